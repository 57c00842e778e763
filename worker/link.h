#ifndef MOED_WORKER_LINK_H
#define MOED_WORKER_LINK_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "worker/engine.h"

/*
 * The worker's side of proto/worker.proto: a DEALER socket a gateway, on which it says hello until it is welcome,
 * beats, takes work for the engine and sends the engine's reports. It runs beside the engine, so that heartbeats go on
 * during a long step. A gateway that restarts, or says nothing for five heartbeats, loses its work here, and is called
 * again.
 */
struct link;

struct link_options {
    const char *const *endpoints; /* of gateways, as zmq_connect takes them; they must outlive the link */
    size_t endpoint_count;
    uint64_t heartbeat_ns;
};

/* What the link says of its worker. All of it must outlive link_run. */
struct link_worker {
    const char *id;
    const struct model_config *model;
    const struct executor_info *info;
    struct engine *engine;
};

/*
 * Opens the sockets; nothing is said before link_run. Errors: an endpoint that cannot be. On success *out is to be
 * freed with link_destroy.
 */
int link_create(const struct link_options *options, void *zmq_context, struct link **out, struct status *status);
void link_destroy(struct link *link);

/*
 * Serves until stop_fd, a pipe or eventfd in non-blocking mode, has had one byte (no new work, those that run finish)
 * or two (the end, without waiting), and says goodbye. -1: a socket failed.
 */
int link_run(struct link *link, const struct link_worker *worker, int stop_fd, struct status *status);

#endif
