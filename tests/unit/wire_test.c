#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <zmq.h>

#include "common/clock.h"
#include "common/wire.h"
#include "worker.pb-c.h"

/* A ROUTER, the gateway, and a DEALER, the worker, over inproc. */
struct pair {
    void *context, *router, *dealer;
};

static int set_up(void **state) {
    static struct pair pair;
    int mandatory = 1;
    pair.context = zmq_ctx_new();
    pair.router = zmq_socket(pair.context, ZMQ_ROUTER);
    pair.dealer = zmq_socket(pair.context, ZMQ_DEALER);
    zmq_setsockopt(pair.router, ZMQ_ROUTER_MANDATORY, &mandatory, sizeof mandatory);
    zmq_setsockopt(pair.dealer, ZMQ_ROUTING_ID, "peer", 4);
    *state = &pair;
    return zmq_bind(pair.router, "inproc://wire") || zmq_connect(pair.dealer, "inproc://wire");
}

static int tear_down(void **state) {
    struct pair *pair = *state;
    zmq_close(pair->dealer);
    zmq_close(pair->router);
    return zmq_ctx_term(pair->context);
}

static struct status status;

static Moed__Worker__V1__ToGateway *receive_at_router(struct pair *pair, struct wire_identity *from, int expected) {
    ProtobufCMessage *message;
    status = (struct status){0};
    assert_int_equal(wire_receive(pair->router, from, &moed__worker__v1__to_gateway__descriptor, &message, &status),
                     expected);
    assert_int_equal(message != NULL, expected == WIRE_OK);
    return (Moed__Worker__V1__ToGateway *)message;
}

static void send_failure(struct pair *pair, uint64_t id, const char *text) {
    Moed__Worker__V1__Failure failure = MOED__WORKER__V1__FAILURE__INIT;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    failure.id = id;
    failure.code = STATUS_INTERNAL;
    failure.message = (char *)text;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_FAILURE;
    message.failure = &failure;
    assert_int_equal(wire_send(pair->dealer, NULL, &message.base, &status), WIRE_OK);
}

static void carries_messages_both_ways(void **state) {
    struct pair *pair = *state;
    struct wire_identity from;
    send_failure(pair, 77, "lost");
    Moed__Worker__V1__ToGateway *got = receive_at_router(pair, &from, WIRE_OK);
    assert_int_equal(from.length, 4);
    assert_memory_equal(from.bytes, "peer", 4);
    assert_int_equal(got->body_case, MOED__WORKER__V1__TO_GATEWAY__BODY_FAILURE);
    assert_int_equal(got->failure->id, 77);
    assert_string_equal(got->failure->message, "lost");
    protobuf_c_message_free_unpacked(&got->base, NULL);

    uint64_t ids[] = {1, UINT64_MAX};
    Moed__Worker__V1__Cancel cancel = MOED__WORKER__V1__CANCEL__INIT;
    Moed__Worker__V1__ToWorker message = MOED__WORKER__V1__TO_WORKER__INIT;
    cancel.ids = ids;
    cancel.n_ids = 2;
    message.body_case = MOED__WORKER__V1__TO_WORKER__BODY_CANCEL;
    message.cancel = &cancel;
    assert_int_equal(wire_send(pair->router, &from, &message.base, &status), WIRE_OK);
    ProtobufCMessage *answer;
    assert_int_equal(wire_receive(pair->dealer, NULL, &moed__worker__v1__to_worker__descriptor, &answer, &status),
                     WIRE_OK);
    Moed__Worker__V1__ToWorker *work = (Moed__Worker__V1__ToWorker *)answer;
    assert_int_equal(work->body_case, MOED__WORKER__V1__TO_WORKER__BODY_CANCEL);
    assert_int_equal(work->cancel->n_ids, 2);
    assert_true(work->cancel->ids[1] == UINT64_MAX);
    protobuf_c_message_free_unpacked(answer, NULL);
}

static void says_when_nothing_is_there(void **state) {
    struct wire_identity from;
    receive_at_router(*state, &from, WIRE_AGAIN);
    assert_int_equal(from.length, 0);
}

static void says_when_the_peer_is_unknown(void **state) {
    struct pair *pair = *state;
    struct wire_identity nobody = {.bytes = "nobody", .length = 6};
    Moed__Worker__V1__Identify identify = MOED__WORKER__V1__IDENTIFY__INIT;
    Moed__Worker__V1__ToWorker message = MOED__WORKER__V1__TO_WORKER__INIT;
    message.body_case = MOED__WORKER__V1__TO_WORKER__BODY_IDENTIFY;
    message.identify = &identify;
    assert_int_equal(wire_send(pair->router, &nobody, &message.base, &status), WIRE_AGAIN);
}

static void says_when_the_queue_is_full(void **state) {
    struct pair *pair = *state;
    void *alone = zmq_socket(pair->context, ZMQ_DEALER);
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    assert_int_equal(wire_send(alone, NULL, &message.base, &status), WIRE_AGAIN); /* no peer: no queue at all */
    zmq_close(alone);
}

