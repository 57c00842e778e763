#include "gateway/inference_check.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static int invalid_real(const char *field, double value, const char *allowed, struct status *status) {
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s: %g; %s", field, value, allowed);
}

static int check_sampling(const Moed__V1__Sampling *sampling, struct status *status) {
    const struct {
        const char *field;
        float value, min, max;
        const char *allowed;
    } reals[] = {
        {"sampling.temperature", sampling->temperature, 0, INFINITY, "a finite number of at least 0 is allowed"},
        {"sampling.top_p", sampling->top_p, 0, 1, "0 (off) to 1 is allowed"},
        {"sampling.min_p", sampling->min_p, 0, 1, "0 (off) to 1 is allowed"},
        {"sampling.repetition_penalty", sampling->repetition_penalty, 0, INFINITY,
         "a finite number above 0, or 0 (off), is allowed"},
        {"sampling.presence_penalty", sampling->presence_penalty, -INFINITY, INFINITY, "a finite number is allowed"},
        {"sampling.frequency_penalty", sampling->frequency_penalty, -INFINITY, INFINITY, "a finite number is allowed"},
    };
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        if (!isfinite(reals[i].value) || reals[i].value < reals[i].min || reals[i].value > reals[i].max)
            return invalid_real(reals[i].field, reals[i].value, reals[i].allowed, status);
    return 0;
}

static int check_ids(const char *field, const uint32_t *ids, size_t count, uint32_t vocab_size, struct status *status) {
    for (size_t i = 0; i < count; i++)
        if (ids[i] >= vocab_size)
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s[%zu]: %" PRIu32 "; 0 to %" PRIu32 " are allowed",
                              field, i, ids[i], vocab_size - 1);
    return 0;
}

int inference_check_generate(const Moed__V1__GenerateRequest *request, const struct fleet_limits *limits,
                             struct status *status) {
    size_t id_bytes = strlen(request->request_id);
    if (id_bytes > REQUEST_ID_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "request_id: %zu bytes; at most %d are allowed", id_bytes,
                          REQUEST_ID_MAX);
    if (request->text[0])
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "text: %zu bytes; not supported yet: give the prompt in tokens.ids", strlen(request->text));
    if (request->n_stop)
        return status_set(status, STATUS_INVALID_ARGUMENT, "stop: %zu texts; not supported yet: give stop_token_ids",
                          request->n_stop);
    if (!request->tokens || request->tokens->n_ids == 0)
        return status_set(status, STATUS_INVALID_ARGUMENT, "tokens.ids: empty; at least 1 token is needed");
    if (request->tokens->n_ids > limits->context_length)
        return status_set(status, STATUS_INVALID_ARGUMENT, "tokens.ids: %zu tokens; the context holds %" PRIu32,
                          request->tokens->n_ids, limits->context_length);
    if (check_ids("tokens.ids", request->tokens->ids, request->tokens->n_ids, limits->vocab_size, status))
        return -1;
    if (request->n_stop_token_ids > STOP_TOKENS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "stop_token_ids: %zu; at most %d are allowed",
                          request->n_stop_token_ids, STOP_TOKENS_MAX);
    if (check_ids("stop_token_ids", request->stop_token_ids, request->n_stop_token_ids, limits->vocab_size, status))
        return -1;
    if (request->logprobs > LOGPROBS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "logprobs: %" PRIu32 "; at most %d are allowed",
                          request->logprobs, LOGPROBS_MAX);
    return request->sampling ? check_sampling(request->sampling, status) : 0;
}

static uint64_t varint_bytes(uint64_t value) {
    uint64_t bytes = 1;
    while (value >>= 7)
        bytes++;
    return bytes;
}

uint64_t inference_forward_bytes(const Moed__V1__ForwardRequest *request, const struct fleet_limits *limits) {
    /* Of each message and each packed field: a key of one byte and a length. */
    const uint64_t header = 1 + 5;
    uint64_t columns = request->top_logits ? request->top_logits : limits->vocab_size;
    uint64_t value_bytes = sizeof(float) + (request->top_logits ? varint_bytes(limits->vocab_size - 1) : 0);
    uint64_t route_bytes = sizeof(float) + varint_bytes(limits->expert_count);
    uint64_t bytes = header + 256; /* timing */
    for (size_t i = 0; i < request->n_sequences; i++) {
        uint64_t tokens = request->sequences[i]->n_ids;
        uint64_t rows = request->all_positions ? tokens : 1;
        bytes += 4 * header + rows * columns * value_bytes;
        if (request->expert_routes)
            bytes += 3 * header + tokens * limits->block_count * limits->expert_used_count * route_bytes;
    }
    return bytes;
}

int inference_check_forward(const Moed__V1__ForwardRequest *request, const struct fleet_limits *limits,
                            uint64_t max_message_size, struct status *status) {
    if (request->n_sequences == 0 || request->n_sequences > FORWARD_SEQUENCES_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "sequences: %zu; 1 to %d are allowed", request->n_sequences,
                          FORWARD_SEQUENCES_MAX);
    for (size_t i = 0; i < request->n_sequences; i++) {
        const Moed__V1__Tokens *sequence = request->sequences[i];
        char field[48];
        snprintf(field, sizeof field, "sequences[%zu].ids", i);
        if (sequence->n_ids == 0)
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s: empty; at least 1 token is needed", field);
        if (sequence->n_ids > limits->context_length)
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s: %zu tokens; the context holds %" PRIu32, field,
                              sequence->n_ids, limits->context_length);
        if (check_ids(field, sequence->ids, sequence->n_ids, limits->vocab_size, status))
            return -1;
    }
    if (request->top_logits > limits->vocab_size)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "top_logits: %" PRIu32 "; at most the vocabulary's %" PRIu32 " are allowed",
                          request->top_logits, limits->vocab_size);
    uint64_t bytes = inference_forward_bytes(request, limits);
    if (bytes > max_message_size)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED,
                          "the answer would have %" PRIu64 " bytes; a message may have %" PRIu64
                          " (--max-message-size): ask for fewer positions, or set top_logits",
                          bytes, max_message_size);
    return 0;
}
