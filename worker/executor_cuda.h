#ifndef MOED_WORKER_EXECUTOR_CUDA_H
#define MOED_WORKER_EXECUTOR_CUDA_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "worker/executor.h"
#include "worker/thread_pool.h"

/* The inside of the CUDA executor, shared by its files. */

struct cuda_layer {
    const float *attn_norm, *attn_q_norm, *attn_k_norm, *ffn_norm, *router; /* f32, as in the file */
    struct cuda_matrix q, k, v, output, down;
    struct cuda_matrix gate, up; /* gate holds both, interleaved, where they have one format; up.tiles is NULL then */
};

struct cuda_weights {
    unsigned char *memory; /* one allocation */
    size_t bytes;
    const void *embedding; /* in the file's format */
    size_t embedding_row_bytes;
    const float *output_norm;
    struct cuda_matrix head;
    struct cuda_layer *layers;
};

/* Lays the weights out; fills in `bytes` and everything but pointers. The rest of *weights is zero. */
int cuda_weights_create(struct cuda_weights *weights, const struct model *model, struct status *status);
/* Allocates device memory and fills it from the mapped file, with progress lines. */
int cuda_weights_upload(struct cuda_weights *weights, const struct model *model, struct thread_pool *pool,
                        struct status *status);
void cuda_weights_free(struct cuda_weights *weights);

/* A step's inputs as the kernels read them. The parts up to `tables` have room for a whole step each. */
struct cuda_input {
    uint32_t *tokens, *position, *table, *tiles, *tile_rows, *select, *tables;
};

/* Shape of a launch sequence: what is baked into a captured graph. */
struct cuda_shape {
    uint32_t rows, tiles, outputs, context_limit;
    bool split, decode; /* decode: every row is a tile, of a sequence of its own or a copy of another row */
};

struct cuda_graph {
    struct cuda_shape shape;
    cudaGraphExec_t exec;
};

struct executor_cuda {
    struct executor base;
    const struct model *model;
    struct cuda_weights weights;
    struct cuda_heads heads;
    struct thread_pool *pool; /* fills staging buffers, samples where histories are too long for the device */
    cudaStream_t stream;
    bool many_runs;    /* cuda_matmul_many_runs() */
    bool row_runs;     /* a step of one row has kernels of its own: cuda_row_matmul */
    uint32_t few_rows; /* in a step of 2 up to so many, it makes attention's products */

    unsigned char *kv; /* [layers][blocks] */
    size_t kv_layer_bytes;

    unsigned char *scratch;
    struct cuda_input host, device; /* host: pinned */
    size_t input_bytes;             /* up to `tables` */
    uint32_t tables_capacity;
    float *x, *norm_factors, *qkv, *attended, *partial, *hidden, *expert_out, *router_logits, *route_weights, *logits,
        *cos_sin;
    void *q;
    struct cuda_activation normed, mixed; /* mixed: of attention's output and of the experts' hidden rows */
    uint32_t *route_experts, *route_counts, *order, *item_count;
    uint32_t *busiest, *greatest; /* [layers], and behind it [max_outputs]: the tokens chosen */
    uint64_t *greatest_parts;
    struct cuda_item *items;
    size_t partial_floats;

    /* Of outputs that the device samples, but for those that only want the greatest logit. */
    struct cuda_draw *draws, *host_draws; /* [max_outputs]; host: pinned */
    uint32_t *history, *host_history;     /* [CUDA_HISTORY_TOKENS]; host: pinned */
    float *plain;                         /* [CUDA_HISTORY_TOKENS] */
    struct cuda_part *draw_parts;
    uint32_t *draw_list;
    uint32_t draw_count, penalized_count, history_count; /* of this step */
    bool *sample_on_host;                                /* [max_outputs] */

    /* Of outputs that the device samples and that ask for log-probabilities. [max_outputs]; host: pinned */
    struct cuda_asked *asked, *host_asked;
    struct cuda_alternatives *alternatives, *host_alternatives;
    uint64_t *asked_masses;
    uint32_t asked_count; /* of this step */

    struct cuda_graph *graphs;
    uint32_t graph_count;

    /* Results on the host. */
    float *host_logits;      /* pinned; [max_outputs][vocab] */
    uint32_t *host_busiest, *host_greatest; /* pinned; as busiest and greatest */
    uint32_t *host_route_experts, *routes_of_rows;
    float *host_route_weights, *route_weights_of_rows;
    struct sampled *sampled;
    const float **logits_rows;
    unsigned char *sampler_scratch; /* one for each thread */
    struct cuda_profile *profile;   /* NULL before the first step with batch.profile */
    bool profiling;                 /* this step is one */
};

/* Tokens of penalized sequences that a step has room for; sequences beyond are sampled on the host, to the same token. */
enum { CUDA_HISTORY_TOKENS = 1 << 20 };

/* A CUDA error as a status: what was being done, and the runtime's own words. Returns -1. */
int cuda_failed(struct status *status, cudaError_t error, const char *what);

/* Whether attention of such a step cuts contexts into pieces. */
bool cuda_shape_splits(const struct executor_cuda *cuda, const struct cuda_shape *shape);
/* Whether cuda_row_matmul and cuda_row_mix take all of the model's layers. */
bool cuda_row_runs(const struct executor_cuda *cuda);
/* The most rows of which cuda_row_matmul takes all layers' products of attention; 1: none, or of one row only. */
uint32_t cuda_few_rows(const struct executor_cuda *cuda);
/* Enqueues one forward pass over device.* . */
cudaError_t cuda_forward(struct executor_cuda *cuda, const struct cuda_shape *shape);
/* Captures the forward pass of a shape; graph->exec is to be destroyed. */
cudaError_t cuda_graph_capture(struct executor_cuda *cuda, struct cuda_graph *graph);
/* Captures the forward pass of every decode shape. */
int cuda_graphs_capture(struct executor_cuda *cuda, struct status *status);
/* The graph for so many decode rows and such a context, or NULL. */
const struct cuda_graph *cuda_graph_find(const struct executor_cuda *cuda, uint32_t rows, uint32_t context_limit);
void cuda_graphs_free(struct executor_cuda *cuda);

/* Notes, while profiling, that what was enqueued since the last mark was this operation; NULL: it was none. */
cudaError_t cuda_mark(struct executor_cuda *cuda, const char *operation);
/* Runs a forward pass with marks, as a graph of its own: launches one by one could keep the device waiting. */
cudaError_t cuda_profile_forward(struct executor_cuda *cuda, const struct cuda_shape *shape);
/* The step's times, once the device is done with it. */
cudaError_t cuda_profile_read(struct executor_cuda *cuda, const struct executor_timing **timings, uint32_t *count);
void cuda_profile_free(struct cuda_profile *profile);

int cuda_step(struct executor *executor, const struct batch *batch, struct batch_result *result, struct status *status);

#endif
