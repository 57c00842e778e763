#ifndef MOED_KERNELS_CUDA_WARP_CUH
#define MOED_KERNELS_CUDA_WARP_CUH

#include <stdint.h>

/* What the 32 lanes of a warp make of a value of each. */

/* All lanes' together: they are halved 16, 8, 4, 2, 1. */
template <class VALUE, class OPERATION>
static __device__ __forceinline__ VALUE warp_reduce(VALUE value, OPERATION operation) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        value = operation(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

/* The sum of integers over this lane and those below. */
template <class VALUE> static __device__ __forceinline__ VALUE warp_scan(VALUE sum, uint32_t lane) {
#pragma unroll
    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        const VALUE below = __shfl_up_sync(0xffffffffu, sum, offset);
        sum += lane >= offset ? below : 0;
    }
    return sum;
}

#endif
