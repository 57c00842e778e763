/*
 * The router with the norm before it: logits, the likeliest experts of each row with their weights, and the assignments
 * sorted by expert. See cuda_route in cuda.h, and route.cuh for the order of a logit's sum. Up to FEW_ROWS rows are normed
 * by every block that wants logits of them; more are normed once, and their logits made by logits.cu. Up to SORTED_ROWS
 * rows are chosen for and sorted by one block; with more, each block of the choice counts its own, from which a block
 * of the sort knows the places of those. Any way does the same operations on a row.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/warp.cuh"

namespace {

constexpr int SELECT_WARPS = 8, SORT_THREADS = 1024;
constexpr uint32_t FEW_ROWS = 128, SORTED_ROWS = 32, SELECT_ROWS = 8;
constexpr uint32_t FEW_FLOATS = 32768; /* of normed rows that a block keeps */

/*
 * Norm and logits of ROWS rows and EXPERTS experts, a warp TILE_ROWS by TILE_EXPERTS of them. The last block rounds the
 * first row, the blocks before it the others: the last has no experts where one row is all it takes.
 */
template <int ROWS, int EXPERTS, int TILE_ROWS, int TILE_EXPERTS>
__global__ void __launch_bounds__(NORM_THREADS) few_kernel(const struct cuda_route r) {
    constexpr int AHEAD = 16 / TILE_EXPERTS; /* float4 of the router that a lane fetches before it can multiply */
    constexpr uint32_t EXPERT_TILES = EXPERTS / TILE_EXPERTS;
    static_assert(ROWS / TILE_ROWS * EXPERT_TILES <= NORM_WARPS, "a warp a tile");
    extern __shared__ float4 x[]; /* [ROWS][fours] */
    __shared__ float sums[ROWS][NORM_WARPS], maxima[NORM_WARPS];
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
    const float4 *norm = (const float4 *)r.norm.norm, norm_ahead = norm[min(threadIdx.x, fours - 1)];
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
            x[j * fours + i] = normed(x[j * fours + i], factor, i == threadIdx.x ? norm_ahead : norm[i]);
    }
    __syncthreads();

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
    const uint32_t padded = padded_columns(r.norm.columns);
    for (uint32_t j = gridDim.x - 1 - blockIdx.x; j < rows; j += gridDim.x) {
        float greatest = 0, shrink;
        for (uint32_t i = threadIdx.x; i < fours; i += NORM_THREADS)
            greatest = greater(greatest, greatest_of(x[j * fours + i]));
        const float scale = rounding_scale(block_reduce(greatest, greater, maxima), shrink);
        uint2 *out = (uint2 *)((half *)r.norm.out.half + (uint64_t)(first + j) * padded);
        for (uint32_t i = threadIdx.x; i < padded / 4; i += NORM_THREADS)
            store_rounded(r.norm.out, out, i, i < fours ? rounded(x[j * fours + i], shrink) : make_uint2(0, 0));
        if (threadIdx.x == 0)
            r.norm.out.scale[first + j] = scale;
        __syncthreads();
    }
}

