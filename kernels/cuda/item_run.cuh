#ifndef MOED_KERNELS_CUDA_ITEM_RUN_CUH
#define MOED_KERNELS_CUDA_ITEM_RUN_CUH

#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/warp.cuh"

/* What a job of an item takes, in some unit: weights have to be expanded once, and each eight tokens multiplied. */
static __device__ __forceinline__ uint32_t item_job_cost(uint32_t count) {
    return 3 + (count + 7) / 8;
}

/*
 * Deals the jobs of `count` items, `jobs` of each, to the blocks of a grid in runs that cost the same, to within a job:
 * this block's are begin .. end. Costs of all jobs together are less than 2^32. The whole warp calls it.
 */
static __device__ __forceinline__ void item_run(const cuda_item *items, uint32_t count, uint32_t jobs, int lane,
                                                uint32_t &begin, uint32_t &end) {
    const uint32_t own = (count + 31) / 32, first = lane * own; /* a lane's items lie together */
    uint32_t cost = 0;
#pragma unroll 4
    for (uint32_t i = first; i < first + own; i++)
        cost += i < count ? item_job_cost(items[i].count) : 0;
    const uint32_t through = warp_scan(cost, lane) * jobs, before = through - cost * jobs;
    const uint32_t all = __shfl_sync(0xffffffffu, through, 31), each = all / gridDim.x, more = all % gridDim.x;
    const auto job_at = [&](uint32_t place) {
        const bool here = before <= place && place < through;
        uint32_t job = 0;
        if (here) {
            uint32_t i = first, left = place - before, job_cost;
            while (job_cost = item_job_cost(items[i].count), left >= job_cost * jobs) {
                left -= job_cost * jobs;
                i++;
            }
            job = i * jobs + left / job_cost;
        }
        const uint32_t found = __ballot_sync(0xffffffffu, here);
        return found ? __shfl_sync(0xffffffffu, job, __ffs(found) - 1) : count * jobs;
    };
    const uint32_t from = each * blockIdx.x + min(blockIdx.x, more); /* the first blocks have one more */
    begin = job_at(from);
    end = job_at(from + each + (blockIdx.x < more));
}

#endif
