#ifndef MOED_KERNELS_CUDA_ATTENTION_CUH
#define MOED_KERNELS_CUDA_ATTENTION_CUH

#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/kv_cache.cuh"
#include "kernels/cuda/mma.cuh"

/*
 * What all kernels of attention do alike: see cuda_attention in cuda.h for shapes and the order of sums.
 *
 * A warp multiplies 16 rows of q with a block's 32 positions by mma.m16n8k16. Lane 4 g + t owns positions 8 t to 8 t + 7
 * of the block and, in every 32 dimensions, dimensions 8 t to 8 t + 7: keys are read so that the scores a lane gets are
 * those of its own positions, which makes them, as f16, the left operand of the product with the values without any
 * exchange between lanes. What a row gets does not depend on the other rows of its tile: positions behind its own weigh
 * exactly 0, and a block of such positions changes nothing.
 */
constexpr uint32_t ATTENTION_PIECE_BLOCKS = CUDA_KV_PIECE / CUDA_KV_BLOCK;

struct attention_parameters {
    const half *q;
    void *cache;
    struct cuda_rope rope; /* or none */
    float q_scale;
    const uint32_t *position, *table, *tables, *tiles, *tile_rows;
    float *partial, *y; /* partial: [rows][heads][pieces][head_dim], not divided by the sum of weights */
    float2 *stats;      /* [rows][heads][pieces]: of the partial results, max and sum */
    struct cuda_activation out;
    uint32_t heads, kv_heads, group, rows, pieces, tile_count;
    uint64_t block_values; /* a block, in halves or, with Q8_0, bytes */
};

/* All pieces of rows of tiles, eight tiles a block, by Hopper's matrix unit, where device, build and dimension allow it. */
bool attention_many_runs(uint32_t head_dim);
cudaError_t attention_many(const attention_parameters &p, const struct cuda_heads *heads, cudaStream_t stream);
/* All pieces of rows with rope, a block each, with little code: where cuda_attention_takes_rope. */
cudaError_t attention_decode(const attention_parameters &p, const struct cuda_heads *heads, cudaStream_t stream);
/* Joins p.partial and p.stats of all rows, and rounds these where p.out wants it. */
cudaError_t attention_join(const attention_parameters &p, uint32_t head_dim, cudaStream_t stream);

/* Rows g and g + 8 of a warp's 16: max and sum of the weights so far, and the values weighted by them. */
template <int DIM> struct attention_state {
    float max[2], sum[2], out[DIM / 8][4];

    __device__ __forceinline__ void clear() {
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
            out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0;
    }
};

/* The hardware's 2^x: less than 2^-126 is 0. */
static __device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Factor that brings sums made with maximum `from` to the maximum `to`; 0 where there was nothing yet. */
static __device__ __forceinline__ float rescale(float from, float to) {
    return from == -INFINITY ? 0.0f : power_of_two(from - to);
}

/* The maximum after a piece; a NaN stays. */
static __device__ __forceinline__ float next_maximum(float max, float piece_max) {
    return piece_max > max || piece_max != piece_max ? piece_max : max;
}

/* Joins a piece to the total. */
static __device__ __forceinline__ void join_factors(float &max, float piece_max, float &keep, float &add) {
    const float next = next_maximum(max, piece_max);
    keep = rescale(max, next);
    add = rescale(piece_max, next);
    max = next;
}

static __device__ __forceinline__ float join(float total, float keep, float piece, float add) {
    return fmaf(piece, add, total * keep);
}

/* Without a negative zero: whether a sum is 0 or -0 depends on how many zeros were added to it. */
static __device__ __forceinline__ float quotient(float out, float sum) {
    return out * (1.0f / sum) + 0.0f;
}

template <int DIM> struct attention_rows {
    uint32_t q[DIM / 32][8]; /* left operands of two mma for every 32 dimensions */
    int limit[2];            /* last position rows g and g + 8 attend to; -1: no such row */
    int last;                /* the greatest limit of the tile: what lies behind it in the cache may be anything */
};

static __device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    const half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* A tile's rows: row i of 16 is head i % group of token i / group. Its number among all rows' heads. */
static __device__ __forceinline__ uint32_t tile_row_head(const attention_parameters &p, uint32_t first_row,
                                                         uint32_t kv_head, int i) {
    return (first_row + i / p.group) * p.heads + kv_head * p.group + i % p.group;
}

/* Reads q, which the kernel before has made; `there`: false for no rows. */
template <int DIM>
static __device__ __forceinline__ void load_rows(const attention_parameters &p, uint32_t tile, bool there,
                                                 uint32_t kv_head, int lane, attention_rows<DIM> &rows) {
    const uint32_t count = there ? p.tile_rows[tile] : 0;
    rows.last = count ? (int)p.position[p.tiles[tile] + count - 1] : -1;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t i = lane / 4 + 8 * r, token = i / p.group;
        rows.limit[r] = token < count ? (int)p.position[p.tiles[tile] + token] : -1;
        const half *q =
            p.q + (token < count ? tile_row_head(p, p.tiles[tile], kv_head, i) : 0) * (uint64_t)DIM + 8 * (lane & 3);
#pragma unroll
        for (int d = 0; d < DIM / 32; d++) {
            const uint4 v = token < count ? *(const uint4 *)(q + 32 * d) : make_uint4(0, 0, 0, 0);
            rows.q[d][r] = v.x;
            rows.q[d][2 + r] = v.y;
            rows.q[d][4 + r] = v.z;
            rows.q[d][6 + r] = v.w;
        }
    }
}

