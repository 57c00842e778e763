#ifndef MOED_WORKER_EXECUTOR_CPU_H
#define MOED_WORKER_EXECUTOR_CPU_H

#include <stdatomic.h>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu.h"
#include "worker/executor.h"
#include "worker/thread_pool.h"

/*
 * The CPU executor's own parts. A step runs phase by phase, each phase's items on all threads: the caller's thread
 * fills in what an item needs, the items read it. Rows are those of the batch; `E` is the embedding length, `F` the
 * experts' feed-forward length, `D` the head dimension, `U` the experts used. A slot is one (row, chosen expert).
 */

/* Most rows of one matmul item; their activations should stay in the second-level cache while tiles pass by. */
enum { CPU_ITEM_ROWS = 128, CPU_ITEM_ACTIVATION_BYTES = 384 << 10 };
/* gate and up are computed, and their product quantized, by groups of 32 rows: two tiles of each. */
enum { CPU_GROUP = 32 };
/* Rows of one sequence whose attention is one item for each KV head and piece. */
enum { CPU_ATTENTION_TOKENS = 16 };

/* A matrix as tiles of 16 rows; each expert's rows begin a new tile. */
struct cpu_matrix {
    enum quant_type type;
    bool quantized; /* takes quantized activations; else float ones */
    uint32_t columns, rows, experts;
    uint32_t tiles; /* of one expert */
    size_t tile_bytes;
    const unsigned char *packed; /* [experts][tiles][tile_bytes]; NULL: each tile is packed when it is used */
    const unsigned char *source; /* in the file */
    size_t row_bytes;
};

struct cpu_layer {
    const struct model_layer *norms;
    struct cpu_matrix q, k, v, output, router, gate, up, down;
};

struct cpu_weights {
    struct cpu_layer *layers;
    struct cpu_matrix head;
    void *memory; /* of packed tiles; NULL: none are */
    size_t bytes;
    size_t tile_bytes_max;
};

/* Describes all matrices, unpacked. To be freed with cpu_weights_free, also on failure. */
int cpu_weights_create(struct cpu_weights *weights, const struct model *model, struct status *status);
/* Bytes that cpu_weights_pack takes. */
size_t cpu_weights_packed_bytes(const struct cpu_weights *weights, const struct model *model);
int cpu_weights_pack(struct cpu_weights *weights, const struct model *model, const struct cpu_kernels *kernels,
                     struct thread_pool *pool, struct status *status);
void cpu_weights_free(struct cpu_weights *weights);

/* What one thread works in. */
struct cpu_thread {
    unsigned char *tile;           /* a tile packed when it is used */
    const void *in[CPU_ITEM_ROWS]; /* the arguments of matmul_tile */
    float *out[CPU_ITEM_ROWS];
    float *gate, *up; /* [CPU_ITEM_ROWS][CPU_GROUP] */
    void *expanded;   /* blocks of a piece of attention in f16; NULL where the cache is in f16 */
    void *sampler;
};

/* Rows of one expert that choose it, at most CPU_ITEM_ROWS: consecutive slots. */
struct cpu_expert_rows {
    uint32_t expert, slot, count;
};

/* Consecutive rows of one sequence, and where its partial results lie. */
struct cpu_attention_group {
    const struct batch_sequence *sequence;
    uint32_t row, tokens, position;
    uint32_t pieces;
    uint32_t item;  /* its first */
    size_t partial; /* in floats, of KV head 0; [KV heads][tokens][heads of a KV head][pieces] */
    atomic_uint heads_left;
};

struct executor_cpu {
    struct executor base;
    const struct model *model;
    const struct cpu_kernels *kernels;
    struct thread_pool *pool;
    struct cpu_weights weights;
    struct cpu_thread *threads;

    unsigned char *kv; /* [kv_blocks][layers][KV heads][kv_block_bytes] */
    size_t kv_bytes, kv_block_bytes;
    enum quant_type kv_type;

