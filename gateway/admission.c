#include "gateway/admission.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>

struct admission {
    uint64_t max_requests, max_tokens;
    _Atomic uint64_t requests, tokens;
    atomic_bool draining;
};

struct admission *admission_create(uint64_t max_requests, uint64_t max_tokens) {
    struct admission *admission = calloc(1, sizeof *admission);
    if (admission) {
        admission->max_requests = max_requests;
        admission->max_tokens = max_tokens;
    }
    return admission;
}

void admission_destroy(struct admission *admission) {
    free(admission);
}

/* Adds to a counter unless that takes it over its limit. *held is what it held before. */
static bool reserve(_Atomic uint64_t *counter, uint64_t amount, uint64_t limit, uint64_t *held) {
    *held = atomic_load(counter);
    do {
        if (*held > limit || amount > limit - *held)
            return false;
    } while (!atomic_compare_exchange_weak(counter, held, *held + amount));
    return true;
}

int admission_enter(struct admission *admission, uint64_t tokens, struct status *status) {
    uint64_t held;
    if (atomic_load(&admission->draining))
        return status_set(status, STATUS_UNAVAILABLE, "the gateway is shutting down");
    if (!reserve(&admission->requests, 1, admission->max_requests, &held))
        return status_set(status, STATUS_RESOURCE_EXHAUSTED,
                          "%" PRIu64 " requests are in flight; at most %" PRIu64 " may be", held,
                          admission->max_requests);
    if (!reserve(&admission->tokens, tokens, admission->max_tokens, &held)) {
        atomic_fetch_sub(&admission->requests, 1);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED,
                          "a request of %" PRIu64 " tokens while %" PRIu64 " are in flight; at most %" PRIu64 " may be",
                          tokens, held, admission->max_tokens);
    }
    return 0;
}

void admission_leave(struct admission *admission, uint64_t tokens) {
    atomic_fetch_sub(&admission->tokens, tokens);
    atomic_fetch_sub(&admission->requests, 1);
}

void admission_drain(struct admission *admission) {
    atomic_store(&admission->draining, true);
}

bool admission_draining(const struct admission *admission) {
    return atomic_load(&admission->draining);
}

uint64_t admission_requests(const struct admission *admission) {
    return atomic_load(&admission->requests);
}
