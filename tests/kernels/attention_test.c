#include "kernels/cpu/attention.h"
#include "kernels/cpu/f16.h"
#include "tests/kernels/kernel_test.h"

/* Attention against float64, each instruction set against plain C, and rows together against rows alone. */

static const struct cpu_kernels *kernels[3];
static int isas;

/* One sequence, with its keys and values and what the cache makes of them. */
struct sequence {
    enum quant_type type; /* of the cache */
    uint32_t head_dim, heads, length;
    float *q, *key, *value;     /* [length][heads][head_dim], [length][head_dim] */
    float *read_key, *read_value; /* as attention should read them */
    void *expanded;
    unsigned char *cache;
    size_t block_bytes, block_stride;
    uint32_t *blocks, block_count;
};

static void store_position(struct sequence *s, const struct cpu_kernels *kernel, uint32_t p) {
    void *block = s->cache + s->blocks[p / CPU_KV_BLOCK] * s->block_stride;
    kernel->attention->store(s->type, block, p % CPU_KV_BLOCK, s->head_dim, s->key + (size_t)p * s->head_dim,
                             s->value + (size_t)p * s->head_dim);
}

static void store_all(struct sequence *s, const struct cpu_kernels *kernel) {
    memset(s->cache, 0xff, s->block_stride * s->block_count * 2); /* NaN wherever nothing is written */
    for (uint32_t p = 0; p < s->length; p++)
        store_position(s, kernel, p);
}

/* What a cache of the type makes of a key or value, by the words of attention.h. */
static void round_as(enum quant_type type, const float *x, uint32_t n, float *y) {
    for (uint32_t first = 0; first < n; first += type == QUANT_F16 ? 1 : 32) {
        const uint32_t end = type == QUANT_F16 ? first + 1 : first + 32 < n ? first + 32 : n;
        float most = 0;
        for (uint32_t i = first; i < end; i++)
            most = fmaxf(most, fabsf(x[i]));
        const float scale = cpu_f16_to_f32(cpu_f32_to_f16(most / 127));
        for (uint32_t i = first; i < end; i++) {
            const float q = type == QUANT_F16 ? x[i] : scale > 0 ? nearbyintf(x[i] * (127 / most)) * scale : 0;
            y[i] = cpu_f16_to_f32(cpu_f32_to_f16(q));
        }
    }
}

static void sequence_begin(struct sequence *s, enum quant_type type, uint32_t head_dim, uint32_t heads,
                           uint32_t length) {
    s->type = type;
    s->head_dim = head_dim;
    s->heads = heads;
    s->length = length;
    size_t cells = (size_t)length * head_dim;
    s->q = test_memory(cells * heads * sizeof(float));
    s->key = test_memory(cells * sizeof(float));
    s->value = test_memory(cells * sizeof(float));
    random_floats(s->q, cells * heads);
    random_floats(s->key, cells);
    random_floats(s->value, cells);
    s->read_key = test_memory(cells * sizeof(float));
    s->read_value = test_memory(cells * sizeof(float));
    for (uint32_t d = 0, p = random_below(length); d < head_dim && d < 32; d++) /* a group too small for its scale */
        s->value[(size_t)p * head_dim + d] *= 1e-9f;
    for (size_t at = 0; at < cells; at += head_dim) {
        round_as(type, s->key + at, head_dim, s->read_key + at);
        round_as(type, s->value + at, head_dim, s->read_value + at);
    }
    s->expanded = test_memory(CPU_KV_PIECE / CPU_KV_BLOCK * cpu_kv_block_bytes(QUANT_F16, head_dim));
    s->block_bytes = cpu_kv_block_bytes(type, head_dim);
    s->block_stride = s->block_bytes + 64 * random_below(3);
    s->block_count = (length + CPU_KV_BLOCK - 1) / CPU_KV_BLOCK;
    s->cache = test_memory(s->block_stride * s->block_count * 2);
    /* Any half of twice as many blocks, in any order. */
    s->blocks = test_memory(2 * s->block_count * sizeof *s->blocks);
    for (uint32_t b = 0; b < 2 * s->block_count; b++) {
        uint32_t other = random_below(b + 1);
        s->blocks[b] = s->blocks[other];
        s->blocks[other] = b;
    }
    store_all(s, kernels[0]);
}

