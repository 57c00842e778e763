/*
 * Causal attention over the paged cache: see cuda_attention in cuda.h for shapes and the order of sums.
 *
 * A warp multiplies 16 rows of q with a block's 32 positions by mma.m16n8k16. Lane 4 g + t owns positions 8 t to 8 t + 7
 * of the block and, in every 32 dimensions, dimensions 8 t to 8 t + 7: keys are read so that the scores a lane gets are
 * those of its own positions, which makes them, as f16, the left operand of the product with the values without any
 * exchange between lanes. What a row gets does not depend on the other rows of its tile: positions behind its own weigh
 * exactly 0, and a block of such positions changes nothing.
 */
#include <cuda_fp16.h>
#include <math.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr int WARPS = 4, COMBINE_WARPS = 32;
constexpr uint32_t ROUNDED_MAX = 8192; /* dimensions of a row that combine_kernel keeps to round them */
constexpr uint32_t PIECE_BLOCKS = CUDA_KV_PIECE / CUDA_KV_BLOCK;

/* Rows g and g + 8 of a warp's 16: max and sum of the weights so far, the values weighted by them. */
template <int DIM> struct state {
    float max[2], sum[2], out[DIM / 8][4];

    __device__ __forceinline__ void clear() {
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
            out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0;
    }
};

/* Factor that brings sums made with maximum `from` to the maximum `to`; 0 where there was nothing yet. */
__device__ __forceinline__ float rescale(float from, float to) {
    return from == -INFINITY ? 0.0f : exp2f(from - to);
}

/* Joins a piece to the total: the same operations here and in combine_kernel. */
__device__ __forceinline__ void join_factors(float &max, float piece_max, float &keep, float &add) {
    const float next = piece_max > max || piece_max != piece_max ? piece_max : max;
    keep = rescale(max, next);
    add = rescale(piece_max, next);
    max = next;
}

__device__ __forceinline__ float join(float total, float keep, float piece, float add) {
    return fmaf(piece, add, total * keep);
}

/* Without a negative zero: whether a sum is 0 or -0 depends on how many zeros were added to it. */
__device__ __forceinline__ float quotient(float out, float sum) {
    return out / sum + 0.0f;
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    const half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&h);
}

template <int DIM> struct warp_rows {
    uint32_t q[DIM / 32][8]; /* left operands of two mma for every 32 dimensions */
    int limit[2];            /* last position rows g and g + 8 attend to; -1: no such row */
    int last;                /* the greatest limit of the tile: what lies behind it in the cache may be anything */
};

/* Two neighbouring values, zero from position `last` + 1 on: 0 times a stale Inf would be NaN. */
__device__ __forceinline__ uint32_t values_until(uint32_t pair, int position, int last) {
    return position > last ? 0 : position + 1 > last ? pair & 0xffffu : pair;
}

/* One block of positions from `start` on into the state of a piece. AHEAD: values fetched in advance. */
template <int DIM, int AHEAD>
__device__ __forceinline__ void attend_block(const warp_rows<DIM> &rows, const half *keys, const half *values,
                                             int start, int lane, state<DIM> &s) {
    const int g = lane / 4, t = lane & 3;
    float scores[4][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) { /* column n of product j is position 8 (n / 2) + 2 j + n % 2 */
        const half *key = keys + (8 * (g / 2) + 2 * j + g % 2) * DIM + 8 * t;
#pragma unroll
        for (int d = 0; d < DIM / 32; d++) {
            const uint4 k = *(const uint4 *)(key + 32 * d);
            mma(scores[j], rows.q[d], k.x, k.y);
            mma(scores[j], rows.q[d] + 4, k.z, k.w);
        }
    }
    const half *value = values + g * CUDA_KV_BLOCK + 8 * t;
    uint4 ahead[AHEAD ? AHEAD : 1];
#pragma unroll
    for (int n = 0; n < AHEAD; n++)
        ahead[n] = *(const uint4 *)(value + 8 * n * CUDA_KV_BLOCK);
    uint32_t weights[2][4]; /* [row][j]: two positions as f16 */
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = s.max[r];
        bool nan = false;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &score = scores[j][2 * r + e];
                if (start + 8 * t + 2 * j + e > rows.limit[r])
                    score = -INFINITY;
                nan = nan || score != score;
                max = fmaxf(max, score);
            }
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        keep[r] = rescale(s.max[r], max);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float w0 = max == -INFINITY ? 0.0f : exp2f(scores[j][2 * r] - max);
            const float w1 = max == -INFINITY ? 0.0f : exp2f(scores[j][2 * r + 1] - max);
            sum += w0 + w1;
            weights[r][j] = pack_halves(w0, w1);
        }
        if (nan) /* fmaxf lets a NaN pass unseen */
            sum = NAN;
        s.sum[r] = fmaf(s.sum[r], keep[r], sum);
        s.max[r] = max;
    }
    const uint32_t first[4] = {weights[0][0], weights[1][0], weights[0][1], weights[1][1]};
    const uint32_t second[4] = {weights[0][2], weights[1][2], weights[0][3], weights[1][3]};
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
        uint4 v = n < AHEAD ? ahead[AHEAD ? n : 0] : *(const uint4 *)(value + 8 * n * CUDA_KV_BLOCK);
        if (start + CUDA_KV_BLOCK - 1 > rows.last) {
            const int position = start + 8 * t;
            v.x = values_until(v.x, position, rows.last);
            v.y = values_until(v.y, position + 2, rows.last);
            v.z = values_until(v.z, position + 4, rows.last);
            v.w = values_until(v.w, position + 6, rows.last);
        }
        s.out[n][0] *= keep[0];
        s.out[n][1] *= keep[0];
        s.out[n][2] *= keep[1];
        s.out[n][3] *= keep[1];
        mma(s.out[n], first, v.x, v.y);
        mma(s.out[n], second, v.z, v.w);
    }
}

