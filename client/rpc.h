#ifndef MOED_CLIENT_RPC_H
#define MOED_CLIENT_RPC_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * A small gRPC client over C-core. A channel is a connection to one target and may be shared by threads. A queue
 * collects the events of the calls started on it, one or thousands, and belongs to one thread. A call sends one request
 * and gets any number of messages and one end: that covers unary calls and server streaming.
 */
struct rpc_channel;
struct rpc_queue;
struct rpc_call;

enum { RPC_MESSAGE_MAX = 64 << 20 }; /* bytes of a received message */
#define RPC_FOREVER UINT64_MAX       /* as a time-out */

/* Before and after everything else here, and not before a fork. May be nested. */
void rpc_init(void);
void rpc_shutdown(void);

struct rpc_target {
    const char *address;            /* "host:port", or any gRPC name */
    bool tls;                       /* a certificate below means it too */
    const char *ca_file;            /* PEM; NULL: the system's roots */
    const char *cert_file, *key_file; /* PEM, what the client shows of itself; both or none */
};

/* Connects in the background: a target that is not there fails the calls. Fails on a file that cannot be read. */
int rpc_channel_create(const struct rpc_target *target, struct rpc_channel **out, struct status *status);
/* Calls that are left go on until they end. */
void rpc_channel_destroy(struct rpc_channel *channel);

struct rpc_queue *rpc_queue_create(void);
/* Cancels the calls whose end was not taken yet, and frees all calls of the queue. */
void rpc_queue_destroy(struct rpc_queue *queue);

/* What is called: the full path and the type of the answers. */
struct rpc_method {
    const char *path; /* "/moed.v1.Inference/Generate" */
    const ProtobufCMessageDescriptor *response;
};

struct rpc_options {
    uint64_t timeout_ns; /* from now; RPC_FOREVER: no deadline */
    bool wait_for_ready; /* wait for a connection instead of failing with UNAVAILABLE */
    void *user;          /* comes back with every event */
};

/* Never fails: what goes wrong is told by the end event. `options` may be NULL: no deadline. */
struct rpc_call *rpc_call_start(struct rpc_channel *channel, struct rpc_queue *queue, const struct rpc_method *method,
                                const ProtobufCMessage *request, const struct rpc_options *options);
/* The same with a request of any bytes, which are copied. */
struct rpc_call *rpc_call_start_bytes(struct rpc_channel *channel, struct rpc_queue *queue,
                                      const struct rpc_method *method, const void *bytes, size_t size,
                                      const struct rpc_options *options);
/* Ends the call with CANCELLED unless it has ended already. From any thread. */
void rpc_call_cancel(struct rpc_call *call);

enum rpc_event_type {
    RPC_TIMEOUT, /* nothing happened in time */
    RPC_MESSAGE, /* event.message is the caller's: rpc_message_free */
    RPC_END,     /* event.status says how; the call is freed and event.call only names it */
};

struct rpc_event {
    enum rpc_event_type type;
    struct rpc_call *call;
    void *user;
    ProtobufCMessage *message;
    struct status status;
};

/* Waits for the next event of any of the queue's calls, to a millisecond or two; 0: takes one that is there. */
void rpc_queue_next(struct rpc_queue *queue, uint64_t timeout_ns, struct rpc_event *event);

void rpc_message_free(ProtobufCMessage *message); /* NULL-safe */

#endif
