#ifndef MOED_TESTS_KERNELS_EXECUTOR_TEST_H
#define MOED_TESTS_KERNELS_EXECUTOR_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/kernels/kernel_test.h"
#include "tests/synth/synth.h"
#include "worker/executor.h"

/* What the tests of the executors share: models made on the spot, executors over them. */

static const struct synth_shape shape_tiny = {
    .hidden = 256, .layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 64, .experts = 8, .topk = 2, .inter = 256,
    .vocab = 512, .ctx = 640};
/* No length is a multiple of 16 rows, and only some are of 32 columns. */
static const struct synth_shape shape_odd = {
    .hidden = 96, .layers = 3, .heads = 6, .kv_heads = 3, .head_dim = 22, .experts = 5, .topk = 3, .inter = 40,
    .vocab = 301, .ctx = 300};

/* A file that is gone when the process ends well; ends the process when it cannot be written. `path` has the room. */
static inline void model_write(const struct synth_shape *shape, const char *quant, bool tied, char path[64]) {
    strcpy(path, "/tmp/executor_test.XXXXXX");
    int fd = mkstemp(path);
    if (fd >= 0)
        close(fd);
    struct status status = {0};
    struct synth_options options = {
        .path = path, .shape = *shape, .quant = quant, .seed = 7, .rope_freq_base = 1e6, .tied = tied, .threads = 1};
    if (fd < 0 || synth_write(&options, NULL, &status) < 0) {
        printf("Bail out! %s: %s\n", path, status.message);
        exit(1);
    }
}

static inline struct model *model_make(const struct synth_shape *shape, const char *quant, bool tied) {
    char path[64];
    model_write(shape, quant, tied, path);
    struct status status = {0};
    struct model *model;
    if (model_open(path, &model, &status) < 0) {
        printf("Bail out! %s\n", status.message);
        exit(1);
    }
    unlink(path); /* it stays mapped */
    return model;
}

static inline struct executor_options options_make(const char *isa, uint32_t threads, const char *repack) {
    return (struct executor_options){.threads = threads,
                                     .max_sequences = 6,
                                     .step_tokens = 96,
                                     .memory_fraction = 0.9,
                                     .kv_bytes = 8 << 20,
                                     .isa = isa,
                                     .repack = repack};
}

static inline struct executor *executor_make(const struct executor_ops *ops, const struct model *model,
                                             const struct executor_options *options) {
    struct status status = {0};
    struct executor *executor;
    if (ops->open(model, options, &executor, &status) < 0) {
        printf("Bail out! %s\n", status.message);
        exit(1);
    }
    return executor;
}

#endif
