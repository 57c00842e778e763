#ifndef MOED_KERNELS_CUDA_ROPE_CUH
#define MOED_KERNELS_CUDA_ROPE_CUH

#include <math.h>
#include <stdint.h>

/*
 * RMS norm and NeoX rotation of one head by one warp. The sum of squares: lane l adds dimensions l, l + 32, ... by fma, then
 * lanes are halved 16, 8, 4, 2, 1.
 */

/* What queries are multiplied by last, for a softmax in powers of two. */
static inline float rope_query_scale(uint32_t head_dim) {
    const float log2_e = 1.44269504f;
    return log2_e / sqrtf((float)head_dim);
}

/*
 * x: of ROWS rows' heads dimension lane + 32 i in x[row][i]; cos_sin: of each row's position. The rows go side by side, so
 * that they wait for memory and for each other's lanes together.
 */
template <int DIM, int ROWS>
static __device__ __forceinline__ void norm_and_rotate(float (&x)[ROWS][DIM / 32], const float *weight,
                                                       const float *const (&cos_sin)[ROWS], float epsilon, int lane) {
    constexpr bool PAIRED = DIM % 64 == 0; /* pairs (d, d + DIM / 2) are in one lane, else in lanes 16 apart */
    constexpr int OWN = DIM / 32, TURNS = PAIRED ? OWN / 2 : OWN;
    float2 turn[ROWS][TURNS];
    float sum[ROWS] = {};
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int i = 0; i < TURNS; i++)
            turn[j][i] = ((const float2 *)cos_sin[j])[PAIRED ? lane + 32 * i : (lane + 32 * i) % (DIM / 2)];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int i = 0; i < OWN; i++)
            sum[j] = fmaf(x[j][i], x[j][i], sum[j]);
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const float factor = 1.0f / sqrtf(sum[j] / (float)DIM + epsilon);
#pragma unroll
        for (int i = 0; i < OWN; i++)
            x[j][i] = x[j][i] * factor * weight[lane + 32 * i];
    }
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        if constexpr (PAIRED) {
#pragma unroll
            for (int i = 0; i < TURNS; i++) {
                const float2 r = turn[j][i];
                const float a = x[j][i], b = x[j][i + TURNS];
                x[j][i] = fmaf(a, r.x, -(b * r.y));
                x[j][i + TURNS] = fmaf(a, r.y, b * r.x);
            }
        } else {
            float rotated[OWN];
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int d = lane + 32 * i, partner = d < DIM / 2 ? d + DIM / 2 : d - DIM / 2;
                float other = 0;
#pragma unroll
                for (int k = 0; k < OWN; k++) {
                    const float seen = __shfl_sync(0xffffffffu, x[j][k], (lane + 16) & 31);
                    if (k == partner / 32)
                        other = seen;
                }
                const float2 r = turn[j][i];
                rotated[i] = d < DIM / 2 ? fmaf(x[j][i], r.x, -(other * r.y)) : fmaf(other, r.y, x[j][i] * r.x);
            }
#pragma unroll
            for (int i = 0; i < OWN; i++)
                x[j][i] = rotated[i];
        }
    }
}

/* One row. */
template <int DIM>
static __device__ __forceinline__ void norm_and_rotate(float x[DIM / 32], const float *weight, const float *cos_sin,
                                                       float epsilon, int lane) {
    float rows[1][DIM / 32];
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        rows[0][i] = x[i];
    norm_and_rotate<DIM, 1>(rows, weight, {cos_sin}, epsilon, lane);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        x[i] = rows[0][i];
}

#endif
