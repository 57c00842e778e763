#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "gateway/inference_private.h"

/* A Forward in flight. */
struct forward {
    struct work work; /* first */
    Moed__Worker__V1__ForwardWork message;
    grpc_byte_buffer *answer; /* the fleet thread's, between the answer and the end */
};

/*
 * The worker's answer, passed on as it is. A second ForwardResponse with nothing but a timing follows it in the same
 * message: a decoder merges the two (https://protobuf.dev/programming-guides/encoding/#last-one-wins), so that total_ns
 * and worker get in without decoding tens of megabytes here.
 */
static void on_answer(struct fleet_request *request, const ProtobufCBinaryData *response, const struct worker *worker) {
    struct forward *forward = (struct forward *)WORK_OF(request);
    Moed__V1__ForwardResponse tail = MOED__V1__FORWARD_RESPONSE__INIT;
    Moed__V1__Timing timing = MOED__V1__TIMING__INIT;
    timing.total_ns = clock_now_ns() - rpc_call_started_ns(forward->work.call);
    timing.worker = (char *)worker->id;
    tail.timing = &timing;
    size_t tail_bytes = moed__v1__forward_response__get_packed_size(&tail);
    grpc_slice slice = grpc_slice_malloc(response->len + tail_bytes);
    if (response->len)
        memcpy(GRPC_SLICE_START_PTR(slice), response->data, response->len);
    moed__v1__forward_response__pack(&tail, GRPC_SLICE_START_PTR(slice) + response->len);
    forward->answer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    metric_add(&forward->work.inference->metrics->prompt_tokens, request->prompt_tokens);
}

static void on_end(struct fleet_request *request, const struct status *status) {
    struct forward *forward = (struct forward *)WORK_OF(request);
    struct rpc_call *call = forward->work.call;
    uint64_t limit = forward->work.inference->max_message_size;
    grpc_byte_buffer *answer = forward->answer;
    forward->answer = NULL;
    work_leave(&forward->work);
    if (answer && grpc_byte_buffer_length(answer) <= limit) {
        rpc_call_reply(call, answer);
        return;
    }
    struct status too_large;
    if (answer) {
        status = &too_large;
        status_set(&too_large, STATUS_RESOURCE_EXHAUSTED,
                   "the answer has %zu bytes; a message may have %" PRIu64 " (--max-message-size)",
                   grpc_byte_buffer_length(answer), limit);
        grpc_byte_buffer_destroy(answer);
    }
    rpc_call_finish(call, status);
}

static const struct fleet_request_ops forward_ops = {
    .retain = work_retain, .release = work_release, .answer = on_answer, .end = on_end};

static void on_message(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    struct inference *inference = rpc_call_context(call);
    struct fleet_limits limits;
    struct status status;
    Moed__V1__ForwardRequest *request = (Moed__V1__ForwardRequest *)inference_decode(
        call, &moed__v1__forward_request__descriptor, bytes, size, &limits);
    if (!request)
        return;
    struct forward *forward = calloc(1, sizeof *forward);
    if (!forward || inference_check_forward(request, &limits, inference->max_message_size, &status)) {
        if (!forward)
            status_set(&status, STATUS_RESOURCE_EXHAUSTED, "no memory for the request");
        free(forward);
        moed__v1__forward_request__free_unpacked(request, NULL);
        rpc_call_finish(call, &status);
        return;
    }
    moed__worker__v1__forward_work__init(&forward->message);
    forward->message.request = request;

    struct work *work = &forward->work;
    work->inference = inference;
    work->call = call;
    work->decoded = &request->base;
    work->request.ops = &forward_ops;
    work->request.forward = &forward->message;
    for (size_t i = 0; i < request->n_sequences; i++) {
        uint64_t tokens = request->sequences[i]->n_ids;
        work->request.prompt_tokens += tokens;
        if (tokens > work->request.longest_sequence)
            work->request.longest_sequence = tokens;
    }
    rpc_call_set_state(call, forward);
    work_submit(work, "", &limits);
}

static void destroy(void *state) {
    struct forward *forward = state;
    protobuf_c_message_free_unpacked(forward->work.decoded, NULL);
    free(forward);
}

const struct rpc_handler inference_forward = {.message = on_message, .closed = work_closed, .destroy = destroy};
