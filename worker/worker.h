#ifndef MOED_WORKER_WORKER_H
#define MOED_WORKER_WORKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "worker/executor.h"

struct worker_setup {
    const struct model *model;
    const struct executor_ops *backend;
    struct executor_options executor;
    const char *const *gateways; /* ZeroMQ endpoints */
    size_t gateway_count;
    const char *worker_id; /* NULL: host name and process id */
    uint64_t heartbeat_ms;
    bool prefix_cache; /* sequences that begin alike share KV blocks, also later */
    const char *metrics_listen; /* "ADDR:PORT"; NULL: nowhere */
    const char *metrics_prefix;
};

/*
 * A worker from its executor's opening to its goodbye: the engine in a thread of its own, the link in this one. It ends
 * as link_run does, by bytes read from stop_fd. -1: it could not begin or go on; status says why, and the log in its
 * own words.
 */
int worker_run(const struct worker_setup *setup, int stop_fd, struct status *status);

#endif
