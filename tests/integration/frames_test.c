#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "common/wire.h"
#include "tests/integration/service.h"
#include "worker.pb-c.h"

/* Peers of the worker endpoint that do not speak the protocol, while the service goes on. */

struct peer {
    void *context, *socket;
};

static void peer_open(struct peer *peer) {
    peer->context = zmq_ctx_new();
    peer->socket = zmq_socket(peer->context, ZMQ_DEALER);
    assert_non_null(peer->socket);
    assert_int_equal(zmq_setsockopt(peer->socket, ZMQ_LINGER, &(int){0}, sizeof(int)), 0);
    assert_int_equal(zmq_connect(peer->socket, WORKER_ENDPOINT), 0);
}

static void peer_close(struct peer *peer) {
    zmq_close(peer->socket);
    zmq_ctx_term(peer->context);
}

static void assert_serves(struct service *service) {
    uint32_t ids[] = {4, 5, 6};
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, 3, 10);
    generation_run(service, &generation, &prompt);
    assert_int_equal(generation.count, 10);
    generation_free(&generation);
    service_wait_workers(service, 1);
}

/* A good frame; to be freed. */
static unsigned char *frame_create(const Moed__Worker__V1__ToGateway *message, unsigned version, size_t *size) {
    *size = 8 + protobuf_c_message_get_packed_size(&message->base);
    unsigned char *frame = malloc(*size);
    assert_non_null(frame);
    memcpy(frame, "moed", 4);
    frame[4] = (unsigned char)version;
    memset(frame + 5, 0, 3);
    protobuf_c_message_pack(&message->base, frame + 8);
    return frame;
}

/* A Hello such as the living worker's, under another name. */
static void hello_init(struct service *service, Moed__Worker__V1__ToGateway *message, Moed__Worker__V1__Hello *hello,
                       Moed__V1__Model **model) {
    Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
    struct status status;
    *model = (Moed__V1__Model *)service_call(service, &method_get_model, &request.base, &status);
    assert_non_null(*model);
    *message = (Moed__Worker__V1__ToGateway)MOED__WORKER__V1__TO_GATEWAY__INIT;
    *hello = (Moed__Worker__V1__Hello)MOED__WORKER__V1__HELLO__INIT;
    message->body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_HELLO;
    message->hello = hello;
    hello->worker_id = "impostor";
    hello->incarnation = 1;
    hello->backend = "cpu";
    hello->device = "none";
    hello->model = *model;
    hello->max_sequences = 1;
    hello->step_tokens = 64;
    hello->kv_block_tokens = 16;
    hello->kv_blocks_total = 100;
    hello->context_length = 256;
    hello->state = MOED__V1__WORKER__STATE__LOADING; /* so that it gets no work */
}

static void random_frames(void **state) {
    struct service *service = *state;
    uint64_t random = random_seed();
    struct peer peer;
    peer_open(&peer);
    for (unsigned i = 0; i < 500; i++) {
        unsigned char bytes[400];
        size_t size = random_next(&random) % sizeof bytes;
        for (size_t j = 0; j < size; j++)
            bytes[j] = (unsigned char)random_next(&random);
        if (i % 2 && size >= 8) /* with a good header half of the time */
            memcpy(bytes, "moed\1\0\0\0", 8);
        int more = i % 5 == 0 ? ZMQ_SNDMORE : 0;
        assert_true(zmq_send(peer.socket, bytes, size, more) == (int)size);
        if (more)
            assert_true(zmq_send(peer.socket, bytes, size / 2, 0) == (int)(size / 2));
        if (i % 100 == 0)
            assert_serves(service);
    }
    assert_serves(service);
    peer_close(&peer);
    assert_serves(service);
}

static void truncated_and_mutated_frames(void **state) {
    struct service *service = *state;
    uint64_t random = random_seed();
    Moed__Worker__V1__ToGateway message;
    Moed__Worker__V1__Hello hello;
    Moed__V1__Model *model;
    hello_init(service, &message, &hello, &model);
    size_t size;
    unsigned char *frame = frame_create(&message, WIRE_VERSION, &size);
    struct peer peer;
    peer_open(&peer);
    for (size_t i = 0; i < size; i++)
        assert_int_equal(zmq_send(peer.socket, frame, i, 0), i);
    unsigned char *mutated = malloc(size);
    assert_non_null(mutated);
    for (unsigned i = 0; i < 300; i++) {
        memcpy(mutated, frame, size);
        size_t end = 8 + random_next(&random) % (size - 8);
        mutated[end] ^= (unsigned char)(1 << random_next(&random) % 8);
        /* One that still is a good Hello would be a worker: it is cut, then. */
        assert_int_equal(zmq_send(peer.socket, mutated, size - 1, 0), size - 1);
    }
    assert_serves(service);
    free(mutated);
    free(frame);
    rpc_message_free(&model->base);
    peer_close(&peer);
    assert_serves(service);
}

/* The next message for the peer; rpc_message_free. */
static Moed__Worker__V1__ToWorker *peer_receive(struct peer *peer) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (;;) {
        ProtobufCMessage *message;
        struct status status;
        int result =
            wire_receive(peer->socket, NULL, &moed__worker__v1__to_worker__descriptor, &message, &status);
        if (result == WIRE_OK)
            return (Moed__Worker__V1__ToWorker *)message;
        assert_int_equal(result, WIRE_AGAIN);
        pause_until(deadline, "an answer of the gateway");
    }
}

