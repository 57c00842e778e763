#ifndef MOED_COMMON_METRICS_PROCESS_H
#define MOED_COMMON_METRICS_PROCESS_H

#include "common/metrics.h"

/* The names by which Prometheus knows any process: memory, processor time, and since when it runs. */

/* Seconds since 1970, now: to be taken once, when the process begins. */
double metrics_process_now(void);

void metrics_process_render(struct metrics_text *text, double started);

#endif
