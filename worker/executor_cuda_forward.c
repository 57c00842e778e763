#include <stdlib.h>

#include "common/log.h"
#include "worker/executor_cuda.h"

/* Rows of a captured decode step, and positions its rows may have; a step takes the next larger of each. */
static const uint32_t row_buckets[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256};
static const uint32_t context_buckets[] = {256, 1024, 4096, 16384, UINT32_MAX};
enum {
    ROW_BUCKETS = sizeof row_buckets / sizeof *row_buckets,
    CONTEXT_BUCKETS = sizeof context_buckets / sizeof *context_buckets,
    MANY_ROWS_ABOVE = 128,
    SPLIT_ROWS = 128,     /* more rows of prompts than this keep the device busy without cutting contexts into pieces, */
    WHOLE_ROWS = 48,      /* and so do so many decode rows, where no context is so long that others wait for it */
    WHOLE_CONTEXT = 1024,
};

/* Above so many rows the matrix products for many tokens are faster, which read rows interleaved. */
static bool is_many(const struct executor_cuda *cuda, const struct cuda_shape *shape) {
    return cuda->many_runs && shape->rows > MANY_ROWS_ABOVE;
}

bool cuda_shape_splits(const struct executor_cuda *cuda, const struct cuda_shape *shape) {
    if (cuda_attention_partial_floats(&cuda->heads, shape->rows, shape->context_limit) > cuda->partial_floats)
        return false;
    return shape->tiles < shape->rows ? shape->rows <= SPLIT_ROWS
                                      : shape->rows < WHOLE_ROWS || shape->context_limit > WHOLE_CONTEXT;
}

bool cuda_row_runs(const struct executor_cuda *cuda) {
    const uint32_t used = cuda->model->config.expert_used_count;
    bool runs = true;
    for (uint32_t l = 0; l < cuda->model->config.block_count && runs; l++) {
        const struct cuda_layer *layer = &cuda->weights.layers[l];
        const struct cuda_matrix *qkv[] = {&layer->q, &layer->k, &layer->v};
        const struct cuda_matrix *output = &layer->output, *gate = &layer->gate;
        runs = cuda_row_takes(qkv, 3, true, 0, 1) && cuda_row_takes(&output, 1, false, 0, 1) && !layer->up.tiles &&
               cuda_row_takes(&gate, 1, false, used, 1) && cuda_row_takes_mix(&layer->down, used);
    }
    return runs;
}

uint32_t cuda_few_rows(const struct executor_cuda *cuda) {
    uint32_t most = CUDA_ROW_TOKENS;
    for (uint32_t l = 0; l < cuda->model->config.block_count; l++) {
        const struct cuda_layer *layer = &cuda->weights.layers[l];
        const struct cuda_matrix *qkv[] = {&layer->q, &layer->k, &layer->v}, *output = &layer->output;
        while (most > 1 && !(cuda_row_takes(qkv, 3, false, 0, most) && cuda_row_takes(&output, 1, false, 0, most)))
            most--;
    }
    return most;
}

static bool is_row(const struct executor_cuda *cuda, const struct cuda_shape *shape) {
    return cuda->row_runs && shape->rows == 1;
}

/* As the products of the layers read it; the head reads rows as they are. */
static struct cuda_activation activation(struct cuda_activation of, bool interleaved) {
    of.interleaved = interleaved;
    return of;
}

/* Tokens of an expert that share one pass over its weights: about twice as many as an even spread gives each. */
static uint32_t item_tokens(const struct model_config *config, uint32_t rows) {
    const uint64_t spread = (uint64_t)rows * config->expert_used_count / config->expert_count;
    if (spread > 4 && spread <= 16 && cuda_matmul_streams())
        return CUDA_STREAM_TOKENS;
    return spread <= 4 ? 8 : spread <= 8 ? 16 : spread <= 16 ? 32 : CUDA_TOKENS_MAX;
}

static struct cuda_matmul projection(const struct cuda_matrix *w, const struct cuda_activation *x, uint32_t rows,
                                     float *y, uint32_t y_stride, enum cuda_epilogue epilogue) {
    return (struct cuda_matmul){
        .w = w, .x = x->half, .x_scale = x->scale, .y = y, .y_stride = y_stride, .tokens = rows, .epilogue = epilogue};
}

