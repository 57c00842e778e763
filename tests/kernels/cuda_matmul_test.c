#include "tests/kernels/cuda_matmul_problem.h"

/*
 * cuda_pack and cuda_matmul of every format against float64 over the file's own weights, on random shapes: dense and by
 * expert, all epilogues. A token's result must have the same bits alone and among others.
 */

static double dot(enum quant_type type, const uint8_t *row, const double *x, uint32_t columns) {
    double sum = 0;
    for (uint32_t i = 0; i < columns; i++)
        sum += weight_reference(type, row, i) * x[i];
    return sum;
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
    return tap_done();
}
