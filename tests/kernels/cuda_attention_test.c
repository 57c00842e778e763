#include <math.h>
#include <stdbool.h>
#include <time.h>

#include "kernels/cpu/f16.h"
#include "kernels/cuda/cuda.h"
#include "tests/kernels/cuda_test.h"

/*
 * cuda_rope and cuda_attention against float64 on random shapes: several sequences of odd lengths, blocks scattered over a
 * cache of NaN, all rows at once, split and not split, tiles in any order, and rows alone. All ways must give the same bits,
 * and where they round y to activations those of cuda_round; and so must cuda_rope of all rows and of each alone, and
 * attention that does what cuda_rope does. Of a cache in Q8_0 float64 reads what is in it, which is held against what
 * should be.
 */

enum { SEQUENCES = 3, BLOCKS = 64, POSITIONS = BLOCKS * CUDA_KV_BLOCK, COLUMNS_MAX = 8192 };

struct problem {
    struct cuda_heads heads;
    uint32_t lengths[SEQUENCES], rows, longest;
    float *qkv, *q_norm, *k_norm, *cos_sin;
    uint32_t *position, *table, tables[SEQUENCES * BLOCKS];
};

static float *random_floats(struct random *random, size_t n, float size) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = random_float(random) * size;
    return x;
}

static void shuffle(struct random *random, uint32_t *x, uint32_t n) {
    for (uint32_t i = n - 1; i > 0; i--) {
        const uint32_t j = random_below(random, i + 1), swap = x[i];
        x[i] = x[j];
        x[j] = swap;
    }
}

/* LONG: one context of up to POSITIONS; MANY: more than 512 rows, of which some begin at a multiple of 8. */
enum kind { SHORT, LONG, MANY, KINDS };

static uint32_t random_length(struct random *random, enum kind kind, int sequence) {
    if (kind == MANY)
        return sequence ? 256 + random_below(random, 44) : 8 * (1 + random_below(random, 8));
    return 1 + random_below(random, sequence == 0 ? 70 : sequence == 1 && kind == LONG ? POSITIONS : 300);
}

static void problem_make(struct random *random, enum kind kind, enum quant_type cache, struct problem *p) {
    static const uint32_t dims[] = {32, 64, 96, 128, 256};
    p->heads.cache = cache;
    p->heads.head_dim = dims[kind == LONG ? 3 : random_below(random, 5)];
    p->heads.kv_heads = kind == LONG ? 1 : 1 + random_below(random, 4);
    p->heads.heads = p->heads.kv_heads * (kind == LONG ? 8 : 1 + random_below(random, 12));
    p->rows = p->longest = 0;
    for (int s = 0; s < SEQUENCES; s++) {
        p->lengths[s] = random_length(random, kind, s);
        p->rows += p->lengths[s];
        p->longest = p->lengths[s] > p->longest ? p->lengths[s] : p->longest;
    }
    const uint32_t dim = p->heads.head_dim, all = p->heads.heads + 2 * p->heads.kv_heads;
    p->qkv = random_floats(random, (size_t)p->rows * all * dim, 3);
    p->q_norm = random_floats(random, dim, 2);
    p->k_norm = random_floats(random, dim, 2);
    p->cos_sin = malloc(sizeof *p->cos_sin * p->longest * dim);
    for (uint32_t position = 0; position < p->longest; position++)
        for (uint32_t i = 0; i < dim / 2; i++) {
            const double angle = position * pow(1e6, -2.0 * i / dim);
            p->cos_sin[(position * dim / 2 + i) * 2] = (float)cos(angle);
            p->cos_sin[(position * dim / 2 + i) * 2 + 1] = (float)sin(angle);
        }
    p->position = malloc(sizeof *p->position * p->rows);
    p->table = malloc(sizeof *p->table * p->rows);
    for (uint32_t i = 0; i < SEQUENCES * BLOCKS; i++)
        p->tables[i] = i;
    shuffle(random, p->tables, SEQUENCES * BLOCKS);
    uint32_t row = 0;
    for (uint32_t s = 0; s < SEQUENCES; s++)
        for (uint32_t i = 0; i < p->lengths[s]; i++, row++) {
            p->position[row] = i;
            p->table[row] = s * BLOCKS;
        }
}

