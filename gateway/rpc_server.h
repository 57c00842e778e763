#ifndef MOED_GATEWAY_RPC_SERVER_H
#define MOED_GATEWAY_RPC_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "gateway/rpc_call.h"

/*
 * The gRPC server: one completion queue and one thread per poller, a number of calls posted in advance for every method
 * on each of them, and UNIMPLEMENTED for every method that is not in the table. grpc_init comes before, grpc_shutdown
 * after. No fork in between.
 */
struct rpc_server;

struct rpc_server_options {
    const char *listen; /* "ADDR:PORT" (port 0: any), "[ADDR6]:PORT" or "unix:PATH" */
    unsigned pollers;
    uint64_t max_message_size;      /* bytes, of requests and of answers */
    uint64_t stall_timeout_ns;      /* a write that waits for its reader for longer ends its call */
    const char *tls_cert, *tls_key; /* PEM files; both or neither */
    const char *tls_client_ca;      /* PEM file; callers need a certificate of it */
    struct metric_counter *unregistered_ended; /* of the methods that are not in the table; as in struct rpc_method */
};

/* Listens and serves. `methods` (and the contexts in it) outlive the server. */
int rpc_server_start(const struct rpc_server_options *options, const struct rpc_method *methods, size_t method_count,
                     struct rpc_server **out, struct status *status);

/* No new connections and calls from now on; running ones go on. */
void rpc_server_shutdown(struct rpc_server *server);
/* Calls that have not ended, but for those that idle. (Connections may last longer; nobody needs to wait for them.) */
unsigned rpc_server_calls(const struct rpc_server *server);
/* Cancels what still runs and waits until it has ended. Comes after rpc_server_shutdown. */
void rpc_server_cancel(struct rpc_server *server);
/* Stops the pollers. Calls must be shut down and cancelled. NULL-safe. */
void rpc_server_destroy(struct rpc_server *server);

#endif
