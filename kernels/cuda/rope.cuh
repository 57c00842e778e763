#ifndef MOED_KERNELS_CUDA_ROPE_CUH
#define MOED_KERNELS_CUDA_ROPE_CUH

#include <stdint.h>

/*
 * RMS norm and NeoX rotation of one head by one warp. The sum of squares: lane l adds dimensions l, l + 32, ... by fma, then
 * lanes are halved 16, 8, 4, 2, 1.
 */

/* x: dimension lane + 32 i in x[i]. */
template <int DIM>
static __device__ __forceinline__ void norm_and_rotate(float x[DIM / 32], const float *weight, const float *cos_sin,
                                                float epsilon, int lane) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        sum = fmaf(x[i], x[i], sum);
    for (int offset = 16; offset; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const float factor = 1.0f / sqrtf(sum / (float)DIM + epsilon);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        x[i] = x[i] * factor * weight[lane + 32 * i];
    if constexpr (DIM % 64 == 0) { /* pairs (d, d + DIM / 2) */
#pragma unroll
        for (int i = 0; i < DIM / 64; i++) {
            const float2 r = *(const float2 *)(cos_sin + 2 * (lane + 32 * i));
            const float a = x[i], b = x[i + DIM / 64];
            x[i] = fmaf(a, r.x, -(b * r.y));
            x[i + DIM / 64] = fmaf(a, r.y, b * r.x);
        }
    } else { /* the partner is in the lane 16 further on */
        float rotated[DIM / 32];
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) {
            const int d = lane + 32 * i, partner = d < DIM / 2 ? d + DIM / 2 : d - DIM / 2;
            float other = 0;
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                const float seen = __shfl_sync(0xffffffffu, x[j], (lane + 16) & 31);
                if (j == partner / 32)
                    other = seen;
            }
            const float2 r = *(const float2 *)(cos_sin + 2 * (d < DIM / 2 ? d : partner));
            rotated[i] = d < DIM / 2 ? fmaf(x[i], r.x, -(other * r.y)) : fmaf(other, r.y, x[i] * r.x);
        }
#pragma unroll
        for (int i = 0; i < DIM / 32; i++)
            x[i] = rotated[i];
    }
}

#endif
