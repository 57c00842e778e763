#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/executor_cuda.h"

/*
 * Weights travel through pinned buffers: the pool's threads fill one from the mapped file while another is copied to the
 * device and repacked there.
 */
enum {
    ALIGNMENT = 256,
    STAGING_BUFFERS = 3,
    STAGING_BYTES = 48 << 20,
    COPY_BYTES = 1 << 20,
    UNITS = 512,
    LAYER_MATRICES = 7
};
static const uint64_t progress_ns = 2000000000;

static size_t aligned(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Gives a part of the one allocation; with no memory behind it, it only adds up. */
static void *place(struct cuda_weights *weights, size_t bytes) {
    void *at = weights->memory ? weights->memory + weights->bytes : NULL;
    weights->bytes += aligned(bytes);
    return at;
}

static void place_matrix(struct cuda_weights *weights, const struct model_matrix *from, uint32_t rows,
                         struct cuda_matrix *to) {
    *to = (struct cuda_matrix){
        .type = from->type, .columns = from->columns, .rows = rows, .experts = from->experts, .scale = to->scale};
    to->tiles = place(weights, cuda_matrix_expert_bytes(from->type, from->columns, rows) * from->experts);
}

static void lay_out(struct cuda_weights *weights, const struct model *model) {
    const struct model_config *config = &model->config;
    weights->bytes = 0;
    weights->embedding_row_bytes = model->token_embd.row_bytes;
    weights->embedding = place(weights, model->token_embd.row_bytes * model->token_embd.rows);
    weights->output_norm = place(weights, config->embedding_length * sizeof(float));
    place_matrix(weights, &model->output, model->output.rows, &weights->head);
    for (uint32_t l = 0; l < config->block_count; l++) {
        const struct model_layer *from = &model->layers[l];
        struct cuda_layer *to = &weights->layers[l];
        to->attn_norm = place(weights, config->embedding_length * sizeof(float));
        to->ffn_norm = place(weights, config->embedding_length * sizeof(float));
        to->attn_q_norm = place(weights, config->head_dim * sizeof(float));
        to->attn_k_norm = place(weights, config->head_dim * sizeof(float));
        to->router = place(weights, (size_t)config->expert_count * config->embedding_length * sizeof(float));
        place_matrix(weights, &from->attn_q, from->attn_q.rows, &to->q);
        place_matrix(weights, &from->attn_k, from->attn_k.rows, &to->k);
        place_matrix(weights, &from->attn_v, from->attn_v.rows, &to->v);
        place_matrix(weights, &from->attn_output, from->attn_output.rows, &to->output);
        const bool one_format = from->ffn_gate_exps.type == from->ffn_up_exps.type && from->ffn_up_exps.rows % 8 == 0;
        place_matrix(weights, &from->ffn_gate_exps, (one_format ? 2 : 1) * from->ffn_gate_exps.rows, &to->gate);
        if (!one_format)
            place_matrix(weights, &from->ffn_up_exps, from->ffn_up_exps.rows, &to->up);
        else
            to->up = (struct cuda_matrix){0};
        place_matrix(weights, &from->ffn_down_exps, from->ffn_down_exps.rows, &to->down);
    }
}

int cuda_weights_create(struct cuda_weights *weights, const struct model *model, struct status *status) {
    weights->layers = calloc(model->config.block_count, sizeof *weights->layers);
    if (!weights->layers)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %u layers", model->config.block_count);
    lay_out(weights, model);
    return 0;
}

void cuda_weights_free(struct cuda_weights *weights) {
    cudaFree(weights->memory);
    free(weights->layers);
    *weights = (struct cuda_weights){0};
}

/* Something that fits in a staging buffer: rows to pack, or bytes to copy as they are (columns 0). */
struct unit {
    const unsigned char *source, *pairs; /* in the file; pairs: the other half of interleaved rows, or NULL */
    size_t bytes, offset;                /* of each of the two; where in the buffer */
    enum quant_type type;
    size_t row_bytes;
    uint32_t columns, rows, bound; /* bound: which matrix's */
    void *to;
};

struct piece {
    const unsigned char *from;
    unsigned char *to;
    size_t bytes;
};

struct upload {
    struct thread_pool *pool;
    unsigned char *host[STAGING_BUFFERS], *device[STAGING_BUFFERS];
    cudaStream_t stream;
    cudaEvent_t done[STAGING_BUFFERS];
    int current;
    struct unit units[UNITS];
    uint32_t unit_count, matrix_count;
    size_t filled, sent, total;
    uint32_t *bounds; /* on the device, one for each matrix */
    uint64_t start, reported;
    struct piece pieces[2 * UNITS + STAGING_BYTES / COPY_BYTES]; /* what the threads copy to fill a buffer */
    uint32_t piece_count;
};

static void copy_pieces(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    const struct piece *pieces = context;
    for (uint32_t i = first; i < end; i++)
        memcpy(pieces[i].to, pieces[i].from, pieces[i].bytes);
}

static void add_pieces(struct upload *upload, const unsigned char *from, unsigned char *to, size_t bytes) {
    for (size_t done = 0; done < bytes; done += COPY_BYTES)
        upload->pieces[upload->piece_count++] =
            (struct piece){from + done, to + done, bytes - done < COPY_BYTES ? bytes - done : COPY_BYTES};
}

static cudaError_t send_unit(struct upload *upload, const struct unit *unit) {
    const unsigned char *at = upload->device[upload->current] + unit->offset;
    if (unit->columns == 0)
        return cudaMemcpyAsync(unit->to, at, unit->bytes, cudaMemcpyDeviceToDevice, upload->stream);
    const unsigned char *pairs = unit->pairs ? at + aligned(unit->bytes) : NULL;
    const size_t blocks = unit->bytes / quant_format(unit->type)->block_bytes;
    cudaError_t error =
        cuda_pack(unit->type, at, pairs, unit->row_bytes, unit->columns, unit->rows, unit->to, upload->stream);
    if (error == cudaSuccess)
        error = cuda_weight_bound(unit->type, at, blocks, upload->bounds + unit->bound, upload->stream);
    if (error == cudaSuccess && pairs)
        error = cuda_weight_bound(unit->type, pairs, blocks, upload->bounds + unit->bound, upload->stream);
    return error;
}

/* Fills the current buffer, sends it on its way and takes the next. */
static cudaError_t flush(struct upload *upload) {
    if (upload->unit_count == 0)
        return cudaSuccess;
    const int buffer = upload->current;
    upload->piece_count = 0;
    for (uint32_t i = 0; i < upload->unit_count; i++) {
        const struct unit *unit = &upload->units[i];
        add_pieces(upload, unit->source, upload->host[buffer] + unit->offset, unit->bytes);
        if (unit->pairs)
            add_pieces(upload, unit->pairs, upload->host[buffer] + unit->offset + aligned(unit->bytes), unit->bytes);
        upload->sent += unit->bytes * (unit->pairs ? 2 : 1);
    }
    thread_pool_run(upload->pool, copy_pieces, upload->pieces, upload->piece_count);
    cudaError_t error = cudaMemcpyAsync(upload->device[buffer], upload->host[buffer], upload->filled,
                                        cudaMemcpyHostToDevice, upload->stream);
    for (uint32_t i = 0; i < upload->unit_count && error == cudaSuccess; i++)
        error = send_unit(upload, &upload->units[i]);
    if (error == cudaSuccess)
        error = cudaEventRecord(upload->done[buffer], upload->stream);
    upload->unit_count = 0;
    upload->filled = 0;
    upload->current = (buffer + 1) % STAGING_BUFFERS;
    if (error == cudaSuccess)
        error = cudaEventSynchronize(upload->done[upload->current]);

    const uint64_t now = clock_now_ns();
    if (now - upload->reported >= progress_ns) {
        log_info("weights_uploaded", LOG_UINT("mib", upload->sent >> 20), LOG_UINT("of_mib", upload->total >> 20),
                 LOG_REAL("gb_per_second", (double)upload->sent / (double)(now - upload->start)));
        upload->reported = now;
    }
    return error;
}

static cudaError_t add_unit(struct upload *upload, struct unit unit) {
    const size_t bytes = aligned(unit.bytes) * (unit.pairs ? 2 : 1);
    if (upload->unit_count == UNITS || upload->filled + bytes > STAGING_BYTES) {
        cudaError_t error = flush(upload);
        if (error != cudaSuccess)
            return error;
    }
    unit.offset = upload->filled;
    upload->filled += bytes;
    upload->units[upload->unit_count++] = unit;
    return cudaSuccess;
}

static cudaError_t add_bytes(struct upload *upload, const void *from, size_t bytes, const void *to) {
    cudaError_t error = cudaSuccess;
    const size_t most = STAGING_BYTES / 2;
    for (size_t done = 0; done < bytes && error == cudaSuccess; done += most)
        error = add_unit(upload, (struct unit){.source = (const unsigned char *)from + done,
                                               .bytes = bytes - done < most ? bytes - done : most,
                                               .to = (unsigned char *)to + done});
    return error;
}

/* All rows of a matrix, and of `pairs` between them where given, in units of whole tiles. */
static cudaError_t add_matrix(struct upload *upload, const struct model_matrix *from, const struct model_matrix *pairs,
                              const struct cuda_matrix *to) {
    const uint32_t tile = pairs ? CUDA_TILE_ROWS / 2 : CUDA_TILE_ROWS;
    const size_t expert_bytes = cuda_matrix_expert_bytes(to->type, to->columns, to->rows);
    const size_t tile_bytes = cuda_matrix_expert_bytes(to->type, to->columns, CUDA_TILE_ROWS);
    uint32_t most = (uint32_t)(STAGING_BYTES / 4 / from->row_bytes / tile * tile);
    most = most ? most : tile;
    cudaError_t error = cudaSuccess;
    for (uint32_t e = 0; e < from->experts; e++)
        for (uint32_t row = 0; row < from->rows && error == cudaSuccess; row += most) {
            const uint32_t rows = from->rows - row < most ? from->rows - row : most;
            const size_t at = ((size_t)e * from->rows + row) * from->row_bytes;
            error = add_unit(upload, (struct unit){
                                         .source = (const unsigned char *)from->data + at,
                                         .pairs = pairs ? (const unsigned char *)pairs->data + at : NULL,
                                         .bytes = rows * from->row_bytes,
                                         .type = from->type,
                                         .row_bytes = from->row_bytes,
                                         .columns = from->columns,
                                         .rows = rows,
                                         .bound = upload->matrix_count,
                                         .to = (unsigned char *)to->tiles + e * expert_bytes + row / tile * tile_bytes,
                                     });
        }
    upload->matrix_count++;
    return error;
}

/* All that one layer has. Its matrices count in this order for set_scales. */
static cudaError_t add_layer(struct upload *upload, const struct model_config *config, const struct model_layer *from,
                             struct cuda_layer *to) {
    cudaError_t error = add_bytes(upload, from->attn_norm, config->embedding_length * sizeof(float), to->attn_norm);
    const bool fused = to->up.tiles == NULL;
    error = error ? error : add_bytes(upload, from->ffn_norm, config->embedding_length * sizeof(float), to->ffn_norm);
    error = error ? error : add_bytes(upload, from->attn_q_norm, config->head_dim * sizeof(float), to->attn_q_norm);
    error = error ? error : add_bytes(upload, from->attn_k_norm, config->head_dim * sizeof(float), to->attn_k_norm);
    error = error ? error
                  : add_bytes(upload, from->ffn_gate_inp.data, from->ffn_gate_inp.rows * from->ffn_gate_inp.row_bytes,
                              to->router);
    error = error ? error : add_matrix(upload, &from->attn_q, NULL, &to->q);
    error = error ? error : add_matrix(upload, &from->attn_k, NULL, &to->k);
    error = error ? error : add_matrix(upload, &from->attn_v, NULL, &to->v);
    error = error ? error : add_matrix(upload, &from->attn_output, NULL, &to->output);
    error = error ? error : add_matrix(upload, &from->ffn_gate_exps, fused ? &from->ffn_up_exps : NULL, &to->gate);
    if (fused)
        upload->matrix_count++;
    else
        error = error ? error : add_matrix(upload, &from->ffn_up_exps, NULL, &to->up);
    return error ? error : add_matrix(upload, &from->ffn_down_exps, NULL, &to->down);
}

/* The power of two that brings the greatest weight to 128 .. 256, where f16 has all its precision and room above. */
static float matrix_scale(const uint32_t *bounds, uint32_t matrix) {
    float bound;
    int exponent = 0;
    memcpy(&bound, bounds + matrix, sizeof bound);
    if (bound > 0 && isfinite(bound))
        frexpf(bound, &exponent);
    return ldexpf(1, 8 - exponent);
}

static void set_scales(struct cuda_weights *weights, const uint32_t *bounds, uint32_t layers) {
    weights->head.scale = matrix_scale(bounds, 0);
    for (uint32_t l = 0; l < layers; l++) {
        struct cuda_layer *layer = &weights->layers[l];
        struct cuda_matrix *list[LAYER_MATRICES] = {&layer->q,    &layer->k,  &layer->v,   &layer->output,
                                                    &layer->gate, &layer->up, &layer->down};
        for (uint32_t i = 0; i < LAYER_MATRICES; i++)
            list[i]->scale = matrix_scale(bounds, 1 + l * LAYER_MATRICES + i);
    }
}

static cudaError_t upload_all(struct upload *upload, struct cuda_weights *weights, const struct model *model) {
    const struct model_config *config = &model->config;
    const uint32_t matrices = 1 + config->block_count * LAYER_MATRICES;
    cudaError_t error = cudaStreamCreateWithFlags(&upload->stream, cudaStreamNonBlocking);
    for (int i = 0; i < STAGING_BUFFERS && error == cudaSuccess; i++) {
        error = cudaHostAlloc((void **)&upload->host[i], STAGING_BYTES, cudaHostAllocDefault);
        error = error ? error : cudaMalloc((void **)&upload->device[i], STAGING_BYTES);
        error = error ? error : cudaEventCreateWithFlags(&upload->done[i], cudaEventDisableTiming);
    }
    error = error ? error : cudaMalloc((void **)&upload->bounds, matrices * sizeof(uint32_t));
    error = error ? error : cudaMemsetAsync(upload->bounds, 0, matrices * sizeof(uint32_t), upload->stream);
    error = error ? error : add_matrix(upload, &model->output, NULL, &weights->head);
    error = error ? error
                  : add_bytes(upload, model->token_embd.data, model->token_embd.row_bytes * model->token_embd.rows,
                              weights->embedding);
    error = error
                ? error
                : add_bytes(upload, model->output_norm, config->embedding_length * sizeof(float), weights->output_norm);
    for (uint32_t l = 0; l < config->block_count && error == cudaSuccess; l++)
        error = add_layer(upload, config, &model->layers[l], &weights->layers[l]);
    error = error ? error : flush(upload);

    uint32_t *bounds = calloc(matrices, sizeof *bounds);
    if (!bounds)
        return cudaErrorMemoryAllocation;
    error = error ? error
                  : cudaMemcpyAsync(bounds, upload->bounds, matrices * sizeof *bounds, cudaMemcpyDeviceToHost,
                                    upload->stream);
    error = error ? error : cudaStreamSynchronize(upload->stream);
    set_scales(weights, bounds, config->block_count);
    free(bounds);
    return error;
}

int cuda_weights_upload(struct cuda_weights *weights, const struct model *model, struct thread_pool *pool,
                        struct status *status) {
    const size_t bytes = weights->bytes;
    cudaError_t error = cudaMalloc((void **)&weights->memory, bytes);
    if (error != cudaSuccess)
        return cuda_failed(status, error, "weights");
    lay_out(weights, model);

    struct upload *upload = calloc(1, sizeof *upload);
    if (!upload)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory to upload weights");
    upload->pool = pool;
    upload->total = model->config.tensor_bytes;
    upload->start = upload->reported = clock_now_ns();
    error = upload_all(upload, weights, model);
    for (int i = 0; i < STAGING_BUFFERS; i++) {
        cudaFreeHost(upload->host[i]);
        cudaFree(upload->device[i]);
        if (upload->done[i])
            cudaEventDestroy(upload->done[i]);
    }
    cudaFree(upload->bounds);
    if (upload->stream)
        cudaStreamDestroy(upload->stream);
    const double seconds = (double)(clock_now_ns() - upload->start) * 1e-9;
    if (error == cudaSuccess)
        log_info("weights_ready", LOG_UINT("mib", bytes >> 20), LOG_REAL("seconds", seconds),
                 LOG_REAL("gb_per_second", (double)upload->sent * 1e-9 / seconds));
    free(upload);
    return error == cudaSuccess ? 0 : cuda_failed(status, error, "upload of the weights");
}