struct parameters {
    const half *q, *cache;
    const uint32_t *position, *table, *tables, *tiles, *tile_rows;
    float *partial, *y;
    float2 *stats; /* of the partial results: max and sum */
    struct cuda_activation out;
    uint32_t heads, group, rows, pieces, tile_count;
    uint64_t block_halves;
};

/* A tile's rows: row i of 16 is head i % group of token i / group. */
struct tile_row {
    uint32_t row, head;
    bool there;
};

__device__ __forceinline__ tile_row tile_row_at(const parameters &p, uint32_t tile, uint32_t kv_head, int i) {
    const uint32_t token = i / p.group;
    return {p.tiles[tile] + token, kv_head * p.group + i % p.group, token < p.tile_rows[tile]};
}

/*
 * Sums of one lane become those of the row. Lanes of a row hold different positions, each a sum over rising blocks;
 * they are added 0 + 1, 2 + 3, then both.
 */
__device__ __forceinline__ float row_sum(float sum) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

/* A piece's share of the cache on its way to L2: most of it was there before this step began. */
template <int DIM>
__device__ __forceinline__ void prefetch_blocks(const parameters &p, const uint32_t *table, uint32_t kv_head,
                                                uint32_t first, uint32_t end, int lane) {
    constexpr uint32_t bytes = 2 * DIM * CUDA_KV_BLOCK * sizeof(half);
    for (uint32_t b = first; b < end; b++) {
        const uint8_t *block = (const uint8_t *)(p.cache + table[b] * p.block_halves) + (uint64_t)kv_head * bytes;
        for (uint32_t i = 128 * lane; i < bytes; i += 128 * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(block + i));
    }
}