    /* Buffers of a step, cut from one allocation. */
    void *scratch;
    size_t scratch_bytes;
    double *rope_frequencies;  /* [D / 2] */
    float *rope;               /* [rows][D]: {cos, sin} of the row's position */
    float *x;                  /* [rows][E], the residual stream */
    float *normed;             /* [rows][E] */
    unsigned char *normed_q;   /* [rows], quantized */
    float *q, *k, *v;          /* [rows][heads * D]; attention's result replaces q */
    unsigned char *attended_q; /* [rows], quantized */
    float *delta;              /* [rows][E]: what the output projection adds to x */
    float *router_logits;      /* [rows][experts] */
    uint32_t *chosen;          /* [rows][U] */
    float *chosen_weights;     /* [rows][U] */
    uint32_t *slots;           /* [rows][U]: the slot of each choice */
    uint32_t *slot_rows;       /* [slots] */
    uint32_t *expert_ends;     /* [experts + 1] */
    struct cpu_expert_rows *expert_rows;
    unsigned char *hidden; /* [slots]: F quantized or float, as down takes them */
    float *expert_out;     /* [slots][E] */
    float *logits;         /* [outputs][vocabulary] */
    float *partial;        /* of attention */
    size_t partial_floats; /* how many there is room for */
    struct cpu_attention_group *groups;
    atomic_uint *group_pieces_left;             /* [groups][KV heads] */
    uint32_t *rows, *all_rows;                  /* [rows]: the rows that a phase computes; 0, 1, 2, ... */
    uint32_t *positions;                        /* [rows] */
    const struct batch_sequence **row_sequence; /* [rows] */
    uint32_t *route_experts;                    /* [rows][layers][U] */
    float *route_weights;
    struct sampled *sampled;   /* [outputs] */
    const float **logits_rows; /* [outputs] */

    size_t normed_q_bytes, attended_q_bytes, hidden_bytes; /* of one row or slot */

    /* The step that runs. */
    const struct batch *batch;
    uint32_t layer;
    uint32_t row_count; /* of rows[] */
    uint32_t group_count, expert_rows_count;
    uint64_t busiest_rows; /* of the busiest expert, summed over layers that ran all rows */
    uint32_t full_layers;  /* how many those were */
    atomic_bool not_finite;
};

/* y = W x for some rows: row r's input is at in + r * in_stride bytes, its output at out + r * out_stride floats. */
struct cpu_product {
    const struct cpu_matrix *matrix;
    const void *in;
    size_t in_stride;
    float *out;
    size_t out_stride;
    const uint32_t *rows; /* [count] */
    uint32_t count;
    atomic_bool *not_finite; /* set where an output is not finite; NULL: do not look */
};

/* The tile, packed into the thread's scratch where the matrix is not. */
const void *cpu_matrix_tile(const struct executor_cpu *cpu, const struct cpu_matrix *matrix, uint32_t expert,
                            uint32_t tile, uint32_t thread);
/* Rows of one matmul item that takes k quantized or float activations. */
uint32_t cpu_item_rows(const struct cpu_matrix *matrix);
/* Runs products, which do not depend on each other, as one phase. */
void cpu_multiply(struct executor_cpu *cpu, const struct cpu_product *products, uint32_t count);

/* Per-head norm, RoPE, KV write and attention of the layer, from q, k and v; the result in q and, where the output
 * projection takes it, quantized in attended_q. */
void cpu_attention_store(struct executor_cpu *cpu);
void cpu_attention_run(struct executor_cpu *cpu);
/* Floats of partial results that any one row may need. */
size_t cpu_attention_row_floats(const struct model_config *config, uint32_t context_length);

/* Router and experts of the layer, from normed and normed_q: fills in chosen_weights, slots and expert_out. */
void cpu_experts_run(struct executor_cpu *cpu);

/* The forward pass of cpu->batch, to logits and sampled. */
void cpu_forward(struct executor_cpu *cpu);

#endif
