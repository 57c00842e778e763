#ifndef MOED_KERNELS_CUDA_ROUTE_CUH
#define MOED_KERNELS_CUDA_ROUTE_CUH

#include <stdint.h>

#include "kernels/cuda/cuda.h"

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

/* The logits of many rows, of which cuda_norm has made norm.factors: logits.cu. */
cudaError_t route_logits(const struct cuda_route *route, cudaStream_t stream);

#endif
