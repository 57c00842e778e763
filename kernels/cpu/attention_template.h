/* The attention kernels for one instruction set; see attention.h for shapes and the order of the sums. */

#include "kernels/cpu/attention.h"
#include "kernels/cpu/vector_lanes.h"

/* Rows computed together and the vectors of each, so that the sums fill the registers. It changes no row's result. */
#if VECTOR_ISA == VECTOR_ISA_AVX512
enum { TILE_ROWS = 8, TILE_VECTORS = 2 };
#elif VECTOR_ISA == VECTOR_ISA_AVX2
enum { TILE_ROWS = 4, TILE_VECTORS = 1 };
#else
enum { TILE_ROWS = 2, TILE_VECTORS = 1 };
#endif

enum { HALF = 16, VALUE_TILE = 32, TILE_WIDTH = TILE_VECTORS * 16, GROUP = 32 /* of Q8_0 */ };

struct tile {
    _Alignas(64) float q[CPU_HEAD_DIM_MAX][TILE_ROWS];
    _Alignas(64) float weight[TILE_ROWS][CPU_KV_PIECE]; /* scores, then e of the softmax */
    uint32_t length[TILE_ROWS];                          /* positions of the piece that the row sees */
    uint32_t shortest, longest;
    const uint16_t *blocks[CPU_KV_PIECE / CPU_KV_BLOCK];
};

static inline uint16_t *q8_0_scales(void *block, uint32_t head_dim) {
    uint32_t padded = (head_dim + VALUE_TILE - 1) / VALUE_TILE * VALUE_TILE;
    return (uint16_t *)((char *)block + (size_t)CPU_KV_BLOCK * (head_dim + padded));
}

/* Makes a group of n <= GROUP dimensions of Q8_0; returns its scale. */
static inline uint16_t group_quantize(const float *x, uint32_t n, int8_t *q) {
    enum { INFINITE = 0x7c00, NOT_A_NUMBER = 0x7e00 };
    uint32_t greatest = 0; /* by their bits absolute values are in order, NaN above all */
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        greatest = bits > greatest ? bits : greatest;
    }
    float most;
    memcpy(&most, &greatest, sizeof most);
    uint16_t scale = cpu_f32_to_f16(most / 127.0f);
    bool finite = scale < INFINITE;
    float factor = finite && scale > 0 ? 127.0f / most : 0;
    for (uint32_t i = 0; i < n; i++)
        q[i] = (int8_t)(finite ? rintf(x[i] * factor) : 0);
    return finite ? scale : NOT_A_NUMBER;
}

static void store_q8_0(void *block, uint32_t index, uint32_t head_dim, const float *key, const float *value) {
    uint32_t groups = (head_dim + GROUP - 1) / GROUP;
    int8_t *keys = (int8_t *)block + (size_t)(index / HALF) * head_dim * HALF + index % HALF;
    int8_t *values = (int8_t *)block + (size_t)CPU_KV_BLOCK * head_dim + (size_t)index * VALUE_TILE;
    uint16_t *scales = q8_0_scales(block, head_dim) + index;
    for (uint32_t g = 0; g < groups; g++) {
        uint32_t d = g * GROUP, n = head_dim - d < GROUP ? head_dim - d : GROUP;
        int8_t q[GROUP];
        scales[g * CPU_KV_BLOCK] = group_quantize(key + d, n, q);
        for (uint32_t i = 0; i < n; i++)
            keys[(size_t)(d + i) * HALF] = q[i];
        memset(q, 0, sizeof q);
        scales[(groups + g) * CPU_KV_BLOCK] = group_quantize(value + d, n, q);
        memcpy(values + (size_t)g * CPU_KV_BLOCK * VALUE_TILE, q, sizeof q);
    }
}