static void problem_free(struct problem *p) {
    free(p->qkv);
    free(p->q_norm);
    free(p->k_norm);
    free(p->cos_sin);
    free(p->position);
    free(p->table);
}

static void head_reference(const struct problem *p, uint32_t row, uint32_t head, const float *weight, double *out) {
    const uint32_t dim = p->heads.head_dim, all = p->heads.heads + 2 * p->heads.kv_heads;
    const float *in = p->qkv + ((size_t)row * all + head) * dim;
    double x[CUDA_HEAD_DIM_MAX], squares = 0;
    for (uint32_t i = 0; i < dim; i++)
        squares += (double)in[i] * in[i];
    for (uint32_t i = 0; i < dim; i++)
        x[i] = in[i] / sqrt(squares / dim + 1e-6) * weight[i];
    for (uint32_t i = 0; i < dim / 2; i++) {
        const float *r = p->cos_sin + ((size_t)p->position[row] * dim / 2 + i) * 2;
        out[i] = x[i] * r[0] - x[i + dim / 2] * r[1];
        out[i + dim / 2] = x[i] * r[1] + x[i + dim / 2] * r[0];
    }
}

/*
 * What a block in Q8_0 has of a position: keys, or values, of a KV head as attention reads them, and their scales. By the
 * words of cuda.h.
 */
static void unpack(const struct problem *p, const unsigned char *cache, uint32_t row, uint32_t kv, bool keys, double *x,
                   double *scales) {
    const uint32_t dim = p->heads.head_dim, groups = dim / 32, at = p->position[row] % CUDA_KV_BLOCK;
    const uint32_t t = at / 8, j = at % 8 / 2, e = at % 2, key_row = 8 * j + 2 * t + e;
    const uint32_t id = p->tables[p->table[row] + p->position[row] / CUDA_KV_BLOCK];
    const unsigned char *head = cache + cuda_kv_block_bytes(&p->heads) * id + (size_t)kv * 68 * dim;
    const uint16_t *key_scales = (const uint16_t *)(head + 64 * dim), *value_scales = key_scales + 32 * groups;
    for (uint32_t d = 0; d < dim; d++) {
        const uint16_t scale = keys ? key_scales[key_row * groups + d / 32] : value_scales[d / 32 * 32 + at];
        const int q = keys ? head[(d / 32 * 32 + key_row) * 32 + d % 32] : head[32 * dim + d * 32 + at];
        scales[d / 32] = cpu_f16_to_f32(scale);
        x[d] = cpu_f16_to_f32(cpu_f32_to_f16((float)(q - 128) * cpu_f16_to_f32(scale)));
    }
}

/*
 * A row's key or value as attention reads it. off: the greatest distance from what Q8_0 should hold, in scales: half of one,
 * and what 127 are off because the scale, and what is read, is rounded to f16.
 */
static void key_or_value(const struct problem *p, const unsigned char *cache, uint32_t row, uint32_t kv, bool key,
                         double *x, double *off) {
    const uint32_t dim = p->heads.head_dim, all = p->heads.heads + 2 * p->heads.kv_heads;
    const float *v = p->qkv + ((size_t)row * all + p->heads.heads + p->heads.kv_heads + kv) * dim;
    double stored[CUDA_HEAD_DIM_MAX], scales[CUDA_HEAD_DIM_MAX / 32];
    if (key)
        head_reference(p, row, p->heads.heads + kv, p->k_norm, x);
    for (uint32_t d = 0; d < dim && !key; d++)
        x[d] = v[d];
    if (p->heads.cache == QUANT_F16)
        return;
    unpack(p, cache, row, kv, key, stored, scales);
    for (uint32_t d = 0; d < dim; d++) {
        const double distance = fabs(stored[d] - x[d]) / scales[d / 32];
        if (!(distance <= *off))
            *off = isnan(distance) ? INFINITY : distance;
        x[d] = stored[d];
    }
    for (uint32_t d = 0; d < dim; d += 32) { /* the greatest value of a group is 127 scales: no scale is too large */
        double greatest = 0;
        for (uint32_t i = d; i < d + 32; i++)
            greatest = fabs(x[i]) > greatest ? fabs(x[i]) : greatest;
        *off = greatest / scales[d / 32] > 126.9 ? *off : INFINITY;
    }
}

