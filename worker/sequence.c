#include "worker/sequence.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

int sequence_set_tokens(struct sequence *sequence, const uint32_t *tokens, uint32_t count) {
    sequence->tokens = malloc(count * sizeof(*tokens));
    if (!sequence->tokens)
        return -1;
    memcpy(sequence->tokens, tokens, count * sizeof(*tokens));
    sequence->token_count = sequence->token_capacity = count;
    return 0;
}

void sequence_clear(struct sequence *sequence) {
    assert(sequence->state == SEQUENCE_IDLE && sequence->kv.count == 0);
    free(sequence->tokens);
    free(sequence->stop_ids);
    sequence->tokens = sequence->stop_ids = NULL;
}

static bool stops_at(const struct sequence *sequence, uint32_t token) {
    if (token == sequence->eos)
        return true;
    for (uint32_t i = 0; i < sequence->stop_count; i++)
        if (sequence->stop_ids[i] == token)
            return true;
    return false;
}

int sequence_append(struct sequence *sequence, uint32_t token, enum sequence_end *end) {
    if (sequence->token_count == sequence->token_capacity) {
        uint32_t capacity = sequence->token_capacity + sequence->token_capacity / 2 + 64;
        uint32_t *tokens = realloc(sequence->tokens, capacity * sizeof(*tokens));
        if (!tokens)
            return -1;
        sequence->tokens = tokens;
        sequence->token_capacity = capacity;
    }
    sequence->tokens[sequence->token_count++] = token;
    if (sequence->credit_limited && sequence->credit > 0)
        sequence->credit--;
    *end = stops_at(sequence, token)                         ? SEQUENCE_STOPPED
           : sequence->token_count >= sequence->longest ? SEQUENCE_LENGTH
                                                         : SEQUENCE_GOES_ON;
    return 0;
}

void sequence_add_credit(struct sequence *sequence, uint32_t tokens) {
    sequence->credit += tokens; /* 64 bits: 2^32 grants of 2^32 do not fill them */
}
