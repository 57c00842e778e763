/*
 * The router with the norm before it: logits, the likeliest experts of each row with their weights, and the assignments
 * sorted by expert. See cuda_route in cuda.h, and route.cuh for the order of a logit's sum. Up to SOME_ROWS rows are
 * normed by every block that wants logits of them; more are normed once, and their logits made by logits.cu. Up to
 * SORTED_ROWS rows are chosen for and sorted by one block; with more, each block of the choice counts its own, from
 * which a block of the sort knows the places of those. Any way does the same operations on a row.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/warp.cuh"

namespace {

constexpr int SELECT_WARPS = 8, SORT_THREADS = 1024;
constexpr uint32_t SOME_ROWS = 128, SORTED_ROWS = 32, SELECT_ROWS = 8;
constexpr uint32_t FEW_EXPERTS = 2;     /* of a block, for one or two rows */
constexpr uint32_t KEPT_FLOATS = 32768; /* of rows that a block keeps, at most */

/*
 * x[ROWS][fours] in shared memory = the rows of the norm from `first` on, normed; norm_ahead: the thread's first four
 * weights. What the block fetches by cp.async has come afterwards.
 */
template <int ROWS>
__device__ __forceinline__ void norm_rows(const struct cuda_norm &n, uint32_t first, uint32_t rows, float4 norm_ahead,
                                          float4 *x) {
    constexpr int TOGETHER = ROWS < 4 ? ROWS : 4; /* rows whose factors eight lanes each make */
    __shared__ float sums[ROWS][NORM_WARPS];
    const uint32_t lane = threadIdx.x % 32, fours = n.columns / 4;
    float sum[ROWS] = {};
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS) {
        float4 value[ROWS];
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            value[j] = j < (int)rows ? ((const float4 *)(n.x + (uint64_t)(first + j) * n.columns))[i]
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
            sums[j][threadIdx.x / 32] = sum[j];
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ROWS; j += TOGETHER) {
        const float factors = norm_factor(join_squares(sums[j + lane / 8 % TOGETHER]), n.columns, n.epsilon);
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const float factor = ROWS == 1 ? factors : __shfl_sync(0xffffffffu, factors, 8 * k);
            float4 *row = x + (j + k) * fours;
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS)
                row[i] = normed(row[i], factor, i == threadIdx.x ? norm_ahead : ((const float4 *)n.norm)[i]);
        }
    }
    __syncthreads();
}

/* The last block along x rounds the first of the rows that norm_rows has made, the blocks before it the others. */
__device__ __forceinline__ void round_rows(const struct cuda_norm &n, uint32_t first, uint32_t rows, const float4 *x) {
    __shared__ float maxima[NORM_WARPS];
    const uint32_t fours = n.columns / 4, padded = padded_columns(n.columns);
#pragma unroll 1
    for (uint32_t j = gridDim.x - 1 - blockIdx.x; j < rows; j += gridDim.x) {
        const float4 *row = x + j * fours;
        float greatest = 0, shrink;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS)
            greatest = greater(greatest, greatest_of(row[i]));
        const float scale = rounding_scale(block_greatest<NORM_WARPS>(greatest, maxima), shrink);
        uint2 *out = (uint2 *)((half *)n.out.half + (uint64_t)(first + j) * padded);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < padded / 4; i += NORM_THREADS)
            store_rounded(n.out, out, i, i < fours ? rounded(row[i], shrink) : make_uint2(0, 0));
        if (threadIdx.x == 0)
            n.out.scale[first + j] = scale;
        __syncthreads();
    }
}

__device__ __forceinline__ float4 own_norm(const struct cuda_norm &n) {
    return ((const float4 *)n.norm)[min(threadIdx.x, n.columns / 4 - 1)];
}

/*
 * Norm and logits of a step of ROWS rows: FEW_EXPERTS experts a block, a logit a warp. Such a step waits for its code
 * more than for anything else, so there is little of it: the router comes by way of shared memory, not in registers.
 */
template <int ROWS> __global__ void __launch_bounds__(NORM_THREADS) few_kernel(const struct cuda_route r) {
    static_assert(ROWS * FEW_EXPERTS <= NORM_WARPS, "a warp a logit");
    extern __shared__ float4 x[]; /* [ROWS][fours], then the weights of the experts */
    const uint32_t warp = threadIdx.x / 32, fours = r.norm.columns / 4;
    const uint32_t expert = blockIdx.x * FEW_EXPERTS; /* the last block may have none */
    const uint32_t experts = expert < r.experts ? min(r.experts - expert, FEW_EXPERTS) : 0;
    float4 *router = x + ROWS * fours;
    launch_dependents();
    const float4 *from = (const float4 *)r.router + (uint64_t)expert * fours;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < experts * fours; i += NORM_THREADS)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(router + i)),
                     "l"(from + i)
                     : "memory");
    const float4 norm_ahead = own_norm(r.norm);
    wait_for_predecessor();
    norm_rows<ROWS>(r.norm, 0, ROWS, norm_ahead, x);
    const uint32_t e = warp % FEW_EXPERTS, row = warp / FEW_EXPERTS;
    if (e < experts && row < ROWS) {
        const uint32_t lane = threadIdx.x % 32;
        float logit = 0;
#pragma unroll 8
        for (uint32_t i = lane; i < fours; i += 32)
            logit = dot4(router[e * fours + i], x[row * fours + i], logit);
        logit = route_sum(logit);
        if (lane == 0)
            r.logits[row * r.experts + expert + e] = logit;
    }
    round_rows(r.norm, 0, ROWS, x);
}