/* The norm before layer l, with what layer l - 1's experts made; behind the last layer of rows with an output only. */
static struct cuda_norm norm_of(struct executor_cuda *cuda, const struct cuda_shape *shape, uint32_t l) {
    const struct model_config *config = &cuda->model->config;
    const bool last = l == config->block_count;
    struct cuda_norm norm = {.x = cuda->x,
                             .columns = config->embedding_length,
                             .rows = last ? shape->outputs : shape->rows,
                             .norm = last ? cuda->weights.output_norm : cuda->weights.layers[l].attn_norm,
                             .epsilon = config->rms_epsilon,
                             .select = last ? cuda->device.select : NULL,
                             .out = activation(cuda->normed, !last && is_many(cuda, shape))};
    if (l > 0 && !is_row(cuda, shape)) {
        norm.experts = cuda->expert_out;
        norm.weights = cuda->route_weights + (size_t)(l - 1) * cuda->base.info.step_tokens * config->expert_used_count;
        norm.used = config->expert_used_count;
    }
    return norm;
}

static cudaError_t attention(struct executor_cuda *cuda, const struct cuda_shape *shape, uint32_t l) {
    const struct model_config *config = &cuda->model->config;
    const struct cuda_layer *layer = &cuda->weights.layers[l];
    const bool many = is_many(cuda, shape), few = shape->rows > 1 && shape->rows <= cuda->few_rows;
    const struct cuda_activation x = activation(cuda->normed, many), attended = activation(cuda->mixed, many);
    const uint32_t dim = config->head_dim, q_width = config->head_count * dim, kv_width = config->head_count_kv * dim;
    const uint32_t width = q_width + 2 * kv_width, n = shape->rows;
    unsigned char *cache = cuda->kv + l * cuda->kv_layer_bytes;
    const struct cuda_rows rows = {cuda->device.position, cuda->device.table, cuda->device.tables, n};
    const struct cuda_rope rope = {
        cuda->qkv, layer->attn_q_norm, layer->attn_k_norm, cuda->cos_sin, config->rms_epsilon,
    };
    const bool rope_within = shape->decode && cuda_attention_takes_rope(&cuda->heads);
    const struct cuda_attention a = {
        .heads = cuda->heads,
        .rows = rows,
        .q = cuda->q,
        .cache = cache,
        .rope = rope_within ? &rope : NULL,
        .tiles = cuda->device.tiles,
        .tile_rows = cuda->device.tile_rows,
        .tile_count = shape->tiles,
        .context_limit = shape->context_limit,
        .partial = shape->split ? cuda->partial : NULL,
        .y = cuda->attended,
        .out = attended,
    };
    const struct cuda_matmul qkv[] = {
        projection(&layer->q, &x, n, cuda->qkv, width, CUDA_STORE),
        projection(&layer->k, &x, n, cuda->qkv + q_width, width, CUDA_STORE),
        projection(&layer->v, &x, n, cuda->qkv + q_width + kv_width, width, CUDA_STORE),
    };
    const struct cuda_matmul output =
        projection(&layer->output, &attended, n, cuda->x, config->embedding_length, CUDA_ADD);

    cudaError_t error = cudaSuccess;
    if (is_row(cuda, shape)) {
        const struct cuda_norm norm = norm_of(cuda, shape, l);
        error = cuda_row_matmul(qkv, 3, &norm, NULL, cuda->stream);
    } else if (many) {
        for (int i = 0; i < 3 && error == cudaSuccess; i++)
            error = cuda_matmul_many(&qkv[i], cuda->stream);
    } else if (few) {
        error = cuda_row_matmul(qkv, 3, NULL, NULL, cuda->stream);
    } else {
        error = cuda_matmul_parts(qkv, 3, cuda->stream);
    }
    error = error ? error : cuda_mark(cuda, "q, k, v");
    if (!rope_within) {
        error = error ? error : cuda_rope(&cuda->heads, &rows, &rope, cuda->q, cache, cuda->stream);
        error = error ? error : cuda_mark(cuda, "rope");
    }
    error = error ? error : cuda_attention(&a, cuda->stream);
    error = error ? error : cuda_mark(cuda, "attention");
    error = error                        ? error
            : many                       ? cuda_matmul_many(&output, cuda->stream)
            : is_row(cuda, shape) || few ? cuda_row_matmul(&output, 1, NULL, NULL, cuda->stream)
                                          : cuda_matmul(&output, cuda->stream);
    return error ? error : cuda_mark(cuda, "output");
}