static void sequence_end(struct sequence *s) {
    free(s->q);
    free(s->key);
    free(s->value);
    free(s->read_key);
    free(s->read_value);
    free(s->expanded);
    free(s->cache);
    free(s->blocks);
}

/* Tokens first to first + tokens, query heads head to head + heads: y[tokens][heads][head_dim]. */
static void attend(const struct sequence *s, const struct cpu_kernels *kernel, uint32_t first, uint32_t tokens,
                   uint32_t head, uint32_t heads, float *y) {
    struct cpu_attention_rows rows = {
        .head_dim = s->head_dim,
        .scale = 1 / sqrtf((float)s->head_dim),
        .q = s->q + ((size_t)first * s->heads + head) * s->head_dim,
        .token_stride = (size_t)s->heads * s->head_dim,
        .tokens = tokens,
        .heads = heads,
        .position = first,
        .cache = s->cache,
        .block_stride = s->block_stride,
        .blocks = s->blocks,
        .type = s->type,
        .expanded = s->expanded,
    };
    uint32_t pieces = cpu_attention_pieces(first + tokens - 1), count = tokens * heads;
    size_t stride = cpu_attention_partial_floats(s->head_dim);
    float *partial = test_memory((size_t)pieces * count * stride * sizeof *partial);
    for (uint32_t piece = pieces; piece-- > 0;)
        kernel->attention->run(&rows, piece, partial + piece * count * stride, stride);
    for (uint32_t row = 0; row < count; row++)
        kernel->attention->combine(partial + row * stride, cpu_attention_pieces(first + row / heads), count * stride,
                                   s->head_dim, y + (size_t)row * s->head_dim);
    free(partial);
}

/* The greatest error of a row against float64, as a part of the greatest value. */
static double row_error(const struct sequence *s, uint32_t token, uint32_t head, const float *y) {
    const float *q = s->q + ((size_t)token * s->heads + head) * s->head_dim;
    double *weight = test_memory((token + 1) * sizeof *weight), max = -INFINITY, total = 0, worst = 0, greatest = 1e-30;
    for (uint32_t p = 0; p <= token; p++) {
        weight[p] = 0;
        for (uint32_t d = 0; d < s->head_dim; d++)
            weight[p] += (double)q[d] * s->read_key[(size_t)p * s->head_dim + d];
        weight[p] /= sqrt(s->head_dim);
        max = fmax(max, weight[p]);
    }
    for (uint32_t p = 0; p <= token; p++)
        total += weight[p] = exp(weight[p] - max);
    for (uint32_t d = 0; d < s->head_dim; d++) {
        double sum = 0;
        for (uint32_t p = 0; p <= token; p++) {
            double value = s->read_value[(size_t)p * s->head_dim + d];
            sum += weight[p] * value;
            greatest = fmax(greatest, fabs(value));
        }
        double error = fabs(y[d] - sum / total);
        worst = error > worst || isnan(error) ? error : worst;
    }
    free(weight);
    return worst / greatest;
}

static const char *name(enum quant_type type) {
    return type == QUANT_F16 ? "f16" : "q8_0";
}

