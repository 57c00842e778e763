#ifndef MOED_WORKER_SEQUENCE_H
#define MOED_WORKER_SEQUENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "worker/kv_cache.h"
#include "worker/sampler.h"

struct request;

enum sequence_state {
    SEQUENCE_IDLE,    /* not with the scheduler */
    SEQUENCE_WAITING, /* no slot, no KV blocks */
    SEQUENCE_RUNNING, /* has a slot and the KV blocks of its tokens so far, some of them shared */
};

enum sequence_end { SEQUENCE_GOES_ON, SEQUENCE_STOPPED, SEQUENCE_LENGTH };

/*
 * The tokens of one timeline and how far the executor has come with them. A step runs tokens computed .. token_count;
 * one token of distance is a decode row, more is a prompt to prefill, or, after a preemption, everything once more.
 * A generating sequence samples at its last token and grows; any other has its logits returned.
 */
struct sequence {
    struct request *request; /* owner */
    uint32_t index;          /* which of its sequences */

    uint32_t *tokens; /* [token_count]: the prompt and what was generated */
    uint32_t token_count, token_capacity;
    uint32_t prompt_length;
    uint32_t computed; /* leading tokens whose keys and values lie in the KV cache */
    uint32_t cached;   /* leading tokens that lay there when it was first admitted */

    bool generate;
    struct sampling sampling;
    uint32_t logprobs;
    uint32_t longest; /* token_count at which it ends for its length */
    uint32_t eos;     /* MODEL_EOS_NONE: ignored */
    uint32_t *stop_ids;
    uint32_t stop_count;
    bool credit_limited;
    uint64_t credit; /* tokens that may still be sent; generating sequences without any are left out of steps */

    bool all_positions; /* logits of every position, else of the last */
    bool routes;
    uint32_t answered; /* leading positions whose logits are with the answer already, also across a preemption */

    /* The scheduler's. */
    enum sequence_state state;
    int32_t priority;
    uint64_t submitted_ns; /* by the owner's clock */
    int64_t turn;          /* with priority and waiting in it: the lowest goes first; then by arrival */
    uint64_t arrival;
    bool admitted; /* has been, once */
    uint32_t slot;
    struct kv_table kv;
    struct sequence *previous, *next; /* among the waiting ones */

    uint64_t started_ns, first_token_ns, last_token_ns; /* 0: not yet */
};

/* Gives a zeroed sequence its tokens, which are copied. -1: no memory. */
int sequence_set_tokens(struct sequence *sequence, const uint32_t *tokens, uint32_t count);
/* Frees what it holds, but not itself. The scheduler must have let it go. */
void sequence_clear(struct sequence *sequence);

/* Tokens the executor has not run yet: 0 only for a sequence that has ended. */
static inline uint32_t sequence_remaining(const struct sequence *sequence) {
    return sequence->token_count - sequence->computed;
}

/* Waits for its reader. */
static inline bool sequence_stalled(const struct sequence *sequence) {
    return sequence->credit_limited && sequence->credit == 0;
}

/* Whether the executor is to return something for the row at this position. */
static inline bool sequence_wants_output(const struct sequence *sequence, uint32_t position) {
    if (sequence->all_positions)
        return position >= sequence->answered;
    return position + 1 == sequence->token_count;
}

/* How many leading tokens need not be computed if their keys and values are in the KV cache: nothing is wanted of them. */
static inline uint32_t sequence_reusable(const struct sequence *sequence) {
    if (sequence->routes)
        return 0;
    uint32_t silent = sequence->token_count - 1;
    return sequence->all_positions && sequence->answered < silent ? sequence->answered : silent;
}

/* Appends a generated token, spends credit and says whether that was the last one. -1: no memory. */
int sequence_append(struct sequence *sequence, uint32_t token, enum sequence_end *end);

void sequence_add_credit(struct sequence *sequence, uint32_t tokens);

#endif
