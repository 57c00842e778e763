#include "tests/kernels/cuda_matmul_problem.h"

/*
 * cuda_row_matmul and cuda_row_mix on random shapes: all bits must be those of the kernels for any number of rows, which
 * other tests compare with float64.
 */

static float *random_floats(struct random *random, size_t n, float greatest) {
    float *floats = malloc(n * sizeof *floats);
    for (size_t i = 0; i < n; i++)
        floats[i] = random_float(random) * greatest;
    return floats;
}

static size_t differing(const float *want, const float *got, size_t n) {
    size_t differ = 0;
    for (size_t i = 0; i < n; i++)
        differ += memcmp(want + i, got + i, sizeof *got) != 0;
    return differ;
}

/* Device memory that a test frees in the end. */
struct buffers {
    void *all[64];
    size_t count;
};

static void *buffer(struct buffers *buffers, const void *from, size_t bytes) {
    return buffers->all[buffers->count++] = cuda_test_buffer(from, bytes);
}

static void release(struct buffers *buffers) {
    for (size_t i = 0; i < buffers->count; i++)
        cudaFree(buffers->all[i]);
}

static void weights_free(struct weights *w) {
    cudaFree(w->tiles);
    free(w->rows);
    free(w->pairs);
}

/* A row still to be normed, or some as f16, by up to three matrices of which all but the first have format `other`. */
static void test_dense(struct random *random, enum quant_type type, enum quant_type other, bool normed) {
    struct buffers buffers = {0};
    struct weights w[CUDA_PARTS];
    const uint32_t count = 1 + random_below(random, CUDA_PARTS);
    const bool super_blocks = quant_format(type)->block_weights == 256 || quant_format(other)->block_weights == 256;
    const uint32_t block = super_blocks ? 256 : 32;
    const uint32_t tokens = normed ? 1 : 1 + random_below(random, CUDA_ROW_TOKENS);
    struct problem p = {.experts = 1, .tokens = tokens, .epilogue = random_below(random, 2) ? CUDA_ADD : CUDA_STORE};
    p.columns = block * (1 + random_below(random, 5000 / block));
    size_t rows = 0;
    for (uint32_t i = 0; i < count; i++) {
        p.type = i ? other : type;
        p.rows = 1 + random_below(random, i ? 200 : 5000);
        rows += p.rows;
        weights_make(random, &p, &w[i]);
    }
    const uint32_t padded = (p.columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    float *x = random_floats(random, tokens * p.columns, 3), *norm = random_floats(random, p.columns, 2);
    const size_t results = tokens * rows;
    float *want = random_floats(random, results, 10), *got = calloc(results, sizeof *got);
    if (random_below(random, 8) == 0)
        x[random_below(random, tokens * p.columns)] = NAN;
    struct cuda_norm n = {.x = buffer(&buffers, x, tokens * p.columns * sizeof *x),
                          .columns = p.columns,
                          .rows = tokens,
                          .norm = buffer(&buffers, norm, p.columns * sizeof *norm),
                          .epsilon = 1e-6f,
                          .out = {buffer(&buffers, NULL, tokens * padded * 2),
                                  buffer(&buffers, NULL, tokens * sizeof(float)), false}};
    float *device_want = buffer(&buffers, want, results * sizeof *want);
    float *device_got = buffer(&buffers, want, results * sizeof *want);
    struct cuda_matmul a[CUDA_PARTS], b[CUDA_PARTS];
    size_t at = 0;
    for (uint32_t i = 0; i < count; i++) {
        a[i] = (struct cuda_matmul){.w = &w[i].matrix,
                                    .x = n.out.half,
                                    .x_scale = n.out.scale,
                                    .y = device_want + at,
                                    .y_stride = (uint32_t)rows,
                                    .tokens = tokens,
                                    .epilogue = p.epilogue};
        b[i] = a[i];
        b[i].y = device_got + at;
        at += w[i].matrix.rows;
    }
    CUDA_CHECK(cuda_norm(&n, 0));
    CUDA_CHECK(cuda_matmul_parts(a, count, 0));
    if (normed) { /* what is not to be read is not there */
        for (uint32_t i = 0; i < count; i++)
            b[i].x = b[i].x_scale = NULL;
        n.out = (struct cuda_activation){0};
    }
    CUDA_CHECK(cuda_row_matmul(b, count, normed ? &n : NULL, NULL, 0));
    cuda_test_fetch(want, device_want, results * sizeof *want);
    cuda_test_fetch(got, device_got, results * sizeof *got);
    const size_t differ = differing(want, got, results);
    tap_ok(differ == 0, "%s: %u by %u of %s, %s, %u columns, %zu rows, %s: %zu differ", normed ? "norm" : "rows",
           tokens, count, quant_format(type)->name, quant_format(other)->name, p.columns, rows,
           p.epilogue == CUDA_ADD ? "add" : "store", differ);
    for (uint32_t i = 0; i < count; i++)
        weights_free(&w[i]);
    release(&buffers);
    free(x);
    free(norm);
    free(want);
    free(got);
}

/* The router and the experts of a row. */
static void test_experts(struct random *random, enum quant_type type, enum quant_type down_type) {
    struct buffers buffers = {0};
    struct weights gate, down;
    const uint32_t block = quant_format(type)->block_weights == 256 ? 256 : 32;
    const uint32_t hidden_block = quant_format(down_type)->block_weights == 256 ? 256 : 32;
    const uint32_t experts = 1 + random_below(random, 128), used = 1 + random_below(random, experts < 8 ? experts : 8);
    struct problem p = {.type = type, .experts = experts, .tokens = 1, .used = used, .epilogue = CUDA_SWIGLU};
    const uint32_t columns = p.columns = block * (1 + random_below(random, 2500 / block));
    struct cuda_matrix shape = {.type = down_type, .rows = columns, .experts = experts};
    shape.columns = hidden_block * (1 + random_below(random, 1500 / hidden_block));
    while (!cuda_row_takes_mix(&shape, used))
        shape.columns -= hidden_block;
    const uint32_t hidden = p.rows = shape.columns;
    weights_make(random, &p, &gate);
    p.type = down_type;
    p.columns = hidden;
    p.rows = columns;
    p.epilogue = CUDA_STORE;
    weights_make(random, &p, &down);
    const uint32_t padded = (columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    const uint32_t hidden_padded = (hidden + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    const uint32_t limit = cuda_route_item_limit(1, experts, used, 8);
    float *x = random_floats(random, columns, 3), *norm = random_floats(random, columns, 2);
    float *router = random_floats(random, (size_t)experts * columns, 0.2f);
    if (random_below(random, 3) == 0) /* equal logits */
        memset(router, 0, (size_t)(experts + 1) / 2 * columns * sizeof *router);
    const struct cuda_activation normed = {buffer(&buffers, NULL, padded * 2), buffer(&buffers, NULL, sizeof(float)), false};
    struct cuda_route r = {.norm = {.columns = columns,
                                    .rows = 1,
                                    .norm = buffer(&buffers, norm, columns * sizeof *norm),
                                    .epsilon = 1e-6f,
                                    .out = normed,
                                    .factors = buffer(&buffers, NULL, sizeof(float))},
                           .router = buffer(&buffers, router, (size_t)experts * columns * sizeof *router),
                           .experts = experts,
                           .used = used,
                           .item_tokens = 8,
                           .logits = buffer(&buffers, NULL, experts * sizeof(float)),
                           .items = buffer(&buffers, NULL, limit * sizeof(struct cuda_item)),
                           .item_count = buffer(&buffers, NULL, sizeof(uint32_t)),
                           .order = buffer(&buffers, NULL, used * sizeof(uint32_t)),
                           .counts = buffer(&buffers, NULL, (size_t)CUDA_SORT_BLOCKS * experts * sizeof(uint32_t))};
    float *got[2], *weights[2];
    uint32_t *chosen[2];
    for (int way = 0; way < 2; way++) {
        got[way] = calloc(columns, sizeof **got);
        weights[way] = calloc(used, sizeof **weights);
        chosen[way] = calloc(used, sizeof **chosen);
        r.norm.x = buffer(&buffers, x, columns * sizeof *x);
        r.chosen = buffer(&buffers, NULL, used * sizeof(uint32_t));
        r.weights = buffer(&buffers, NULL, used * sizeof(float));
        float *device_hidden = buffer(&buffers, NULL, (size_t)used * hidden * sizeof(float));
        struct cuda_matmul m = {.w = &gate.matrix,
                                .x = r.norm.out.half,
                                .x_scale = r.norm.out.scale,
                                .y = device_hidden,
                                .y_stride = hidden,
                                .tokens = 8,
                                .epilogue = CUDA_SWIGLU,
                                .items = r.items,
                                .item_count = r.item_count,
                                .order = r.order,
                                .item_limit = limit,
                                .x_divisor = used};
        if (way == 0) {
            struct cuda_activation mixed = {buffer(&buffers, NULL, (size_t)used * hidden_padded * 2),
                                            buffer(&buffers, NULL, used * sizeof(float)), false};
            CUDA_CHECK(cuda_route(&r, 0));
            CUDA_CHECK(cuda_matmul(&m, 0));
            CUDA_CHECK(cuda_round(device_hidden, hidden, used, &mixed, 0));
            m.w = &down.matrix;
            m.x = mixed.half;
            m.x_scale = mixed.scale;
            m.y = buffer(&buffers, NULL, (size_t)used * columns * sizeof(float));
            m.y_stride = columns;
            m.epilogue = CUDA_STORE;
            m.x_divisor = 1;
            CUDA_CHECK(cuda_matmul(&m, 0));
            struct cuda_norm sum = r.norm;
            sum.experts = m.y;
            sum.weights = r.weights;
            sum.used = used;
            CUDA_CHECK(cuda_norm(&sum, 0));
        } else {
            const struct cuda_row_mix mix = {&r, &down.matrix, device_hidden, r.norm.x};
            CUDA_CHECK(cuda_route_logits(&r, 0));
            CUDA_CHECK(cuda_row_matmul(&m, 1, NULL, &r, 0));
            CUDA_CHECK(cuda_row_mix(&mix, 0));
        }
        cuda_test_fetch(got[way], r.norm.x, columns * sizeof(float));
        cuda_test_fetch(weights[way], r.weights, used * sizeof(float));
        cuda_test_fetch(chosen[way], r.chosen, used * sizeof(uint32_t));
    }
    const size_t differ = differing(got[0], got[1], columns), same = columns - differing(got[1], x, columns);
    tap_ok(differ == 0 && same < columns / 8 + 1 && memcmp(chosen[0], chosen[1], used * sizeof **chosen) == 0 &&
               memcmp(weights[0], weights[1], used * sizeof **weights) == 0,
           "experts: %s, %s, %u of %u, %u columns, %u hidden: %zu differ", quant_format(type)->name,
           quant_format(down_type)->name, used, experts, columns, hidden, differ);
    for (int way = 0; way < 2; way++) {
        free(got[way]);
        free(weights[way]);
        free(chosen[way]);
    }
    weights_free(&gate);
    weights_free(&down);
    release(&buffers);
    free(x);
    free(norm);
    free(router);
}

int main(void) {
    static const enum quant_type pairs[][2] = {
        {QUANT_Q4_K, QUANT_Q4_K}, {QUANT_Q4_K, QUANT_Q6_K}, {QUANT_Q5_K, QUANT_Q5_K},
        {QUANT_Q5_K, QUANT_Q6_K}, {QUANT_Q6_K, QUANT_Q6_K}, {QUANT_Q8_0, QUANT_Q8_0},
    };
    struct random random;
    cuda_test_begin(&random);
    const struct cuda_matrix q4 = {.type = QUANT_Q4_K, .columns = 256, .rows = 16, .experts = 1};
    const bool takes = cuda_row_takes_mix(&q4, 1);
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs && takes; i++)
        for (int round = 0; round < 6; round++) {
            test_dense(&random, pairs[i][0], pairs[i][1], round % 2);
            test_experts(&random, pairs[i][0], pairs[i][1]);
        }
    if (!takes)
        tap_skip("this device or build has no kernels for a row");
    return tap_done();
}
