#include "worker/request.h"

#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/wire.h"
#include "worker/model.h"

enum { ANSWER_BYTES_MAX = WIRE_MESSAGE_MAX - 4096 }; /* the rest is for the message around the answer */

static struct request *request_create(uint64_t id, size_t sequence_count) {
    struct request *request = calloc(1, sizeof(*request) + sequence_count * sizeof(request->sequences[0]));
    if (!request)
        return NULL;
    request->id = id;
    request->sequence_count = request->unfinished = (uint32_t)sequence_count;
    for (uint32_t i = 0; i < sequence_count; i++) {
        request->sequences[i].request = request;
        request->sequences[i].index = i;
        request->sequences[i].eos = MODEL_EOS_NONE;
    }
    return request;
}

void request_destroy(struct request *request) {
    if (!request)
        return;
    for (uint32_t i = 0; i < request->sequence_count; i++)
        sequence_clear(&request->sequences[i]);
    forward_destroy(request->forward);
    free(request);
}

static int no_memory(struct status *status) {
    return status_set(status, STATUS_RESOURCE_EXHAUSTED, "the worker has no memory for this request");
}

static int check_ids(const char *field, const uint32_t *ids, size_t count, uint32_t vocab_size, struct status *status) {
    for (size_t i = 0; i < count; i++)
        if (ids[i] >= vocab_size)
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s[%zu]: token %u, the vocabulary ends at %u", field, i,
                              ids[i], vocab_size - 1);
    return 0;
}

static int check_tokens(const char *field, const uint32_t *tokens, size_t count, const struct request_limits *limits,
                        struct status *status) {
    if (count == 0)
        return status_set(status, STATUS_INVALID_ARGUMENT, "%s: empty, at least 1 token is needed", field);
    if (count > limits->context_length)
        return status_set(status, STATUS_INVALID_ARGUMENT, "%s: %zu tokens, the context of this worker holds %u", field,
                          count, limits->context_length);
    return check_ids(field, tokens, count, limits->vocab_size, status);
}

static int check_real(const char *field, float value, float least, float greatest, struct status *status) {
    if (value >= least && value <= greatest) /* false for a NaN */
        return 0;
    if (greatest == 1)
        return status_set(status, STATUS_INVALID_ARGUMENT, "sampling.%s: %g, allowed is %g to %g", field, value, least,
                          greatest);
    return status_set(status, STATUS_INVALID_ARGUMENT, "sampling.%s: %g, allowed is a finite number%s", field, value,
                      least == 0 ? " of 0 or more" : "");
}

static int read_sampling(const Moed__V1__Sampling *message, struct sampling *sampling, struct status *status) {
    if (!message)
        return 0; /* greedy */
    if (check_real("temperature", message->temperature, 0, FLT_MAX, status) != 0 ||
        check_real("top_p", message->top_p, 0, 1, status) != 0 ||
        check_real("min_p", message->min_p, 0, 1, status) != 0 ||
        check_real("repetition_penalty", message->repetition_penalty, 0, FLT_MAX, status) != 0 ||
        check_real("presence_penalty", message->presence_penalty, -FLT_MAX, FLT_MAX, status) != 0 ||
        check_real("frequency_penalty", message->frequency_penalty, -FLT_MAX, FLT_MAX, status) != 0)
        return -1;
    *sampling = (struct sampling){
        .temperature = message->temperature,
        .top_k = message->top_k,
        .top_p = message->top_p,
        .min_p = message->min_p,
        .seed = message->seed,
        .repetition_penalty = message->repetition_penalty,
        .presence_penalty = message->presence_penalty,
        .frequency_penalty = message->frequency_penalty,
    };
    return 0;
}

static int check_generate(const Moed__Worker__V1__GenerateWork *work, const struct request_limits *limits,
                          struct status *status) {
    if (check_tokens("tokens", work->tokens, work->n_tokens, limits, status) != 0)
        return -1;
    if (work->generated >= work->n_tokens)
        return status_set(status, STATUS_INVALID_ARGUMENT, "generated: %u of %zu tokens, at least 1 must be the prompt",
                          work->generated, work->n_tokens);
    if (work->max_tokens > 0 && work->generated >= work->max_tokens)
        return status_set(status, STATUS_INVALID_ARGUMENT, "generated: %u, max_tokens is %u: nothing is left to do",
                          work->generated, work->max_tokens);
    if (work->n_stop_token_ids > REQUEST_STOP_IDS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "stop_token_ids: %zu ids, at most %d are allowed",
                          work->n_stop_token_ids, REQUEST_STOP_IDS_MAX);
    if (check_ids("stop_token_ids", work->stop_token_ids, work->n_stop_token_ids, limits->vocab_size, status) != 0)
        return -1;
    if (work->logprobs > SAMPLER_LOGPROBS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "logprobs: %u, at most %d are allowed", work->logprobs,
                          SAMPLER_LOGPROBS_MAX);
    return 0;
}