/* Orders floats as integers; NaN below everything, so that it is chosen last. 0: taken, or not there. */
__device__ __forceinline__ uint32_t order_key(float value) {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? 1 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_value(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/*
 * One warp chooses the experts of a row, of at most 32 * PER_LANE: `used` times the greatest of what is left. Softmax over
 * the chosen equals renormalizing the whole one. Lane i < used gets the expert of rank i.
 */
template <int PER_LANE>
__device__ __forceinline__ uint32_t select_row(const struct cuda_route &r, uint32_t row, uint32_t lane) {
    const float *logits = r.logits + (uint64_t)row * r.experts;
    uint32_t keys[PER_LANE];
    bool nan = false;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const uint32_t e = lane + 32 * i;
        keys[i] = 0;
        if (e < r.experts) {
            const float logit = logits[e];
            nan = nan || !(fabsf(logit) <= 3.4e38f);
            keys[i] = order_key(logit);
        }
    }
    nan = __any_sync(0xffffffffu, nan);
    uint32_t own_top = 0, chosen = 0;
    for (uint32_t rank = 0; rank < r.used; rank++) {
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
    for (uint32_t rank = 0; rank < r.used; rank++)
        total += __shfl_sync(0xffffffffu, mine, rank);
    if (lane < r.used) {
        r.chosen[row * r.used + lane] = chosen;
        r.weights[row * r.used + lane] = nan ? NAN : mine / total;
    }
    return chosen;
}

/* Rows of each block of the choice and of the sort. */
__host__ __device__ __forceinline__ uint32_t block_rows(uint32_t rows) {
    const uint32_t share = (rows + CUDA_SORT_BLOCKS - 1) / CUDA_SORT_BLOCKS;
    return share > SELECT_ROWS ? share : SELECT_ROWS;
}

/* A block's rows: their experts, and how often it has each of these. */
template <int PER_LANE> __global__ void __launch_bounds__(SELECT_WARPS * 32) select_kernel(const struct cuda_route r) {
    __shared__ uint32_t counts[CUDA_EXPERTS_MAX];
    const uint32_t lane = threadIdx.x % 32, share = block_rows(r.norm.rows), first = blockIdx.x * share;
    launch_dependents();
    for (uint32_t e = threadIdx.x; e < r.experts; e += blockDim.x)
        counts[e] = 0;
    wait_for_predecessor();
    __syncthreads();
    for (uint32_t row = first + threadIdx.x / 32; row < min(first + share, r.norm.rows); row += SELECT_WARPS) {
        const uint32_t expert = select_row<PER_LANE>(r, row, lane);
        if (lane < r.used)
            atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < r.experts; e += blockDim.x)
        r.counts[blockIdx.x * r.experts + e] = counts[e];
}

/*
 * A block puts the assignments first .. last into their experts' lists. Thread i has expert i: `count` assignments, of
 * which `before` are other blocks' and stand before this one's. next: [CUDA_EXPERTS_MAX], shared. The first block makes
 * the items.
 */
__device__ __forceinline__ void sort_assignments(const struct cuda_route &r, const uint32_t *chosen, uint32_t first,
                                                 uint32_t last, uint32_t count, uint32_t before, uint32_t *next) {
    __shared__ uint64_t warps[SORT_THREADS / 32];
    const uint32_t i = threadIdx.x, lane = i % 32, pieces = (count + r.item_tokens - 1) / r.item_tokens;
    uint64_t sum = warp_scan((uint64_t)count << 32 | pieces, lane); /* of both, over the experts up to this thread's */
    if (lane == 31)
        warps[i / 32] = sum;
    __syncthreads();
    const uint64_t below = lane < i / 32 ? warps[lane] : 0;
    sum += warp_reduce(below, [](uint64_t a, uint64_t b) { return a + b; });
    const uint32_t start = (uint32_t)(sum >> 32) - count, first_item = (uint32_t)sum - pieces;
    next[i] = start + before;
    __syncthreads();
    /* Where among its block's an assignment stands is left to chance: no result depends on it. */
    for (uint32_t a = first + i; a < last; a += SORT_THREADS)
        r.order[atomicAdd(&next[chosen[a]], 1)] = a;
    if (blockIdx.x > 0)
        return;
    for (uint32_t j = 0; j < pieces; j++)
        r.items[first_item + j] = {i, start + j * r.item_tokens, min(r.item_tokens, count - j * r.item_tokens)};
    if (i == SORT_THREADS - 1)
        *r.item_count = (uint32_t)sum;
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
    sort_assignments(r, r.chosen, first * r.used, last * r.used, all[threadIdx.x], before[threadIdx.x], all);
}

template <int PER_LANE> __global__ void __launch_bounds__(SORT_THREADS) select_sort_kernel(const struct cuda_route r) {
    __shared__ uint32_t chosen[SORTED_ROWS * CUDA_EXPERTS_USED_MAX], counts[CUDA_EXPERTS_MAX];
    const uint32_t lane = threadIdx.x % 32;
    launch_dependents();
    counts[threadIdx.x] = 0;
    __syncthreads();
    wait_for_predecessor();
    for (uint32_t row = threadIdx.x / 32; row < r.norm.rows; row += SORT_THREADS / 32) {
        const uint32_t expert = select_row<PER_LANE>(r, row, lane);
        if (lane < r.used) {
            chosen[row * r.used + lane] = expert;
            atomicAdd(&counts[expert], 1);
        }
    }
    __syncthreads();
    sort_assignments(r, chosen, 0, r.norm.rows * r.used, counts[threadIdx.x], 0, counts);
}

static_assert(SORT_THREADS == CUDA_EXPERTS_MAX, "one thread an expert");

/* SPARE: blocks without experts. */
template <int ROWS, int EXPERTS, int TILE_ROWS, int TILE_EXPERTS, int SPARE>
cudaError_t launch_few(const struct cuda_route *r, cudaStream_t stream) {
    const auto kernel = few_kernel<ROWS, EXPERTS, TILE_ROWS, TILE_EXPERTS>;
    const size_t shared = ROWS * r->norm.columns * sizeof(float);
    const dim3 grid((r->experts + EXPERTS - 1) / EXPERTS + SPARE, (r->norm.rows + ROWS - 1) / ROWS);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(kernel, grid, dim3(NORM_THREADS), shared, stream, *r);
}

/* Blocks are as many as run at a time, or fewer: with 16 rows and 128 experts 132, with 64 or 128 rows 128. */
cudaError_t norm_and_logits(const struct cuda_route *r, cudaStream_t stream) {
    const uint32_t rows = r->norm.rows, most = FEW_FLOATS / r->norm.columns;
    if (rows <= 16 && most >= 4)
        return rows == 1   ? launch_few<1, 4, 1, 1, 1>(r, stream)
               : rows == 2 ? launch_few<2, 4, 1, 1, 1>(r, stream)
                           : launch_few<4, 4, 1, 1, 1>(r, stream);
    if (rows <= FEW_ROWS && most >= 8)
        return rows <= FEW_ROWS / 2 ? launch_few<8, 8, 2, 2, 0>(r, stream) : launch_few<8, 16, 4, 2, 0>(r, stream);
    const cudaError_t error = cuda_norm(&r->norm, stream);
    return error ? error : route_logits(r, stream);
}

template <int PER_LANE> cudaError_t route(const struct cuda_route *r, cudaStream_t stream) {
    const cudaError_t error = norm_and_logits(r, stream);
    if (error != cudaSuccess)
        return error;
    if (r->norm.rows <= SORTED_ROWS)
        return launch(select_sort_kernel<PER_LANE>, dim3(1), dim3(SORT_THREADS), 0, stream, *r);
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

cudaError_t cuda_route(const struct cuda_route *r, cudaStream_t stream) {
    return r->experts <= 128   ? route<4>(r, stream)
           : r->experts <= 256 ? route<8>(r, stream)
                               : route<CUDA_EXPERTS_MAX / 32>(r, stream);
}
