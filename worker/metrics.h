#ifndef MOED_WORKER_METRICS_H
#define MOED_WORKER_METRICS_H

#include "common/metrics_serving.h"
#include "worker/executor.h"
#include "worker/scheduler.h"

/*
 * What the worker exports: requests as its engine sees them, and its steps. The engine's thread counts, whether anybody
 * asks or not; the page is written from the counters on any thread.
 */
struct engine;

struct engine_metrics {
    struct serving_metrics serving;
    struct metric_histogram step_seconds, step_rows, step_sequences, expert_imbalance;
    struct metric_counter preemptions;
};

void engine_metrics_init(struct engine_metrics *metrics);

/* A step that took so long. */
void engine_metrics_step(struct engine_metrics *metrics, const struct batch *batch, const struct batch_result *result,
                         uint64_t elapsed_ns);
/* What the scheduler counts. */
void engine_metrics_load(struct engine_metrics *metrics, const struct scheduler_load *load);
/* A token of a generating sequence, before the sequence's own times are set. */
void engine_metrics_token(struct engine_metrics *metrics, const struct sequence *sequence, uint64_t now_ns);
/* Its last one. */
void engine_metrics_finish(struct engine_metrics *metrics, const struct sequence *sequence, enum sequence_end end,
                           uint64_t now_ns);
/* The answer of a Forward. */
void engine_metrics_answer(struct engine_metrics *metrics, const struct request *request);
/* A request that its gateway has cancelled, or that went with its gateway. */
void engine_metrics_abort(struct engine_metrics *metrics, const struct request *request);

/* What a page is made of. The strings and the engine outlive it. */
struct worker_metrics {
    const struct engine *engine;
    const char *prefix, *model_name;
    uint32_t kv_blocks;
    double started; /* metrics_process_now */
};

/* A metrics_render of a struct worker_metrics. */
void worker_metrics_render(void *metrics, struct metrics_text *text);

#endif
