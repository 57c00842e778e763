#ifndef MOED_GATEWAY_RPC_CALL_H
#define MOED_GATEWAY_RPC_CALL_H

#include <grpc/grpc.h>
#include <protobuf-c/protobuf-c.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/metrics.h"
#include "common/status.h"

/*
 * One RPC on the server's side, from accepted to closed, over the C-core API.
 *
 * A call belongs to the poller thread of its completion queue: all completions, and so open, message, half_closed and
 * closed of its handler, run there. Any thread that holds a reference may lock it, change what it has to say and pump:
 * whenever nothing is being written, the handler's `next` is asked for what there is to send. So while a write is in
 * flight news pile up in the handler's own outbox, and the next write takes all of them at once. At most one read, one
 * write and one receive-close are in flight, each with a tag inside the call; each holds a reference.
 */
struct rpc_call;

struct rpc_handler {
    /* The call was accepted. NULL: read the one request message. Otherwise it may read, or finish the call. */
    void (*open)(struct rpc_call *call);
    /* A request message. The bytes are the caller's. */
    void (*message)(struct rpc_call *call, const uint8_t *bytes, size_t size);
    /* There are no more request messages. NULL: an error if there was none at all. */
    void (*half_closed)(struct rpc_call *call);
    /* All there is to send now, as one message, or NULL. The call is locked; any thread. */
    grpc_byte_buffer *(*next)(struct rpc_call *call);
    /* What `next` gave last has passed flow control. The call is locked; the poller's thread. May be NULL. */
    void (*written)(struct rpc_call *call);
    /* The last event of a call. `cancelled`: by its caller, its deadline or the network, before its status was sent. */
    void (*closed)(struct rpc_call *call, bool cancelled);
    /* Frees the handler's state with the call. Any thread. */
    void (*destroy)(void *state);
    /* Its calls stay open with nothing to do: a server that drains does not wait for them. */
    bool idles;
};

struct rpc_method {
    const char *path; /* "/moed.v1.Inference/Generate" */
    const struct rpc_handler *handler;
    void *context; /* what the handler serves: rpc_call_context */
    struct metric_counter *ended; /* [STATUS_CODES]: calls, by how they ended; NULL: nobody counts */
};

void rpc_call_ref(struct rpc_call *call);
void rpc_call_unref(struct rpc_call *call);

const struct rpc_method *rpc_call_method(const struct rpc_call *call);
void *rpc_call_context(const struct rpc_call *call);
unsigned rpc_call_poller(const struct rpc_call *call);     /* index of its poller's thread */
uint64_t rpc_call_started_ns(const struct rpc_call *call); /* when it was accepted, by clock_now_ns */

/* The handler's state; set once, in open or message. */
void rpc_call_set_state(struct rpc_call *call, void *state);
void *rpc_call_state(const struct rpc_call *call);

/* Reads the next request message. Only from open, message or written. */
void rpc_call_read(struct rpc_call *call);

void rpc_call_lock(struct rpc_call *call);
void rpc_call_unlock(struct rpc_call *call);
/* Sends what there is to send, if nothing is being sent, and unlocks. */
void rpc_call_pump_unlock(struct rpc_call *call);

/* Ends the call, behind what is left to send. Only the first end counts. `status` NULL means OK. */
void rpc_call_finish(struct rpc_call *call, const struct status *status);
/* Ends the call with OK and this message, which it takes; NULL (no memory) ends it with RESOURCE_EXHAUSTED. */
void rpc_call_reply(struct rpc_call *call, grpc_byte_buffer *message);

/* A message as it is sent; NULL without memory. */
grpc_byte_buffer *rpc_pack(const ProtobufCMessage *message);

/* ---- for rpc_server */

/* What a completion queue's events are tagged with. */
struct rpc_tag {
    void (*fire)(struct rpc_tag *tag, bool ok);
};

struct rpc_poller {
    unsigned index;
    grpc_completion_queue *queue;
    struct rpc_call *calls; /* accepted and not yet closed; the poller thread's own */
    atomic_uint busy;       /* how many of them are not of the kind that idles */
};

/*
 * Posts one call for `method`: `registered` is what C-core registered it under, or NULL for all unregistered methods.
 * Once it is accepted, another one is posted in its place.
 */
int rpc_call_post(grpc_server *server, struct rpc_poller *poller, const struct rpc_method *method, void *registered);

/* Cancels the calls whose write has waited for its reader since before `since_ns`. The poller's thread. */
void rpc_poller_cancel_stalled(struct rpc_poller *poller, uint64_t since_ns);

#endif
