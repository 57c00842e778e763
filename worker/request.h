#ifndef MOED_WORKER_REQUEST_H
#define MOED_WORKER_REQUEST_H

#include <stdint.h>

#include "common/status.h"
#include "worker.pb-c.h"
#include "worker/forward.h"
#include "worker/sequence.h"

/* A piece of work a gateway submitted: a Generate, which is one sequence, or a Forward, which is one or more. */
struct request {
    uint32_t peer; /* the link's number for this time of being connected to a gateway; never used again */
    uint64_t id;   /* the gateway's */
    uint64_t submitted_ns;
    struct forward *forward;        /* the answer in the making; NULL: Generate */
    struct request *previous, *next; /* the engine's */
    uint32_t unfinished;             /* sequences that have not ended */
    uint32_t sequence_count;
    struct sequence sequences[];
};

/* What requests are held against. */
struct request_limits {
    uint32_t vocab_size, block_count, expert_count, expert_used_count;
    uint32_t context_length;
    uint32_t eos; /* MODEL_EOS_NONE: none */
};

enum { REQUEST_STOP_IDS_MAX = 1024, REQUEST_SEQUENCES_MAX = 4096 };

/*
 * Check every field of a message and make a request of it, which is to be freed with request_destroy. Errors name the
 * field, what it held and what is allowed.
 */
int request_from_generate(const Moed__Worker__V1__GenerateWork *work, const struct request_limits *limits,
                          struct request **out, struct status *status);
int request_from_forward(const Moed__Worker__V1__ForwardWork *work, const struct request_limits *limits,
                         struct request **out, struct status *status);

/* The scheduler must have let go of its sequences. */
void request_destroy(struct request *request);

#endif
