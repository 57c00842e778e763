#ifndef MOED_GATEWAY_HEALTH_H
#define MOED_GATEWAY_HEALTH_H

#include <stdbool.h>

#include "gateway/rpc_call.h"

/*
 * grpc.health.v1.Health (https://github.com/grpc/grpc/blob/master/doc/health-checking.md). The service "" says that the
 * gateway lives; "moed.v1.Inference" that a worker is ready and the gateway is not shutting down.
 */
struct health;

struct health *health_create(void);
void health_destroy(struct health *health);

/* Both tell the watchers. Any thread. */
void health_set_ready(struct health *health, bool ready);
void health_drain(struct health *health); /* not ready any more, and the watches end */

/* Handlers; their context is a struct health. */
extern const struct rpc_handler health_check, health_watch;

#endif