static cudaError_t experts(struct executor_cuda *cuda, const struct cuda_shape *shape, uint32_t l) {
    const struct model_config *config = &cuda->model->config;
    const struct cuda_layer *layer = &cuda->weights.layers[l];
    const uint32_t length = config->embedding_length, used = config->expert_used_count;
    const bool many = is_many(cuda, shape);
    cudaError_t (*const matmul)(const struct cuda_matmul *, cudaStream_t) = many ? cuda_matmul_many : cuda_matmul;
    const uint32_t hidden = config->expert_feed_forward_length;
    const uint32_t tokens = many ? shape->rows : item_tokens(config, shape->rows); /* many: an expert's all */
    const size_t route_at = (size_t)l * cuda->base.info.step_tokens * used;
    const struct cuda_route route = {
        .norm = {.x = cuda->x,
                 .columns = length,
                 .rows = shape->rows,
                 .norm = layer->ffn_norm,
                 .epsilon = config->rms_epsilon,
                 .out = activation(cuda->normed, many),
                 .factors = cuda->norm_factors},
        .router = layer->router,
        .experts = config->expert_count,
        .used = used,
        .item_tokens = tokens,
        .logits = cuda->router_logits,
        .chosen = cuda->route_experts + route_at,
        .weights = cuda->route_weights + route_at,
        .items = cuda->items,
        .item_count = cuda->item_count,
        .order = cuda->order,
        .counts = cuda->route_counts,
    };
    const struct cuda_activation mixed = activation(cuda->mixed, many);
    struct cuda_matmul m = {
        .w = &layer->gate,
        .x = cuda->normed.half,
        .x_scale = cuda->normed.scale,
        .y = cuda->hidden,
        .y_stride = hidden,
        .tokens = tokens,
        .epilogue = layer->up.tiles ? CUDA_STORE : CUDA_SWIGLU,
        .items = cuda->items,
        .item_count = cuda->item_count,
        .order = cuda->order,
        .x_divisor = used,
        .item_limit = cuda_route_item_limit(shape->rows, config->expert_count, used, tokens),
    };

    if (is_row(cuda, shape)) {
        const struct cuda_row_mix mix = {&route, &layer->down, cuda->hidden, cuda->x};
        cudaError_t error = cuda_route_logits(&route, cuda->stream);
        error = error ? error : cuda_mark(cuda, "norm and route");
        error = error ? error : cuda_row_matmul(&m, 1, NULL, &route, cuda->stream);
        error = error ? error : cuda_mark(cuda, "gate, up");
        error = error ? error : cuda_row_mix(&mix, cuda->stream);
        return error ? error : cuda_mark(cuda, "down");
    }
    cudaError_t error = cuda_route(&route, cuda->stream);
    error = error ? error : cuda_mark(cuda, "norm and route");
    error = error ? error : matmul(&m, cuda->stream);
    if (layer->up.tiles) {
        m.w = &layer->up;
        m.epilogue = CUDA_GATED;
        error = error ? error : matmul(&m, cuda->stream);
    }
    error = error ? error : cuda_mark(cuda, "gate, up");
    m.w = &layer->down;
    m.x = mixed.half;
    m.x_scale = mixed.scale;
    m.floats = cuda->hidden;
    m.y = cuda->expert_out;
    m.y_stride = length;
    m.epilogue = CUDA_STORE;
    m.x_divisor = 1;
    m.items_early = !many; /* gate and up stand between */
    if (many || !cuda_matmul_rounds(&m)) {
        m.floats = NULL;
        error = error ? error : cuda_round(cuda->hidden, hidden, shape->rows * used, &mixed, cuda->stream);
        error = error ? error : cuda_mark(cuda, "round");
    }
    error = error ? error : matmul(&m, cuda->stream);
    return error ? error : cuda_mark(cuda, "down");
}

static cudaError_t norm_layer(struct executor_cuda *cuda, const struct cuda_shape *shape, uint32_t l) {
    const struct cuda_norm norm = norm_of(cuda, shape, l);
    cudaError_t error = cuda_norm(&norm, cuda->stream);
    return error ? error : cuda_mark(cuda, "norm");
}

