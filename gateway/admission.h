#ifndef MOED_GATEWAY_ADMISSION_H
#define MOED_GATEWAY_ADMISSION_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

/*
 * Bounds what the gateway has taken on: requests in flight and their prompt tokens. What is over the bound is refused
 * at once, with RESOURCE_EXHAUSTED, so that a caller can go elsewhere instead of standing in a line that never ends.
 * Any thread may call.
 */
struct admission;

struct admission *admission_create(uint64_t max_requests, uint64_t max_tokens);
void admission_destroy(struct admission *admission);

/* Takes a request of so many prompt tokens on; 0, or -1 with a status. Each 0 is paid back with one admission_leave. */
int admission_enter(struct admission *admission, uint64_t tokens, struct status *status);
void admission_leave(struct admission *admission, uint64_t tokens);

/* From now on everything is refused with UNAVAILABLE. */
void admission_drain(struct admission *admission);
bool admission_draining(const struct admission *admission);

uint64_t admission_requests(const struct admission *admission);

#endif
