/*
 * The router with the norm before it: logits, the likeliest experts of each row with their weights, and the assignments
 * sorted by expert. See cuda_route in cuda.h. A logit: lane l of a warp adds columns 4 l .. 4 l + 3, 4 l + 128, ... by
 * fma, lanes are halved. Few rows take two kernels, of which the first norms rows wherever their logits are wanted;
 * many take one for each of the four steps. Either way does the same operations on a row.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"

namespace {

constexpr int LOGIT_WARPS = 8, LOGIT_ROWS = 4, SELECT_WARPS = 4, SORT_THREADS = 1024;
constexpr uint32_t FEW_ROWS = 16, FEW_EXPERTS = 4, FEW_FLOATS = 8192; /* the latter two of one block of few_kernel */

/* Norm and logits of ROWS rows and FEW_EXPERTS experts, a warp a logit; the last block rounds the rows. */
template <int ROWS> __global__ void __launch_bounds__(NORM_THREADS) few_kernel(const struct cuda_route r) {
    constexpr int AHEAD = 16; /* float4 of the router that a lane fetches before there is anything to multiply */
    static_assert(FEW_EXPERTS * 4 == NORM_WARPS, "a warp a logit");
    extern __shared__ float4 x[]; /* [ROWS][fours] */
    __shared__ float sums[ROWS][NORM_WARPS], maxima[NORM_WARPS];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, fours = r.norm.columns / 4;
    const uint32_t first = blockIdx.y * ROWS, rows = min(r.norm.rows - first, (uint32_t)ROWS);
    const uint32_t expert = blockIdx.x * FEW_EXPERTS + warp % FEW_EXPERTS, own = warp / FEW_EXPERTS;
    const bool busy = expert < r.experts && own < rows;
    const float4 *router = (const float4 *)r.router + (uint64_t)expert * fours;
    float4 ahead[AHEAD];
    launch_dependents();
    if (busy) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (lane + 32 * k < fours)
                ahead[k] = router[lane + 32 * k];
    }
    wait_for_predecessor();

    float sum[ROWS] = {};
    for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS) {
        float4 value[ROWS];
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            value[j] = j < (int)rows ? ((const float4 *)(r.norm.x + (uint64_t)(first + j) * r.norm.columns))[i]
                                     : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            x[j * fours + i] = value[j];
            sum[j] = add_squares(value[j], sum[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        sum[j] = warp_reduce(sum[j], plus);
        if (lane == 0)
            sums[j][warp] = sum[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const float factor = norm_factor(join_warps(sums[j], plus), r.norm.columns, r.norm.epsilon);
        for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS)
            x[j * fours + i] = normed(x[j * fours + i], factor, ((const float4 *)r.norm.norm)[i]);
    }
    __syncthreads();

    if (busy) {
        const float4 *values = x + own * fours;
        float logit = 0;
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (lane + 32 * k < fours)
                logit = dot4(ahead[k], values[lane + 32 * k], logit);
        for (uint32_t i = lane + 32 * AHEAD; i < fours; i += 32)
            logit = dot4(router[i], values[i], logit);
        logit = warp_reduce(logit, plus);
        if (lane == 0)
            r.logits[(uint64_t)(first + own) * r.experts + expert] = logit;
    }
    if (blockIdx.x + 1 < gridDim.x)
        return;
    for (uint32_t j = 0; j < rows; j++) {
        float greatest = 0, shrink;
        for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS)
            greatest = greater(greatest, greatest_of(x[j * fours + i]));
        const float scale = rounding_scale(block_reduce(greatest, greater, maxima), shrink);
        const uint32_t padded = padded_columns(r.norm.columns);
        uint2 *out = (uint2 *)((half *)r.norm.out.half + (uint64_t)(first + j) * padded);
        for (uint32_t i = threadIdx.x; i < padded / 4; i += NORM_THREADS)
            out[i] = i < fours ? rounded(x[j * fours + i], shrink) : make_uint2(0, 0);
        if (threadIdx.x == 0)
            r.norm.out.scale[first + j] = scale;
        __syncthreads();
    }
}

