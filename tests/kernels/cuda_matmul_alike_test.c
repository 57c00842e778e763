#include "tests/kernels/cuda_matmul_problem.h"

/*
 * The kernels that cuda_matmul chooses between, and cuda_matmul_many, on random shapes: all bits of a product must be the
 * same whichever computes it.
 */

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
    cuda_test_interleave(halves, halves_bytes / sizeof *halves);
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
    /* whole experts, or pieces of them, far more than a warp of cuda_matmul_many keeps at a time */
    const uint32_t limit = random_below(random, 2) ? assignments : 1 + random_below(random, 300);
    count = p->used ? make_items(expert, p, assignments, limit, order, items) : 0;
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

/* y = W x in pieces that none of cuda_matmul's other kernels takes: up to 8 tokens of few rows or of one item. */
static void run_pieces(const struct cuda_matmul *whole, uint32_t item_count, const uint32_t *one) {
    enum { TOKENS = 8, ROWS = 4096 };
    const size_t padded = (whole->w->columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    struct cuda_matmul m = *whole;
    m.tokens = TOKENS;
    m.item_count = one;
    m.item_limit = 1;
    for (uint32_t i = 0; i < item_count; i++) {
        m.items = whole->items + i;
        CUDA_CHECK(cuda_matmul(&m, 0));
    }
    for (uint32_t t = 0; !whole->items && t < whole->tokens; t += TOKENS)
        for (uint32_t row = 0; row < whole->w->rows; row += ROWS) {
            struct cuda_matrix w = *whole->w;
            w.tiles = (const uint8_t *)w.tiles + cuda_matrix_expert_bytes(w.type, w.columns, row);
            w.rows = w.rows - row < ROWS ? w.rows - row : ROWS;
            m.w = &w;
            m.x = (const uint16_t *)whole->x + t * padded;
            m.x_scale = whole->x_scale + t;
            m.y = whole->y + (size_t)t * whole->y_stride + (m.epilogue == CUDA_SWIGLU ? row / 2 : row);
            m.tokens = whole->tokens - t < TOKENS ? whole->tokens - t : TOKENS;
            CUDA_CHECK(cuda_matmul(&m, 0));
        }
}

/*
 * `count` matrices of p's shape, of which all but the first have format `other`, in one call and in pieces; items have up to
 * `item_tokens`. rounds: the one call gets floats, the pieces what cuda_round makes of them.
 */
static void test_together(struct random *random, const struct problem *p, uint32_t count, enum quant_type other,
                          uint32_t item_tokens, bool rounds) {
    struct weights w[CUDA_PARTS];
    struct problem part = *p;
    for (uint32_t i = 0; i < count; i++) {
        part.type = i ? other : p->type;
        weights_make(random, &part, &w[i]);
    }
    const uint32_t padded = (p->columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    const uint32_t assignments = p->used ? p->tokens * p->used : p->tokens;
    const size_t halves = (size_t)p->tokens * padded, results = (size_t)assignments * p->rows * count;
    uint16_t *x = calloc(halves, sizeof *x);
    float *scales = calloc(p->tokens, sizeof *scales), *want = calloc(results, sizeof *want),
          *got = calloc(results, sizeof *got);
    for (uint32_t t = 0; t < p->tokens; t++) {
        scales[t] = ldexpf(1, (int)random_below(random, 9) - 4);
        for (uint32_t i = 0; i < p->columns; i++)
            x[(size_t)t * padded + i] = f16_from_double((double)((int)random_below(random, 2049) - 1024) / 64);
    }
    for (size_t i = 0; i < results; i++)
        want[i] = p->epilogue == CUDA_ADD || p->epilogue == CUDA_GATED ? random_float(random) * 10 : NAN;
    uint32_t *expert = calloc(assignments, sizeof *expert), *order = calloc(assignments, sizeof *order), one = 1;
    struct cuda_item *items = calloc(assignments, sizeof *items), *small = calloc(assignments, sizeof *small);
    for (uint32_t a = 0; a < assignments; a++) /* the first expert gets many */
        expert[a] = p->used && random_below(random, 8) ? random_below(random, p->experts) : 0;
    const uint32_t small_count = p->used ? make_items(expert, p, assignments, 8, order, small) : 0;
    const uint32_t item_count = p->used ? make_items(expert, p, assignments, item_tokens, order, items) : 0;

    void *device_x = cuda_test_buffer(x, sizeof *x * halves),
         *device_scales = cuda_test_buffer(scales, sizeof *scales * p->tokens),
         *device_want = cuda_test_buffer(want, sizeof *want * results),
         *device_got = cuda_test_buffer(want, sizeof *want * results),
         *device_items = cuda_test_buffer(items, sizeof *items * assignments),
         *device_small = cuda_test_buffer(small, sizeof *small * assignments),
         *device_order = cuda_test_buffer(order, sizeof *order * assignments),
         *device_count = cuda_test_buffer(&item_count, sizeof item_count),
         *device_one = cuda_test_buffer(&one, sizeof one);
    float *floats = calloc((size_t)p->tokens * p->columns, sizeof *floats);
    for (size_t i = 0; i < (size_t)p->tokens * p->columns; i++)
        floats[i] = random_float(random) * ldexpf(1, (int)(i / p->columns % 20) - 10);
    void *device_floats = cuda_test_buffer(floats, sizeof *floats * p->tokens * p->columns);
    const struct cuda_activation rounded = {.half = device_x, .scale = device_scales};
    if (rounds)
        CUDA_CHECK(cuda_round(device_floats, p->columns, p->tokens, &rounded, 0));
    struct cuda_matmul m[CUDA_PARTS];
    for (uint32_t i = 0; i < count; i++) {
        m[i] = (struct cuda_matmul){.w = &w[i].matrix,
                                    .x = device_x,
                                    .x_scale = device_scales,
                                    .y = (float *)device_want + (size_t)i * p->rows,
                                    .y_stride = count * p->rows,
                                    .tokens = p->used ? item_tokens : p->tokens,
                                    .epilogue = p->epilogue,
                                    .order = p->used ? device_order : NULL,
                                    .x_divisor = p->used};
        m[i].items = p->used ? device_small : NULL;
        run_pieces(&m[i], small_count, device_one);
        m[i].y = (float *)device_got + (size_t)i * p->rows;
        m[i].items = p->used ? device_items : NULL;
        m[i].item_count = device_count;
        m[i].item_limit = item_count + 3;
        m[i].items_early = random_below(random, 2);
        m[i].floats = rounds ? device_floats : NULL;
    }
    const bool taken = !rounds || cuda_matmul_rounds(m);
    CUDA_CHECK(count > 1 ? cuda_matmul_parts(m, count, 0) : cuda_matmul(m, 0));
    cuda_test_fetch(want, device_want, sizeof *want * results);
    cuda_test_fetch(got, device_got, sizeof *got * results);
    size_t differ = 0, missing = 0;
    for (size_t i = 0; i < results; i++) {
        differ += memcmp(&want[i], &got[i], sizeof *got) != 0;
        missing += isnan(want[i]);
    }
    static const char *const epilogues[] = {"store", "add", "swiglu", "gated"};
    tap_ok(taken && differ == 0 && missing == 0,
           "together: %u of %s, %s %ux%u, %u experts, %u tokens by %u%s, %s: %zu of %zu differ", count,
           quant_format(p->type)->name, quant_format(part.type)->name, p->rows, p->columns, p->experts, p->tokens,
           item_tokens, rounds ? ", rounded" : "", epilogues[p->epilogue], differ, results);
    for (uint32_t i = 0; i < count; i++) {
        cudaFree(w[i].tiles);
        free(w[i].rows);
        free(w[i].pairs);
    }
    void *const device[] = {device_x,     device_scales, device_want,  device_got, device_items,
                            device_small, device_order,  device_count, device_one, device_floats};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        cudaFree(device[i]);
    void *const host[] = {x, scales, want, got, expert, order, items, small, floats};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        free(host[i]);
}

/* Shapes that cuda_matmul has kernels of their own for, if the format is one of theirs. */
static void test_choices(struct random *random, enum quant_type type) {
    const uint32_t block = quant_format(type)->block_weights == 256 ? 256 : 32;
    for (int round = 0; round < 8; round++) { /* many items; in later rounds of few columns, and rounded */
        const uint32_t columns = round < 4 ? 2048 : 1024;
        struct problem p = {.type = type, .epilogue = (enum cuda_epilogue)(round % 4)};
        p.columns = block * (1 + random_below(random, columns / block));
        p.experts = 110 + random_below(random, 30);
        p.used = 3 + random_below(random, 3);
        p.tokens = 150 + random_below(random, 150);
        p.rows = 8 * (44 + random_below(random, 6)) - (p.epilogue == CUDA_SWIGLU ? 0 : random_below(random, 8));
        const uint32_t item_tokens = round < 4 ? CUDA_STREAM_TOKENS : round % 2 ? 8 : 17 + random_below(random, 8);
        test_together(random, &p, 1, type, item_tokens, round >= 4);
    }
    for (int round = 0; round < 2; round++) { /* as many rows as a head has */
        struct problem p = {.type = type, .experts = 1, .epilogue = round ? CUDA_ADD : CUDA_STORE};
        p.columns = round ? 1280 : 512;
        p.tokens = 1 + random_below(random, CUDA_STREAM_TOKENS);
        p.rows = 32768 + random_below(random, 1000);
        test_together(random, &p, 1, type, 0, false);
    }
    for (int round = 0; round < 12; round++) { /* many tokens; in the last round also many rows */
        struct problem p = {.type = type, .experts = 1, .epilogue = (enum cuda_epilogue)(round % 4)};
        p.columns = round % 2 ? 256 * (1 + random_below(random, 20)) : block * (1 + random_below(random, 1024 / block));
        p.tokens = 9 + random_below(random, round < 3 ? 24 : round < 6 ? 56 : 200);
        p.rows = 8 * (1 + random_below(random, round % 3 ? 50 : 250));
        if (round == 11) {
            p.columns = 256;
            p.rows = 8 * (3100 + random_below(random, 100));
        }
        p.rows -= p.epilogue == CUDA_SWIGLU ? 0 : random_below(random, 8);
        test_together(random, &p, 1 + (uint32_t)round % CUDA_PARTS, round % 2 ? QUANT_Q6_K : type, 0, false);
    }
}

int main(void) {
    struct random random;
    cuda_test_begin(&random);
    for (int i = 0; i < QUANT_TYPES && cuda_matmul_streams(); i++)
        if (quant_format(quant_types[i])->block_weights > 1)
            test_choices(&random, quant_types[i]);
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
