#ifndef MOED_KERNELS_CUDA_ROUTE_CUH
#define MOED_KERNELS_CUDA_ROUTE_CUH

#include <math.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/norm.cuh"

/*
 * What the kernels of the router's logits share. A logit, by one warp: lane l adds the products of columns 4 l .. 4 l + 3,
 * 4 l + 128, ... by fma; lanes l < 8 add to that the sums of lanes l + 8, l + 16 and l + 24 in turn, and are halved 4, 2, 1.
 */

static __device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/* The logit of what the lanes have added up, in lane 0. */
static __device__ __forceinline__ float route_sum(float sum) {
    const float second = __shfl_down_sync(0xffffffffu, sum, 8), third = __shfl_down_sync(0xffffffffu, sum, 16),
                fourth = __shfl_down_sync(0xffffffffu, sum, 24);
    sum = ((sum + second) + third) + fourth;
#pragma unroll
    for (int offset = 4; offset; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

/* Orders floats as integers; NaN below everything, so that it is chosen last. 0: taken, or not there. */
static __device__ __forceinline__ uint32_t route_key(float value) {
    const int bits = __float_as_int(value);
    return value != value ? 1 : (uint32_t)(bits ^ (bits >> 31 | INT32_MIN));
}

static __device__ __forceinline__ float route_key_value(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* What lane i < used of a warp knows once experts are chosen. */
struct route_choice {
    uint32_t key; /* of rank i's logit */
    bool finite;  /* all logits */
};

static __device__ __forceinline__ void exchange(uint32_t &a, uint32_t &b) {
    const uint32_t before = a;
    a = b;
    b = before;
}

/*
 * One warp chooses the experts of a row, of at most 32 * PER_LANE: `used` times the greatest of what is left. chosen[i],
 * in shared memory, gets the expert of rank i.
 */
template <int PER_LANE>
static __device__ __forceinline__ route_choice route_choose(const float *logits, uint32_t experts, uint32_t used,
                                                            uint32_t lane, uint32_t *chosen) {
    const uint32_t own = lane * PER_LANE;
    float logit[PER_LANE], greatest = 0;
    uint32_t keys[PER_LANE]; /* of neighbours: of equal ones the lowest lane has the lowest id */
    logits += own;
#pragma unroll
    for (uint32_t i = 0; i < PER_LANE; i++)
        logit[i] = own + i < experts ? logits[i] : 0;
#pragma unroll
    for (uint32_t i = 0; i < PER_LANE; i++) {
        greatest = greater(greatest, fabsf(logit[i]));
        keys[i] = own + i < experts ? route_key(logit[i]) : 0;
    }
    route_choice choice = {0, __all_sync(0xffffffffu, greatest <= 3.4e38f) != 0};
    constexpr bool sorted = PER_LANE <= 8; /* a lane has its own in order, and only the first has to be looked at */
    uint32_t ids[PER_LANE];
#pragma unroll
    for (uint32_t i = 0; i < PER_LANE; i++)
        ids[i] = i;
    if (sorted)
#pragma unroll
        for (int i = 1; i < PER_LANE; i++)
#pragma unroll
            for (int j = i; j > 0; j--)
                if (keys[j] > keys[j - 1]) {
                    exchange(keys[j], keys[j - 1]);
                    exchange(ids[j], ids[j - 1]);
                }
#pragma unroll 1
    for (uint32_t rank = 0; rank < used; rank++) {
        uint32_t best = keys[0], at = ids[0];
#pragma unroll
        for (int i = 1; i < PER_LANE && !sorted; i++)
            if (keys[i] > best) {
                best = keys[i];
                at = i;
            }
        const uint32_t top = __reduce_max_sync(0xffffffffu, best);
        const uint32_t equal = __ballot_sync(0xffffffffu, best == top);
        const bool won = best == top && (equal & ((1u << lane) - 1)) == 0;
#pragma unroll
        for (uint32_t i = 0; i < PER_LANE; i++)
            if (sorted && won) {
                keys[i] = i + 1 < PER_LANE ? keys[i + 1] : 0;
                ids[i] = i + 1 < PER_LANE ? ids[i + 1] : 0;
            } else if (won && i == at) {
                keys[i] = 0;
            }
        if (won)
            chosen[rank] = own + at;
        if (lane == rank)
            choice.key = top;
    }
    __syncwarp();
    return choice;
}

/*
 * The weight of lane i's expert; NaN where a logit was not finite. Softmax over the chosen equals renormalizing the whole
 * one.
 */
static __device__ __forceinline__ float route_weight(route_choice choice, uint32_t used, uint32_t lane) {
    const float value = route_key_value(choice.key), first = __shfl_sync(0xffffffffu, value, 0);
    const float mine = lane < used ? expf(value - first) : 0;
    float total = 0; /* rank by rank; those that there are not add 0 */
#pragma unroll 1
    for (uint32_t rank = 0; rank < used; rank += 8)
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            total += __shfl_sync(0xffffffffu, mine, rank + i);
    return choice.finite ? mine / total : NAN;
}

/* The logits of many rows, of which cuda_norm has made norm.factors: logits.cu. */
cudaError_t route_logits(const struct cuda_route *route, cudaStream_t stream);

#endif