int request_from_generate(const Moed__Worker__V1__GenerateWork *work, const struct request_limits *limits,
                          struct request **out, struct status *status) {
    struct sampling sampling = {0};
    if (check_generate(work, limits, status) != 0 || read_sampling(work->sampling, &sampling, status) != 0)
        return -1;
    struct request *request = request_create(work->id, 1);
    if (!request)
        return no_memory(status);
    struct sequence *sequence = &request->sequences[0];
    uint32_t prompt_length = (uint32_t)work->n_tokens - work->generated;
    /* Every position of the context may give a token; the last one itself needs no position. */
    uint64_t longest = (uint64_t)limits->context_length + 1;
    if (work->max_tokens > 0 && (uint64_t)prompt_length + work->max_tokens < longest)
        longest = (uint64_t)prompt_length + work->max_tokens;
    sequence->generate = true;
    sequence->sampling = sampling;
    sequence->prompt_length = prompt_length;
    sequence->longest = (uint32_t)longest;
    sequence->logprobs = work->logprobs;
    sequence->priority = work->priority;
    sequence->credit_limited = work->credit > 0;
    sequence->credit = work->credit;
    if (!work->ignore_eos)
        sequence->eos = limits->eos;
    sequence->stop_count = (uint32_t)work->n_stop_token_ids;
    if (sequence->stop_count > 0) {
        sequence->stop_ids = malloc(sequence->stop_count * sizeof(*sequence->stop_ids));
        if (!sequence->stop_ids)
            goto no_memory;
        memcpy(sequence->stop_ids, work->stop_token_ids, sequence->stop_count * sizeof(*sequence->stop_ids));
    }
    if (sequence_set_tokens(sequence, work->tokens, (uint32_t)work->n_tokens) != 0)
        goto no_memory;
    *out = request;
    return 0;

no_memory:
    request_destroy(request);
    return no_memory(status);
}

static int check_forward(const Moed__V1__ForwardRequest *message, const struct request_limits *limits,
                         struct status *status) {
    if (!message || message->n_sequences == 0)
        return status_set(status, STATUS_INVALID_ARGUMENT, "sequences: empty, at least 1 is needed");
    if (message->n_sequences > REQUEST_SEQUENCES_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "sequences: %zu, at most %d are allowed",
                          message->n_sequences, REQUEST_SEQUENCES_MAX);
    for (size_t i = 0; i < message->n_sequences; i++) {
        char field[48];
        snprintf(field, sizeof(field), "sequences[%zu].ids", i);
        const Moed__V1__Tokens *tokens = message->sequences[i];
        if (check_tokens(field, tokens->ids, tokens->n_ids, limits, status) != 0)
            return -1;
    }
    if (message->top_logits > limits->vocab_size)
        return status_set(status, STATUS_INVALID_ARGUMENT, "top_logits: %u, the vocabulary has %u tokens",
                          message->top_logits, limits->vocab_size);
    return 0;
}

static int create_answer(const Moed__V1__ForwardRequest *message, const struct request_limits *limits,
                         struct forward **out, struct status *status) {
    uint32_t *lengths = calloc(message->n_sequences, sizeof(*lengths));
    if (!lengths)
        return no_memory(status);
    for (size_t i = 0; i < message->n_sequences; i++)
        lengths[i] = (uint32_t)message->sequences[i]->n_ids;
    const struct forward_shape shape = {
        .vocab_size = limits->vocab_size,
        .block_count = limits->block_count,
        .expert_count = limits->expert_count,
        .expert_used_count = limits->expert_used_count,
        .all_positions = message->all_positions,
        .routes = message->expert_routes,
        .top_logits = message->top_logits,
        .sequence_count = (uint32_t)message->n_sequences,
        .lengths = lengths,
    };
    uint64_t bytes = forward_bytes(&shape);
    int result = bytes > ANSWER_BYTES_MAX
                     ? status_set(status, STATUS_RESOURCE_EXHAUSTED, "the answer would take %llu bytes, at most %d fit",
                                  (unsigned long long)bytes, ANSWER_BYTES_MAX)
                     : forward_create(&shape, out, status);
    free(lengths);
    return result;
}

int request_from_forward(const Moed__Worker__V1__ForwardWork *work, const struct request_limits *limits,
                         struct request **out, struct status *status) {
    const Moed__V1__ForwardRequest *message = work->request;
    if (check_forward(message, limits, status) != 0)
        return -1;
    struct request *request = request_create(work->id, message->n_sequences);
    if (!request)
        return no_memory(status);
    if (create_answer(message, limits, &request->forward, status) != 0)
        goto failed;
    for (size_t i = 0; i < message->n_sequences; i++) {
        struct sequence *sequence = &request->sequences[i];
        const Moed__V1__Tokens *tokens = message->sequences[i];
        sequence->prompt_length = (uint32_t)tokens->n_ids;
        sequence->all_positions = message->all_positions;
        sequence->routes = message->expert_routes;
        if (sequence_set_tokens(sequence, tokens->ids, (uint32_t)tokens->n_ids) != 0) {
            no_memory(status);
            goto failed;
        }
    }
    *out = request;
    return 0;

failed:
    request_destroy(request);
    return -1;
}
