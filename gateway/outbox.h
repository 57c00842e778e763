#ifndef MOED_GATEWAY_OUTBOX_H
#define MOED_GATEWAY_OUTBOX_H

#include <stdint.h>

#include "moed.pb-c.h"

/*
 * The tokens of one stream that wait for the write before them: a ring, bounded by the credit its worker was given. The
 * caller locks.
 */
enum { OUTBOX_TOKENS = 256 };

struct outbox {
    uint32_t ids[OUTBOX_TOKENS];
    Moed__V1__TokenLogprobs *logprobs[OUTBOX_TOKENS]; /* owned; NULL where not asked for */
    uint32_t head, count;
};

/* Appends; takes the logprobs (NULL: none), which leaves the array's places NULL. -1: no room, nothing was taken. */
int outbox_push(struct outbox *outbox, const uint32_t *ids, Moed__V1__TokenLogprobs **logprobs, uint32_t count);

/* Moves everything, oldest first, to arrays of OUTBOX_TOKENS; the logprobs are then the caller's. Returns how many. */
uint32_t outbox_take(struct outbox *outbox, uint32_t *ids, Moed__V1__TokenLogprobs **logprobs);

/* Frees what is in it. */
void outbox_clear(struct outbox *outbox);

#endif
