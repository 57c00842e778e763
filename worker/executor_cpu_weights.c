#include "worker/executor_cpu.h"

#include <stdlib.h>

#include "common/clock.h"
#include "common/gguf.h"
#include "common/log.h"
#include "worker/host_memory.h"

enum { MATRICES_OF_LAYER = 8, PROGRESS_NS = 2000000000 };

static int describe(struct cpu_weights *weights, const struct model_matrix *source, struct cpu_matrix *out,
                    struct status *status) {
    *out = (struct cpu_matrix){
        .type = source->type,
        .quantized = cpu_type_is_quantized(source->type),
        .columns = source->columns,
        .rows = source->rows,
        .experts = source->experts,
        .tiles = (source->rows + CPU_TILE_ROWS - 1) / CPU_TILE_ROWS,
        .tile_bytes = cpu_tile_bytes(source->type, source->columns),
        .source = source->data,
        .row_bytes = source->row_bytes,
    };
    if (!out->tile_bytes)
        return status_set(status, STATUS_UNIMPLEMENTED, "%s: no kernels for rows of %u weights of type %d",
                          source->name, source->columns, (int)source->type);
    if (out->tile_bytes > weights->tile_bytes_max)
        weights->tile_bytes_max = out->tile_bytes;
    return 0;
}

int cpu_weights_create(struct cpu_weights *weights, const struct model *model, struct status *status) {
    uint32_t layers = model->config.block_count;
    *weights = (struct cpu_weights){.layers = calloc(layers, sizeof *weights->layers)};
    if (!weights->layers)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %u layers", layers);
    for (uint32_t l = 0; l < layers; l++) {
        const struct model_layer *from = &model->layers[l];
        struct cpu_layer *to = &weights->layers[l];
        to->norms = from;
        if (describe(weights, &from->attn_q, &to->q, status) < 0 ||
            describe(weights, &from->attn_k, &to->k, status) < 0 ||
            describe(weights, &from->attn_v, &to->v, status) < 0 ||
            describe(weights, &from->attn_output, &to->output, status) < 0 ||
            describe(weights, &from->ffn_gate_inp, &to->router, status) < 0 ||
            describe(weights, &from->ffn_gate_exps, &to->gate, status) < 0 ||
            describe(weights, &from->ffn_up_exps, &to->up, status) < 0 ||
            describe(weights, &from->ffn_down_exps, &to->down, status) < 0)
            return -1;
    }
    return describe(weights, &model->output, &weights->head, status);
}

/* The layer's matrices in the order a step reads them. */
static void list_matrices(struct cpu_layer *layer, struct cpu_matrix *out[MATRICES_OF_LAYER]) {
    struct cpu_matrix *list[MATRICES_OF_LAYER] = {&layer->q,      &layer->k,    &layer->v,  &layer->output,
                                                  &layer->router, &layer->gate, &layer->up, &layer->down};
    for (int i = 0; i < MATRICES_OF_LAYER; i++)
        out[i] = list[i];
}

static size_t packed_bytes(const struct cpu_matrix *matrix) {
    return (size_t)matrix->experts * matrix->tiles * matrix->tile_bytes;
}

size_t cpu_weights_packed_bytes(const struct cpu_weights *weights, const struct model *model) {
    size_t bytes = packed_bytes(&weights->head);
    for (uint32_t l = 0; l < model->config.block_count; l++) {
        struct cpu_matrix *list[MATRICES_OF_LAYER];
        list_matrices(&weights->layers[l], list);
        for (int i = 0; i < MATRICES_OF_LAYER; i++)
            bytes += packed_bytes(list[i]);
    }
    return bytes;
}

struct packing {
    const struct cpu_kernels *kernels;
    const struct cpu_matrix *matrix;
    unsigned char *to;
};

static void pack_tiles(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    const struct packing *packing = context;
    const struct cpu_matrix *matrix = packing->matrix;
    for (uint32_t i = first; i < end; i++) {
        uint32_t row = i % matrix->tiles * CPU_TILE_ROWS;
        uint32_t rows = matrix->rows - row < CPU_TILE_ROWS ? matrix->rows - row : CPU_TILE_ROWS;
        size_t from = (size_t)(i / matrix->tiles) * matrix->rows + row;
        packing->kernels->pack(matrix->type, matrix->columns, matrix->source + from * matrix->row_bytes,
                               matrix->row_bytes, rows, packing->to + i * matrix->tile_bytes);
    }
}

int cpu_weights_pack(struct cpu_weights *weights, const struct model *model, const struct cpu_kernels *kernels,
                     struct thread_pool *pool, struct status *status) {
    weights->bytes = cpu_weights_packed_bytes(weights, model);
    unsigned char *to = weights->memory = host_memory_map(weights->bytes);
    if (!to)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu MiB of repacked weights",
                          weights->bytes >> 20);

    uint64_t start = clock_now_ns(), reported = start;
    size_t done = 0;
    uint32_t layers = model->config.block_count;
    for (uint32_t l = 0; l <= layers; l++) {
        struct cpu_matrix *list[MATRICES_OF_LAYER] = {&weights->head};
        if (l < layers)
            list_matrices(&weights->layers[l], list);
        for (int i = 0; i < (l < layers ? MATRICES_OF_LAYER : 1); i++) {
            struct packing packing = {.kernels = kernels, .matrix = list[i], .to = to + done};
            thread_pool_run(pool, pack_tiles, &packing, list[i]->experts * list[i]->tiles);
            list[i]->packed = packing.to;
            done += packed_bytes(list[i]);
            /* Embeddings are read from the file, so a tied head's pages stay. */
            if (l < layers || !model->tied)
                gguf_release(model->gguf, list[i]->source,
                             (uint64_t)list[i]->experts * list[i]->rows * list[i]->row_bytes);
            uint64_t now = clock_now_ns();
            if (now - reported >= PROGRESS_NS || (reported > start && done == weights->bytes)) {
                log_info("weights_repacked", LOG_UINT("mib", done >> 20), LOG_UINT("of_mib", weights->bytes >> 20),
                         LOG_REAL("gb_per_second", (double)done / (double)(now - start)));
                reported = now;
            }
        }
    }
    return 0;
}

void cpu_weights_free(struct cpu_weights *weights) {
    host_memory_unmap(weights->memory, weights->bytes);
    free(weights->layers);
    *weights = (struct cpu_weights){0};
}
