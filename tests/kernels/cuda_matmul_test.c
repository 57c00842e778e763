#include <math.h>
#include <stdbool.h>
#include <time.h>

#include "kernels/cuda/cuda.h"
#include "tests/kernels/cuda_test.h"

/*
 * cuda_pack and cuda_matmul of every format against float64 over the file's own weights, on random shapes: dense and by
 * expert, all epilogues. A token's result must have the same bits alone and among others, and from cuda_matmul_many.
 */

static uint16_t f16_from_double(double x) { /* of a small number with at most 11 significant bits */
    if (x == 0)
        return 0;
    int exponent;
    double mantissa = frexp(fabs(x), &exponent);
    uint16_t bits = (uint16_t)((exponent + 14) << 10 | ((int)ldexp(mantissa, 11) & 1023));
    return (uint16_t)(bits | (x < 0) << 15);
}

struct problem {
    enum quant_type type;
    uint32_t columns, rows, experts; /* rows: of the output, so gate and up have this many each with SwiGLU */
    uint32_t tokens, used;           /* used 0: dense */
    enum cuda_epilogue epilogue;
};

struct weights {
    size_t row_bytes;
    uint8_t *rows, *pairs; /* [experts][rows][row_bytes] */
    struct cuda_matrix matrix;
    void *tiles;
};

static void weights_make(struct random *random, const struct problem *p, struct weights *w) {
    const struct quant_format *format = quant_format(p->type);
    const bool swiglu = p->epilogue == CUDA_SWIGLU;
    w->row_bytes = (size_t)p->columns / format->block_weights * format->block_bytes;
    const size_t expert_bytes = w->row_bytes * p->rows, bytes = expert_bytes * p->experts;
    const uint32_t tile_rows = swiglu ? 2 * p->rows : p->rows;
    w->rows = aligned_bytes(bytes);
    w->pairs = swiglu ? aligned_bytes(bytes) : NULL;
    for (size_t r = 0; r < (size_t)p->rows * p->experts; r++) {
        random_row(random, p->type, p->columns, false, w->rows + r * w->row_bytes);
        if (swiglu)
            random_row(random, p->type, p->columns, false, w->pairs + r * w->row_bytes);
    }
    const size_t tile_bytes = cuda_matrix_expert_bytes(p->type, p->columns, tile_rows);
    uint8_t *rows = cuda_test_buffer(w->rows, bytes), *pairs = swiglu ? cuda_test_buffer(w->pairs, bytes) : NULL;
    uint32_t zero = 0, *bound = cuda_test_buffer(&zero, sizeof zero);
    w->tiles = cuda_test_buffer(NULL, tile_bytes * p->experts);
    for (uint32_t e = 0; e < p->experts; e++)
        CUDA_CHECK(cuda_pack(p->type, rows + e * expert_bytes, swiglu ? pairs + e * expert_bytes : NULL, w->row_bytes,
                             p->columns, p->rows, (uint8_t *)w->tiles + e * tile_bytes, 0));
    CUDA_CHECK(cuda_weight_bound(p->type, rows, bytes / format->block_bytes, bound, 0));
    if (swiglu)
        CUDA_CHECK(cuda_weight_bound(p->type, pairs, bytes / format->block_bytes, bound, 0));
    float greatest;
    cuda_test_fetch(&greatest, bound, sizeof greatest);
    int exponent;
    frexpf(greatest, &exponent);
    w->matrix = (struct cuda_matrix){.type = p->type,
                                     .columns = p->columns,
                                     .rows = tile_rows,
                                     .experts = p->experts,
                                     .scale = ldexpf(1, 8 - exponent),
                                     .tiles = w->tiles};
    CUDA_CHECK(cudaFree(rows));
    CUDA_CHECK(cudaFree(pairs));
    CUDA_CHECK(cudaFree(bound));
}

static double dot(enum quant_type type, const uint8_t *row, const double *x, uint32_t columns) {
    double sum = 0;
    for (uint32_t i = 0; i < columns; i++)
        sum += weight_reference(type, row, i) * x[i];
    return sum;
}

