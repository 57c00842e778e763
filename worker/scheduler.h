#ifndef MOED_WORKER_SCHEDULER_H
#define MOED_WORKER_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "worker/executor.h"
#include "worker/sequence.h"

/*
 * Decides which rows the next step runs. Logic alone: no threads, no clock, no I/O.
 *
 * Sequences have one order: first come, first served, where a level of priority is worth SCHEDULER_PRIORITY_S seconds
 * of waiting, so that nobody starves. A step takes the decode rows of the running sequences, then prompts of running
 * ones, then admits waiting ones, each in that order, as far as rows, outputs, slots and KV blocks go. A sequence is
 * admitted with the blocks of all its tokens, and begins behind those that the KV cache holds already; nobody overtakes
 * one that does not fit yet. But one whose next block a running sequence is computing waits for it, and others pass.
 *
 * When a running sequence needs a block and none is free, the last one in the order gives up its blocks and waits in
 * its old place to be computed again; results are batch-invariant, so nobody can tell. Sequences that wait for their
 * reader (no credit) go first, and also make room for waiting ones: a slow reader holds up nobody but itself.
 */
struct scheduler;

/* The rows of one step. Arrays are the scheduler's, valid until the next plan or any other change. */
struct plan {
    struct batch batch;
    struct sequence **sequences;  /* [batch.sequence_count] */
    const uint32_t *first_output; /* [batch.sequence_count]: index of the first output of each sequence */
    const uint32_t *output_count; /* [batch.sequence_count] */
};

enum { SCHEDULER_PRIORITY_S = 10 };

struct scheduler_load {
    uint32_t running, waiting, kv_blocks_free;
    uint64_t waiting_tokens; /* to prefill, of waiting and running sequences */
    uint64_t preemptions;
    uint64_t prefix_queries, prefix_hits; /* tokens of admitted sequences, and those of them that were cached */
};

/*
 * prefix_cache: whether KV blocks are shared and kept for sequences that begin alike. A sequence may become as long as
 * scheduler_context_length, which always fits. NULL: no memory.
 */
struct scheduler *scheduler_create(const struct executor_info *info, bool prefix_cache);
/* All sequences must have been removed. */
void scheduler_destroy(struct scheduler *scheduler);

/* The longest sequence: the executor's context length, or the whole KV cache where that holds less. */
uint32_t scheduler_context_length(const struct executor_info *info);

/* Takes in a sequence, which stays its owner's. */
void scheduler_add(struct scheduler *scheduler, struct sequence *sequence);
/* Lets go of a sequence, wherever it is, and frees its slot and blocks. */
void scheduler_remove(struct scheduler *scheduler, struct sequence *sequence);

/* Plans a step. False: nothing can run. */
bool scheduler_plan(struct scheduler *scheduler, struct plan *plan);
/* The executor has run the plan: its rows are computed. Call before sequences grow or are removed. */
void scheduler_advance(struct scheduler *scheduler, const struct plan *plan);

void scheduler_get_load(const struct scheduler *scheduler, struct scheduler_load *load);

#endif
