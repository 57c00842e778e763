#ifndef MOED_TESTS_BENCH_BENCH_H
#define MOED_TESTS_BENCH_BENCH_H

#include <stdbool.h>

#include "common/status.h"
#include "kernels/cpu/cpu.h"
#include "tests/bench/machine.h"

/* The parts of moed-bench. Each prints a table, or members of one JSON object, to standard output. */

struct bench_options {
    enum cpu_isa isa;
    uint32_t threads;
    const char *format; /* only this one; "": all */
    bool json;

    const char *model;    /* file to run the executor on; "": none */
    const char *repack;   /* as in executor_options */
    uint32_t prefill;     /* tokens of all prompts together: they are shared out among the sequences */
    uint32_t decode;      /* steps after the prompts */
    const uint32_t *batches; /* numbers of sequences */
    uint32_t batch_count;
};

int bench_kernels(const struct bench_options *options, struct thread_pool *pool, const struct machine *machine,
                  struct status *status);
/* The pool is for measuring the read rate again beside each batch: neighbours on the machine change it. */
int bench_model(const struct bench_options *options, struct thread_pool *pool, const struct machine *machine,
                struct status *status);

#endif
