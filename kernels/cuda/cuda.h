#ifndef MOED_KERNELS_CUDA_CUDA_H
#define MOED_KERNELS_CUDA_CUDA_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/quant.h"

/*
 * GPU kernels of the forward pass: launchers, callable from C. All pointers but those of the argument structs are device
 * memory. A launcher only enqueues on the stream and returns the launch's error; every kernel may be captured in a graph
 * and follows its predecessor by programmatic dependent launch. No kernel adds floats atomically: every sum has one order.
 */
#ifdef __cplusplus
extern "C" {
#endif

enum {
    CUDA_TILE_ROWS = 16,
    CUDA_CHUNK = 256,     /* columns of one chunk; rows of activations are padded to it with zeros */
    CUDA_CHAINS = 4,      /* a dot product is four sums, see cuda_matmul */
    CUDA_TOKENS_MAX = 64, /* of one expert item, and of one pass over a matrix */
};

/*
 * A matrix of `experts` times `rows` rows of `columns` weights in the order of tile.cuh: expert after expert, in each
 * tiles of 16 rows, in each chunks of 256 columns. Rows and columns are padded with zero weights.
 */
struct cuda_matrix {
    enum quant_type type;
    uint32_t columns, rows, experts;
    float scale; /* a power of two; weights times it are what is multiplied, in f16 */
    const void *tiles;
};

/* Bytes of the tiles of one expert (of the whole matrix where there is one); 0 for a format moed does not run. */
size_t cuda_matrix_expert_bytes(enum quant_type type, uint32_t columns, uint32_t rows);

/*
 * Repacks `rows` rows of the file's format (row_bytes apart; a whole number of tiles but for the matrix's last) into
 * tiles at `tiles`. With `pairs` not NULL the tile's rows 0 to 7 come from `rows_data` and 8 to 15 from `pairs`, as gate
 * and up are interleaved; `rows` then counts the rows of each.
 */
cudaError_t cuda_pack(enum quant_type type, const void *rows_data, const void *pairs, size_t row_bytes,
                      uint32_t columns, uint32_t rows, void *tiles, cudaStream_t stream);
/* Raises *bound, the bits of a float that is not negative, to the greatest absolute value a weight of these rows can have. */
cudaError_t cuda_weight_bound(enum quant_type type, const void *rows_data, size_t blocks, uint32_t *bound,
                              cudaStream_t stream);

/* Tokens of one expert: order[first .. first + count). */
struct cuda_item {
    uint32_t expert, first, count;
};

enum cuda_epilogue {
    CUDA_STORE,  /* y = W x */
    CUDA_ADD,    /* y = y + W x */
    CUDA_SWIGLU, /* y[i] = silu(gate_i x) * (up_i x); W interleaves gate and up, y has rows / 2 columns */
    CUDA_GATED,  /* y = silu(y) * W x: where gate and up have different formats */
};

/*
 * y[t] = W x[t]. x: f16 [.][columns padded], with x_scale[t], a power of two: x times it is the activation.
 * Dense: items NULL, tokens t = 0 .. tokens - 1. By expert: item_limit items (those at and behind *item_count do nothing);
 * token j of an item is assignment a = order[first + j]: x row a / x_divisor, y row a.
 * Order of a row's sum: chain j = 0..3 runs over chunks j, j + 4, j + 8, ... in f32 through the mma of 16 columns each;
 * the result is ((s0 + s1) + s2) + s3, times x_scale / W.scale. It is the same whatever else is computed.
 */
struct cuda_matmul {
    const struct cuda_matrix *w;
    const void *x;
    const float *x_scale;
    float *y;
    uint32_t y_stride; /* floats */
    uint32_t tokens;   /* dense: any number; by expert: the most tokens of an item, at most CUDA_TOKENS_MAX */
    enum cuda_epilogue epilogue;
    const struct cuda_item *items;
    const uint32_t *item_count, *order;
    uint32_t item_limit, x_divisor;
    bool items_early; /* items, item_count and order were complete before the kernel before let this one begin */
    const float *floats; /* instead of x and x_scale: rows of `columns`, rounded as cuda_round does, if cuda_matmul_rounds */
};
/* By expert, where !items_early, a kernel lets the next begin only once its items are complete. */
cudaError_t cuda_matmul(const struct cuda_matmul *arguments, cudaStream_t stream);
/* Dense products of the same x and tokens, as cuda_matmul of each; in one launch where their formats allow it. */
enum { CUDA_PARTS = 3 };
cudaError_t cuda_matmul_parts(const struct cuda_matmul *arguments, uint32_t count, cudaStream_t stream);
/*
 * Whether cuda_matmul has a kernel for many items of up to CUDA_STREAM_TOKENS tokens, whose time is that of the tokens they
 * have (and for as many tokens of very many rows). Without it, or with larger items, the time is that of `tokens`.
 */
enum { CUDA_STREAM_TOKENS = 24 };
bool cuda_matmul_streams(void);
/* Whether cuda_matmul takes the product with its `floats`: no more chunks than chains, and tokens for which that is faster. */
bool cuda_matmul_rounds(const struct cuda_matmul *arguments);

/*
 * The same product with the same bits, for many tokens, where the device and the build have Hopper's matrix unit
 * (cuda_matmul_many_runs): items have any number of tokens, best all of their expert's, and x is interleaved
 * (cuda_activation).
 */
bool cuda_matmul_many_runs(void);
cudaError_t cuda_matmul_many(const struct cuda_matmul *arguments, cudaStream_t stream);

/*
 * Activations for cuda_matmul: half[t] = f16(value / scale[t]), padded with zeros to a multiple of CUDA_CHUNK, where
 * scale[t] is the power of two that brings the row's greatest absolute value to 128 .. 256. A NaN or Inf makes scale NaN.
 * Interleaved, as cuda_matmul_many wants them, of the sixteen pairs of each 32 columns pair 4 t + n stands at 4 n + t.
 */
struct cuda_activation {
    void *half;
    float *scale;
    bool interleaved;
};

/*
 * Causal attention over a paged KV cache. A block holds CUDA_KV_BLOCK consecutive positions of one sequence for one layer,
 * for each KV head:
 *   QUANT_F16: keys [CUDA_KV_BLOCK][head_dim], then values [head_dim][CUDA_KV_BLOCK];
 *   QUANT_Q8_0: keys [head_dim / 32][row][32], where position 8 t + 2 j + e is row 8 j + 2 t + e, and values
 *   [head_dim][CUDA_KV_BLOCK], each a byte q + 128; then scales in f16, of keys [row][head_dim / 32] and of values
 *   [head_dim / 32][CUDA_KV_BLOCK].
 * Q8_0 has a scale for every 32 dimensions of a position's key, and of its value: d = f16(m / 127), m the greatest absolute
 * value of them, and q the integer nearest to x * (127 / m), both in f32, ties to even; 0 where d is 0. Where d is not
 * finite it is NaN. What attention reads is f16(q d), and from there on all is as with QUANT_F16.
 */
enum { CUDA_KV_BLOCK = 32, CUDA_KV_PIECE = 64, CUDA_HEAD_DIM_MAX = 256 };

struct cuda_heads {
    uint32_t heads, kv_heads,
        head_dim; /* head_dim: a multiple of 32, at most CUDA_HEAD_DIM_MAX; 16 >= heads / kv_heads */
    enum quant_type cache; /* QUANT_F16 or QUANT_Q8_0 */
};

/* Bytes of one block of one layer, a multiple of 128. */
size_t cuda_kv_block_bytes(const struct cuda_heads *heads);

/* What the rows of a step are: arrays of `rows` but for the block tables. */
struct cuda_rows {
    const uint32_t *position; /* of each row in its sequence */
    const uint32_t *table;    /* where the block table of the row's sequence begins in `tables` */
    const uint32_t *tables;   /* block ids */
    uint32_t rows;
};

/*
 * The heads of a row's projections: q and k get their RMS norm and NeoX rotation. q goes to `q` [rows][heads][head_dim]
 * in f16, times 1 / sqrt(head_dim) and log2(e) for the softmax in powers of two; k and v go to the cache.
 * qkv: [rows][heads + 2 kv_heads][head_dim]; cos_sin: [positions][head_dim / 2][2].
 */
struct cuda_rope {
    const float *qkv, *q_norm, *k_norm, *cos_sin;
    float epsilon;
};
cudaError_t cuda_rope(const struct cuda_heads *heads, const struct cuda_rows *rows, const struct cuda_rope *rope, void *q,
                      void *cache, cudaStream_t stream);

/*
 * y[row][heads][head_dim] of all rows. A row's context is cut into pieces of CUDA_KV_PIECE positions, in each of which
 * the softmax runs over blocks in rising order; pieces are joined one by one in rising order. Either way of going about
 * it does the same operations on a row, and gives the same bits:
 *   split: one warp a piece, joined by a second kernel, for few rows. partial: cuda_attention_partial_floats(...) floats;
 *   not split (partial NULL): a warp's rows run through all pieces, for many rows; neighbouring tiles of one sequence share
 *   what is read of the cache.
 * A warp takes up to 16 rows of q, the query heads of `tile_tokens` consecutive rows of one sequence: tiles[i] is the
 * first row of tile i and tile_rows[i] how many it has, at most cuda_attention_tile_tokens(heads).
 * context_limit: no row's position reaches it; it sets the launch's size.
 * With out.half, y rounded goes there, and y may stay unwritten; heads * head_dim is at most 8192 then.
 * With rope (where cuda_attention_takes_rope, and split), it does what cuda_rope does, and q is not read. Tile i is row i
 * then, and tiles and tile_rows are not read; no row attends to another's position of this step, but rows may be the
 * same. The cache but for the rows' own positions was complete before the kernel before was launched.
 */
struct cuda_attention {
    struct cuda_heads heads;
    struct cuda_rows rows;
    const void *q;
    void *cache;
    const struct cuda_rope *rope; /* or NULL */
    const uint32_t *tiles, *tile_rows;
    uint32_t tile_count, context_limit;
    float *partial;
    float *y;
    struct cuda_activation out;
};
uint32_t cuda_attention_tile_tokens(const struct cuda_heads *heads);
size_t cuda_attention_partial_floats(const struct cuda_heads *heads, uint32_t rows, uint32_t context_limit);
bool cuda_attention_takes_rope(const struct cuda_heads *heads);
cudaError_t cuda_attention(const struct cuda_attention *arguments, cudaStream_t stream);

/* x[t][columns] = row tokens[t] of a table in the file's format. */
cudaError_t cuda_embed(enum quant_type type, const void *table, size_t row_bytes, uint32_t columns,
                       const uint32_t *tokens, uint32_t rows, float *x, cudaStream_t stream);

/*
 * What stands between two matrix products, one block a row of at most 8192 columns, a multiple of 4:
 *   x[row] += sum over rank of weight[rank] * experts[row * used + rank], in rising rank, where `experts` is given;
 *   x[row] / sqrt(mean of squares + epsilon) * norm goes to `out`, and 1 / the root to `factors` (where given).
 * With `select`, output row i is of x row select[i].
 */
struct cuda_norm {
    float *x;
    uint32_t columns, rows;
    const float *norm;
    float epsilon;
    const float *experts, *weights; /* [rows * used][columns], [rows][used] */
    uint32_t used;
    const uint32_t *select;
    struct cuda_activation out;
    float *factors; /* [rows] */
};
cudaError_t cuda_norm(const struct cuda_norm *arguments, cudaStream_t stream);

/*
 * out[row] = x[row], of at most 8192 columns, a multiple of 4. It lets its successor begin only when its predecessor has
 * ended: that successor may read what kernels before those two wrote without waiting.
 */
cudaError_t cuda_round(const float *x, uint32_t columns, uint32_t rows, const struct cuda_activation *out,
                       cudaStream_t stream);

/*
 * The norm before the router (norm.experts and norm.select NULL), and the router. logits[row][experts] =
 * router[experts][columns] normed x[row], in f32; then of each row the `used` likeliest experts (ties: the lower id)
 * with weights renormalized to sum 1, and the work they make, sorted by expert: items of at most `item_tokens` assignments
 * (row * used + rank), see cuda_matmul.
 */
enum { CUDA_EXPERTS_MAX = 1024, CUDA_EXPERTS_USED_MAX = 32, CUDA_SORT_BLOCKS = 128 };

struct cuda_route {
    struct cuda_norm norm;
    const float *router;
    uint32_t experts, used, item_tokens;
    float *logits;    /* [rows][experts] */
    uint32_t *chosen; /* [rows][used] */
    float *weights;   /* [rows][used] */
    struct cuda_item *items;
    uint32_t *item_count, *order;
    uint32_t *counts; /* scratch, as are norm.factors and logits: [CUDA_SORT_BLOCKS][experts] */
};
/* Most items that `rows` rows can make. */
uint32_t cuda_route_item_limit(uint32_t rows, uint32_t experts, uint32_t used, uint32_t item_tokens);
cudaError_t cuda_route(const struct cuda_route *arguments, cudaStream_t stream);
/* Its first half: the norm and the logits. */
cudaError_t cuda_route_logits(const struct cuda_route *arguments, cudaStream_t stream);

/*
 * The products of a step of one row, which do themselves what stands before and behind them, and dense ones of a few rows:
 * fewer kernels and less code, with the bits of those above.
 *
 * cuda_row_matmul: `count` products of one x, as cuda_matmul_parts. With `norm` (no experts, no select), x is norm->x
 * normed, and norm->out is not written. With `route`, whose logits cuda_route_logits has made just before, it is one
 * product by expert: y row i is that of the expert of rank i; it lets its successor begin when these logits are there.
 * With neither, x may have up to CUDA_ROW_TOKENS rows.
 * cuda_row_mix, behind that: makes route->chosen and weights, and x += sum over rank of weights[rank] *
 * W[chosen[rank]] hidden[rank], in rising rank.
 * The others say whether device and build have them for such matrices; used 0: not by expert.
 */
enum { CUDA_ROW_TOKENS = 8 };
bool cuda_row_takes(const struct cuda_matrix *const *parts, uint32_t count, bool normed, uint32_t used, uint32_t tokens);
bool cuda_row_takes_mix(const struct cuda_matrix *w, uint32_t used);
cudaError_t cuda_row_matmul(const struct cuda_matmul *parts, uint32_t count, const struct cuda_norm *norm,
                            const struct cuda_route *route, cudaStream_t stream);

struct cuda_row_mix {
    const struct cuda_route *route;
    const struct cuda_matrix *w; /* experts */
    const float *hidden;         /* [used][w->columns] */
    float *x;                    /* [w->rows] */
};
cudaError_t cuda_row_mix(const struct cuda_row_mix *arguments, cudaStream_t stream);

/*
 * ids[row] = the first index of the greatest of logits[row][vocab]; UINT32_MAX where a logit is not finite.
 * ranks: [rows][CUDA_SAMPLE_RANKS] for cuda_sample: the greatest of as many shares of the row.
 */
enum {
    CUDA_SAMPLE_PARTS = 32,
    CUDA_SAMPLE_RANKS = 16 * CUDA_SAMPLE_PARTS,
    CUDA_SAMPLE_VOCAB_MAX = 1024 * CUDA_SAMPLE_RANKS, /* of cuda_sample */
};
cudaError_t cuda_greatest(const float *logits, uint32_t vocab, uint32_t rows, uint64_t *ranks, uint32_t *ids,
                          cudaStream_t stream);

/* How a row is sampled: struct sampling and the history of worker/sampler.h. */
struct cuda_draw {
    uint64_t random; /* sampler_random() */
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint32_t top_k;
    uint32_t row;                                     /* of logits and ids; no two have the same */
    uint32_t history, history_length, prompt_length; /* with penalties: tokens history[history .. + history_length) */
};

/* The listed tokens of one of a row's CUDA_SAMPLE_PARTS: scratch of cuda_sample. */
struct cuda_part {
    uint64_t mass;
    uint32_t count;
};

/*
 * ids[row] = the token that sampler_sample chooses from logits[row][vocab], for rows of which cuda_greatest has made ranks
 * and ids; UINT32_MAX stays. Logits of rows with penalties are changed. All pointers but the struct are device memory.
 */
struct cuda_sample {
    float *logits;
    uint32_t vocab;
    const struct cuda_draw *draws; /* [count]; the first `penalized` are those with penalties */
    uint32_t count, penalized;
    const uint32_t *history;
    float *plain; /* [history]: what those tokens' logits were, of rows with penalties */
    uint64_t *ranks;
    struct cuda_part *parts; /* [rows][CUDA_SAMPLE_PARTS] */
    uint32_t *list;          /* [rows][vocab] */
    uint32_t *ids;
};
cudaError_t cuda_sample(const struct cuda_sample *arguments, cudaStream_t stream);

/* A row whose log-probabilities are asked for. */
enum { CUDA_LOGPROBS_MAX = 20 };
struct cuda_asked {
    uint32_t row, count;              /* count: of the likeliest tokens, 1 .. CUDA_LOGPROBS_MAX and not above vocab */
    uint32_t history, history_length; /* of its draw; no history without penalties */
};

/* Natural logarithms, from the logits before penalties and temperature: of the row's token, and of the likeliest. */
struct cuda_alternatives {
    float logprob;
    uint32_t ids[CUDA_LOGPROBS_MAX]; /* falling; ties: the lower id first */
    float logprobs[CUDA_LOGPROBS_MAX];
};

/*
 * out[i] = what sampler_sample makes of row asked[i].row, to the bit: cuda_logprobs_begin between cuda_greatest and
 * cuda_sample, cuda_logprobs_end behind both. Where ids[row] is UINT32_MAX, out[i] is nothing of use. ranks, history,
 * plain and ids are those of cuda_sample. All pointers but the struct are device memory.
 */
struct cuda_logprobs {
    const float *logits;
    uint32_t vocab;
    const struct cuda_asked *asked; /* [count] */
    uint32_t count;
    const uint64_t *ranks;
    const uint32_t *history, *ids;
    const float *plain;
    uint64_t *masses; /* scratch: [count][CUDA_SAMPLE_PARTS] */
    struct cuda_alternatives *out;
};
cudaError_t cuda_logprobs_begin(const struct cuda_logprobs *arguments, cudaStream_t stream);
cudaError_t cuda_logprobs_end(const struct cuda_logprobs *arguments, cudaStream_t stream);

/*
 * busiest[layer] = how many of the layer's `assignments` the expert with most of them has; chosen: [layers][stride].
 */
cudaError_t cuda_busiest(const uint32_t *chosen, uint32_t layers, size_t stride, uint32_t assignments, uint32_t *busiest,
                         cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
