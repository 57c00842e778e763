#ifndef MOED_TESTS_FAKE_EXECUTOR_H
#define MOED_TESTS_FAKE_EXECUTOR_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "worker/executor.h"

/*
 * An executor without a model: the token after a sequence is a hash of its last token and its length. Its KV cache
 * holds hashes of the tokens up to each position, so that it can tell whether every block table holds its sequence; a batch
 * that breaks worker/executor.h aborts the process.
 */
extern const struct executor_ops fake_executor_ops;

/* Read at open and at each step; tests set them. */
struct fake_executor_control {
    uint32_t kv_blocks, kv_block_tokens, max_outputs; /* 0: enough, 16, max_sequences + 64 */
    bool unchecked;             /* do not look into the KV cache: constant time a row */
    _Atomic uint32_t step_us;   /* how long a step takes */
    _Atomic uint32_t fail_steps; /* so many steps fail */
    _Atomic bool lost;           /* all steps do, for the device is */
    _Atomic uint64_t steps, rows; /* counted */
};
extern struct fake_executor_control fake_executor;

/* The token that follows tokens[0 .. count). */
uint32_t fake_executor_next(const uint32_t *tokens, uint32_t count, uint32_t vocab_size);

/* Logit of `token` behind tokens[0 .. count), distinct enough to be sorted: -1 to 1. */
float fake_executor_logit(const uint32_t *tokens, uint32_t count, uint32_t token);

/* The i-th expert of a row of this token in a layer; each weighs 1 / expert_used_count. */
uint32_t fake_executor_expert(const struct model_config *config, uint32_t token, uint32_t layer, uint32_t i);

/* A model with a config and nothing else. */
void fake_model(struct model *model, uint32_t vocab_size, uint32_t context_length);

#endif
