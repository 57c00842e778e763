#ifndef MOED_GATEWAY_INFERENCE_CHECK_H
#define MOED_GATEWAY_INFERENCE_CHECK_H

#include <stdint.h>

#include "common/status.h"
#include "gateway/fleet.h"
#include "moed.pb-c.h"

/* What a request may hold. Errors name the field, its value and what is allowed. */

enum {
    REQUEST_ID_MAX = 128, /* bytes */
    LOGPROBS_MAX = 20,
    STOP_TOKENS_MAX = 256,
    FORWARD_SEQUENCES_MAX = 1024,
};

/* 0, or -1 with INVALID_ARGUMENT. */
int inference_check_generate(const Moed__V1__GenerateRequest *request, const struct fleet_limits *limits,
                             struct status *status);

/* 0, or -1 with INVALID_ARGUMENT, or RESOURCE_EXHAUSTED where the answer would be larger than max_message_size. */
int inference_check_forward(const Moed__V1__ForwardRequest *request, const struct fleet_limits *limits,
                            uint64_t max_message_size, struct status *status);

/* At most so many bytes is the answer to a checked request. */
uint64_t inference_forward_bytes(const Moed__V1__ForwardRequest *request, const struct fleet_limits *limits);

#endif