typedef cudaError_t matmul(const struct cuda_matmul *arguments, cudaStream_t stream);

/* One launch over some tokens' assignments; y is [tokens * max(used, 1)][rows], NaN where nothing was written. */
static void run(const struct problem *p, const struct weights *w, const void *x, const float *x_scale,
                const struct cuda_item *items, uint32_t item_count, const uint32_t *order, float *y, uint32_t y_rows,
                matmul *multiply) {
    const bool adds = p->epilogue == CUDA_ADD || p->epilogue == CUDA_GATED;
    float *device_y = cuda_test_buffer(adds ? y : NULL, sizeof *y * y_rows * p->rows);
    uint32_t most = 0;
    for (uint32_t i = 0; i < item_count; i++)
        most = items[i].count > most ? items[i].count : most;
    struct cuda_matmul m = {.w = &w->matrix,
                            .x = x,
                            .x_scale = x_scale,
                            .y = device_y,
                            .y_stride = p->rows,
                            .tokens = items ? most : p->tokens,
                            .epilogue = p->epilogue,
                            .x_divisor = p->used};
    void *device_items = NULL, *device_order = NULL, *device_count = NULL;
    if (items) {
        m.items = device_items = cuda_test_buffer(items, sizeof *items * item_count);
        m.order = device_order = cuda_test_buffer(order, sizeof *order * y_rows);
        m.item_count = device_count = cuda_test_buffer(&item_count, sizeof item_count);
        m.item_limit = item_count + 3;
    }
    CUDA_CHECK(multiply(&m, 0));
    cuda_test_fetch(y, device_y, sizeof *y * y_rows * p->rows);
    cudaFree(device_y);
    cudaFree(device_items);
    cudaFree(device_order);
    cudaFree(device_count);
}

/* Assignments sorted by expert, in items of at most `limit`; returns how many. */
static uint32_t make_items(const uint32_t *expert, const struct problem *p, uint32_t assignments, uint32_t limit,
                           uint32_t *order, struct cuda_item *items) {
    uint32_t count = 0, sorted = 0;
    for (uint32_t e = 0; e < p->experts; e++) {
        uint32_t first = sorted;
        for (uint32_t a = 0; a < assignments; a++)
            if (expert[a] == e)
                order[sorted++] = a;
        for (; first < sorted; first += limit)
            items[count++] = (struct cuda_item){e, first, sorted - first < limit ? sorted - first : limit};
    }
    return count;
}

