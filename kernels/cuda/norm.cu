/*
 * The sum of the experts' results with the RMS norm, and the rounding to f16 between two matrix products: see cuda_norm
 * and cuda_round in cuda.h; the order of the sum of squares is in norm.cuh.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr int AT_ONCE = 8, ROUND_FOURS = 8;
constexpr uint32_t MANY_ROWS = 512;     /* enough to keep more blocks of fewer warps busy */
constexpr uint32_t ROUND_FEW = 8 * 128; /* rows that blocks of eight warps round all at a time */

__device__ __forceinline__ float4 add_weighted(float weight, float4 y, float4 sum) {
    return make_float4(fmaf(weight, y.x, sum.x), fmaf(weight, y.y, sum.y), fmaf(weight, y.z, sum.z),
                       fmaf(weight, y.w, sum.w));
}

/*
 * value + the experts' results of four columns, `at` being those of the first. The whole block takes part, for its part
 * `part` of each row in turn. Eight results are in flight together: as their weights come by way of shared memory, the
 * compiler cannot wait for one result before it loads the next.
 */
__device__ __forceinline__ float4 add_experts(float4 value, const float4 *experts, uint32_t at, uint32_t stride,
                                              const float *weights, uint32_t used, int part) {
    __shared__ float4 shared[AT_ONCE / 4];
    float4 mixture = make_float4(0, 0, 0, 0);
    uint32_t i = 0;
    if (used >= AT_ONCE) {
        float4 y[AT_ONCE];
        if (part == 0 && threadIdx.x < AT_ONCE)
            ((float *)shared)[threadIdx.x] = weights[threadIdx.x];
#pragma unroll
        for (; i < AT_ONCE; i++, at += stride)
            y[i] = experts[at];
        __syncthreads();
#pragma unroll
        for (int k = 0; k < AT_ONCE / 4; k++) {
            const float4 weight = shared[k];
            mixture = add_weighted(weight.x, y[4 * k], mixture);
            mixture = add_weighted(weight.y, y[4 * k + 1], mixture);
            mixture = add_weighted(weight.z, y[4 * k + 2], mixture);
            mixture = add_weighted(weight.w, y[4 * k + 3], mixture);
        }
    }
#pragma unroll 1
    for (; i < used; i++, at += stride)
        mixture = add_weighted(weights[i], experts[at], mixture);
    return make_float4(value.x + mixture.x, value.y + mixture.y, value.z + mixture.z, value.w + mixture.w);
}

/*
 * One block a row. A thread takes the parts of SHARE of the NORM_THREADS, of up to 4 * FOURS columns each: the more
 * blocks there are at a time, the less of it goes to waiting for each other's warps, if rows are many.
 */
template <int FOURS, int WARPS, bool EXPERTS>
__global__ void __launch_bounds__(WARPS * 32) norm_kernel(const struct cuda_norm n) {
    constexpr int SHARE = NORM_WARPS / WARPS, PARTS = SHARE * FOURS;
    static_assert(SHARE == 1 || !EXPERTS, "parts that add_experts takes");
    __shared__ float sums[NORM_WARPS], maxima[WARPS];
    const uint32_t row = n.select ? n.select[blockIdx.x] : blockIdx.x, fours = n.columns / 4;
    const auto at = [](int part) { return threadIdx.x + part % SHARE * WARPS * 32 + part / SHARE * NORM_THREADS; };
    float4 norm[PARTS], value[PARTS];
    launch_dependents();
#pragma unroll
    for (int k = 0; k < PARTS; k++)
        norm[k] = at(k) < fours ? ((const float4 *)n.norm)[at(k)] : make_float4(0, 0, 0, 0);
    wait_for_predecessor();

    float4 *x = (float4 *)(n.x + (uint64_t)row * n.columns);
    float sum[SHARE] = {}, greatest = 0, shrink;
#pragma unroll
    for (int k = 0; k < PARTS; k++)
        value[k] = at(k) < fours ? x[at(k)] : make_float4(0, 0, 0, 0);
    if (EXPERTS) {
        const float4 *experts = (const float4 *)(n.experts + (uint64_t)row * n.used * n.columns);
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            const float4 result =
                add_experts(value[k], experts, min(at(k), fours - 1), fours, n.weights + row * n.used, n.used, k);
            if (at(k) < fours)
                x[at(k)] = value[k] = result;
        }
    }
#pragma unroll
    for (int k = 0; k < PARTS; k++)
        sum[k % SHARE] = add_squares(value[k], sum[k % SHARE]); /* 0 where there are no columns */
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
        sum[s] = warp_reduce(sum[s], plus);
        if (threadIdx.x % 32 == 0)
            sums[threadIdx.x / 32 + s * WARPS] = sum[s];
    }
    __syncthreads();
    const float factor = norm_factor(join_squares(sums), n.columns, n.epsilon);
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
        value[k] = normed(value[k], factor, norm[k]);
        greatest = greater(greatest, greatest_of(value[k]));
    }
    const float scale = rounding_scale(block_greatest<WARPS>(greatest, maxima), shrink);
    const uint32_t padded = padded_columns(n.columns);
    uint2 *out = (uint2 *)((half *)n.out.half + (uint64_t)blockIdx.x * padded);
