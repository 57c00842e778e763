#ifndef MOED_KERNELS_CUDA_NORM_CUH
#define MOED_KERNELS_CUDA_NORM_CUH

#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/warp.cuh"

/*
 * Parts of kernels that norm rows or round them to f16. NORM_THREADS share the squares of a row: thread i adds those of
 * columns 4 i .. 4 i + 3, then those 4 NORM_THREADS further on, by fma; lanes are halved 16, 8, 4, 2, 1, then warps are as
 * if they were lanes.
 */
enum { NORM_THREADS = 512, NORM_WARPS = NORM_THREADS / 32, NORM_COLUMNS_MAX = 8192 };

/* As the greater, but a NaN stays: fmaxf would drop it. */
static __device__ __forceinline__ float greater(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

/* The greatest of a warp's values, none of them negative: as their bits are in order, and those of a NaN above. */
static __device__ __forceinline__ float warp_greatest(float value) {
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(value)));
}

/* That of a block's WARPS, a power of two; `shared` has a float for each, and must not be in use. */
template <int WARPS> static __device__ __forceinline__ float block_greatest(float value, float *shared) {
    value = warp_greatest(value);
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_greatest(shared[threadIdx.x % WARPS]);
}

static __device__ __forceinline__ float plus(float a, float b) {
    return a + b;
}

static __device__ __forceinline__ float greatest_of(float4 v) {
    return greater(greater(fabsf(v.x), fabsf(v.y)), greater(fabsf(v.z), fabsf(v.w)));
}

static __device__ __forceinline__ float add_squares(float4 v, float sum) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

/* The squares of a row, of which `sums` has those of the NORM_WARPS; each eight lanes may ask for another row's. */
static __device__ __forceinline__ float join_squares(const float *sums) {
    const float *own = sums + threadIdx.x % 8;
    float squares = own[0] + own[8];
#pragma unroll
    for (int offset = 4; offset; offset /= 2)
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    return squares;
}

static __device__ __forceinline__ float norm_factor(float squares, uint32_t columns, float epsilon) {
    return 1.0f / sqrtf(squares / (float)columns + epsilon);
}

static __device__ __forceinline__ float4 normed(float4 v, float factor, float4 norm) {
    return make_float4(v.x * factor * norm.x, v.y * factor * norm.y, v.z * factor * norm.z, v.w * factor * norm.w);
}

/* The scale of a row of cuda_activation, and 1 / scale in `shrink`, from its greatest absolute value. */
static __device__ __forceinline__ float rounding_scale(float greatest, float &shrink) {
    const int exponent = greatest > 0 ? (int)(__float_as_uint(greatest) >> 23) - 126 : 0; /* greatest < 2^exponent */
    const int clamped = max(exponent, -100); /* so that both powers are normal numbers */
    shrink = __uint_as_float((uint32_t)(127 + 8 - clamped) << 23);
    return greatest <= 3.4e38f ? __uint_as_float((uint32_t)(127 + clamped - 8) << 23) : NAN;
}

static __device__ __forceinline__ uint2 rounded(float4 v, float shrink) {
    const half2 low = __floats2half2_rn(v.x * shrink, v.y * shrink),
                high = __floats2half2_rn(v.z * shrink, v.w * shrink);
    return make_uint2(*reinterpret_cast<const uint32_t *>(&low), *reinterpret_cast<const uint32_t *>(&high));
}

/*
 * A warp's lanes hold four columns each, of consecutive fours from a multiple of 32 on: what stands in the lane's place
 * once every 32 columns are interleaved (cuda_activation).
 */
static __device__ __forceinline__ uint2 interleaved(uint2 four) {
    const uint32_t lane = threadIdx.x % 32, n = lane % 8 / 2, from = lane / 8 * 8 + lane % 2 * 4 + n / 2;
    const uint32_t x0 = __shfl_sync(0xffffffffu, four.x, from), y0 = __shfl_sync(0xffffffffu, four.y, from);
    const uint32_t x1 = __shfl_sync(0xffffffffu, four.x, from + 2), y1 = __shfl_sync(0xffffffffu, four.y, from + 2);
    return n % 2 ? make_uint2(y0, y1) : make_uint2(x0, x1);
}

/* Four i of a row of `out` gets what is rounded; a warp does so as a whole, as for interleaved(). */
static __device__ __forceinline__ void store_rounded(const cuda_activation &out, uint2 *row, uint32_t i, uint2 four) {
    row[i] = out.interleaved ? interleaved(four) : four;
}

/* cuda_round of a row of up to ROUND_FEW_COLUMNS, by a warp, which has `chunks` of it written; returns the scale. */
enum { ROUND_FEW_COLUMNS = 1024 };
static __device__ __forceinline__ float round_few(const float4 *values, uint32_t fours, uint32_t chunks, uint2 *to,
                                                  uint32_t lane) {
    constexpr int OWN = ROUND_FEW_COLUMNS / 4 / 32;
    float4 value[OWN];
    float greatest = 0, shrink;
#pragma unroll
    for (int k = 0; k < OWN; k++)
        value[k] = lane + 32 * k < fours ? values[lane + 32 * k] : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < OWN; k++)
        greatest = greater(greatest, greatest_of(value[k]));
    const float scale = rounding_scale(warp_greatest(greatest), shrink);
#pragma unroll
    for (int k = 0; k < OWN; k++)
        if (lane + 32 * k < CUDA_CHUNK / 4 * chunks)
            to[lane + 32 * k] = rounded(value[k], shrink);
    return scale;
}

static __host__ __device__ __forceinline__ uint32_t padded_columns(uint32_t columns) {
    return (columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
}

#endif
