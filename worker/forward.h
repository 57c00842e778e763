#ifndef MOED_WORKER_FORWARD_H
#define MOED_WORKER_FORWARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "moed.pb-c.h"

/* The answer to a Forward, filled in as the steps of its sequences come in, in any order and more than once. */
struct forward;

struct forward_shape {
    uint32_t vocab_size, block_count, expert_count, expert_used_count; /* the model's */
    bool all_positions, routes;
    uint32_t top_logits; /* 0: all */
    uint32_t sequence_count;
    const uint32_t *lengths; /* [sequence_count]: tokens; used during the call alone */
};

/* An upper bound of the packed answer's bytes. */
uint64_t forward_bytes(const struct forward_shape *shape);

/* On success *out is to be freed with forward_destroy. RESOURCE_EXHAUSTED: no memory. */
int forward_create(const struct forward_shape *shape, struct forward **out, struct status *status);
void forward_destroy(struct forward *forward);

/* The logits [vocab_size] of one position of a sequence: of its last where all_positions is off. */
void forward_take_logits(struct forward *forward, uint32_t sequence, uint32_t position, const float *logits);

/* The routes of consecutive positions: [rows][block_count][expert_used_count], as executors give them. */
void forward_take_routes(struct forward *forward, uint32_t sequence, uint32_t position, uint32_t rows,
                         const uint32_t *experts, const float *weights);

/* Elements of one row of routes: block_count * expert_used_count. */
size_t forward_route_width(const struct forward *forward);

/* The times to answer with; the worker's name in them stays the caller's. */
void forward_set_timing(struct forward *forward, const Moed__V1__Timing *timing);

/* The whole answer as a packed ForwardResponse; the bytes are the caller's to free. -1: no memory. */
int forward_pack(const struct forward *forward, ProtobufCBinaryData *out);

#endif
