#ifndef MOED_KERNELS_CUDA_ROUTE_CUH
#define MOED_KERNELS_CUDA_ROUTE_CUH

#include <math.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

/*
 * The router's arithmetic on one row, by one warp. A logit: lane l adds the products of columns 4 l .. 4 l + 3, 4 l + 128,
 * ... by fma; lanes l < 8 add to that the sums of lanes l + 8, l + 16 and l + 24 in turn, and are halved 4, 2, 1.
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
static __device__ __forceinline__ uint32_t order_key(float value) {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? 1 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float key_value(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/*
 * One warp, one row of at most 32 * PER_LANE experts: `used` times the greatest of what is left. Softmax over the
 * chosen equals renormalizing the whole one. Lane i < used gets the expert of rank i and its weight.
 */
template <int PER_LANE>
static __device__ __forceinline__ void route_select(const float *logits, uint32_t experts, uint32_t used, uint32_t lane,
                                                    uint32_t &chosen, float &chosen_weight) {
    uint32_t keys[PER_LANE];
    bool nan = false;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const uint32_t e = lane + 32 * i;
        keys[i] = 0;
        if (e < experts) {
            const float logit = logits[e];
            nan = nan || !(fabsf(logit) <= 3.4e38f);
            keys[i] = order_key(logit);
        }
    }
    nan = __any_sync(0xffffffffu, nan);
    uint32_t own_top = 0;
    for (uint32_t rank = 0; rank < used; rank++) {
        uint32_t best = 0, at = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (keys[i] > best) {
                best = keys[i];
                at = lane + 32 * i;
            }
        const uint32_t top = __reduce_max_sync(0xffffffffu, best);
        const uint32_t expert = __reduce_min_sync(0xffffffffu, best == top ? at : UINT32_MAX);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i == expert)
                keys[i] = 0;
        if (lane == rank) {
            own_top = top;
            chosen = expert;
        }
    }
    const float logit = key_value(own_top), mine = expf(logit - __shfl_sync(0xffffffffu, logit, 0));
    float total = 0;
    for (uint32_t rank = 0; rank < used; rank++)
        total += __shfl_sync(0xffffffffu, mine, rank);
    chosen_weight = nan ? NAN : mine / total;
}

/* The logits of many rows, of which cuda_norm has made norm.factors: logits.cu. */
cudaError_t route_logits(const struct cuda_route *route, cudaStream_t stream);

#endif