/* Norm and logits of ROWS rows and EXPERTS experts, a warp TILE_ROWS by TILE_EXPERTS of them. */
template <int ROWS, int EXPERTS, int TILE_ROWS, int TILE_EXPERTS>
__global__ void __launch_bounds__(NORM_THREADS) some_kernel(const struct cuda_route r) {
    constexpr int AHEAD = 16 / TILE_EXPERTS; /* float4 of the router that a lane fetches before it can multiply */
    constexpr uint32_t EXPERT_TILES = EXPERTS / TILE_EXPERTS;
    static_assert(ROWS / TILE_ROWS * EXPERT_TILES <= NORM_WARPS, "a warp a tile");
    extern __shared__ float4 x[]; /* [ROWS][fours] */
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, fours = r.norm.columns / 4;
    const uint32_t first = blockIdx.y * ROWS, rows = min(r.norm.rows - first, (uint32_t)ROWS);
    const uint32_t expert = blockIdx.x * EXPERTS + warp % EXPERT_TILES * TILE_EXPERTS;
    const uint32_t own = warp / EXPERT_TILES * TILE_ROWS;
    const bool busy = expert < r.experts && own < rows;
    const float4 *router[TILE_EXPERTS];
    float4 ahead[TILE_EXPERTS][AHEAD];
    launch_dependents();
#pragma unroll
    for (int e = 0; e < TILE_EXPERTS; e++) { /* those behind the last repeat it */
        router[e] = (const float4 *)r.router + (uint64_t)min(expert + e, r.experts - 1) * fours;
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (busy && lane + 32 * k < fours)
                ahead[e][k] = router[e][lane + 32 * k];
    }
    const float4 norm_ahead = own_norm(r.norm);
    wait_for_predecessor();
    norm_rows<ROWS>(r.norm, first, rows, norm_ahead, x);
    if (busy) {
        const float4 *values = x + own * fours;
        float logit[TILE_EXPERTS][TILE_ROWS] = {};
        const auto add = [&](int e, uint32_t i, float4 w) {
#pragma unroll
            for (int j = 0; j < TILE_ROWS; j++)
                logit[e][j] = dot4(w, values[j * fours + i], logit[e][j]);
        };
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (lane + 32 * k < fours)
#pragma unroll
                for (int e = 0; e < TILE_EXPERTS; e++)
                    add(e, lane + 32 * k, ahead[e][k]);
#pragma unroll 4
        for (uint32_t i = lane + 32 * AHEAD; i < fours; i += 32)
#pragma unroll
            for (int e = 0; e < TILE_EXPERTS; e++)
                add(e, i, router[e][i]);
#pragma unroll
        for (int e = 0; e < TILE_EXPERTS; e++)
#pragma unroll
            for (int j = 0; j < TILE_ROWS; j++) {
                const float result = route_sum(logit[e][j]);
                if (lane == 0 && expert + e < r.experts && own + j < rows)
                    r.logits[(uint64_t)(first + own + j) * r.experts + expert + e] = result;
            }
    }
    round_rows(r.norm, first, rows, x);
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
    return __reduce_add_sync(0xffffffffu, value);
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
    return warp_reduce(value, [](uint64_t a, uint64_t b) { return a + b; });
}

/*
 * One warp chooses the experts of a row (route_choose). chosen[i], in shared memory, gets the expert of rank i, and so does
 * lane i < used.
 */
template <int PER_LANE>
__device__ __forceinline__ uint32_t select_row(const struct cuda_route &r, uint32_t row, uint32_t lane,
                                               uint32_t *chosen) {
    const float *logits = r.logits + (uint64_t)row * r.experts;
    const float weight = route_weight(route_choose<PER_LANE>(logits, r.experts, r.used, lane, chosen), r.used, lane);
    const uint32_t expert = lane < r.used ? chosen[lane] : 0;
    if (lane < r.used) {
        r.chosen[row * r.used + lane] = expert;
        r.weights[row * r.used + lane] = weight;
    }
    return expert;
}