/* Relative error of some rows' y. */
static double compare(struct random *random, const struct problem *p, const unsigned char *cache, const float *y,
                      double *off) {
    const uint32_t dim = p->heads.head_dim;
    double error = 0, norm = 0;
    *off = 0;
    for (int trial = 0; trial < 12; trial++) {
        const uint32_t row = random_below(random, p->rows), head = random_below(random, p->heads.heads);
        const uint32_t kv = head / (p->heads.heads / p->heads.kv_heads), first = row - p->position[row];
        double q[CUDA_HEAD_DIM_MAX], k[CUDA_HEAD_DIM_MAX], v[CUDA_HEAD_DIM_MAX], out[CUDA_HEAD_DIM_MAX] = {0};
        double total = 0;
        head_reference(p, row, head, p->q_norm, q);
        for (uint32_t r = first; r <= row; r++) {
            double score = 0;
            key_or_value(p, cache, r, kv, true, k, off);
            key_or_value(p, cache, r, kv, false, v, off);
            for (uint32_t d = 0; d < dim; d++)
                score += q[d] * k[d];
            const double weight = exp(score / sqrt(dim));
            total += weight;
            for (uint32_t d = 0; d < dim; d++)
                out[d] += weight * v[d];
        }
        for (uint32_t d = 0; d < dim; d++) {
            const double want = out[d] / total, got = y[((size_t)row * p->heads.heads + head) * dim + d];
            error += (got - want) * (got - want);
            norm += want * want;
        }
    }
    return sqrt(error / norm);
}

/* Whether cuda_rope of one row after the other makes the same q and cache as it made of all. */
static bool rope_alone_is_same(const struct problem *p, const struct cuda_rows *rows, const struct cuda_rope *rope,
                               const void *q, const void *cache) {
    const uint32_t dim = p->heads.head_dim, all = p->heads.heads + 2 * p->heads.kv_heads;
    const size_t q_row = 2 * (size_t)p->heads.heads * dim, q_bytes = q_row * p->rows,
                 cache_bytes = cuda_kv_block_bytes(&p->heads) * SEQUENCES * BLOCKS;
    unsigned char *q_alone = cuda_test_buffer(NULL, q_bytes), *cache_alone = cuda_test_buffer(NULL, cache_bytes);
    for (uint32_t row = 0; row < p->rows; row++) {
        const struct cuda_rows one = {rows->position + row, rows->table + row, rows->tables, 1};
        struct cuda_rope of_one = *rope;
        of_one.qkv += (size_t)row * all * dim;
        CUDA_CHECK(cuda_rope(&p->heads, &one, &of_one, q_alone + q_row * row, cache_alone, 0));
    }
    unsigned char *want = malloc(q_bytes + cache_bytes), *got = malloc(q_bytes + cache_bytes);
    cuda_test_fetch(want, q_alone, q_bytes);
    cuda_test_fetch(want + q_bytes, cache_alone, cache_bytes);
    cuda_test_fetch(got, q, q_bytes);
    cuda_test_fetch(got + q_bytes, cache, cache_bytes);
    const bool same = memcmp(want, got, q_bytes + cache_bytes) == 0;
    cudaFree(q_alone);
    cudaFree(cache_alone);
    free(want);
    free(got);
    return same;
}

