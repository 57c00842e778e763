#ifndef MOED_GATEWAY_FLEET_H
#define MOED_GATEWAY_FLEET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "gateway/worker_table.h"
#include "worker.pb-c.h"

/*
 * The fleet thread owns the workers' socket, the table of workers and the requests in flight. Other threads talk to it
 * through ports of their own (an inproc PUSH socket each, so no lock is shared); it answers through the callbacks
 * below, on its own thread.
 */
struct fleet;
struct fleet_port;

struct fleet_request;

struct fleet_request_ops {
    /* The request is held while it is in flight, and by every message about it. */
    void (*retain)(struct fleet_request *request);
    void (*release)(struct fleet_request *request);
    /* A step's output for a Generate; may take what it wants out of it. -1 with a status: the worker broke its word. */
    int (*output)(struct fleet_request *request, Moed__Worker__V1__SequenceOutput *output, const struct worker *worker,
                  struct status *status);
    /* A Forward's answer: a packed moed.v1.ForwardResponse. Its end follows. */
    void (*answer)(struct fleet_request *request, const ProtobufCBinaryData *response, const struct worker *worker);
    /* The last word, exactly once for each submitted request; code OK when all output was there. */
    void (*end)(struct fleet_request *request, const struct status *status);
};

/* Embedded in whatever waits for the answer. */
struct fleet_request {
    const struct fleet_request_ops *ops;
    const char *request_id;                   /* unique among those in flight */
    Moed__Worker__V1__GenerateWork *generate; /* one of the two; the fleet sets its id */
    Moed__Worker__V1__ForwardWork *forward;
    uint64_t prompt_tokens;    /* to prefill, of all its sequences */
    uint64_t longest_sequence; /* what a worker's context must hold */
    uint64_t model_generation; /* of the model it was checked against */

    /* The fleet's own. */
    uint64_t id; /* 0: not in flight */
    struct worker *worker;
    uint64_t load; /* what it counts for on its worker now */
    struct fleet_request *next_by_id, *next_by_name;
};

/* Something that wants to see the workers: answered once, on the fleet thread. */
struct fleet_query {
    void (*answer)(struct fleet_query *query, struct worker_table *workers, uint64_t now_ns);
};

struct fleet_options {
    const char *const *endpoints; /* of the workers' socket */
    size_t endpoint_count;
    uint64_t worker_timeout_ns; /* without a heartbeat for so long a worker is lost */
    /* Called on the fleet thread when a first worker becomes ready, or the last one stops being so. */
    void (*ready_changed)(void *context, bool ready);
    void *ready_context;
    /* Called on the fleet thread a few times a second, to look at the workers. NULL: nobody does. */
    void (*ticked)(void *context, struct worker_table *workers);
    void *ticked_context;
};

/* What requests are checked against before they are submitted. */
struct fleet_limits {
    bool ready;          /* a worker is */
    uint64_t generation; /* of the model */
    uint32_t vocab_size;
    uint32_t context_length; /* the longest sequence a ready worker takes */
    uint32_t block_count, expert_count, expert_used_count;
};

/* Binds the workers' socket and starts the thread. */
int fleet_start(const struct fleet_options *options, void *zmq_context, struct fleet **out, struct status *status);
/*
 * Ends what is in flight with UNAVAILABLE and stops. Nothing may be sent through a port any more; they are closed
 * afterwards, so that what is in them is not lost. NULL-safe.
 */
void fleet_stop(struct fleet *fleet);

struct fleet_limits fleet_get_limits(struct fleet *fleet);

/* A port is one thread's. */
struct fleet_port *fleet_port_open(struct fleet *fleet, struct status *status);
void fleet_port_close(struct fleet_port *port);

/* From here on the request is the fleet's, until its end. */
void fleet_submit(struct fleet_port *port, struct fleet_request *request);
/* Ends a request with CANCELLED and frees what it has on its worker; nothing if it has ended. */
void fleet_cancel(struct fleet_port *port, struct fleet_request *request);
/* Its caller has taken so many tokens: the worker may send as many more. */
void fleet_credit(struct fleet_port *port, struct fleet_request *request, uint32_t tokens);
void fleet_ask(struct fleet_port *port, struct fleet_query *query);

#endif