template <int DIM, bool SPLIT> __global__ void __launch_bounds__(WARPS * 32) attention_kernel(const parameters p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane & 3;
    const uint32_t kv_head = blockIdx.y;
    const uint32_t unit = blockIdx.x * WARPS + warp;
    const uint32_t tile = SPLIT ? unit / p.pieces : unit;
    launch_dependents();
    if (tile >= p.tile_count || p.tile_rows[tile] == 0)
        return;
    const uint32_t last_row = p.tiles[tile] + p.tile_rows[tile] - 1;
    warp_rows<DIM> rows;
    rows.last = (int)p.position[last_row];
    const uint32_t blocks = rows.last / CUDA_KV_BLOCK + 1;
    const uint32_t *table = p.tables + p.table[last_row];
    const uint32_t pieces = (blocks + PIECE_BLOCKS - 1) / PIECE_BLOCKS;
    const uint32_t first_piece = SPLIT ? unit % p.pieces : 0, end_piece = SPLIT ? first_piece + 1 : pieces;
    if (first_piece >= pieces)
        return;
    if (SPLIT)
        prefetch_blocks<DIM>(p, table, kv_head, first_piece * PIECE_BLOCKS, min(end_piece * PIECE_BLOCKS, blocks),
                             lane);
    tile_row own[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        own[r] = tile_row_at(p, tile, kv_head, g + 8 * r);
        rows.limit[r] = own[r].there ? (int)p.position[own[r].row] : -1;
    }
    wait_for_predecessor();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const half *q = p.q + ((uint64_t)own[r].row * p.heads + own[r].head) * DIM + 8 * t;
#pragma unroll
        for (int d = 0; d < DIM / 32; d++) {
            const uint4 v = own[r].there ? *(const uint4 *)(q + 32 * d) : make_uint4(0, 0, 0, 0);
            rows.q[d][r] = v.x;
            rows.q[d][2 + r] = v.y;
            rows.q[d][4 + r] = v.z;
            rows.q[d][6 + r] = v.w;
        }
    }

    state<DIM> total, piece;
    if (!SPLIT)
        total.clear();
    for (uint32_t i = first_piece; i < end_piece; i++) {
        piece.clear();
        for (uint32_t b = i * PIECE_BLOCKS; b < min((i + 1) * PIECE_BLOCKS, blocks); b++) {
            const half *keys = p.cache + table[b] * p.block_halves + (uint64_t)kv_head * 2 * DIM * CUDA_KV_BLOCK;
            attend_block<DIM, SPLIT && DIM <= 128 ? DIM / 8 : 0>(rows, keys, keys + DIM * CUDA_KV_BLOCK,
                                                                 (int)(b * CUDA_KV_BLOCK), lane, piece);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            piece.sum[r] = row_sum(piece.sum[r]);
            if (!SPLIT) {
                float keep, add;
                join_factors(total.max[r], piece.max[r], keep, add);
                total.sum[r] = join(total.sum[r], keep, piece.sum[r], add);
#pragma unroll
                for (int n = 0; n < DIM / 8; n++) {
                    total.out[n][2 * r] = join(total.out[n][2 * r], keep, piece.out[n][2 * r], add);
                    total.out[n][2 * r + 1] = join(total.out[n][2 * r + 1], keep, piece.out[n][2 * r + 1], add);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (!own[r].there)
            continue;
        const state<DIM> &s = SPLIT ? piece : total;
        const uint64_t at = (uint64_t)own[r].row * p.heads + own[r].head;
        float *y = SPLIT ? p.partial + (at * p.pieces + first_piece) * DIM : p.y + at * DIM;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            const float a = s.out[n][2 * r], b = s.out[n][2 * r + 1];
            *(float2 *)(y + 8 * n + 2 * t) =
                SPLIT ? make_float2(a, b) : make_float2(quotient(a, s.sum[r]), quotient(b, s.sum[r]));
        }
        if (SPLIT && t == 0)
            p.stats[at * p.pieces + first_piece] = make_float2(s.max[r], s.sum[r]);
    }
}

/* Joins the pieces of one row, a warp a head, and rounds the row: lane l has dimensions l, l + 32, ... */
template <int DIM> __global__ void __launch_bounds__(COMBINE_WARPS * 32) combine_kernel(const parameters p) {
    constexpr int OWN = DIM / 32, PIECES_AT_ONCE = OWN > 4 ? 3 : 6;
    extern __shared__ float values[]; /* the row, where it is rounded */
    __shared__ float maxima[COMBINE_WARPS];
    const uint32_t row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t pieces = p.position[row] / CUDA_KV_PIECE + 1;
    float greatest = 0;
    launch_dependents();
    wait_for_predecessor();
    for (uint32_t head = warp; head < p.heads; head += blockDim.x / 32) {
        const uint64_t at = (uint64_t)row * p.heads + head;
        const float *piece = p.partial + at * p.pieces * DIM + lane;
        const float2 *stats = p.stats + at * p.pieces;
        float max = -INFINITY, sum = 0, out[OWN] = {};
        for (uint32_t first = 0; first < pieces; first += PIECES_AT_ONCE) {
            float2 stat[PIECES_AT_ONCE];
            float part[PIECES_AT_ONCE][OWN];
#pragma unroll
            for (int i = 0; i < PIECES_AT_ONCE; i++)
                if (first + i < pieces) {
                    stat[i] = stats[first + i];
#pragma unroll
                    for (int d = 0; d < OWN; d++)
                        part[i][d] = piece[(first + i) * DIM + 32 * d];
                }
#pragma unroll
            for (int i = 0; i < PIECES_AT_ONCE; i++)
                if (first + i < pieces) {
                    float keep, add;
                    join_factors(max, stat[i].x, keep, add);
                    sum = join(sum, keep, stat[i].y, add);
#pragma unroll
                    for (int d = 0; d < OWN; d++)
                        out[d] = join(out[d], keep, part[i][d], add);
                }
        }
#pragma unroll
        for (int d = 0; d < OWN; d++) {
            const float y = quotient(out[d], sum);
            if (p.out.half) {
                values[head * DIM + lane + 32 * d] = y;
                greatest = greater(greatest, fabsf(y));
            } else {
                p.y[at * DIM + lane + 32 * d] = y;
            }
        }
    }
    if (!p.out.half)
        return;
    float shrink;
    const float scale = rounding_scale(block_reduce(greatest, greater, maxima), shrink);
    const uint32_t columns = p.heads * DIM, padded = padded_columns(columns);
    uint2 *to = (uint2 *)((half *)p.out.half + (uint64_t)row * padded);
    for (uint32_t i = threadIdx.x; i < padded / 4; i += blockDim.x)
        store_rounded(p.out, to, i,
                      i < columns / 4 ? rounded(((const float4 *)values)[i], shrink) : make_uint2(0, 0));
    if (threadIdx.x == 0)
        p.out.scale[row] = scale;
}

template <int DIM> cudaError_t launch_dim(const parameters &p, uint32_t kv_heads, cudaStream_t stream) {
    const uint32_t columns = p.heads * DIM;
    if (p.out.half && columns > ROUNDED_MAX)
        return cudaErrorInvalidValue;
    if (!p.partial) {
        cudaError_t error = launch(attention_kernel<DIM, false>, dim3((p.tile_count + WARPS - 1) / WARPS, kv_heads),
                                   dim3(WARPS * 32), 0, stream, p);
        return error || !p.out.half ? error : cuda_round(p.y, columns, p.rows, &p.out, stream);
    }
    cudaError_t error =
        launch(attention_kernel<DIM, true>, dim3((p.tile_count * p.pieces + WARPS - 1) / WARPS, kv_heads),
               dim3(WARPS * 32), 0, stream, p);
    if (error != cudaSuccess)
        return error;
    const uint32_t warps = p.heads < COMBINE_WARPS ? p.heads : COMBINE_WARPS;
    return launch(combine_kernel<DIM>, dim3(p.rows), dim3(32 * warps), p.out.half ? columns * sizeof(float) : 0, stream,
                  p);
}

uint32_t piece_count(uint32_t context_limit) {
    return (context_limit + CUDA_KV_PIECE - 1) / CUDA_KV_PIECE;
}

} // namespace

