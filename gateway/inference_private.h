#ifndef MOED_GATEWAY_INFERENCE_PRIVATE_H
#define MOED_GATEWAY_INFERENCE_PRIVATE_H

#include <stddef.h>

#include "gateway/inference.h"
#include "gateway/inference_check.h"

struct inference {
    struct admission *admission;
    struct fleet *fleet;
    struct serving_metrics *metrics;
    uint64_t max_message_size;
    unsigned pollers;
    struct fleet_port *ports[]; /* one for each poller */
};

/* What Generate and Forward have in common: the state of a call that the fleet works on. Freed with its call. */
struct work {
    struct fleet_request request;
    struct inference *inference;
    struct rpc_call *call;
    ProtobufCMessage *decoded; /* the caller's request, whose arrays the work refers to */
    char request_id[REQUEST_ID_MAX + 1];
};

#define WORK_OF(pointer) ((struct work *)((char *)(pointer) - offsetof(struct work, request)))

/* Decodes a request, once there is a worker to check it against. NULL: the call has been answered. */
ProtobufCMessage *inference_decode(struct rpc_call *call, const ProtobufCMessageDescriptor *descriptor,
                                   const uint8_t *bytes, size_t size, struct fleet_limits *limits);

/*
 * Admits the work, whose request is filled in but for its ids, and gives it to the fleet. It is its call's state
 * already. `request_id` empty: one is made up.
 */
void work_submit(struct work *work, const char *request_id, const struct fleet_limits *limits);

/* Pays admission back: the first thing at the end. */
void work_leave(struct work *work);

/* For struct fleet_request_ops. */
void work_retain(struct fleet_request *request);
void work_release(struct fleet_request *request);

/* For struct rpc_handler; the call's state begins with a struct work. */
void work_closed(struct rpc_call *call, bool cancelled);

#endif
