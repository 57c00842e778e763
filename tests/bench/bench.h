#ifndef MOED_TESTS_BENCH_BENCH_H
#define MOED_TESTS_BENCH_BENCH_H

#include <stdbool.h>

#include "common/status.h"
#include "kernels/cpu/cpu.h"
#include "tests/bench/machine.h"
#include "worker/executor.h"

/* The parts of moed-bench. Each prints a table, or members of one JSON object, to standard output. */

/* Sequences that are prefilled and then decoded together. */
struct bench_case {
    uint32_t batch;  /* sequences */
    uint32_t prompt; /* tokens of each one's prompt */
    uint32_t decode; /* steps after the prompts; 0: only the prompts are measured */
};

struct bench_options {
    enum cpu_isa isa;
    uint32_t threads;
    const char *format; /* only this one; "": all */
    bool json;

    const char *model;   /* file to run an executor on; "": none */
    const struct executor_ops *backend;
    uint32_t device;     /* as in executor_options */
    const char *repack, *kv_type; /* as in executor_options */
    uint32_t step_tokens; /* most rows of a step */
    bool sample;          /* draw tokens, and do not take the likeliest */
    bool profile;         /* print the times of a step's operations */
    const struct bench_case *cases;
    uint32_t case_count;
};

int bench_kernels(const struct bench_options *options, struct thread_pool *pool, const struct machine *machine,
                  struct status *status);
/*
 * Runs the cases on the backend. `machine` and the pool are the CPU's: the read rate is measured again before each run,
 * because neighbours on the machine change it; a GPU's is that of its memory, and measured here.
 */
int bench_model(const struct bench_options *options, struct thread_pool *pool, const struct machine *machine,
                struct status *status);

/* What each operation takes of a step, in the median of some steps. All zero is an empty one. */
enum { PROFILE_STEPS = 7, PROFILE_OPERATIONS = 32 };

struct profile {
    uint32_t steps, count;
    struct profile_operation {
        const char *name; /* the executor's */
        uint32_t calls;
        double seconds[PROFILE_STEPS]; /* 0 in a step that did not have it */
    } operations[PROFILE_OPERATIONS];
};

/* Takes up a step's times; beyond PROFILE_STEPS steps nothing. */
void profile_add(struct profile *profile, const struct batch_result *result);
/* As a table, or as a member of the case's JSON object; `what` is "prefill" or "decode". */
void profile_print(const struct profile *profile, const char *what, bool json);

#endif