/* Rows of each block of the choice and of the sort. */
__host__ __device__ __forceinline__ uint32_t block_rows(uint32_t rows) {
    const uint32_t share = (rows + CUDA_SORT_BLOCKS - 1) / CUDA_SORT_BLOCKS;
    return share > SELECT_ROWS ? share : SELECT_ROWS;
}

/* A block's rows: their experts, and how often it has each of these. */
template <int PER_LANE> __global__ void __launch_bounds__(SELECT_WARPS * 32) select_kernel(const struct cuda_route r) {
    __shared__ uint32_t counts[CUDA_EXPERTS_MAX], chosen[SELECT_WARPS][CUDA_EXPERTS_USED_MAX];
    const uint32_t lane = threadIdx.x % 32, share = block_rows(r.norm.rows), first = blockIdx.x * share;
    launch_dependents();
    for (uint32_t e = threadIdx.x; e < r.experts; e += blockDim.x)
        counts[e] = 0;
    wait_for_predecessor();
    __syncthreads();
    for (uint32_t row = first + threadIdx.x / 32; row < min(first + share, r.norm.rows); row += SELECT_WARPS) {
        const uint32_t expert = select_row<PER_LANE>(r, row, lane, chosen[threadIdx.x / 32]);
        if (lane < r.used)
            atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < r.experts; e += blockDim.x)
        r.counts[blockIdx.x * r.experts + e] = counts[e];
}

/*
 * A block puts the assignments first .. last into their experts' lists. Thread i has expert i: `count` assignments, of
 * which `before` are other blocks' and stand before this one's. next: [blockDim.x], shared. The first block makes the
 * items. SUM: holds both sums over all experts, of assignments and of items, in half of its bits each.
 */
template <class SUM>
__device__ __forceinline__ void sort_assignments(const struct cuda_route &r, const uint32_t *chosen, uint32_t first,
                                                 uint32_t last, uint32_t count, uint32_t before, uint32_t *next) {
    constexpr int HALF = 4 * sizeof(SUM);
    __shared__ SUM warps[SORT_THREADS / 32];
    const uint32_t i = threadIdx.x, lane = i % 32;
    uint32_t pieces = 0;
    if (HALF == 16) /* few: no division */
        for (uint32_t left = count; left > 0; left -= min(left, r.item_tokens))
            pieces++;
    else
        pieces = (count + r.item_tokens - 1) / r.item_tokens;
    SUM sum = warp_scan((SUM)count << HALF | pieces, lane); /* of both, over the experts up to this thread's */
    if (lane == 31)
        warps[i / 32] = sum;
    __syncthreads();
    sum += warp_sum(lane < i / 32 ? warps[lane] : 0);
    const uint32_t start = (uint32_t)(sum >> HALF) - count;
    const uint32_t items = (uint32_t)(sum & ((SUM)1 << HALF) - 1), first_item = items - pieces;
    next[i] = start + before;
    __syncthreads();
    /* Where among its block's an assignment stands is left to chance: no result depends on it. */
#pragma unroll 1
    for (uint32_t a = first + i; a < last; a += blockDim.x)
        r.order[atomicAdd(&next[chosen[a]], 1)] = a;
    if (blockIdx.x > 0)
        return;
#pragma unroll 1
    for (uint32_t j = 0; j < pieces; j++)
        r.items[first_item + j] = {i, start + j * r.item_tokens, min(r.item_tokens, count - j * r.item_tokens)};
    if (i == blockDim.x - 1)
        *r.item_count = items;
}

__global__ void __launch_bounds__(SORT_THREADS) sort_kernel(const struct cuda_route r) {
    __shared__ uint32_t all[CUDA_EXPERTS_MAX], before[CUDA_EXPERTS_MAX];
    const uint32_t padded = (r.experts + 31) / 32 * 32, expert = threadIdx.x % padded, slices = SORT_THREADS / padded;
    const uint32_t first = blockIdx.x * block_rows(r.norm.rows),
                   last = min(first + block_rows(r.norm.rows), r.norm.rows);
    launch_dependents();
    all[threadIdx.x] = before[threadIdx.x] = 0;
    __syncthreads();
    wait_for_predecessor();
    if (expert < r.experts && threadIdx.x / padded < slices) {
        uint32_t count = 0, count_before = 0;
#pragma unroll 8
        for (uint32_t b = threadIdx.x / padded; b < gridDim.x; b += slices) {
            const uint32_t of_block = r.counts[b * r.experts + expert];
            count += of_block;
            count_before += b < blockIdx.x ? of_block : 0;
        }
        atomicAdd(&all[expert], count);
        atomicAdd(&before[expert], count_before);
    }
    __syncthreads();
    sort_assignments<uint64_t>(r, r.chosen, first * r.used, last * r.used, all[threadIdx.x], before[threadIdx.x], all);
}