/* A block of Q8_0 as one of f16. */
static void expand_q8_0(const void *block, uint32_t head_dim, uint16_t *to) {
    uint32_t groups = (head_dim + GROUP - 1) / GROUP;
    const uint16_t *scales = q8_0_scales((void *)block, head_dim);
    const int8_t *q = block;
    for (uint32_t half = 0; half < CPU_KV_BLOCK / HALF; half++)
        for (uint32_t g = 0; g < groups; g++) {
            struct lanes scale = lanes_load_f16(scales + g * CPU_KV_BLOCK + half * HALF);
            uint32_t n = head_dim - g * GROUP < GROUP ? head_dim - g * GROUP : GROUP;
            for (uint32_t i = 0; i < n; i++, q += HALF, to += HALF)
                lanes_store_f16(to, lanes_mul(lanes_load_i8(q), scale));
        }
    scales += groups * CPU_KV_BLOCK;
    for (uint32_t row = 0; row < groups * CPU_KV_BLOCK; row++) {
        struct lanes scale = lanes_set(cpu_f16_to_f32(scales[row]));
        for (int v = 0; v < VALUE_TILE / HALF; v++, q += HALF, to += HALF)
            lanes_store_f16(to, lanes_mul(lanes_load_i8(q), scale));
    }
}

static void store_f16(void *block, uint32_t index, uint32_t head_dim, const float *key, const float *value) {
    uint16_t *keys = (uint16_t *)block + (size_t)(index / HALF) * head_dim * HALF + index % HALF;
    uint16_t *values = (uint16_t *)block + (size_t)CPU_KV_BLOCK * head_dim + (size_t)index * VALUE_TILE;
    for (uint32_t d = 0; d < head_dim; d += HALF) {
        uint32_t n = head_dim - d < HALF ? head_dim - d : HALF;
        uint16_t part[HALF];
        lanes_store_f16(part, n == HALF ? lanes_load(key + d) : lanes_load_part(key + d, n));
        for (uint32_t i = 0; i < n; i++)
            keys[(size_t)(d + i) * HALF] = part[i];
    }
    /* Values are padded to whole tiles with zeros. */
    for (uint32_t d = 0; d < head_dim; d += VALUE_TILE, values += CPU_KV_BLOCK * VALUE_TILE)
        for (uint32_t e = d; e < d + VALUE_TILE; e += HALF) {
            uint32_t n = e >= head_dim ? 0 : head_dim - e < HALF ? head_dim - e : HALF;
            lanes_store_f16(values + (e - d), n == HALF ? lanes_load(value + e) : lanes_load_part(value + e, n));
        }
}

static void VECTOR_NAME(store)(enum quant_type type, void *block, uint32_t index, uint32_t head_dim, const float *key,
                               const float *value) {
    if (type == QUANT_Q8_0)
        store_q8_0(block, index, head_dim, key, value);
    else
        store_f16(block, index, head_dim, key, value);
}

/*
 * Scores of TILE_WIDTH positions, without the scale. Meanwhile the same positions' values and the next block's keys are
 * fetched: where the cache comes from memory, blocks are too small for the processor to run ahead by itself.
 */
