#ifndef MOED_TESTS_KERNELS_CUDA_MATMUL_PROBLEM_H
#define MOED_TESTS_KERNELS_CUDA_MATMUL_PROBLEM_H

#include <math.h>
#include <stdbool.h>
#include <time.h>

#include "kernels/cuda/cuda.h"
#include "tests/kernels/cuda_test.h"

/* Random matrix products for the tests of cuda_matmul. */

static inline uint16_t f16_from_double(double x) { /* of a small number with at most 11 significant bits */
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

static inline void weights_make(struct random *random, const struct problem *p, struct weights *w) {
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

typedef cudaError_t matmul(const struct cuda_matmul *arguments, cudaStream_t stream);

/* One launch over some tokens' assignments; y is [tokens * max(used, 1)][rows], NaN where nothing was written. */
static inline void run(const struct problem *p, const struct weights *w, const void *x, const float *x_scale,
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
static inline uint32_t make_items(const uint32_t *expert, const struct problem *p, uint32_t assignments, uint32_t limit,
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

#endif