static void test_parity(enum quant_type type) {
    static const uint32_t dims[] = {128, 64, 2, 6, 14, 16, 18, 30, 32, 34, 66, 80, 96, 130, 192, 256, 510, 512};
    static const uint32_t lengths[] = {1, 2, 16, 31, 32, 33, 63, 255, 256, 257, 287, 289, 511, 512, 513, 769};
    enum { DIMS = sizeof dims / sizeof *dims, LENGTHS = sizeof lengths / sizeof *lengths };
    double worst = 0;
    bool same = true, alone = true;
    for (int round = 0; round < 3 * DIMS; round++) {
        struct sequence s;
        uint32_t heads = round % 4 == 0 ? 8 : 1 + random_below(16);
        uint32_t length = round < LENGTHS ? lengths[round] : lengths[random_below(LENGTHS)] + random_below(3);
        sequence_begin(&s, type, dims[round % DIMS], heads, length);
        uint32_t tokens = 1 + random_below(length < 20 ? length : 20), first = length - tokens;
        size_t row = s.head_dim, count = (size_t)tokens * heads;
        float *y = test_memory(count * row * sizeof *y), *other = test_memory(count * row * sizeof *y);
        for (int isa = 0; isa < isas; isa++) {
            store_all(&s, kernels[isa]);
            attend(&s, kernels[isa], first, tokens, 0, heads, isa ? other : y);
            same &= isa == 0 || same_floats(y, other, count * row);
        }
        for (int sample = 0; sample < 6; sample++) {
            uint32_t t = sample ? random_below(tokens) : tokens - 1, h = random_below(heads);
            const float *got = y + ((size_t)t * heads + h) * row;
            double error = row_error(&s, first + t, h, got);
            worst = error > worst || isnan(error) ? error : worst;
            for (int isa = 0; isa < isas; isa++) {
                attend(&s, kernels[isa], first + t, 1, h, 1, other);
                alone &= same_floats(got, other, row);
            }
        }
        /* The same tokens in two chunks. */
        for (int isa = 0; isa < isas && tokens > 1; isa++) {
            uint32_t cut = 1 + random_below(tokens - 1);
            attend(&s, kernels[isa], first, cut, 0, heads, other);
            attend(&s, kernels[isa], first + cut, tokens - cut, 0, heads, other + (size_t)cut * heads * row);
            alone &= same_floats(y, other, count * row);
        }
        free(y);
        free(other);
        sequence_end(&s);
    }
    tap_ok(worst < 2e-6, "attention, %s: error %.2g", name(type), worst);
    tap_ok(same, "attention, %s: the same bits from all kernels", name(type));
    tap_ok(alone, "attention, %s: the same bits for a row alone, with others and in chunks", name(type));
}

/* Scores far apart, all equal, and so large that a softmax without its maximum would overflow. */
static void test_extremes(void) {
    static const float factors[] = {1e4f, -1e4f, 3e30f, 0, 1e-40f};
    double worst = 0;
    bool same = true;
    for (size_t i = 0; i < sizeof factors / sizeof *factors; i++) {
        struct sequence s;
        sequence_begin(&s, QUANT_F16, 64, 4, 600);
        for (size_t j = 0; j < (size_t)s.length * s.heads * s.head_dim; j++)
            s.q[j] *= factors[i];
        float y[3][4 * 64];
        for (int isa = 0; isa < isas; isa++) {
            attend(&s, kernels[isa], 599, 1, 0, 4, y[isa]);
            same &= same_floats(y[0], y[isa], 4 * 64);
        }
        for (uint32_t h = 0; h < 4; h++) {
            double error = row_error(&s, 599, h, y[0] + h * 64);
            worst = error > worst || isnan(error) ? error : worst;
        }
        sequence_end(&s);
    }
    tap_ok(worst < 1e-3, "attention: extreme scores, error %.2g", worst); /* a score of 1e4 is rounded to 1e-3 */
    tap_ok(same, "attention: extreme scores, the same bits from all kernels");
}

static bool all_nan(const float *y, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isnan(y[i]))
            return false;
    return true;
}