/* A thread for each expert at least. */
template <int PER_LANE> __global__ void __launch_bounds__(SORT_THREADS) select_sort_kernel(const struct cuda_route r) {
    __shared__ uint32_t chosen[SORTED_ROWS * CUDA_EXPERTS_USED_MAX], counts[CUDA_EXPERTS_MAX];
    static_assert(SORTED_ROWS * CUDA_EXPERTS_USED_MAX <= UINT16_MAX, "sums in half of a uint32_t");
    const uint32_t lane = threadIdx.x % 32;
    launch_dependents();
    counts[threadIdx.x] = 0;
    __syncthreads();
    wait_for_predecessor();
#pragma unroll 1
    for (uint32_t row = threadIdx.x / 32; row < r.norm.rows; row += blockDim.x / 32) {
        const uint32_t expert = select_row<PER_LANE>(r, row, lane, chosen + row * r.used);
        if (lane < r.used)
            atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    sort_assignments<uint32_t>(r, chosen, 0, r.norm.rows * r.used, counts[threadIdx.x], 0, counts);
}

static_assert(SORT_THREADS == CUDA_EXPERTS_MAX, "one thread an expert");

/* A block of `kernel` keeps `kept` rows of floats in shared memory. */
template <class KERNEL>
cudaError_t launch_rows(KERNEL *kernel, dim3 grid, uint32_t kept, const struct cuda_route *r, cudaStream_t stream) {
    const size_t shared = kept * r->norm.columns * sizeof(float);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(kernel, grid, dim3(NORM_THREADS), shared, stream, *r);
}

template <int ROWS> cudaError_t launch_few(const struct cuda_route *r, cudaStream_t stream) {
    const dim3 grid((r->experts + FEW_EXPERTS - 1) / FEW_EXPERTS + 1);
    return launch_rows(few_kernel<ROWS>, grid, ROWS + FEW_EXPERTS, r, stream);
}

/* SPARE: blocks without experts. */
template <int ROWS, int EXPERTS, int TILE_ROWS, int TILE_EXPERTS, int SPARE>
cudaError_t launch_some(const struct cuda_route *r, cudaStream_t stream) {
    const dim3 grid((r->experts + EXPERTS - 1) / EXPERTS + SPARE, (r->norm.rows + ROWS - 1) / ROWS);
    return launch_rows(some_kernel<ROWS, EXPERTS, TILE_ROWS, TILE_EXPERTS>, grid, ROWS, r, stream);
}

template <int PER_LANE> cudaError_t route(const struct cuda_route *r, cudaStream_t stream) {
    const cudaError_t error = cuda_route_logits(r, stream);
    if (error != cudaSuccess)
        return error;
    if (r->norm.rows <= SORTED_ROWS) {
        const uint32_t warps = max((r->experts + 31) / 32, r->norm.rows);
        return launch(select_sort_kernel<PER_LANE>, dim3(1), dim3(32 * warps), 0, stream, *r);
    }
    const uint32_t share = block_rows(r->norm.rows);
    const dim3 blocks((r->norm.rows + share - 1) / share);
    const cudaError_t selected = launch(select_kernel<PER_LANE>, blocks, dim3(SELECT_WARPS * 32), 0, stream, *r);
    return selected ? selected : launch(sort_kernel, blocks, dim3(SORT_THREADS), 0, stream, *r);
}

} // namespace

uint32_t cuda_route_item_limit(uint32_t rows, uint32_t experts, uint32_t used, uint32_t item_tokens) {
    const uint64_t assignments = (uint64_t)rows * used, split = assignments / item_tokens + experts;
    return (uint32_t)(assignments < split ? assignments : split);
}

/* Blocks are as many as run at a time, or fewer: with 16 rows and 128 experts 132, with 64 or 128 rows 128. */
cudaError_t cuda_route_logits(const struct cuda_route *r, cudaStream_t stream) {
    const uint32_t rows = r->norm.rows, most = KEPT_FLOATS / r->norm.columns;
    if (rows <= 2 && most >= 4)
        return rows == 1 ? launch_few<1>(r, stream) : launch_few<2>(r, stream);
    if (rows <= 16 && most >= 4)
        return launch_some<4, 4, 1, 1, 1>(r, stream);
    if (rows <= SOME_ROWS && most >= 8)
        return rows <= SOME_ROWS / 2 ? launch_some<8, 8, 2, 2, 0>(r, stream) : launch_some<8, 16, 4, 2, 0>(r, stream);
    const cudaError_t error = cuda_norm(&r->norm, stream);
    return error ? error : route_logits(r, stream);
}

cudaError_t cuda_route(const struct cuda_route *r, cudaStream_t stream) {
    return r->experts <= 128   ? route<4>(r, stream)
           : r->experts <= 256 ? route<8>(r, stream)
                               : route<CUDA_EXPERTS_MAX / 32>(r, stream);
}