cudaError_t cuda_forward(struct executor_cuda *cuda, const struct cuda_shape *shape) {
    const struct model_config *config = &cuda->model->config;
    cudaError_t error = cuda_mark(cuda, NULL);
    error = error ? error
                  : cuda_embed(cuda->model->token_embd.type, cuda->weights.embedding, cuda->weights.embedding_row_bytes,
                               config->embedding_length, cuda->device.tokens, shape->rows, cuda->x, cuda->stream);
    error = error ? error : cuda_mark(cuda, "embed");
    for (uint32_t l = 0; l < config->block_count && error == cudaSuccess; l++) {
        error = is_row(cuda, shape) ? cudaSuccess : norm_layer(cuda, shape, l);
        error = error ? error : attention(cuda, shape, l);
        error = error ? error : experts(cuda, shape, l);
    }
    if (error != cudaSuccess || shape->outputs == 0)
        return error;
    error = norm_layer(cuda, shape, config->block_count);
    const struct cuda_matmul head = projection(&cuda->weights.head, &cuda->normed, shape->outputs, cuda->logits,
                                               config->vocab_size, CUDA_STORE);
    error = error ? error : cuda_matmul(&head, cuda->stream);
    error = error ? error : cuda_mark(cuda, "head");
    error = error ? error
                  : cuda_greatest(cuda->logits, config->vocab_size, shape->outputs, cuda->greatest_parts,
                                  cuda->greatest, cuda->stream);
    return error ? error : cuda_mark(cuda, "greatest");
}

cudaError_t cuda_graph_capture(struct executor_cuda *cuda, struct cuda_graph *graph) {
    cudaGraph_t captured = NULL;
    cudaError_t error = cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess)
        return error;
    error = cuda_forward(cuda, &graph->shape);
    cudaError_t end = cudaStreamEndCapture(cuda->stream, &captured);
    error = error ? error : end;
    error = error ? error : cudaGraphInstantiate(&graph->exec, captured, 0);
    if (captured)
        cudaGraphDestroy(captured);
    return error;
}

static uint32_t least(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

int cuda_graphs_capture(struct executor_cuda *cuda, struct status *status) {
    const struct executor_info *info = &cuda->base.info;
    cuda->graphs = calloc(ROW_BUCKETS * CONTEXT_BUCKETS, sizeof *cuda->graphs);
    if (!cuda->graphs)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for graphs");
    const uint32_t most = least(info->max_sequences, least(info->step_tokens, info->max_outputs));
    for (uint32_t r = 0; r < ROW_BUCKETS && (r == 0 || row_buckets[r - 1] < most); r++)
        for (uint32_t c = 0; c < CONTEXT_BUCKETS && (c == 0 || context_buckets[c - 1] < info->context_length); c++) {
            const uint32_t rows = least(row_buckets[r], most), limit = least(context_buckets[c], info->context_length);
            struct cuda_graph *graph = &cuda->graphs[cuda->graph_count];
            graph->shape = (struct cuda_shape){
                .rows = rows, .tiles = rows, .outputs = rows, .context_limit = limit, .decode = true};
            graph->shape.split = cuda_shape_splits(cuda, &graph->shape);
            cudaError_t error = cuda_graph_capture(cuda, graph);
            if (error != cudaSuccess)
                return cuda_failed(status, error, "capture of a decode step");
            cuda->graph_count++;
        }
    return 0;
}

const struct cuda_graph *cuda_graph_find(const struct executor_cuda *cuda, uint32_t rows, uint32_t context_limit) {
    for (uint32_t i = 0; i < cuda->graph_count; i++) /* rising rows, and contexts within */
        if (cuda->graphs[i].shape.rows >= rows && cuda->graphs[i].shape.context_limit >= context_limit)
            return &cuda->graphs[i];
    return NULL;
}

void cuda_graphs_free(struct executor_cuda *cuda) {
    for (uint32_t i = 0; i < cuda->graph_count; i++)
        cudaGraphExecDestroy(cuda->graphs[i].exec);
    free(cuda->graphs);
    cuda->graphs = NULL;
    cuda->graph_count = 0;
}
