#ifndef MOED_COMMON_METRICS_HTTP_H
#define MOED_COMMON_METRICS_HTTP_H

#include "common/metrics.h"
#include "common/status.h"

/*
 * GET /metrics over HTTP. Opening and serving are two steps, so that a wrong address shows before a long start, while
 * nobody connects to what cannot answer yet.
 */
struct metrics_http;

/* Writes the page. Called on the listener's own thread, which is one. */
typedef void metrics_render(void *context, struct metrics_text *text);

/*
 * Binds "ADDR:PORT" (port 0: any) or "[ADDR6]:PORT". INVALID_ARGUMENT: it is none; UNAVAILABLE: it cannot be had. On
 * success *out is to be freed with metrics_http_close.
 */
int metrics_http_open(const char *address, struct metrics_http **out, struct status *status);
/* Listens and answers from now on; the log tells where. */
int metrics_http_serve(struct metrics_http *http, metrics_render *render, void *context, struct status *status);
/* Stops, waiting for the page that is being written. NULL-safe. */
void metrics_http_close(struct metrics_http *http);

#endif