static void refuses_to_send_too_much(void **state) {
    struct pair *pair = *state;
    Moed__Worker__V1__ForwardOutput output = MOED__WORKER__V1__FORWARD_OUTPUT__INIT;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    output.response.len = (size_t)WIRE_MESSAGE_MAX + 1; /* never read: the size alone is refused */
    output.response.data = (uint8_t *)"";
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_FORWARD_OUTPUT;
    message.forward_output = &output;
    assert_int_equal(wire_send(pair->dealer, NULL, &message.base, &status), -1);
    assert_int_equal(status.code, STATUS_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(status.message, "at most 268435456"));
}

/* Raw frames from the dealer; afterwards a good message must still pass. */
static void assert_refused(struct pair *pair, int expected, const char *reason, int count, ...) {
    va_list frames;
    struct wire_identity from;
    va_start(frames, count);
    for (int i = 0; i < count; i++) {
        const char *bytes = va_arg(frames, const char *);
        int length = va_arg(frames, int);
        assert_int_equal(zmq_send(pair->dealer, bytes, (size_t)length, i + 1 < count ? ZMQ_SNDMORE : 0), length);
    }
    va_end(frames);
    receive_at_router(pair, &from, expected);
    assert_int_equal(from.length, 4);
    if (!strstr(status.message, reason))
        fail_msg("\"%s\" does not tell \"%s\"", status.message, reason);
    send_failure(pair, 1, "after");
    Moed__Worker__V1__ToGateway *got = receive_at_router(pair, &from, WIRE_OK);
    assert_string_equal(got->failure->message, "after");
    protobuf_c_message_free_unpacked(&got->base, NULL);
}

#define HEADER "moed\1\0\0\0"

static void refuses_malformed_frames(void **state) {
    struct pair *pair = *state;
    assert_refused(pair, WIRE_BAD, "a frame of 0 bytes", 1, "", 0);
    assert_refused(pair, WIRE_BAD, "a frame of 7 bytes", 1, HEADER, 7);
    assert_refused(pair, WIRE_BAD, "does not begin with a header", 1, "mued\1\0\0\0", 8);
    assert_refused(pair, WIRE_BAD, "last bytes are 0 and 9", 1, "moed\1\0\0\11", 8);
    assert_refused(pair, WIRE_BAD, "3 bytes are no moed.worker.v1.ToGateway", 1, HEADER "\x0a\xff\x01", 11);
    assert_refused(pair, WIRE_BAD, "a message of 2 frames", 2, HEADER, 8, HEADER, 8);
    assert_refused(pair, WIRE_BAD, "a message of 3 frames", 3, HEADER, 8, "", 0, "x", 1);
}

static void tells_other_versions_apart(void **state) {
    struct pair *pair = *state;
    assert_refused(pair, WIRE_VERSION_MISMATCH, "version 2; this side speaks 1", 1, "moed\2\0\0\0", 8);
    assert_refused(pair, WIRE_VERSION_MISMATCH, "version 257", 1, "moed\1\1??whatever", 16);
}

static void reports_a_closed_socket(void **state) {
    struct pair *pair = *state;
    ProtobufCMessage *message;
    void *other = zmq_socket(pair->context, ZMQ_PUSH); /* cannot receive */
    assert_int_equal(wire_receive(other, NULL, &moed__worker__v1__to_worker__descriptor, &message, &status), -1);
    assert_int_equal(status.code, STATUS_UNAVAILABLE);
    assert_null(message);
    zmq_close(other);
}

/* ---- wire_decode */

static uint64_t random_state;

static uint64_t random_below(uint64_t limit) { /* splitmix64 */
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (z ^ (z >> 31)) % limit;
}

/* Decodes a copy that ends where the frame ends, so that the sanitizers see a byte too many. */
static int decode_copy(const unsigned char *frame, size_t size) {
    ProtobufCMessage *message;
    unsigned char *copy = malloc(size ? size : 1);
    memcpy(copy, frame, size);
    status = (struct status){0};
    int result = wire_decode(copy, size, &moed__worker__v1__to_gateway__descriptor, &message, &status);
    assert_int_equal(message != NULL, result == WIRE_OK);
    assert_int_equal(status.code == STATUS_OK, result == WIRE_OK);
    free(copy);
    if (message)
        protobuf_c_message_free_unpacked(message, NULL);
    return result;
}