/* Whether y comes rounded as cuda_round rounds it, from split and not split. */
static bool rounds_alike(const struct cuda_attention *attention, float *partial, const float *y) {
    const uint32_t columns = attention->heads.heads * attention->heads.head_dim, rows = attention->rows.rows;
    const uint32_t padded = (columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    const size_t half_bytes = (size_t)2 * rows * padded, scale_bytes = sizeof(float) * rows;
    struct cuda_attention a = *attention;
    unsigned char *bytes[3];
    float *from = cuda_test_buffer(y, sizeof(float) * rows * columns);
    for (int way = 0; way < 3; way++) {
        a.y = cuda_test_buffer(NULL, sizeof(float) * rows * columns);
        a.partial = way == 1 ? partial : NULL;
        a.out = (struct cuda_activation){cuda_test_buffer(NULL, half_bytes), cuda_test_buffer(NULL, scale_bytes),
                                        .interleaved = rows % 2};
        if (way < 2)
            CUDA_CHECK(cuda_attention(&a, 0));
        else
            CUDA_CHECK(cuda_round(from, columns, rows, &a.out, 0));
        bytes[way] = malloc(half_bytes + scale_bytes);
        cuda_test_fetch(bytes[way], a.out.half, half_bytes);
        cuda_test_fetch(bytes[way] + half_bytes, a.out.scale, scale_bytes);
        cudaFree(a.y);
        cudaFree(a.out.half);
        cudaFree(a.out.scale);
    }
    const bool alike = memcmp(bytes[0], bytes[2], half_bytes + scale_bytes) == 0 &&
                       memcmp(bytes[1], bytes[2], half_bytes + scale_bytes) == 0;
    for (int way = 0; way < 3; way++)
        free(bytes[way]);
    cudaFree(from);
    return alike;
}

/* A sequence's rows in tiles: not split, in any order, split; a row a tile: not split and split. */
enum way { WHOLE, MIXED, SPLIT, ROWS_WHOLE, ROWS_SPLIT, WAYS };

/* Cuts the rows into tiles for a way. */
static void make_tiles(struct random *random, const struct problem *p, enum way way, struct cuda_attention *a) {
    const uint32_t most = way < ROWS_WHOLE ? cuda_attention_tile_tokens(&p->heads) : 1;
    uint32_t *tiles = malloc(p->rows * sizeof *tiles), *counts = malloc(p->rows * sizeof *counts);
    a->tile_count = 0;
    for (uint32_t row = 0; row < p->rows; row++)
        if (p->position[row] % most == 0)
            tiles[a->tile_count++] = row;
    if (way == MIXED)
        shuffle(random, tiles, a->tile_count);
    for (uint32_t i = 0; i < a->tile_count; i++) {
        const uint32_t row = tiles[i], left = p->lengths[p->table[row] / BLOCKS] - p->position[row];
        counts[i] = left < most ? left : most;
    }
    CUDA_CHECK(cudaMemcpy((void *)a->tiles, tiles, sizeof *tiles * a->tile_count, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy((void *)a->tile_rows, counts, sizeof *counts * a->tile_count, cudaMemcpyHostToDevice));
    free(tiles);
    free(counts);
}

/* Overwrites what a block holds of a position with NaN: in Q8_0 of a key alone the scales. */
static void spoil(const struct cuda_heads *heads, void *block, uint32_t position) {
    const uint32_t dim = heads->head_dim, groups = dim / 32, at = position % CUDA_KV_BLOCK;
    for (uint32_t kv = 0; kv < heads->kv_heads; kv++) {
        uint16_t *halves = (uint16_t *)block + (size_t)kv * 2 * dim * CUDA_KV_BLOCK;
        unsigned char *bytes = (unsigned char *)block + (size_t)kv * 68 * dim;
        uint16_t *scales = (uint16_t *)(bytes + 64 * dim), key_row = at % 8 / 2 * 8 + at / 8 * 2 + at % 2;
        if (heads->cache == QUANT_F16)
            for (uint32_t d = 0; d < dim; d++)
                halves[at * dim + d] = halves[(dim + d) * CUDA_KV_BLOCK + at] = 0xffff;
        for (uint32_t d = 0; d < dim && heads->cache == QUANT_Q8_0; d++) {
            bytes[(dim + d) * CUDA_KV_BLOCK + at] = 0xff;
            scales[key_row * groups + d / 32] = scales[32 * groups + d / 32 * 32 + at] = 0xffff;
        }
    }
}

/* A position of so many; every other time one that begins or ends a block, if there is one. */
static uint32_t random_position(struct random *random, uint32_t length) {
    const uint32_t position = random_below(random, length), first = position / CUDA_KV_BLOCK * CUDA_KV_BLOCK,
                   edge = first + random_below(random, 2) * (CUDA_KV_BLOCK - 1);
    return edge < length && random_below(random, 2) ? edge : position;
}

/*
 * Whether attention that does what cuda_rope does, split and not, makes the same y, and cache, of steps of a row of each
 * sequence, or of the first, and of copies of these, whose own positions the cache did not have. y: of all rows.
 */
static bool rope_within_is_same(struct random *random, const struct problem *p, const struct cuda_attention *attention,
                                const struct cuda_rope *rope, const float *y) {
    enum { ROWS = 80 };
    const uint32_t dim = p->heads.head_dim, all = p->heads.heads + 2 * p->heads.kv_heads;
    const size_t y_row = sizeof *y * p->heads.heads * dim, qkv_row = sizeof(float) * all * dim,
                 cache_bytes = cuda_kv_block_bytes(&p->heads) * SEQUENCES * BLOCKS;
    unsigned char *want = malloc(cache_bytes), *got = malloc(cache_bytes);
    float *got_y = malloc(ROWS * y_row), *qkv = malloc(ROWS * qkv_row);
    bool same = true;
    cuda_test_fetch(want, attention->cache, cache_bytes);
    for (int turn = 0; turn < 8; turn++) {
        const uint32_t some = 1 + random_below(random, 16), counts[] = {some, SEQUENCES, ROWS / 2, ROWS};
        const uint32_t rows = counts[turn % 4];
        const bool split = turn < 4;
        uint32_t from[ROWS], position[ROWS], table[ROWS];
        memcpy(got, want, cache_bytes);
        for (uint32_t i = 0, first = 0; i < rows; i++) {
            from[i] = i < SEQUENCES ? first + random_position(random, p->lengths[i]) : from[random_below(random, SEQUENCES)];
            first += i < SEQUENCES ? p->lengths[i] : 0;
            position[i] = p->position[from[i]];
            table[i] = p->table[from[i]];
            memcpy(qkv + i * all * dim, p->qkv + (size_t)from[i] * all * dim, qkv_row);
            spoil(&p->heads, got + cuda_kv_block_bytes(&p->heads) * p->tables[table[i] + position[i] / CUDA_KV_BLOCK],
                  position[i]);
        }
        struct cuda_attention a = *attention;
        if (turn == 3) /* far more pieces than there are, which another kernel takes */
            a.context_limit += (1 << 16) / (rows * p->heads.kv_heads) * CUDA_KV_PIECE;
        struct cuda_rope of_rows = *rope;
        of_rows.qkv = cuda_test_buffer(qkv, rows * qkv_row);
        a.rows.position = cuda_test_buffer(position, sizeof position);
        a.rows.table = cuda_test_buffer(table, sizeof table);
        a.rows.rows = a.tile_count = rows;
        a.cache = cuda_test_buffer(got, cache_bytes);
        float *partial = cuda_test_buffer(NULL, sizeof(float) * cuda_attention_partial_floats(&p->heads, rows, a.context_limit));
        a.partial = split ? partial : NULL;
        a.y = cuda_test_buffer(NULL, rows * y_row);
        a.q = a.tiles = a.tile_rows = NULL;
        a.rope = &of_rows;
        CUDA_CHECK(cuda_attention(&a, 0));
        cuda_test_fetch(got_y, a.y, rows * y_row);
        cuda_test_fetch(got, a.cache, cache_bytes);
        same = same && memcmp(want, got, cache_bytes) == 0;
        for (uint32_t i = 0; i < rows; i++)
            same = same && memcmp(got_y + i * y_row / sizeof *y, y + from[i] * y_row / sizeof *y, y_row) == 0;
        void *device[] = {(void *)of_rows.qkv, (void *)a.rows.position, (void *)a.rows.table, a.cache, partial, a.y};
        for (size_t i = 0; i < sizeof device / sizeof *device; i++)
            cudaFree(device[i]);
    }
    free(want);
    free(got);
    free(got_y);
    free(qkv);
    return same;
}

/* Groups that Q8_0 cannot hold become NaN and no other does; one of zeros, and of what is too small for f16, is zeros. */
static void test_odd_groups(struct random *random) {
    struct problem p;
    problem_make(random, MANY, QUANT_Q8_0, &p);
    const uint32_t dim = p.heads.head_dim, all = p.heads.heads + 2 * p.heads.kv_heads, kv = p.heads.kv_heads - 1;
    const size_t cache_bytes = cuda_kv_block_bytes(&p.heads) * SEQUENCES * BLOCKS;
    static const float odd[] = {NAN, INFINITY, -INFINITY, 1e7f, 0, 1e-7f};
    enum { ODD = sizeof odd / sizeof *odd };
    for (uint32_t i = 0; i < ODD; i++) { /* of values of row i of the second sequence, group i % groups */
        float *v = p.qkv + ((size_t)(p.lengths[0] + i) * all + p.heads.heads + p.heads.kv_heads + kv) * dim;
        for (uint32_t d = 0; d < 32; d++)
            v[i * 32 % dim + d] = i < 4 && d != i ? v[i * 32 % dim + d] : odd[i];
    }
    p.qkv[((size_t)(p.lengths[0] + 7) * all + p.heads.heads + kv) * dim] = NAN; /* of a key: its norm spreads it */
    const struct cuda_rope rope = {
        .qkv = cuda_test_buffer(p.qkv, sizeof(float) * p.rows * all * dim),
        .q_norm = cuda_test_buffer(p.q_norm, sizeof(float) * dim),
        .k_norm = cuda_test_buffer(p.k_norm, sizeof(float) * dim),
        .cos_sin = cuda_test_buffer(p.cos_sin, sizeof(float) * p.longest * dim),
        .epsilon = 1e-6f,
    };
    const struct cuda_rows rows = {cuda_test_buffer(p.position, sizeof(uint32_t) * p.rows),
                                   cuda_test_buffer(p.table, sizeof(uint32_t) * p.rows),
                                   cuda_test_buffer(p.tables, sizeof p.tables), p.rows};
    void *q = cuda_test_buffer(NULL, 2 * (size_t)p.rows * p.heads.heads * dim),
         *device = cuda_test_buffer(NULL, cache_bytes);
    CUDA_CHECK(cuda_rope(&p.heads, &rows, &rope, q, device, 0));
    unsigned char *cache = malloc(cache_bytes);
    cuda_test_fetch(cache, device, cache_bytes);
    bool shows = true, zeros = true, others = true;
    for (uint32_t row = 0; row < p.rows; row++)
        for (uint32_t key = 0; key < 2; key++) {
            double x[CUDA_HEAD_DIM_MAX], scales[CUDA_HEAD_DIM_MAX / 32];
            const uint32_t i = row - p.lengths[0]; /* large in the first sequence */
            unpack(&p, cache, row, kv, key, x, scales);
            for (uint32_t d = 0; d < dim; d++) {
                const bool is_odd = key ? i == 7 : i < ODD && d / 32 == i * 32 % dim / 32;
                if (is_odd && (key || i < 4))
                    shows = shows && isnan(x[d]);
                else if (is_odd)
                    zeros = zeros && x[d] == 0;
                else
                    others = others && isfinite(x[d]);
            }
        }
    tap_ok(shows && zeros && others,
           "Q8_0: what is not finite or too large %s, what is too small is %s, other groups are %s",
           shows ? "shows" : "is HIDDEN", zeros ? "zero" : "NOT zero", others ? "themselves" : "SPOILT");
    const void *const buffers[] = {rope.qkv,  rope.q_norm, rope.k_norm, rope.cos_sin, rows.position,
                                   rows.table, rows.tables, q,           device};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        cudaFree((void *)buffers[i]);
    free(cache);
    problem_free(&p);
}

int main(void) {
    struct random random;
    cuda_test_begin(&random);
    test_odd_groups(&random);
    for (int round = 0; round < 60; round++) {
        struct problem p;
        problem_make(&random, (enum kind)(round % KINDS), round % 2 ? QUANT_Q8_0 : QUANT_F16, &p);
        const uint32_t dim = p.heads.head_dim, all = p.heads.heads + 2 * p.heads.kv_heads;
        const size_t y_bytes = sizeof(float) * p.rows * p.heads.heads * dim;
        const size_t cache_bytes = cuda_kv_block_bytes(&p.heads) * SEQUENCES * BLOCKS;
        const struct cuda_rope rope_of = {
            .qkv = cuda_test_buffer(p.qkv, sizeof(float) * p.rows * all * dim),
            .q_norm = cuda_test_buffer(p.q_norm, sizeof(float) * dim),
            .k_norm = cuda_test_buffer(p.k_norm, sizeof(float) * dim),
            .cos_sin = cuda_test_buffer(p.cos_sin, sizeof(float) * p.longest * dim),
            .epsilon = 1e-6f,
        };
        void *q = cuda_test_buffer(NULL, 2 * (size_t)p.rows * p.heads.heads * dim),
             *cache = cuda_test_buffer(NULL, cache_bytes);
        struct cuda_attention a = {.heads = p.heads, .q = q, .cache = cache, .context_limit = p.longest};
        a.rows = (struct cuda_rows){cuda_test_buffer(p.position, sizeof(uint32_t) * p.rows),
                                    cuda_test_buffer(p.table, sizeof(uint32_t) * p.rows),
                                    cuda_test_buffer(p.tables, sizeof p.tables), p.rows};
        CUDA_CHECK(cuda_rope(&p.heads, &a.rows, &rope_of, q, cache, 0));
        const bool rope = rope_alone_is_same(&p, &a.rows, &rope_of, q, cache);

        a.tiles = cuda_test_buffer(NULL, sizeof(uint32_t) * p.rows);
        a.tile_rows = cuda_test_buffer(NULL, sizeof(uint32_t) * p.rows);
        float *partial = cuda_test_buffer(NULL, sizeof(float) * cuda_attention_partial_floats(&p.heads, p.rows, p.longest));
        float *y[WAYS];
        bool rounded = true;
        for (int way = 0; way < WAYS; way++) {
            make_tiles(&random, &p, (enum way)way, &a);
            a.y = cuda_test_buffer(NULL, y_bytes);
            a.partial = way == SPLIT || way == ROWS_SPLIT ? partial : NULL;
            CUDA_CHECK(cuda_attention(&a, 0));
            y[way] = malloc(y_bytes);
            cuda_test_fetch(y[way], a.y, y_bytes);
            cudaFree(a.y);
            if (way == WHOLE && p.heads.heads * dim <= COLUMNS_MAX)
                rounded = rounds_alike(&a, partial, y[WHOLE]);
        }
        const bool takes_rope = cuda_attention_takes_rope(&p.heads),
                   within = !takes_rope || rope_within_is_same(&random, &p, &a, &rope_of, y[WHOLE]);
        unsigned char *cached = malloc(cache_bytes);
        cuda_test_fetch(cached, cache, cache_bytes);
        double off;
        const double error = compare(&random, &p, cached, y[WHOLE], &off);
        free(cached);
        const bool split = memcmp(y[WHOLE], y[SPLIT], y_bytes) == 0, mixed = memcmp(y[WHOLE], y[MIXED], y_bytes) == 0,
                   alone = memcmp(y[WHOLE], y[ROWS_WHOLE], y_bytes) == 0 &&
                           memcmp(y[WHOLE], y[ROWS_SPLIT], y_bytes) == 0;
        tap_ok(error < 2e-3 && off < 0.63 && split && alone && mixed && rounded && rope && within,
               "%s, %u heads of %u, %u kv heads, lengths %u %u %u: relative error %.1e, cache off by %.3f, split %s, alone "
               "%s, mixed %s, rounded %s, rope alone %s, within attention %s",
               p.heads.cache == QUANT_Q8_0 ? "q8_0" : "f16", p.heads.heads, dim, p.heads.kv_heads, p.lengths[0],
               p.lengths[1], p.lengths[2], error, off,
               split ? "the same" : "DIFFERENT", alone ? "the same" : "DIFFERENT", mixed ? "the same" : "DIFFERENT",
               rounded ? "the same" : "DIFFERENT", rope ? "the same" : "DIFFERENT",
               !takes_rope ? "not done" : within ? "the same" : "DIFFERENT");
        void *device[] = {(void *)rope_of.qkv,
                          (void *)rope_of.q_norm,
                          (void *)rope_of.k_norm,
                          (void *)rope_of.cos_sin,
                          q,
                          cache,
                          partial,
                          (void *)a.rows.position,
                          (void *)a.rows.table,
                          (void *)a.rows.tables,
                          (void *)a.tiles,
                          (void *)a.tile_rows};
        for (size_t i = 0; i < sizeof device / sizeof *device; i++)
            cudaFree(device[i]);
        for (int way = 0; way < WAYS; way++)
            free(y[way]);
        problem_free(&p);
    }
    return tap_done();
}
