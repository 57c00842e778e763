#ifndef MOED_WORKER_EXECUTOR_H
#define MOED_WORKER_EXECUTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "worker/model.h"
#include "worker/sampler.h"

/*
 * An executor owns one device's weights and paged KV cache and runs the forward pass of ragged batches. What a row's
 * result is depends on its own sequence alone, to the bit: not on what else is in the batch, nor on how the sequence
 * was cut into chunks. One thread calls it; it may have threads of its own.
 */
struct executor;

struct executor_options {
    uint32_t device;        /* which GPU */
    uint32_t threads;       /* CPU; 0: one per core of the process's affinity mask */
    uint32_t max_sequences; /* slots */
    uint32_t step_tokens;   /* most rows of a step */
    uint32_t context_length; /* longest sequence, at most the model's; 0: the model's */
    double memory_fraction; /* of the device's memory, weights and KV cache together */
    uint64_t kv_bytes;      /* size of the KV cache; 0: from memory_fraction, at most what all slots can fill */
    const char *kv_type;    /* what keys and values are kept in: "f16" or "q8_0"; NULL: f16 */
    const char *isa;        /* CPU: "auto", "c", "avx2" or "avx512" */
    const char *repack;     /* CPU: "auto", "on" or "off": a copy of the weights in the kernels' own order */
};

struct executor_info {
    char backend[16];
    char device[128];
    uint32_t kv_block_tokens; /* positions of one KV block */
    uint32_t kv_blocks;       /* block ids are 0 .. kv_blocks - 1 */
    uint32_t max_sequences, step_tokens, context_length;
    uint32_t max_outputs;     /* most outputs of a step */
    uint64_t memory_used, memory_total;
};

/* Consecutive rows of one sequence: a decode row, or a chunk of its prompt. */
struct batch_sequence {
    uint32_t slot;            /* < max_sequences; the sequence keeps it while it runs */
    uint32_t position;        /* of its first row; all earlier positions are in its KV blocks */
    uint32_t rows;            /* >= 1 */
    const uint32_t *blocks;   /* block table: position p lies in blocks[p / kv_block_tokens] */
    uint32_t block_count;     /* covers position + rows */
};

/* What is wanted of a row. Rows that no output names end after the last layer's KV is written. */
struct batch_output {
    uint32_t row;                   /* index into batch.tokens; strictly rising from output to output */
    const struct sampling *sampling; /* sample a token; NULL: do not */
    const uint32_t *history;        /* the sequence's tokens up to and including the row's, for penalties */
    uint32_t history_length, prompt_length;
    uint32_t logprobs;              /* alternatives, at most SAMPLER_LOGPROBS_MAX; 0: none */
    bool logits;                    /* the whole row of logits */
};

struct batch {
    const uint32_t *tokens; /* [rows]; each below the vocabulary's size */
    uint32_t rows;
    const struct batch_sequence *sequences; /* their rows follow each other in `tokens` */
    uint32_t sequence_count;
    const struct batch_output *outputs;
    uint32_t output_count;
    bool routes; /* fill in the experts of every row */
    bool profile; /* time each operation, where the executor can; such a step may take longer */
};

/* What one kind of operation took of a step, all layers together. */
struct executor_timing {
    const char *operation;
    uint32_t calls;
    double seconds;
};

/* Owned by the executor and valid until its next step or close. */
struct batch_result {
    const struct sampled *sampled;      /* [output_count]; of outputs that sample */
    const float *const *logits;         /* [output_count]: [vocab_size], or NULL where not asked for */
    const uint32_t *route_experts;      /* [rows][block_count][expert_used_count], or NULL */
    const float *route_weights;         /* the same shape; each token's weights sum to 1 */
    double expert_imbalance; /* rows of a layer's busiest expert over the mean of all experts, on average over layers
                                that ran all rows; 0: the executor does not tell */
    const struct executor_timing *timings; /* [timing_count], with batch.profile, in the order they first ran */
    uint32_t timing_count;                 /* 0: the executor does not tell */
};

struct executor_ops {
    const char *name; /* "cpu", "cuda" */
    /* For callers without a wish: sequences, and rows of a step, that keep the device busy and are soon done. */
    uint32_t max_sequences, step_tokens;
    bool (*answers)(void); /* whether there is a device for it; NULL: always */
    /* The model outlives the executor. On success *out is to be closed. */
    int (*open)(const struct model *model, const struct executor_options *options, struct executor **out,
                struct status *status);
    void (*close)(struct executor *executor);
    /*
     * Runs one step. The batch is the caller's and trusted to keep the limits above (they are asserted in tests);
     * a step that fails (no memory, logits that are not finite) leaves the executor unusable for the sequences of the
     * batch: the engine ends them. With STATUS_UNAVAILABLE the device is lost, and no other step of this process can succeed.
     */
    int (*step)(struct executor *executor, const struct batch *batch, struct batch_result *result, struct status *status);
};

/* Every executor struct begins with this. */
struct executor {
    const struct executor_ops *ops;
    struct executor_info info;
};

/* What every executor wants of its options: the limits above, and at most that share of the device's memory. */
int executor_check_options(const struct model_config *config, const struct executor_options *options,
                           double memory_fraction_max, struct status *status);

/* The type that options->kv_type names. */
int executor_kv_type(const struct executor_options *options, enum quant_type *type, struct status *status);

extern const struct executor_ops executor_cpu;
extern const struct executor_ops executor_cuda; /* in builds with CUDA */

#endif
