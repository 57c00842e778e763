#ifndef MOED_GATEWAY_METRICS_H
#define MOED_GATEWAY_METRICS_H

#include "common/metrics_serving.h"
#include "gateway/worker_table.h"

/*
 * What the gateway exports: requests as its callers see them, its workers as their heartbeats tell of them, its calls
 * and its process. Who counts gets a pointer to the counters; the page is written from them on any thread.
 */
struct gateway_metrics;

/* `prefix` is borrowed. NULL: no memory. */
struct gateway_metrics *gateway_metrics_create(const char *prefix);
void gateway_metrics_destroy(struct gateway_metrics *metrics);

/* For the fleet's thread, on which requests get their tokens and end. */
struct serving_metrics *gateway_metrics_serving(struct gateway_metrics *metrics);

/*
 * STATUS_CODES counters, by the code that calls of this method end with; `method` is borrowed. NULL: these are more
 * methods than there are counters for. Before the metrics are rendered.
 */
struct metric_counter *gateway_metrics_method(struct gateway_metrics *metrics, const char *method);

/* Looks at the workers: struct fleet_options' `ticked`. */
void gateway_metrics_see_workers(void *metrics, struct worker_table *workers);

/* A metrics_render. */
void gateway_metrics_render(void *metrics, struct metrics_text *text);

#endif