static inline void tile_scores(struct tile *tile, uint32_t head_dim, uint32_t position) {
    uint32_t block = position / CPU_KV_BLOCK, next = position + CPU_KV_BLOCK < tile->longest ? block + 1 : block;
    size_t offset = (size_t)(position % CPU_KV_BLOCK) * head_dim;
    const uint16_t *keys = tile->blocks[block] + offset, *next_keys = tile->blocks[next] + offset;
    const uint16_t *values = keys + (size_t)CPU_KV_BLOCK * head_dim;
    struct lanes sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++)
            sum[r][v] = lanes_set(0);
    for (uint32_t d = 0; d < head_dim; d++) {
        __builtin_prefetch(values + (size_t)d * TILE_WIDTH, 0, 2); /* a piece is larger than the first cache */
        __builtin_prefetch(next_keys + (size_t)d * TILE_WIDTH, 0, 2);
        struct lanes key[TILE_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++)
            key[v] = lanes_load_f16(keys + ((size_t)v * head_dim + d) * HALF);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++) {
            struct lanes q = lanes_set(tile->q[d][r]);
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[r][v] = lanes_fma(q, key[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++)
            lanes_store(tile->weight[r] + position + v * HALF, sum[r][v]);
}

/* Turns a row's scores into the softmax's numerators. */
static inline void row_softmax(float *score, uint32_t length, float scale, float *max, float *sum) {
    for (uint32_t p = length; p % HALF; p++)
        score[p] = -INFINITY;
    struct lanes factor = lanes_set(scale), greatest = lanes_set(-INFINITY), total = lanes_set(0);
    for (uint32_t p = 0; p < length; p += HALF) {
        struct lanes s = lanes_mul(lanes_load(score + p), factor);
        lanes_store(score + p, s);
        greatest = lanes_max(s, greatest);
    }
    *max = lanes_greatest(greatest);
    for (uint32_t p = 0; p < length; p += HALF) {
        struct lanes e = lanes_exp(lanes_sub(lanes_load(score + p), lanes_set(*max)));
        lanes_store(score + p, e);
        total = lanes_add(total, e);
    }
    *sum = lanes_sum(total);
}

/* Weighted sums of TILE_WIDTH components of the values, over the positions that all rows of the tile see. */
static inline void tile_values(const struct tile *tile, size_t offset, float out[TILE_ROWS][TILE_WIDTH]) {
    struct lanes sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++)
            sum[r][v] = lanes_set(0);
    for (uint32_t start = 0; start < tile->shortest; start += CPU_KV_BLOCK) {
        const uint16_t *values = tile->blocks[start / CPU_KV_BLOCK] + offset;
        uint32_t end = tile->shortest - start < CPU_KV_BLOCK ? tile->shortest : start + CPU_KV_BLOCK;
        for (uint32_t p = start; p < end; p++, values += VALUE_TILE) {
            struct lanes value[TILE_VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++)
                value[v] = lanes_load_f16(values + v * 16);
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; r++) {
                struct lanes weight = lanes_set(tile->weight[r][p]);
#pragma GCC unroll 2
                for (int v = 0; v < TILE_VECTORS; v++)
                    sum[r][v] = lanes_fma(weight, value[v], sum[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++)
            lanes_store(out[r] + v * 16, sum[r][v]);
}

/* The positions of one row beyond those that all rows of the tile see. */
static inline void row_values_rest(const struct tile *tile, uint32_t row, size_t offset, float out[TILE_WIDTH]) {
    for (uint32_t p = tile->shortest; p < tile->length[row]; p++) {
        const uint16_t *values = tile->blocks[p / CPU_KV_BLOCK] + offset + (size_t)(p % CPU_KV_BLOCK) * VALUE_TILE;
        for (int v = 0; v < TILE_VECTORS; v++) {
            struct lanes sum = lanes_load(out + v * 16);
            lanes_store(out + v * 16, lanes_fma(lanes_set(tile->weight[row][p]), lanes_load_f16(values + v * 16), sum));
        }
    }
}

/* Rows first to first + count (1 to TILE_ROWS); a tile that is not full repeats its last row. */
static void tile_run(struct tile *tile, const struct cpu_attention_rows *rows, uint32_t piece, uint32_t first,
                     uint32_t count, float *partial, size_t row_stride) {
    uint32_t head_dim = rows->head_dim, start = piece * CPU_KV_PIECE;
    tile->shortest = CPU_KV_PIECE;
    tile->longest = 0;
    for (uint32_t r = 0; r < TILE_ROWS; r++) {
        uint32_t row = first + (r < count ? r : count - 1), token = row / rows->heads;
        const float *q = rows->q + token * rows->token_stride + (size_t)(row % rows->heads) * head_dim;
        for (uint32_t d = 0; d < head_dim; d++)
            tile->q[d][r] = q[d];
        uint32_t length = rows->position + token + 1 - start;
        tile->length[r] = length < CPU_KV_PIECE ? length : CPU_KV_PIECE;
        tile->shortest = tile->length[r] < tile->shortest ? tile->length[r] : tile->shortest;
        tile->longest = tile->length[r] > tile->longest ? tile->length[r] : tile->longest;
    }

    for (uint32_t p = 0; p < tile->longest; p += TILE_WIDTH)
        tile_scores(tile, head_dim, p);
    float *result = partial + first * row_stride;
    size_t padded = (head_dim + VALUE_TILE - 1) / VALUE_TILE * VALUE_TILE;
    for (uint32_t r = 0; r < TILE_ROWS; r++) {
        float max, sum;
        row_softmax(tile->weight[r], tile->length[r], rows->scale, &max, &sum);
        if (r < count) {
            result[r * row_stride + padded] = max;
            result[r * row_stride + padded + 1] = sum;
        }
    }
    for (uint32_t d = 0; d < padded; d += TILE_WIDTH) {
        _Alignas(64) float out[TILE_ROWS][TILE_WIDTH];
        size_t offset = (size_t)CPU_KV_BLOCK * (head_dim + d / VALUE_TILE * VALUE_TILE) + d % VALUE_TILE;
        tile_values(tile, offset, out);
        for (uint32_t r = 0; r < count; r++) {
            row_values_rest(tile, r, offset, out[r]);
            memcpy(result + r * row_stride + d, out[r], sizeof out[r]);
        }
    }
}

static void VECTOR_NAME(run)(const struct cpu_attention_rows *rows, uint32_t piece, float *partial, size_t row_stride) {
    struct tile tile;
    uint32_t start = piece * CPU_KV_PIECE, end = rows->position + rows->tokens;
    uint16_t *expanded = rows->expanded;
    for (uint32_t p = start; p < end && p < start + CPU_KV_PIECE; p += CPU_KV_BLOCK) {
        const char *cache = rows->cache;
        const void *block = cache + rows->blocks[p / CPU_KV_BLOCK] * rows->block_stride;
        if (rows->type == QUANT_Q8_0) {
            expand_q8_0(block, rows->head_dim, expanded);
            block = expanded;
            expanded += cpu_kv_block_bytes(QUANT_F16, rows->head_dim) / sizeof *expanded;
        }
        tile.blocks[(p - start) / CPU_KV_BLOCK] = block;
    }
    uint32_t skipped = start > rows->position ? start - rows->position : 0; /* tokens that end before the piece */
    for (uint32_t row = skipped * rows->heads, all = rows->tokens * rows->heads; row < all; row += TILE_ROWS)
        tile_run(&tile, rows, piece, row, all - row < TILE_ROWS ? all - row : TILE_ROWS, partial, row_stride);
}

static void VECTOR_NAME(combine)(const float *partial, uint32_t pieces, size_t piece_stride, uint32_t head_dim,
                                 float *y) {
    uint32_t whole = head_dim & ~15u, rest = head_dim & 15;
    size_t padded = (head_dim + VALUE_TILE - 1) / VALUE_TILE * VALUE_TILE;
    float max = -INFINITY, total = 0;
    for (uint32_t i = 0; i < pieces; i++) {
        float piece_max = partial[i * piece_stride + padded];
        max = piece_max > max ? piece_max : max;
    }
    for (uint32_t d = 0; d < head_dim; d++)
        y[d] = 0;
    for (uint32_t i = 0; i < pieces; i++) {
        const float *out = partial + i * piece_stride;
        struct lanes weight = lanes_exp(lanes_set(out[padded] - max));
        total = lanes_first(lanes_fma(weight, lanes_set(out[padded + 1]), lanes_set(total)));
        for (uint32_t d = 0; d < whole; d += 16)
            lanes_store(y + d, lanes_fma(weight, lanes_load(out + d), lanes_load(y + d)));
        if (rest) {
            struct lanes sum = lanes_fma(weight, lanes_load(out + whole), lanes_load_part(y + whole, rest));
            lanes_store_part(y + whole, sum, rest);
        }
    }
    for (uint32_t d = 0; d < head_dim; d++)
        y[d] /= total;
}

const struct cpu_attention_kernels VECTOR_NAME(cpu_attention) = {
    .store = VECTOR_NAME(store),
    .run = VECTOR_NAME(run),
    .combine = VECTOR_NAME(combine),
};