#pragma unroll
    for (int k = 0; k < PARTS; k++)
        if (at(k) < padded / 4)
            store_rounded(n.out, out, at(k), rounded(value[k], shrink));
    if (threadIdx.x > 0)
        return;
    n.out.scale[blockIdx.x] = scale;
    if (n.factors)
        n.factors[blockIdx.x] = factor;
}

/* WARPS warps a row, ROWS rows a block. The row stays in registers, as it would not stay in a cache. */
template <int WARPS, int ROWS, int FOURS>
__global__ void __launch_bounds__(WARPS *ROWS * 32)
    round_kernel(const float *x, uint32_t columns, uint32_t rows, const struct cuda_activation out) {
    static_assert(WARPS == 1 || ROWS == 1, "what a block reduces belongs to one row");
    __shared__ float maxima[WARPS];
    const uint32_t row = blockIdx.x * ROWS + threadIdx.x / (WARPS * 32), fours = columns / 4;
    const uint32_t own = threadIdx.x % (WARPS * 32);
    wait_for_predecessor();
    launch_dependents();
    if (row >= rows)
        return;
    const float4 *values = (const float4 *)(x + (uint64_t)row * columns);
    float4 value[FOURS];
    float greatest = 0, shrink;
#pragma unroll
    for (int k = 0; k < FOURS; k++)
        value[k] = own + k * WARPS * 32 < fours ? values[own + k * WARPS * 32] : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < FOURS; k++)
        greatest = greater(greatest, greatest_of(value[k]));
    greatest = WARPS == 1 ? warp_greatest(greatest) : block_greatest<WARPS>(greatest, maxima);
    const float scale = rounding_scale(greatest, shrink);
    const uint32_t padded = padded_columns(columns);
    uint2 *to = (uint2 *)((half *)out.half + (uint64_t)row * padded);
#pragma unroll
    for (int k = 0; k < FOURS; k++)
        if (own + k * WARPS * 32 < padded / 4)
            store_rounded(out, to, own + k * WARPS * 32, rounded(value[k], shrink));
    if (own == 0)
        out.scale[row] = scale;
}

/* The experts' results are bytes enough in flight without more blocks. */
template <int FOURS, int WARPS> cudaError_t launch_norm(const struct cuda_norm *n, cudaStream_t stream) {
    if (n->experts)
        return launch(norm_kernel<FOURS, NORM_WARPS, true>, dim3(n->rows), dim3(NORM_THREADS), 0, stream, *n);
    return launch(norm_kernel<FOURS, WARPS, false>, dim3(n->rows), dim3(WARPS * 32), 0, stream, *n);
}

template <int WARPS, int ROWS, int FOURS = ROUND_FOURS>
cudaError_t launch_round(const float *x, uint32_t columns, uint32_t rows, const struct cuda_activation *out,
                         cudaStream_t stream) {
    return launch(round_kernel<WARPS, ROWS, FOURS>, dim3((rows + ROWS - 1) / ROWS), dim3(WARPS * ROWS * 32), 0, stream,
                  x, columns, rows, *out);
}

} // namespace

cudaError_t cuda_norm(const struct cuda_norm *n, cudaStream_t stream) {
    const bool many = n->rows >= MANY_ROWS;
    if (n->columns <= 4 * NORM_THREADS)
        return many ? launch_norm<1, NORM_WARPS / 4>(n, stream) : launch_norm<1, NORM_WARPS>(n, stream);
    if (n->columns <= 8 * NORM_THREADS)
        return many ? launch_norm<2, NORM_WARPS / 2>(n, stream) : launch_norm<2, NORM_WARPS>(n, stream);
    if (n->columns <= NORM_COLUMNS_MAX)
        return launch_norm<4, NORM_WARPS>(n, stream);
    return cudaErrorInvalidValue;
}

cudaError_t cuda_round(const float *x, uint32_t columns, uint32_t rows, const struct cuda_activation *out,
                       cudaStream_t stream) {
    constexpr uint32_t of_warp = ROUND_FOURS * 4 * 32;
    if (columns <= of_warp && rows <= ROUND_FEW)
        return launch_round<ROUND_FOURS, 1, 1>(x, columns, rows, out, stream);
    if (columns <= of_warp)
        return launch_round<1, 4>(x, columns, rows, out, stream);
    if (columns <= 4 * of_warp)
        return launch_round<4, 1>(x, columns, rows, out, stream);
    if (columns <= 8 * of_warp)
        return launch_round<8, 1>(x, columns, rows, out, stream);
    return cudaErrorInvalidValue;
}
