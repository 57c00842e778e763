#include "gateway/outbox.h"

#include <stddef.h>

int outbox_push(struct outbox *outbox, const uint32_t *ids, Moed__V1__TokenLogprobs **logprobs, uint32_t count) {
    if (count > OUTBOX_TOKENS - outbox->count)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = (outbox->head + outbox->count++) % OUTBOX_TOKENS;
        outbox->ids[slot] = ids[i];
        outbox->logprobs[slot] = logprobs ? logprobs[i] : NULL;
        if (logprobs)
            logprobs[i] = NULL;
    }
    return 0;
}

uint32_t outbox_take(struct outbox *outbox, uint32_t *ids, Moed__V1__TokenLogprobs **logprobs) {
    uint32_t count = outbox->count;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = (outbox->head + i) % OUTBOX_TOKENS;
        ids[i] = outbox->ids[slot];
        logprobs[i] = outbox->logprobs[slot];
    }
    outbox->head = (outbox->head + count) % OUTBOX_TOKENS;
    outbox->count = 0;
    return count;
}

void outbox_clear(struct outbox *outbox) {
    while (outbox->count) {
        Moed__V1__TokenLogprobs *logprobs = outbox->logprobs[outbox->head];
        if (logprobs)
            moed__v1__token_logprobs__free_unpacked(logprobs, NULL);
        outbox->head = (outbox->head + 1) % OUTBOX_TOKENS;
        outbox->count--;
    }
}
