/*
 * The sum of the experts' results with the RMS norm, and the rounding to f16 between two matrix products: see cuda_norm
 * and cuda_round in cuda.h; the order of the sum of squares is in norm.cuh.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr int AT_ONCE = 8, ROUND_WARPS = 4;

/* value + the experts' results of four columns, `experts` being those of the first. */
__device__ __forceinline__ float4 add_experts(float4 value, const float4 *experts, uint32_t stride,
                                              const float *weights, uint32_t used) {
    float4 mixture = make_float4(0, 0, 0, 0);
    for (uint32_t first = 0; first < used; first += AT_ONCE) {
        float4 y[AT_ONCE];
        float weight[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i < used) {
                y[i] = experts[(uint64_t)(first + i) * stride];
                weight[i] = weights[first + i];
            }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i < used) {
                mixture.x = fmaf(weight[i], y[i].x, mixture.x);
                mixture.y = fmaf(weight[i], y[i].y, mixture.y);
                mixture.z = fmaf(weight[i], y[i].z, mixture.z);
                mixture.w = fmaf(weight[i], y[i].w, mixture.w);
            }
    }
    return make_float4(value.x + mixture.x, value.y + mixture.y, value.z + mixture.z, value.w + mixture.w);
}

/* One block a row, a thread holds up to 4 * FOURS of its columns. */
template <int FOURS> __global__ void __launch_bounds__(NORM_THREADS) norm_kernel(const struct cuda_norm n) {
    __shared__ float sums[NORM_WARPS], maxima[NORM_WARPS];
    const uint32_t row = n.select ? n.select[blockIdx.x] : blockIdx.x, fours = n.columns / 4;
    float4 norm[FOURS], value[FOURS];
    launch_dependents();
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const uint32_t i = threadIdx.x + k * NORM_THREADS;
        norm[k] = i < fours ? ((const float4 *)n.norm)[i] : make_float4(0, 0, 0, 0);
    }
    wait_for_predecessor();

    float4 *x = (float4 *)(n.x + (uint64_t)row * n.columns);
    float sum = 0, greatest = 0, shrink;
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const uint32_t i = threadIdx.x + k * NORM_THREADS;
        value[k] = make_float4(0, 0, 0, 0);
        if (i >= fours)
            continue;
        value[k] = x[i];
        if (n.experts) {
            const float4 *experts = (const float4 *)(n.experts + (uint64_t)row * n.used * n.columns) + i;
            value[k] = add_experts(value[k], experts, fours, n.weights + row * n.used, n.used);
            x[i] = value[k];
        }
        sum = add_squares(value[k], sum);
    }
    const float factor = norm_factor(block_reduce(sum, plus, sums), n.columns, n.epsilon);
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const uint32_t i = threadIdx.x + k * NORM_THREADS;
        value[k] = normed(value[k], factor, norm[k]);
        greatest = greater(greatest, greatest_of(value[k]));
        if (n.plain && i < fours)
            ((float4 *)(n.plain + (uint64_t)blockIdx.x * n.columns))[i] = value[k];
    }
    const float scale = rounding_scale(block_reduce(greatest, greater, maxima), shrink);
    const uint32_t padded = padded_columns(n.columns);
    uint2 *out = (uint2 *)((half *)n.out.half + (uint64_t)blockIdx.x * padded);
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const uint32_t i = threadIdx.x + k * NORM_THREADS;
        if (i < padded / 4)
            out[i] = i < fours ? rounded(value[k], shrink) : make_uint2(0, 0);
    }
    if (threadIdx.x == 0)
        n.out.scale[blockIdx.x] = scale;
}

/* One warp a row. */
__global__ void __launch_bounds__(ROUND_WARPS * 32)
    round_kernel(const float *x, uint32_t columns, uint32_t rows, const struct cuda_activation out) {
    const uint32_t row = blockIdx.x * ROUND_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, fours = columns / 4;
    wait_for_predecessor();
    launch_dependents();
    if (row >= rows)
        return;
    const float4 *values = (const float4 *)(x + (uint64_t)row * columns);
    float greatest = 0, shrink;
#pragma unroll 8
    for (uint32_t i = lane; i < fours; i += 32)
        greatest = greater(greatest, greatest_of(values[i]));
    const float scale = rounding_scale(warp_reduce(greatest, greater), shrink);
    const uint32_t padded = padded_columns(columns);
    uint2 *to = (uint2 *)((half *)out.half + (uint64_t)row * padded);
#pragma unroll 8
    for (uint32_t i = lane; i < padded / 4; i += 32)
        to[i] = i < fours ? rounded(values[i], shrink) : make_uint2(0, 0);
    if (lane == 0)
        out.scale[row] = scale;
}

} // namespace

cudaError_t cuda_norm(const struct cuda_norm *n, cudaStream_t stream) {
    const dim3 grid(n->rows), block(NORM_THREADS);
    if (n->columns <= 4 * NORM_THREADS)
        return launch(norm_kernel<1>, grid, block, 0, stream, *n);
    if (n->columns <= 8 * NORM_THREADS)
        return launch(norm_kernel<2>, grid, block, 0, stream, *n);
    if (n->columns <= NORM_COLUMNS_MAX)
        return launch(norm_kernel<4>, grid, block, 0, stream, *n);
    return cudaErrorInvalidValue;
}

cudaError_t cuda_round(const float *x, uint32_t columns, uint32_t rows, const struct cuda_activation *out,
                       cudaStream_t stream) {
    return launch(round_kernel, dim3((rows + ROUND_WARPS - 1) / ROUND_WARPS), dim3(ROUND_WARPS * 32), 0, stream, x,
                  columns, rows, *out);
}
