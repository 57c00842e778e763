#include "worker/output.h"

#include <string.h>

#include "worker/memory.h"

/* The protobuf-c structs are made as unpacking would make them, so that one call frees them. */

static Moed__Worker__V1__ToGateway *message_create(Moed__Worker__V1__ToGateway__BodyCase body) {
    Moed__Worker__V1__ToGateway *message = memory_allocate(1, sizeof(*message));
    moed__worker__v1__to_gateway__init(message);
    message->body_case = body;
    return message;
}

Moed__Worker__V1__ToGateway *output_failure(uint64_t id, enum status_code code, const char *text) {
    Moed__Worker__V1__ToGateway *message = message_create(MOED__WORKER__V1__TO_GATEWAY__BODY_FAILURE);
    Moed__Worker__V1__Failure *failure = message->failure = memory_allocate(1, sizeof(*failure));
    moed__worker__v1__failure__init(failure);
    failure->id = id;
    failure->code = code;
    failure->message = memory_copy_string(text);
    return message;
}

Moed__Worker__V1__ToGateway *output_forward(uint64_t id) {
    Moed__Worker__V1__ToGateway *message = message_create(MOED__WORKER__V1__TO_GATEWAY__BODY_FORWARD_OUTPUT);
    message->forward_output = memory_allocate(1, sizeof(*message->forward_output));
    moed__worker__v1__forward_output__init(message->forward_output);
    message->forward_output->id = id;
    return message;
}

Moed__Worker__V1__ToGateway *output_step(size_t capacity) {
    Moed__Worker__V1__ToGateway *message = message_create(MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT);
    Moed__Worker__V1__StepOutput *step = message->step_output = memory_allocate(1, sizeof(*step));
    moed__worker__v1__step_output__init(step);
    step->outputs = memory_allocate(capacity, sizeof(*step->outputs));
    return message;
}

static Moed__V1__TokenLogprobs *logprobs_create(const struct sampled *sampled) {
    Moed__V1__TokenLogprobs *logprobs = memory_allocate(1, sizeof(*logprobs));
    moed__v1__token_logprobs__init(logprobs);
    logprobs->logprob = sampled->logprob;
    logprobs->n_top_ids = logprobs->n_top_logprobs = sampled->top_count;
    logprobs->top_ids = memory_allocate(sampled->top_count, sizeof(*logprobs->top_ids));
    logprobs->top_logprobs = memory_allocate(sampled->top_count, sizeof(*logprobs->top_logprobs));
    memcpy(logprobs->top_ids, sampled->top_ids, sampled->top_count * sizeof(*logprobs->top_ids));
    memcpy(logprobs->top_logprobs, sampled->top_logprobs, sampled->top_count * sizeof(*logprobs->top_logprobs));
    return logprobs;
}

Moed__Worker__V1__SequenceOutput *output_add(Moed__Worker__V1__ToGateway *message, const struct sequence *sequence,
                                             const struct sampled *sampled) {
    Moed__Worker__V1__StepOutput *step = message->step_output;
    Moed__Worker__V1__SequenceOutput *output = memory_allocate(1, sizeof(*output));
    moed__worker__v1__sequence_output__init(output);
    step->outputs[step->n_outputs++] = output;
    output->id = sequence->request->id;
    output->token_ids = memory_allocate(1, sizeof(*output->token_ids));
    output->token_ids[output->n_token_ids++] = sampled->token;
    if (sequence->logprobs > 0) {
        output->logprobs = memory_allocate(1, sizeof(*output->logprobs));
        output->logprobs[output->n_logprobs++] = logprobs_create(sampled);
    }
    return output;
}

void output_timing(Moed__V1__Timing *timing, const struct request *request, uint64_t now_ns, char *worker_id) {
    uint64_t started_ns = now_ns, first_token_ns = now_ns;
    for (uint32_t i = 0; i < request->sequence_count; i++) {
        const struct sequence *sequence = &request->sequences[i];
        if (sequence->started_ns && sequence->started_ns < started_ns)
            started_ns = sequence->started_ns;
        if (sequence->first_token_ns && sequence->first_token_ns < first_token_ns)
            first_token_ns = sequence->first_token_ns;
    }
    moed__v1__timing__init(timing);
    timing->queue_ns = started_ns - request->submitted_ns;
    timing->prefill_ns = first_token_ns - started_ns;
    timing->decode_ns = now_ns - first_token_ns;
    timing->total_ns = now_ns - request->submitted_ns;
    timing->worker = worker_id;
}

void output_finish(Moed__Worker__V1__SequenceOutput *output, const struct sequence *sequence, enum sequence_end end,
                   uint64_t now_ns, const char *worker_id) {
    output->finish_reason = end == SEQUENCE_STOPPED ? MOED__V1__FINISH_REASON__FINISH_REASON_STOP
                                                    : MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH;
    output->usage = memory_allocate(1, sizeof(*output->usage));
    moed__v1__usage__init(output->usage);
    output->usage->prompt_tokens = sequence->prompt_length;
    output->usage->cached_tokens =
        sequence->cached < sequence->prompt_length ? sequence->cached : sequence->prompt_length;
    output->usage->completion_tokens = sequence->token_count - sequence->prompt_length;
    output->timing = memory_allocate(1, sizeof(*output->timing));
    output_timing(output->timing, sequence->request, now_ns, memory_copy_string(worker_id));
}