/* One warp: one expert, LOGIT_ROWS rows of norm.plain. */
__global__ void __launch_bounds__(LOGIT_WARPS * 32) logits_kernel(const struct cuda_route r) {
    const uint32_t expert = blockIdx.x * LOGIT_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = blockIdx.y * LOGIT_ROWS, fours = r.norm.columns / 4;
    launch_dependents();
    wait_for_predecessor();
    if (expert >= r.experts)
        return;
    const float4 *w = (const float4 *)r.router + (uint64_t)expert * fours;
    const float4 *x[LOGIT_ROWS];
#pragma unroll
    for (int j = 0; j < LOGIT_ROWS; j++) /* rows behind the last repeat it */
        x[j] = (const float4 *)r.norm.plain + (uint64_t)min(first + j, r.norm.rows - 1) * fours;
    float sums[LOGIT_ROWS] = {};
#pragma unroll 4
    for (uint32_t i = lane; i < fours; i += 32) {
        const float4 a = w[i];
#pragma unroll
        for (int j = 0; j < LOGIT_ROWS; j++)
            sums[j] = dot4(a, x[j][i], sums[j]);
    }
#pragma unroll
    for (int j = 0; j < LOGIT_ROWS; j++) {
        const float sum = warp_reduce(sums[j], plus);
        if (lane == 0 && first + j < r.norm.rows)
            r.logits[(uint64_t)(first + j) * r.experts + expert] = sum;
    }
}

/* One warp chooses the experts of a row; `chosen` gets a second copy of them where given. */
template <int PER_LANE>
__device__ __forceinline__ void select_row(const struct cuda_route &r, uint32_t row, uint32_t lane, uint32_t *chosen) {
    uint32_t expert = 0;
    float weight;
    route_select<PER_LANE>(r.logits + (uint64_t)row * r.experts, r.experts, r.used, lane, expert, weight);
    if (lane >= r.used)
        return;
    r.chosen[row * r.used + lane] = expert;
    r.weights[row * r.used + lane] = weight;
    if (chosen)
        chosen[row * r.used + lane] = expert;
}

template <int PER_LANE> __global__ void __launch_bounds__(SELECT_WARPS * 32) select_kernel(const struct cuda_route r) {
    const uint32_t row = blockIdx.x * SELECT_WARPS + threadIdx.x / 32;
    launch_dependents();
    wait_for_predecessor();
    if (row < r.norm.rows)
        select_row<PER_LANE>(r, row, threadIdx.x % 32, NULL);
}

/* One block: counts per expert, their places, the assignments in them, and the items. */
__device__ __forceinline__ void sort_assignments(const struct cuda_route &r, const uint32_t *chosen) {
    __shared__ uint32_t counts[CUDA_EXPERTS_MAX];
    __shared__ uint64_t warps[SORT_THREADS / 32];
    const uint32_t i = threadIdx.x, lane = i % 32, assignments = r.norm.rows * r.used;
    counts[i] = 0;
    __syncthreads();
    for (uint32_t a = i; a < assignments; a += SORT_THREADS)
        atomicAdd(&counts[chosen[a]], 1);
    __syncthreads();
    const uint32_t count = counts[i], pieces = (count + r.item_tokens - 1) / r.item_tokens;
    uint64_t sum = (uint64_t)count << 32 | pieces; /* of both over the experts up to this thread's */
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t before = __shfl_up_sync(0xffffffffu, sum, offset);
        sum += lane >= (uint32_t)offset ? before : 0;
    }
    if (lane == 31)
        warps[i / 32] = sum;
    __syncthreads();
    uint64_t below = lane < i / 32 ? warps[lane] : 0;
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        below += __shfl_xor_sync(0xffffffffu, below, offset);
    sum += below;
    const uint32_t start = (uint32_t)(sum >> 32) - count, first_item = (uint32_t)sum - pieces;
    for (uint32_t j = 0; j < pieces; j++)
        r.items[first_item + j] = {i, start + j * r.item_tokens, min(r.item_tokens, count - j * r.item_tokens)};
    if (i == SORT_THREADS - 1)
        *r.item_count = (uint32_t)sum;
    counts[i] = start;
    __syncthreads();
    /* Where in its expert's list an assignment stands is left to chance: no result depends on it. */
    for (uint32_t a = i; a < assignments; a += SORT_THREADS)
        r.order[atomicAdd(&counts[chosen[a]], 1)] = a;
}