static void test_nan(enum quant_type type) {
    enum { DIM = 48, HEADS = 3, LENGTH = 300, FIRST = 270, TOKENS = LENGTH - FIRST, ROW = HEADS * DIM };
    struct sequence s;
    float before[TOKENS * ROW], y[TOKENS * ROW];
    bool kept = true, shows = true;
    sequence_begin(&s, type, DIM, HEADS, LENGTH);
    attend(&s, kernels[0], FIRST, TOKENS, 0, HEADS, before);
    for (int isa = 0; isa < isas; isa++) {
        const struct cpu_kernels *kernel = kernels[isa];
        float saved = s.q[(size_t)FIRST * ROW + DIM];
        s.q[(size_t)FIRST * ROW + DIM] = NAN; /* token FIRST, head 1 */
        attend(&s, kernel, FIRST, TOKENS, 0, HEADS, y);
        shows &= all_nan(y + DIM, DIM);
        kept &= same_floats(y, before, DIM) && same_floats(y + 2 * DIM, before + 2 * DIM, TOKENS * ROW - 2 * DIM);
        s.q[(size_t)FIRST * ROW + DIM] = saved;

        uint32_t p = FIRST + random_below(TOKENS); /* a bad position is seen from its own token on */
        float *cell = (isa % 2 ? s.key : s.value) + (size_t)p * DIM + random_below(DIM), good = *cell;
        *cell = isa == 2 ? INFINITY : NAN;
        store_position(&s, kernel, p);
        attend(&s, kernel, FIRST, TOKENS, 0, HEADS, y);
        kept &= same_floats(y, before, (p - FIRST) * ROW);
        for (uint32_t row = (p - FIRST) * HEADS; row < TOKENS * HEADS; row++) {
            double sum = 0;
            for (int d = 0; d < DIM; d++)
                sum += y[row * DIM + d];
            shows &= !isfinite(sum);
        }
        *cell = good;
        store_position(&s, kernel, p);
    }
    tap_ok(shows, "attention, %s: a NaN shows in every row that sees it", name(type));
    tap_ok(kept, "attention, %s: a NaN changes no other row", name(type));
    sequence_end(&s);
}

static void test_bounds(enum quant_type type) {
    bool stored = true, left = true;
    for (int isa = 0; isa < isas; isa++) {
        struct sequence s;
        sequence_begin(&s, type, 2 + 2 * random_below(100), 2, 300);
        unsigned char *copy = test_memory(s.block_stride * s.block_count * 2);
        memcpy(copy, s.cache, s.block_stride * s.block_count * 2);
        store_position(&s, kernels[isa], 77); /* again: the same bytes, and no others */
        stored &= memcmp(copy, s.cache, s.block_stride * s.block_count * 2) == 0;
        free(copy);

        /* Tokens 254 to 257: the second piece is of the last two only. */
        size_t written = cpu_attention_partial_floats(s.head_dim), stride = written + 16;
        float *partial = test_memory(8 * stride * sizeof *partial);
        for (size_t i = 0; i < 8 * stride; i++)
            partial[i] = -1.5f;
        struct cpu_attention_rows rows = {
            .head_dim = s.head_dim, .scale = 1, .q = s.q, .token_stride = 2 * s.head_dim, .tokens = 4, .heads = 2,
            .position = 254, .cache = s.cache, .block_stride = s.block_stride, .blocks = s.blocks,
            .type = type, .expanded = s.expanded,
        };
        kernels[isa]->attention->run(&rows, 1, partial, stride);
        for (size_t i = 0; i < 8 * stride; i++)
            left &= (i >= 4 * stride && i % stride < written) || partial[i] == -1.5f;
        free(partial);
        sequence_end(&s);
    }
    tap_ok(stored, "attention, %s: a position is stored in its own cells", name(type));
    tap_ok(left, "attention, %s: rows that end before a piece are left alone", name(type));
}

int main(void) {
    random_begin();
    isas = kernels_here(kernels);
    test_extremes();
    for (int i = 0; i < 2; i++) {
        const enum quant_type type = i ? QUANT_Q8_0 : QUANT_F16;
        test_parity(type);
        test_nan(type);
        test_bounds(type);
    }
    return tap_done();
}