static bool test_problem(struct random *random, const struct problem *p) {
    struct weights w;
    weights_make(random, p, &w);
    const uint32_t padded = (p->columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    const uint32_t assignments = p->used ? p->tokens * p->used : p->tokens;
    double *x = calloc((size_t)p->tokens * p->columns, sizeof *x);
    uint16_t *halves = calloc((size_t)p->tokens * padded, sizeof *halves);
    float *scales = calloc(p->tokens, sizeof *scales);
    for (uint32_t t = 0; t < p->tokens; t++) {
        scales[t] = ldexpf(1, (int)random_below(random, 9) - 4);
        for (uint32_t i = 0; i < p->columns; i++) {
            double value = (double)((int)random_below(random, 2049) - 1024) / 64;
            halves[(size_t)t * padded + i] = f16_from_double(value);
            x[(size_t)t * p->columns + i] = value * scales[t];
        }
    }
    void *device_x = cuda_test_buffer(halves, sizeof *halves * p->tokens * padded);
    float *device_scales = cuda_test_buffer(scales, sizeof *scales * p->tokens);

    /* Experts of an assignment, and the assignments sorted by expert. */
    uint32_t *expert = calloc(assignments, sizeof *expert), *order = calloc(assignments, sizeof *order);
    struct cuda_item *items = calloc(assignments, sizeof *items);
    uint32_t item_count = 0;
    for (uint32_t a = 0; a < assignments; a++)
        expert[a] = p->used ? (random_below(random, p->experts) + a % p->used) % p->experts : 0;
    if (p->used)
        item_count = make_items(expert, p, assignments, CUDA_TOKENS_MAX, order, items);

    float *y = calloc((size_t)assignments * p->rows, sizeof *y),
          *before = calloc((size_t)assignments * p->rows, sizeof *y);
    for (size_t i = 0; i < (size_t)assignments * p->rows; i++)
        y[i] = before[i] = p->epilogue == CUDA_ADD ? random_float(random) * 100 : 0;
    run(p, &w, device_x, device_scales, p->used ? items : NULL, item_count, order, y, assignments, cuda_matmul);

    double error = 0, norm = 0;
    for (uint32_t a = 0; a < assignments; a++)
        for (uint32_t r = 0; r < p->rows; r++) {
            const double *own = x + (size_t)(p->used ? a / p->used : a) * p->columns;
            const size_t row = ((size_t)expert[a] * p->rows + r) * w.row_bytes;
            double want = dot(p->type, w.rows + row, own, p->columns);
            if (p->epilogue == CUDA_SWIGLU)
                want = want / (1 + exp(-want)) * dot(p->type, w.pairs + row, own, p->columns);
            const double got = (double)y[(size_t)a * p->rows + r] - before[(size_t)a * p->rows + r];
            error += (got - want) * (got - want);
            norm += want * want;
        }
    const double relative = sqrt(error / norm);

    /* Each of a few tokens alone: the same bits. */
    bool same = true;
    for (int trial = 0; trial < 4; trial++) {
        const uint32_t a = random_below(random, assignments);
        float *alone = calloc((size_t)assignments * p->rows, sizeof *alone);
        memcpy(alone, before, sizeof *alone * assignments * p->rows);
        const struct cuda_item item = {expert[a], 0, 1};
        if (p->used) {
            run(p, &w, device_x, device_scales, &item, 1, &a, alone, assignments, cuda_matmul);
            same = same && memcmp(alone + (size_t)a * p->rows, y + (size_t)a * p->rows, sizeof *y * p->rows) == 0;
        } else {
            struct problem one = *p;
            one.tokens = 1;
            memcpy(alone, before + (size_t)a * p->rows, sizeof *alone * p->rows);
            run(&one, &w, (uint16_t *)device_x + (size_t)a * padded, device_scales + a, NULL, 0, NULL, alone, 1,
                cuda_matmul);
            same = same && memcmp(alone, y + (size_t)a * p->rows, sizeof *y * p->rows) == 0;
        }
        free(alone);
    }
    static const char *const epilogues[] = {"store", "add", "swiglu"};
    bool ok = tap_ok(relative < (p->epilogue == CUDA_SWIGLU ? 4e-3 : 2e-3) && same,
                     "%s %ux%u, %u experts, %u tokens, %s: relative error %.1e, alone %s", quant_format(p->type)->name,
                     p->rows, p->columns, p->experts, p->tokens, epilogues[p->epilogue], relative,
                     same ? "the same" : "DIFFERENT");
    cudaFree(device_x);
    cudaFree(device_scales);
    cudaFree(w.tiles);
    free(w.rows);
    free(w.pairs);
    free(x);
    free(halves);
    free(scales);
    free(expert);
    free(order);
    free(items);
    free(y);
    free(before);
    return ok;
}

/* cuda_matmul_many over many tokens: all bits are those of cuda_matmul. */
static void test_many(struct random *random, const struct problem *p) {
    struct weights w;
    weights_make(random, p, &w);
    const uint32_t padded = (p->columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    const uint32_t assignments = p->used ? p->tokens * p->used : p->tokens;
    const size_t halves_bytes = sizeof(uint16_t) * p->tokens * padded, results = (size_t)assignments * p->rows;
    uint16_t *halves = calloc(1, halves_bytes);
    float *scales = calloc(p->tokens, sizeof *scales);
    for (uint32_t t = 0; t < p->tokens; t++) {
        scales[t] = ldexpf(1, (int)random_below(random, 9) - 4);
        for (uint32_t i = 0; i < p->columns; i++)
            halves[(size_t)t * padded + i] = f16_from_double((double)((int)random_below(random, 2049) - 1024) / 64);
    }
    void *x = cuda_test_buffer(halves, halves_bytes);
    cuda_test_interleave(halves, (size_t)p->tokens * padded);
    void *interleaved = cuda_test_buffer(halves, halves_bytes);
    float *device_scales = cuda_test_buffer(scales, sizeof *scales * p->tokens);

    uint32_t *expert = calloc(assignments, sizeof *expert), *order = calloc(assignments, sizeof *order);
    struct cuda_item *items = calloc(assignments, sizeof *items);
    for (uint32_t a = 0; a < assignments; a++) /* the first expert gets many, others few */
        expert[a] = p->used && random_below(random, 2) ? random_below(random, p->experts) : 0;
    float *want = calloc(results, sizeof *want), *got = calloc(results, sizeof *got);
    for (size_t i = 0; i < results; i++)
        want[i] = got[i] = random_float(random) * 10;
    uint32_t count = p->used ? make_items(expert, p, assignments, CUDA_TOKENS_MAX, order, items) : 0;
    run(p, &w, x, device_scales, p->used ? items : NULL, count, order, want, assignments, cuda_matmul);
    count = p->used ? make_items(expert, p, assignments, CUDA_MANY_TOKENS, order, items) : 0;
    run(p, &w, interleaved, device_scales, p->used ? items : NULL, count, order, got, assignments, cuda_matmul_many);
    size_t differ = 0;
    for (size_t i = 0; i < results; i++)
        differ += memcmp(&want[i], &got[i], sizeof *got) != 0;
    static const char *const epilogues[] = {"store", "add", "swiglu", "gated"};
    tap_ok(differ == 0, "many: %s %ux%u, %u experts, %u tokens, %s: %zu of %zu differ", quant_format(p->type)->name,
           p->rows, p->columns, p->experts, p->tokens, epilogues[p->epilogue], differ, results);
    cudaFree(x);
    cudaFree(interleaved);
    cudaFree(device_scales);
    cudaFree(w.tiles);
    free(w.rows);
    free(w.pairs);
    free(halves);
    free(scales);
    free(expert);
    free(order);
    free(items);
    free(want);
    free(got);
}

int main(void) {
    struct random random;
    cuda_test_begin(&random);
    for (int i = 0; i < QUANT_TYPES; i++)
        for (int round = 0; round < 8; round++) {
            const uint32_t block = quant_format(quant_types[i])->block_weights;
            struct problem p = {.type = quant_types[i], .experts = 1};
            p.columns = block == 256 ? 256 * (1 + random_below(&random, 9)) : 32 * (1 + random_below(&random, 60));
            p.rows = 1 + random_below(&random, 90);
            p.tokens = 1 + random_below(&random, round < 4 ? 8 : 150);
            p.epilogue = (enum cuda_epilogue)(round % 3);
            if (round % 2) {
                p.experts = 2 + random_below(&random, 6);
                p.used = 1 + random_below(&random, 3);
            }
            if (p.epilogue == CUDA_SWIGLU)
                p.rows = (p.rows + 7) / 8 * 8;
            test_problem(&random, &p);
        }
    for (int i = 0; i < QUANT_TYPES && cuda_matmul_many_runs(); i++)
        for (int round = 0; round < 8; round++) {
            const uint32_t block = quant_format(quant_types[i])->block_weights;
            struct problem p = {.type = quant_types[i], .experts = 1, .epilogue = (enum cuda_epilogue)(round % 4)};
            p.columns = block == 256 ? 256 * (1 + random_below(&random, 9)) : 32 * (1 + random_below(&random, 60));
            p.rows = 8 * (1 + random_below(&random, 150));
            p.rows -= p.epilogue == CUDA_SWIGLU ? 0 : random_below(&random, 8);
            p.tokens = 1 + random_below(&random, 1500);
            if (round % 3) {
                p.experts = 2 + random_below(&random, 30);
                p.used = 1 + random_below(&random, 4);
            }
            test_many(&random, &p);
        }
    return tap_done();
}