__global__ void __launch_bounds__(SORT_THREADS) sort_kernel(const struct cuda_route r) {
    launch_dependents();
    wait_for_predecessor();
    sort_assignments(r, r.chosen);
}

template <int PER_LANE> __global__ void __launch_bounds__(SORT_THREADS) select_sort_kernel(const struct cuda_route r) {
    __shared__ uint32_t chosen[FEW_ROWS * CUDA_EXPERTS_USED_MAX];
    launch_dependents();
    wait_for_predecessor();
    for (uint32_t row = threadIdx.x / 32; row < r.norm.rows; row += SORT_THREADS / 32)
        select_row<PER_LANE>(r, row, threadIdx.x % 32, chosen);
    sort_assignments(r, chosen);
}

static_assert(SORT_THREADS == CUDA_EXPERTS_MAX, "one thread an expert");

template <int ROWS> cudaError_t launch_few(const struct cuda_route *r, cudaStream_t stream) {
    const dim3 grid((r->experts + FEW_EXPERTS - 1) / FEW_EXPERTS + 1, (r->norm.rows + ROWS - 1) / ROWS);
    return launch(few_kernel<ROWS>, grid, dim3(NORM_THREADS), ROWS * r->norm.columns * sizeof(float), stream, *r);
}

template <int PER_LANE> cudaError_t route_few(const struct cuda_route *r, cudaStream_t stream) {
    const uint32_t most = FEW_FLOATS / r->norm.columns;
    cudaError_t error = r->norm.rows == 1 || most < 2   ? launch_few<1>(r, stream)
                        : r->norm.rows == 2 || most < 4 ? launch_few<2>(r, stream)
                                                        : launch_few<4>(r, stream);
    return error ? error : launch(select_sort_kernel<PER_LANE>, dim3(1), dim3(SORT_THREADS), 0, stream, *r);
}

template <int PER_LANE> cudaError_t route_many(const struct cuda_route *r, cudaStream_t stream) {
    const uint32_t rows = r->norm.rows;
    cudaError_t error = cuda_norm(&r->norm, stream);
    if (error == cudaSuccess)
        error = launch(logits_kernel,
                       dim3((r->experts + LOGIT_WARPS - 1) / LOGIT_WARPS, (rows + LOGIT_ROWS - 1) / LOGIT_ROWS),
                       dim3(LOGIT_WARPS * 32), 0, stream, *r);
    if (error == cudaSuccess)
        error = launch(select_kernel<PER_LANE>, dim3((rows + SELECT_WARPS - 1) / SELECT_WARPS),
                       dim3(SELECT_WARPS * 32), 0, stream, *r);
    return error ? error : launch(sort_kernel, dim3(1), dim3(SORT_THREADS), 0, stream, *r);
}

template <int PER_LANE> cudaError_t route(const struct cuda_route *r, cudaStream_t stream) {
    const bool few = r->norm.rows <= FEW_ROWS && r->norm.columns <= FEW_FLOATS;
    return few ? route_few<PER_LANE>(r, stream) : route_many<PER_LANE>(r, stream);
}

} // namespace

uint32_t cuda_route_item_limit(uint32_t rows, uint32_t experts, uint32_t used, uint32_t item_tokens) {
    const uint64_t assignments = (uint64_t)rows * used, split = assignments / item_tokens + experts;
    return (uint32_t)(assignments < split ? assignments : split);
}

cudaError_t cuda_route(const struct cuda_route *r, cudaStream_t stream) {
    return r->experts <= 128   ? route<4>(r, stream)
           : r->experts <= 256 ? route<8>(r, stream)
                               : route<CUDA_EXPERTS_MAX / 32>(r, stream);
}
