#ifndef MOED_KERNELS_CUDA_ITEM_RUN_CUH
#define MOED_KERNELS_CUDA_ITEM_RUN_CUH

#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/warp.cuh"

/* What a job of an item takes, in some unit: weights have to be expanded once, and each eight tokens multiplied. */
static __device__ __forceinline__ uint32_t item_job_cost(uint32_t count) {
    return 3 + (count + 7) / 8;
}

/* Of 32 items, one a lane: its cost, and those up to it with `before`. */
struct item_costs {
    uint32_t own, through;

    template <class TOKENS>
    __device__ __forceinline__ item_costs(TOKENS tokens, uint32_t count, uint32_t item, uint32_t before, int lane) {
        own = item < count ? item_job_cost(tokens(item)) : 0;
        through = warp_scan(own, lane) + before;
    }
    __device__ __forceinline__ uint32_t last() const {
        return __shfl_sync(0xffffffffu, through, 31);
    }
};

/*
 * Deals the jobs of `count` items, `jobs` of each, to the blocks of a grid in runs that cost the same, to within a job:
 * this block's are begin .. end. tokens(i): those of item i. The whole warp calls it.
 */
template <class TOKENS>
static __device__ __forceinline__ void item_run(TOKENS tokens, uint32_t count, uint32_t jobs, int lane,
                                                uint32_t &begin, uint32_t &end) {
    uint32_t total = 0;
    for (uint32_t first = 0; first < count; first += 32)
        total = item_costs(tokens, count, first + lane, total, lane).last();
    const uint64_t from = (uint64_t)total * jobs * blockIdx.x / gridDim.x,
                   to = (uint64_t)total * jobs * (blockIdx.x + 1) / gridDim.x;
    begin = end = count * jobs;
    uint32_t before = 0;
    for (uint32_t first = 0; first < count; first += 32) {
        const item_costs costs(tokens, count, first + lane, before, lane);
        const uint64_t least = (uint64_t)(costs.through - costs.own) * jobs,
                       limit = (uint64_t)costs.through * jobs;
        const auto job_at = [&](uint64_t cost, uint32_t otherwise) {
            const bool here = least <= cost && cost < limit;
            const uint32_t found = __ballot_sync(0xffffffffu, here);
            const uint32_t job = here ? (first + lane) * jobs + (uint32_t)(cost - least) / costs.own : otherwise;
            return found ? __shfl_sync(0xffffffffu, job, __ffs(found) - 1) : otherwise;
        };
        begin = job_at(from, begin);
        end = job_at(to, end);
        before = costs.last();
    }
}

#endif