static void another_protocol_version_is_refused(void **state) {
    struct service *service = *state;
    Moed__Worker__V1__ToGateway message;
    Moed__Worker__V1__Hello hello;
    Moed__V1__Model *model;
    hello_init(service, &message, &hello, &model);
    size_t size;
    unsigned char *frame = frame_create(&message, WIRE_VERSION + 1, &size);
    struct peer peer;
    peer_open(&peer);
    assert_int_equal(zmq_send(peer.socket, frame, size, 0), size);
    Moed__Worker__V1__ToWorker *answer = peer_receive(&peer);
    assert_int_equal(answer->body_case, MOED__WORKER__V1__TO_WORKER__BODY_REFUSAL);
    assert_non_null(strstr(answer->refusal->reason, "version"));
    char line[1024];
    process_wait_log(service->gateway, "version", "2", line, sizeof line);
    rpc_message_free(&answer->base);
    free(frame);
    rpc_message_free(&model->base);
    peer_close(&peer);
    assert_serves(service);
}

/* Whoever says anything but Hello first is asked who it is. */
static void strangers_are_asked_to_identify(void **state) {
    struct service *service = *state;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    Moed__Worker__V1__StepOutput output = MOED__WORKER__V1__STEP_OUTPUT__INIT;
    Moed__Worker__V1__Heartbeat heartbeat = MOED__WORKER__V1__HEARTBEAT__INIT;
    struct status status;
    struct peer peer;
    peer_open(&peer);
    for (unsigned i = 0; i < 2; i++) {
        message.body_case = i ? MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT
                              : MOED__WORKER__V1__TO_GATEWAY__BODY_HEARTBEAT;
        if (i)
            message.step_output = &output;
        else
            message.heartbeat = &heartbeat;
        assert_int_equal(wire_send(peer.socket, NULL, &message.base, &status), WIRE_OK);
        Moed__Worker__V1__ToWorker *answer = peer_receive(&peer);
        assert_int_equal(answer->body_case, MOED__WORKER__V1__TO_WORKER__BODY_IDENTIFY);
        rpc_message_free(&answer->base);
    }
    peer_close(&peer);
    assert_serves(service);
}

/* A worker that was let in and then tells lies: about work that is not its own, and with impossible numbers. */
static void a_lying_worker_harms_nobody(void **state) {
    struct service *service = *state;
    Moed__Worker__V1__ToGateway message;
    Moed__Worker__V1__Hello hello;
    Moed__V1__Model *model;
    struct status status;
    struct peer peer;
    hello_init(service, &message, &hello, &model);
    peer_open(&peer);
    assert_int_equal(wire_send(peer.socket, NULL, &message.base, &status), WIRE_OK);
    Moed__Worker__V1__ToWorker *answer = peer_receive(&peer);
    assert_int_equal(answer->body_case, MOED__WORKER__V1__TO_WORKER__BODY_WELCOME);
    rpc_message_free(&answer->base);

    uint32_t ids[] = {4, 5, 6}, lie[] = {1, 1, 1};
    struct prompt prompt;
    struct generation alone, among;
    prompt_init(&prompt, ids, 3, 0);
    generation_run(service, &alone, &prompt);
    generation_start(service, &among, &prompt, RPC_FOREVER);
    generation_wait(service, &among, 1);
    for (uint64_t id = 0; id < 50; id++) {
        Moed__Worker__V1__SequenceOutput output = MOED__WORKER__V1__SEQUENCE_OUTPUT__INIT;
        Moed__Worker__V1__SequenceOutput *outputs[] = {&output};
        Moed__Worker__V1__StepOutput step = MOED__WORKER__V1__STEP_OUTPUT__INIT;
        Moed__Worker__V1__Failure failure = MOED__WORKER__V1__FAILURE__INIT;
        output.id = id;
        output.token_ids = lie;
        output.n_token_ids = 3;
        step.outputs = outputs;
        step.n_outputs = 1;
        message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT;
        message.step_output = &step;
        assert_int_equal(wire_send(peer.socket, NULL, &message.base, &status), WIRE_OK);
        failure.id = id;
        failure.code = 99;
        failure.message = "lie";
        message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_FAILURE;
        message.failure = &failure;
        assert_int_equal(wire_send(peer.socket, NULL, &message.base, &status), WIRE_OK);
    }
    Moed__Worker__V1__Heartbeat heartbeat = MOED__WORKER__V1__HEARTBEAT__INIT;
    heartbeat.state = (Moed__V1__Worker__State)1000;
    heartbeat.running = heartbeat.waiting = heartbeat.kv_blocks_free = UINT32_MAX;
    heartbeat.waiting_tokens = heartbeat.generated_tokens = UINT64_MAX;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_HEARTBEAT;
    message.heartbeat = &heartbeat;
    assert_int_equal(wire_send(peer.socket, NULL, &message.base, &status), WIRE_OK);
    generation_finish(service, &among);
    assert_int_equal(among.status.code, STATUS_OK);
    assert_same_generation(&alone, &among);
    generation_free(&alone);
    generation_free(&among);
    rpc_message_free(&model->base);
    peer_close(&peer);
    assert_serves(service);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(another_protocol_version_is_refused), /* first: one such line a second is logged */
        cmocka_unit_test(random_frames),
        cmocka_unit_test(truncated_and_mutated_frames),
        cmocka_unit_test(strangers_are_asked_to_identify),
        cmocka_unit_test(a_lying_worker_harms_nobody),
    };
    return cmocka_run_group_tests(tests, service_setup, service_teardown);
}
