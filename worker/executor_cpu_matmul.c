#include "worker/executor_cpu.h"

#include <assert.h>
#include <math.h>

enum { PRODUCTS_MAX = 3 };

struct multiply {
    struct executor_cpu *cpu;
    const struct cpu_product *products;
    uint32_t item_rows[PRODUCTS_MAX];
    uint32_t item_ends[PRODUCTS_MAX]; /* items of the products up to and including this one */
};

const void *cpu_matrix_tile(const struct executor_cpu *cpu, const struct cpu_matrix *matrix, uint32_t expert,
                            uint32_t tile, uint32_t thread) {
    if (matrix->packed)
        return matrix->packed + ((size_t)expert * matrix->tiles + tile) * matrix->tile_bytes;
    uint32_t row = tile * CPU_TILE_ROWS;
    uint32_t rows = matrix->rows - row < CPU_TILE_ROWS ? matrix->rows - row : CPU_TILE_ROWS;
    const unsigned char *from = matrix->source + ((size_t)expert * matrix->rows + row) * matrix->row_bytes;
    cpu->kernels->pack(matrix->type, matrix->columns, from, matrix->row_bytes, rows, cpu->threads[thread].tile);
    return cpu->threads[thread].tile;
}

uint32_t cpu_item_rows(const struct cpu_matrix *matrix) {
    size_t bytes = matrix->quantized ? cpu_activation_bytes(matrix->columns) : matrix->columns * sizeof(float);
    size_t rows = CPU_ITEM_ACTIVATION_BYTES / bytes;
    return rows < CPU_TILE_ROWS ? CPU_TILE_ROWS : rows > CPU_ITEM_ROWS ? CPU_ITEM_ROWS : (uint32_t)rows;
}

static bool all_finite(const float *x, uint32_t n) {
    bool finite = true;
    for (uint32_t i = 0; i < n; i++)
        finite &= isfinite(x[i]) != 0;
    return finite;
}

/* Items are tiles; all tiles for the first rows, then all for the next. */
static void multiply_items(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    const struct multiply *multiply = context;
    struct executor_cpu *cpu = multiply->cpu;
    struct cpu_thread *own = &cpu->threads[thread];
    uint32_t part = 0, prepared = UINT32_MAX;
    for (uint32_t i = first; i < end; i++) {
        for (; i >= multiply->item_ends[part]; part++)
            prepared = UINT32_MAX;
        const struct cpu_product *product = &multiply->products[part];
        const struct cpu_matrix *matrix = product->matrix;
        uint32_t local = part ? i - multiply->item_ends[part - 1] : i;
        uint32_t step = multiply->item_rows[part], row = local / matrix->tiles * step, tile = local % matrix->tiles;
        uint32_t n = product->count - row < step ? product->count - row : step;
        if (prepared != row) {
            for (uint32_t r = 0; r < n; r++)
                own->in[r] = (const unsigned char *)product->in + product->rows[row + r] * product->in_stride;
            prepared = row;
        }
        for (uint32_t r = 0; r < n; r++)
            own->out[r] = product->out + product->rows[row + r] * product->out_stride + tile * CPU_TILE_ROWS;

        uint32_t rows = matrix->rows - tile * CPU_TILE_ROWS;
        if (rows > CPU_TILE_ROWS)
            rows = CPU_TILE_ROWS;
        cpu->kernels->matmul_tile(matrix->type, matrix->columns, cpu_matrix_tile(cpu, matrix, 0, tile, thread), rows,
                                  own->in, own->out, n);
        if (product->not_finite)
            for (uint32_t r = 0; r < n; r++)
                if (!all_finite(own->out[r], rows))
                    atomic_store_explicit(product->not_finite, true, memory_order_relaxed);
    }
}

void cpu_multiply(struct executor_cpu *cpu, const struct cpu_product *products, uint32_t count) {
    assert(count <= PRODUCTS_MAX);
    struct multiply multiply = {.cpu = cpu, .products = products};
    uint32_t items = 0;
    for (uint32_t i = 0; i < count; i++) {
        multiply.item_rows[i] = cpu_item_rows(products[i].matrix);
        items += (products[i].count + multiply.item_rows[i] - 1) / multiply.item_rows[i] * products[i].matrix->tiles;
        multiply.item_ends[i] = items;
    }
    thread_pool_run(cpu->pool, multiply_items, &multiply, items);
}
