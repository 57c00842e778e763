#ifndef MOED_KERNELS_CPU_ATTENTION_H
#define MOED_KERNELS_CPU_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/quant.h"

/*
 * Causal attention over a paged KV cache in f16 or Q8_0.
 *
 * A block holds the keys and values of CPU_KV_BLOCK consecutive positions of one sequence, for one layer and one KV
 * head. A row is one query head of one token. A row's context is cut into pieces of CPU_KV_PIECE positions, counted from
 * position 0; `run` computes pieces, in any order and on any thread, `combine` joins a row's pieces. The order of all
 * float operations of a row depends on its position alone, so that its result has the same bits whatever is computed
 * with it:
 *
 *   score[p] = scale * (chain of fma(q[d], k[p][d], sum) over rising d, from 0)
 *   of one piece, over the positions up to the row's own:
 *     max = largest score;  e[p] = cpu_exp(score[p] - max)
 *     sum = 16 sums of e by p mod 16, each over rising p, then halved 8, 4, 2, 1
 *     out[d] = chain of fma(e[p], v[p][d], out[d]) over rising p, from 0
 *   combined, over rising pieces i:
 *     max = largest max[i];  w[i] = cpu_exp(max[i] - max);  total = chain of fma(w[i], sum[i], total), from 0
 *     y[d] = (chain of fma(w[i], out[i][d], y[d]), from 0) / total
 *
 * Positions beyond a row's own are never part of a sum, whatever the block holds there. A NaN or +Inf score among a
 * row's own positions makes the whole row NaN.
 */
enum { CPU_KV_BLOCK = 32, CPU_KV_PIECE = 256, CPU_HEAD_DIM_MAX = 512 };

/*
 * Bytes of one block, a multiple of 64. Inside: keys as [2 halves of 16 positions][head_dim][16], values behind them as
 * [head_dim / 32, rounded up][32 positions][32], all f16. Blocks must be 64-byte aligned; they need no initial value.
 *
 * In QUANT_Q8_0 they are int8, and behind them are scales in f16 of every 32 dimensions, or as many as the last group has,
 * of keys and then of values, each [head_dim / 32, rounded up][32 positions]. Of a group d = f16(m / 127), m its greatest
 * absolute value, and q the integer nearest to x * (127 / m), both in f32, ties to even; 0 where d is 0. Where d is not
 * finite it is NaN. What attention reads is f16(q d); from there on all is as with QUANT_F16.
 */
size_t cpu_kv_block_bytes(enum quant_type type, uint32_t head_dim);

/* Floats of one partial result, a multiple of 16: out[head_dim], padded, then max and sum. 64-byte aligned. */
size_t cpu_attention_partial_floats(uint32_t head_dim);

/* Pieces of the context of a row at `position`. */
static inline uint32_t cpu_attention_pieces(uint32_t position) {
    return position / CPU_KV_PIECE + 1;
}

/* The rows of one KV head: `heads` query heads of each of `tokens` consecutive tokens of one sequence. */
struct cpu_attention_rows {
    uint32_t head_dim;      /* a multiple of 2, at most CPU_HEAD_DIM_MAX */
    enum quant_type type;   /* of the cache: QUANT_F16 or QUANT_Q8_0 */
    float scale;            /* 1 / sqrt(head_dim) */
    const float *q;         /* head h of token t: [head_dim] floats at q + t * token_stride + h * head_dim */
    size_t token_stride;    /* in floats */
    uint32_t tokens, heads; /* heads: query heads that share the KV head */
    uint32_t position;      /* of token 0; token t attends to positions 0 to position + t */
    const void *cache;      /* block b of the sequence lies at cache + blocks[b] * block_stride */
    size_t block_stride;    /* in bytes */
    const uint32_t *blocks; /* the sequence's table, from position 0 on */
    void *expanded;         /* with QUANT_Q8_0, room for a piece's blocks in f16; 64-byte aligned */
};

struct cpu_attention_kernels {
    /* Writes key and value [head_dim] of one position (its number within the block) into a block of the type. */
    void (*store)(enum quant_type type, void *block, uint32_t index, uint32_t head_dim, const float *key,
                  const float *value);

    /*
     * Piece number `piece` of all rows: the partial result of head h of token t goes to
     * partial + (t * heads + h) * row_stride floats. Rows whose context ends before the piece are left alone.
     */
    void (*run)(const struct cpu_attention_rows *rows, uint32_t piece, float *partial, size_t row_stride);

    /* Joins a row's `pieces` partial results, piece_stride floats apart, into y[head_dim]. */
    void (*combine)(const float *partial, uint32_t pieces, size_t piece_stride, uint32_t head_dim, float *y);
};

#endif