size_t cuda_kv_block_bytes(const struct cuda_heads *heads) {
    return (size_t)2 * sizeof(half) * heads->kv_heads * heads->head_dim * CUDA_KV_BLOCK;
}

uint32_t cuda_attention_tile_tokens(const struct cuda_heads *heads) {
    return 16 / (heads->heads / heads->kv_heads);
}

size_t cuda_attention_partial_floats(const struct cuda_heads *heads, uint32_t rows, uint32_t context_limit) {
    return (size_t)rows * heads->heads * piece_count(context_limit) * (heads->head_dim + 2);
}

cudaError_t cuda_attention(const struct cuda_attention *a, cudaStream_t stream) {
    parameters p = {};
    p.q = (const half *)a->q;
    p.cache = (const half *)a->cache;
    p.position = a->rows.position;
    p.table = a->rows.table;
    p.tables = a->rows.tables;
    p.tiles = a->tiles;
    p.tile_rows = a->tile_rows;
    p.partial = a->partial;
    p.y = a->y;
    p.out = a->out;
    p.heads = a->heads.heads;
    p.group = a->heads.heads / a->heads.kv_heads;
    p.rows = a->rows.rows;
    p.pieces = piece_count(a->context_limit);
    if (p.partial)
        p.stats = (float2 *)(p.partial + (size_t)p.rows * p.heads * p.pieces * a->heads.head_dim);
    p.tile_count = a->tile_count;
    p.block_halves = cuda_kv_block_bytes(&a->heads) / sizeof(half);
    switch (a->heads.head_dim) {
    case 32: return launch_dim<32>(p, a->heads.kv_heads, stream);
    case 64: return launch_dim<64>(p, a->heads.kv_heads, stream);
    case 96: return launch_dim<96>(p, a->heads.kv_heads, stream);
    case 128: return launch_dim<128>(p, a->heads.kv_heads, stream);
    case 256: return launch_dim<256>(p, a->heads.kv_heads, stream);
    default: return cudaErrorInvalidValue;
    }
}
