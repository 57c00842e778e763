#ifndef MOED_TESTS_KERNELS_EXECUTOR_DRIVER_H
#define MOED_TESTS_KERNELS_EXECUTOR_DRIVER_H

#include <stdint.h>

#include "common/status.h"
#include "worker/executor.h"

/* Runs one sequence at a time through an executor, for tests that hold its results against others. */
struct executor_driver;

struct driver_result {
    uint32_t tokens;
    float *logits;     /* [tokens][vocab_size] */
    uint32_t *experts; /* [tokens][block_count][expert_used_count] */
    float *weights;    /* the same shape */
};

/* Opens a model file on an executor; isa, repack and kv_type as in executor_options. *out: for driver_close. */
int driver_open(const struct executor_ops *ops, const char *path, const char *isa, const char *repack,
                const char *kv_type, struct executor_driver **out, struct status *status);
void driver_close(struct executor_driver *driver);
const struct executor_info *driver_info(const struct executor_driver *driver);

/* Logits and routes of all positions, `chunk` rows a step (0: as many as fit). *result is to be freed. */
int driver_forward(struct executor_driver *driver, const uint32_t *tokens, uint32_t count, uint32_t chunk,
                   struct driver_result *result, struct status *status);
void driver_result_free(struct driver_result *result);

/* Prefills tokens[count] and continues greedily by `length` tokens. */
int driver_greedy(struct executor_driver *driver, const uint32_t *tokens, uint32_t count, uint32_t length,
                  uint32_t *continuation, struct status *status);

#endif