/*
 * Scores of a block that begins at `start` become weights: of row r and product j scores[4 j + 2 r] and the next are
 * positions 8 t + 2 j and the next. max and sum go on; keep is what they were multiplied by. weights: left operands of
 * the two products with the values. `masked` may be false where no row ends within the block. ROWS 1: row g alone.
 */
template <int ROWS = 2>
static __device__ __forceinline__ void weigh_scores(float *scores, int start, const int limit[2], bool masked, int lane,
                                                    float max[2], float sum[2], float keep[2],
                                                    uint32_t weights[8]) {
    const int first = start + 8 * (lane & 3);
    if (masked)
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (i / 2 % 2 < ROWS && first + 2 * (i / 4) + i % 2 > limit[i / 2 % 2])
                scores[i] = -INFINITY;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float next = -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
            next = fmaxf(next, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
        next = fmaxf(next, max[r]);
        keep[r] = rescale(max[r], next);
        const float base = next == -INFINITY ? 0.0f : next; /* so that -Inf weighs 0, and a NaN makes one */
        float block_sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float w0 = power_of_two(scores[4 * j + 2 * r] - base),
                        w1 = power_of_two(scores[4 * j + 2 * r + 1] - base);
            block_sum += w0 + w1;
            weights[2 * j + r] = pack_halves(w0, w1);
        }
        sum[r] = fmaf(sum[r], keep[r], block_sum);
        max[r] = next;
    }
}

/*
 * Sums of one lane become those of the row. Lanes of a row hold different positions, each a sum over rising blocks;
 * they are added 0 + 1, 2 + 3, then both.
 */
static __device__ __forceinline__ float row_sum(float sum) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

/* What is left of two neighbouring values up to position `last`: 0 times a stale Inf behind it would be NaN. */
static __device__ __forceinline__ uint32_t values_mask(int position, int last) {
    return position > last ? 0 : position + 1 > last ? 0xffffu : 0xffffffffu;
}

/* What a block has of a KV head. */
template <class VALUE, int DIM>
static __device__ __forceinline__ VALUE *block_head(const attention_parameters &p, uint32_t id, uint32_t kv_head) {
    return (VALUE *)p.cache + id * p.block_values + (uint64_t)kv_head * kv_head_values<VALUE>(DIM);
}

/*
 * One block of positions from `start` on, of which `head` has the KV head, into the state of a piece. AHEAD: eights of the
 * values fetched in advance; keys are too where any are. ROWS 1: there are no rows g + 8.
 */
template <int AHEAD, int ROWS, class VALUE, int DIM>
static __device__ __forceinline__ void attend_block(const attention_rows<DIM> &rows, const VALUE *head, int start,
                                                    int lane, attention_state<DIM> &s) {
    typedef typename kv_reader<VALUE, DIM>::eight eight;
    kv_reader<VALUE, DIM> block(head, lane);
    float scores[16] = {};
    constexpr int KEYS = AHEAD ? 4 : 1;
#pragma unroll
    for (int first = 0; first < DIM / 32; first += KEYS) {
        eight k[KEYS][4];
#pragma unroll
        for (int i = 0; i < KEYS && first + i < DIM / 32; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) /* column n of product j is position 8 (n / 2) + 2 j + n % 2 */
                k[i][j] = block.key_eight(j, first + i);
#pragma unroll
        for (int i = 0; i < KEYS && first + i < DIM / 32; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 key = block.key_halves(k[i][j], j, first + i);
                mma(scores + 4 * j, rows.q[first + i], key.x, key.y);
                mma(scores + 4 * j, rows.q[first + i] + 4, key.z, key.w);
            }
    }
    eight ahead[AHEAD ? AHEAD : 1];
#pragma unroll
    for (int n = 0; n < AHEAD; n++)
        ahead[n] = block.value_eight(n);
    uint32_t weights[8] = {};
    float keep[2];
    weigh_scores<ROWS>(scores, start, rows.limit, true, lane, s.max, s.sum, keep, weights);
    uint32_t masks[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        masks[i] = values_mask(start + 8 * (lane & 3) + 2 * i, rows.last);
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
        const eight v = n < AHEAD ? ahead[AHEAD ? n : 0] : block.value_eight(n);
        s.out[n][0] *= keep[0];
        s.out[n][1] *= keep[0];
        if (ROWS > 1) {
            s.out[n][2] *= keep[1];
            s.out[n][3] *= keep[1];
        }
        const uint4 value = block.value_halves(v, n, masks);
        mma(s.out[n], weights, value.x, value.y);
        mma(s.out[n], weights + 4, value.z, value.w);
    }
}

#endif