/* A frame with nested, repeated and packed fields. */
static size_t sample_frame(unsigned char *frame, size_t size) {
    uint32_t tokens[] = {1, 300, 70000}, top[] = {5, 6};
    float logprobs[] = {-0.5f, -1.5f};
    Moed__V1__TokenLogprobs logprob = MOED__V1__TOKEN_LOGPROBS__INIT, *logprob_list[] = {&logprob};
    Moed__V1__Timing timing = MOED__V1__TIMING__INIT;
    Moed__Worker__V1__SequenceOutput sequence = MOED__WORKER__V1__SEQUENCE_OUTPUT__INIT;
    Moed__Worker__V1__SequenceOutput *sequences[] = {&sequence, &sequence};
    Moed__Worker__V1__StepOutput step = MOED__WORKER__V1__STEP_OUTPUT__INIT;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    logprob.n_top_ids = logprob.n_top_logprobs = 2;
    logprob.top_ids = top;
    logprob.top_logprobs = logprobs;
    timing.worker = (char *)"worker";
    sequence.id = 9;
    sequence.n_token_ids = 3;
    sequence.token_ids = tokens;
    sequence.n_logprobs = 1;
    sequence.logprobs = logprob_list;
    sequence.timing = &timing;
    step.n_outputs = 2;
    step.outputs = sequences;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT;
    message.step_output = &step;
    assert_true(protobuf_c_message_get_packed_size(&message.base) + 8 <= size);
    memcpy(frame, HEADER, 8);
    return 8 + protobuf_c_message_pack(&message.base, frame + 8);
}

static void survives_truncation_and_mutation(void **state) {
    unsigned char frame[512], mutated[512];
    size_t size = sample_frame(frame, sizeof frame);
    assert_int_equal(decode_copy(frame, size), WIRE_OK);
    for (size_t length = 0; length < size; length++)
        assert_int_equal(decode_copy(frame, length), length == 8 ? WIRE_OK : WIRE_BAD); /* 8: an empty message */

    random_state = clock_random_u64();
    printf("# seed %llu\n", (unsigned long long)random_state);
    for (int i = 0; i < 20000; i++) {
        memcpy(mutated, frame, size);
        for (uint64_t changes = 1 + random_below(6); changes; changes--)
            mutated[random_below(size)] = (unsigned char)random_below(256);
        decode_copy(mutated, size - random_below(2) * random_below(size));
    }
    for (int i = 0; i < 20000; i++) { /* random bytes behind a good header */
        memcpy(mutated, HEADER, 8);
        for (size_t at = 8; at < 72; at++)
            mutated[at] = (unsigned char)random_below(256);
        decode_copy(mutated, 8 + random_below(65));
    }
}

static void refuses_oversized_frames(void **state) {
    ProtobufCMessage *message;
    status = (struct status){0};
    /* Only the first eight bytes are looked at. */
    assert_int_equal(wire_decode(HEADER, (size_t)WIRE_MESSAGE_MAX + 9, &moed__worker__v1__to_gateway__descriptor,
                                 &message, &status), WIRE_BAD);
    assert_int_equal(status.code, STATUS_RESOURCE_EXHAUSTED);
}

/* Two bytes for each empty SequenceOutput, about a hundred in memory. */
static void refuses_small_frames_that_grow(void **state) {
    enum { OUTPUTS = 2 << 20, OUTPUT_BYTES = 2, STEP_BYTES = OUTPUTS * OUTPUT_BYTES };
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    Moed__Worker__V1__StepOutput step = MOED__WORKER__V1__STEP_OUTPUT__INIT;
    Moed__Worker__V1__SequenceOutput output = MOED__WORKER__V1__SEQUENCE_OUTPUT__INIT;
    Moed__Worker__V1__SequenceOutput **outputs = malloc(OUTPUTS * sizeof *outputs);
    unsigned char *frame = malloc(STEP_BYTES + 32);
    for (size_t i = 0; i < OUTPUTS; i++)
        outputs[i] = &output;
    step.outputs = outputs;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT;
    message.step_output = &step;
    memcpy(frame, HEADER, 8);

    step.n_outputs = OUTPUTS;
    assert_int_equal(decode_copy(frame, 8 + protobuf_c_message_pack(&message.base, frame + 8)), WIRE_BAD);
    assert_int_equal(status.code, STATUS_RESOURCE_EXHAUSTED);
    step.n_outputs = OUTPUTS / 8;
    assert_int_equal(decode_copy(frame, 8 + protobuf_c_message_pack(&message.base, frame + 8)), WIRE_OK);
    free(frame);
    free(outputs);
}

#define wire_test(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void) {
    const struct CMUnitTest tests[] = {
        wire_test(carries_messages_both_ways),
        wire_test(says_when_nothing_is_there),
        wire_test(says_when_the_peer_is_unknown),
        wire_test(says_when_the_queue_is_full),
        wire_test(refuses_to_send_too_much),
        wire_test(refuses_malformed_frames),
        wire_test(tells_other_versions_apart),
        wire_test(reports_a_closed_socket),
        cmocka_unit_test(survives_truncation_and_mutation),
        cmocka_unit_test(refuses_oversized_frames),
        cmocka_unit_test(refuses_small_frames_that_grow),
    };
    return cmocka_run_group_tests_name("wire", tests, NULL, NULL);
}
