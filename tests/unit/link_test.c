/* A whole worker (worker.c, link.c, engine.c) with the fake executor, and this test as its gateway. */
#include "config.h" /* _GNU_SOURCE: pipe2 */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>
#include <zmq.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/wire.h"
#include "tests/fake_executor.h"
#include "worker.pb-c.h"
#include "worker/worker.h"

enum { VOCAB = 500, CONTEXT = 256, BEAT_MS = 80, PATIENCE_MS = 10000 };

typedef Moed__Worker__V1__ToGateway ToGateway;
typedef Moed__Worker__V1__ToWorker ToWorker;
#define HELLO MOED__WORKER__V1__TO_GATEWAY__BODY_HELLO
#define HEARTBEAT MOED__WORKER__V1__TO_GATEWAY__BODY_HEARTBEAT
#define STEP_OUTPUT MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT
#define FORWARD_OUTPUT MOED__WORKER__V1__TO_GATEWAY__BODY_FORWARD_OUTPUT
#define FAILURE MOED__WORKER__V1__TO_GATEWAY__BODY_FAILURE
#define GOODBYE MOED__WORKER__V1__TO_GATEWAY__BODY_GOODBYE

struct fixture {
    char directory[64], endpoint[128];
    void *zmq_context, *router;
    struct wire_identity worker_peer;
    uint64_t incarnation;
    bool mute;            /* heartbeats are not acknowledged */
    uint32_t beats;       /* received */
    Moed__Worker__V1__Heartbeat beat; /* the last */
    struct model model;
    const char *endpoints[1];
    pthread_t thread;
    bool running;
    int stop[2], result;
    struct status status;
};

static void *run_worker(void *argument) {
    struct fixture *fixture = argument;
    const struct worker_setup setup = {
        .model = &fixture->model,
        .backend = &fake_executor_ops,
        .executor = {.max_sequences = 4, .step_tokens = 32},
        .gateways = fixture->endpoints,
        .gateway_count = 1,
        .worker_id = "under-test",
        .heartbeat_ms = BEAT_MS,
        .prefix_cache = true,
    };
    fixture->result = worker_run(&setup, fixture->stop[0], &fixture->status);
    return NULL;
}

/* ---- the gateway's hands */

static void gateway_bind(struct fixture *fixture) {
    const int linger = 0, mandatory = 1;
    fixture->router = zmq_socket(fixture->zmq_context, ZMQ_ROUTER);
    zmq_setsockopt(fixture->router, ZMQ_LINGER, &linger, sizeof(linger));
    zmq_setsockopt(fixture->router, ZMQ_ROUTER_MANDATORY, &mandatory, sizeof(mandatory));
    assert_int_equal(zmq_bind(fixture->router, fixture->endpoint), 0);
}

static int try_to_send(struct fixture *fixture, Moed__Worker__V1__ToWorker__BodyCase body, void *message) {
    struct status status;
    ToWorker envelope = MOED__WORKER__V1__TO_WORKER__INIT;
    envelope.body_case = body;
    envelope.welcome = message; /* all bodies share the union's one pointer */
    return wire_send(fixture->router, &fixture->worker_peer, &envelope.base, &status);
}

static void send_to_worker(struct fixture *fixture, Moed__Worker__V1__ToWorker__BodyCase body, void *message) {
    assert_int_equal(try_to_send(fixture, body, message), WIRE_OK);
}

static void send_ack(struct fixture *fixture) {
    Moed__Worker__V1__HeartbeatAck ack = MOED__WORKER__V1__HEARTBEAT_ACK__INIT;
    ack.gateway_incarnation = fixture->incarnation;
    /* The worker may have left since its heartbeat. */
    try_to_send(fixture, MOED__WORKER__V1__TO_WORKER__BODY_ACK, &ack);
}

/* The next message that is no heartbeat, or NULL after timeout_ms. Heartbeats are noted and acknowledged. */
static ToGateway *receive(struct fixture *fixture, int timeout_ms) {
    uint64_t end_ns = clock_now_ns() + (uint64_t)timeout_ms * 1000000;
    for (;;) {
        struct wire_identity from;
        ProtobufCMessage *message;
        struct status status;
        int result = wire_receive(fixture->router, &from, &moed__worker__v1__to_gateway__descriptor, &message, &status);
        if (result == WIRE_AGAIN) {
            uint64_t now_ns = clock_now_ns();
            if (now_ns >= end_ns)
                return NULL;
            zmq_pollitem_t item = {.socket = fixture->router, .events = ZMQ_POLLIN};
            zmq_poll(&item, 1, (long)((end_ns - now_ns) / 1000000 + 1));
            continue;
        }
        assert_int_equal(result, WIRE_OK);
        fixture->worker_peer = from;
        ToGateway *body = (ToGateway *)message;
        if (body->body_case != HEARTBEAT)
            return body;
        fixture->beats++;
        fixture->beat = *body->heartbeat;
        moed__worker__v1__to_gateway__free_unpacked(body, NULL);
        if (!fixture->mute)
            send_ack(fixture);
    }
}

static ToGateway *expect(struct fixture *fixture, Moed__Worker__V1__ToGateway__BodyCase body) {
    ToGateway *message = receive(fixture, PATIENCE_MS);
    assert_non_null(message);
    if (message->body_case == FAILURE && body != FAILURE)
        fail_msg("failure: %s", message->failure->message);
    assert_int_equal(message->body_case, body);
    return message;
}

static void let_go(ToGateway *message) {
    moed__worker__v1__to_gateway__free_unpacked(message, NULL);
}

static void expect_nothing(struct fixture *fixture, int for_ms) {
    ToGateway *message = receive(fixture, for_ms);
    if (message)
        fail_msg("body %d came", (int)message->body_case);
}

static void welcome(struct fixture *fixture) {
    Moed__Worker__V1__Welcome message = MOED__WORKER__V1__WELCOME__INIT;
    message.gateway_id = (char *)"test";
    message.gateway_incarnation = fixture->incarnation;
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_WELCOME, &message);
}

static void accept_hello(struct fixture *fixture) {
    let_go(expect(fixture, HELLO));
    welcome(fixture);
}

static void wait_for_beats(struct fixture *fixture, uint32_t count) {
    for (uint32_t end = fixture->beats + count; fixture->beats < end;) {
        ToGateway *message = receive(fixture, BEAT_MS);
        if (message)
            let_go(message);
    }
}

/* Waits until heartbeats tell of no work; everything else that comes is dropped. */
static void wait_until_idle(struct fixture *fixture) {
    uint64_t end_ns = clock_now_ns() + (uint64_t)PATIENCE_MS * 1000000;
    do {
        assert_true(clock_now_ns() < end_ns);
        wait_for_beats(fixture, 1);
    } while (fixture->beat.running + fixture->beat.waiting > 0);
    assert_int_equal(fixture->beat.kv_blocks_free, 4 * CONTEXT / 16);
    assert_int_equal(fixture->beat.waiting_tokens, 0);
    assert_int_equal(fixture->beat.last_step_age_ns, 0);
}

static void generate(struct fixture *fixture, uint64_t id, uint32_t *prompt, size_t count, uint32_t max_tokens,
                     uint32_t credit) {
    Moed__Worker__V1__GenerateWork work = MOED__WORKER__V1__GENERATE_WORK__INIT;
    work.id = id;
    work.tokens = prompt;
    work.n_tokens = count;
    work.max_tokens = max_tokens;
    work.credit = credit;
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_GENERATE, &work);
}

static void cancel(struct fixture *fixture, uint64_t id) {
    Moed__Worker__V1__Cancel message = MOED__WORKER__V1__CANCEL__INIT;
    message.ids = &id;
    message.n_ids = 1;
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_CANCEL, &message);
}

static void grant(struct fixture *fixture, uint64_t id, uint32_t tokens) {
    Moed__Worker__V1__Credit message = MOED__WORKER__V1__CREDIT__INIT;
    message.ids = &id;
    message.tokens = &tokens;
    message.n_ids = message.n_tokens = 1;
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_CREDIT, &message);
}

static void expect_failure(struct fixture *fixture, uint64_t id, enum status_code code) {
    ToGateway *message = expect(fixture, FAILURE);
    assert_int_equal(message->failure->id, id);
    assert_int_equal(message->failure->code, code);
    let_go(message);
}

/* One token of one sequence, which must be the one that follows tokens[0 .. *count), and is appended. */
static Moed__V1__FinishReason expect_token(struct fixture *fixture, uint64_t id, uint32_t *tokens, uint32_t *count) {
    ToGateway *message = expect(fixture, STEP_OUTPUT);
    assert_int_equal(message->step_output->n_outputs, 1);
    const Moed__Worker__V1__SequenceOutput *output = message->step_output->outputs[0];
    assert_int_equal(output->id, id);
    assert_int_equal(output->n_token_ids, 1);
    assert_int_equal(output->token_ids[0], fake_executor_next(tokens, *count, VOCAB));
    tokens[(*count)++] = output->token_ids[0];
    Moed__V1__FinishReason reason = output->finish_reason;
    let_go(message);
    return reason;
}

/* ---- set up */

static int setup(void **state) {
    struct fixture *fixture = calloc(1, sizeof(*fixture));
    fake_executor.step_us = 0;
    fake_executor.fail_steps = 0;
    fake_executor.lost = false;
    const char *base = getenv("TMPDIR");
    snprintf(fixture->directory, sizeof(fixture->directory), "%s/moed-link-XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(fixture->directory));
    snprintf(fixture->endpoint, sizeof(fixture->endpoint), "ipc://%s/socket", fixture->directory);
    fixture->endpoints[0] = fixture->endpoint;
    fixture->zmq_context = zmq_ctx_new();
    fixture->incarnation = 77;
    gateway_bind(fixture);
    fake_model(&fixture->model, VOCAB, CONTEXT);
    assert_int_equal(pipe2(fixture->stop, O_NONBLOCK), 0);
    assert_int_equal(pthread_create(&fixture->thread, NULL, run_worker, fixture), 0);
    fixture->running = true;
    *state = fixture;
    return 0;
}

static void stop_worker(struct fixture *fixture, size_t bytes) {
    assert_int_equal(write(fixture->stop[1], "..", bytes), bytes);
}

static void join_worker(struct fixture *fixture) {
    pthread_join(fixture->thread, NULL);
    fixture->running = false;
    assert_int_equal(fixture->result, fake_executor.lost ? -1 : 0);
}

static int teardown(void **state) {
    struct fixture *fixture = *state;
    if (fixture->running) {
        stop_worker(fixture, 2);
        join_worker(fixture);
    }
    zmq_close(fixture->router);
    zmq_ctx_term(fixture->zmq_context);
    unlink(fixture->endpoint + strlen("ipc://"));
    rmdir(fixture->directory);
    close(fixture->stop[0]);
    close(fixture->stop[1]);
    free(fixture);
    return 0;
}

/* ---- tests */

static void test_hello(void **state) {
    struct fixture *fixture = *state;
    ToGateway *message = expect(fixture, HELLO);
    const Moed__Worker__V1__Hello *hello = message->hello;
    assert_string_equal(hello->worker_id, "under-test");
    assert_string_equal(hello->backend, "fake");
    assert_string_equal(hello->model->fingerprint, "00000000000fa4e5");
    assert_int_equal(hello->model->vocab_size, VOCAB);
    assert_int_equal(hello->context_length, CONTEXT);
    assert_int_equal(hello->max_sequences, 4);
    assert_int_equal(hello->kv_blocks_total, 4 * CONTEXT / 16);
    assert_int_equal(hello->state, MOED__V1__WORKER__STATE__READY);
    let_go(message);
    let_go(expect(fixture, HELLO)); /* not welcome yet: again */
    welcome(fixture);
    wait_until_idle(fixture);
    assert_int_equal(fixture->beat.state, MOED__V1__WORKER__STATE__READY);
}

static void test_generate(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT + 1] = {3, 1, 4, 1, 5}, count = 5;
    accept_hello(fixture);
    generate(fixture, 9, tokens, count, 6, 0);
    for (int i = 0; i < 5; i++)
        assert_int_equal(expect_token(fixture, 9, tokens, &count), MOED__V1__FINISH_REASON__FINISH_REASON_UNSPECIFIED);
    ToGateway *message = expect(fixture, STEP_OUTPUT);
    const Moed__Worker__V1__SequenceOutput *output = message->step_output->outputs[0];
    assert_int_equal(output->finish_reason, MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
    assert_int_equal(output->usage->prompt_tokens, 5);
    assert_int_equal(output->usage->completion_tokens, 6);
    assert_string_equal(output->timing->worker, "under-test");
    const Moed__V1__Timing *timing = output->timing;
    assert_true(timing->total_ns >= timing->queue_ns + timing->prefill_ns + timing->decode_ns);
    assert_true(output->timing->total_ns > 0);
    let_go(message);
    wait_until_idle(fixture);
    assert_int_equal(fixture->beat.generated_tokens, 6);
}

/* To the context's end: every position gives a token, also with a prompt that fills it. */
static void test_context_end(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT + 2] = {0}, count = CONTEXT - 1;
    accept_hello(fixture);
    generate(fixture, 1, tokens, count, 0, 0);
    assert_int_equal(expect_token(fixture, 1, tokens, &count), MOED__V1__FINISH_REASON__FINISH_REASON_UNSPECIFIED);
    assert_int_equal(expect_token(fixture, 1, tokens, &count), MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
    count = CONTEXT;
    generate(fixture, 2, tokens, count, 0, 0);
    assert_int_equal(expect_token(fixture, 2, tokens, &count), MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
    generate(fixture, 3, tokens, CONTEXT + 1, 0, 0);
    expect_failure(fixture, 3, STATUS_INVALID_ARGUMENT);
}

static void test_stop_and_logprobs(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[4] = {10, 20, 30}, stop = fake_executor_next(tokens, 3, VOCAB);
    Moed__Worker__V1__GenerateWork work = MOED__WORKER__V1__GENERATE_WORK__INIT;
    accept_hello(fixture);
    work.id = 1;
    work.tokens = tokens;
    work.n_tokens = 3;
    work.stop_token_ids = &stop;
    work.n_stop_token_ids = 1;
    work.logprobs = 3;
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_GENERATE, &work);
    ToGateway *message = expect(fixture, STEP_OUTPUT);
    const Moed__Worker__V1__SequenceOutput *output = message->step_output->outputs[0];
    assert_int_equal(output->finish_reason, MOED__V1__FINISH_REASON__FINISH_REASON_STOP);
    assert_int_equal(output->token_ids[0], stop);
    assert_int_equal(output->n_logprobs, 1);
    assert_int_equal(output->logprobs[0]->n_top_ids, 3);
    assert_int_equal(output->logprobs[0]->top_ids[2], 2);
    assert_true(output->logprobs[0]->logprob == -0.5f);
    let_go(message);
}

static void test_one_message_a_step(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[3] = {1, 2, 3};
    accept_hello(fixture);
    fake_executor.step_us = 20000;
    for (uint64_t id = 0; id < 4; id++)
        generate(fixture, id, tokens, 3, 10, 0);
    uint32_t total = 0, messages = 0, most = 0;
    for (; total < 40; messages++) {
        ToGateway *message = expect(fixture, STEP_OUTPUT);
        total += (uint32_t)message->step_output->n_outputs;
        if (message->step_output->n_outputs > most)
            most = (uint32_t)message->step_output->n_outputs;
        let_go(message);
    }
    assert_int_equal(most, 4);
    assert_true(messages <= 20);
}

static void test_cancel_within_a_step(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2, 3}, count = 3;
    accept_hello(fixture);
    fake_executor.step_us = 50000;
    generate(fixture, 5, tokens, 3, 200, 0);
    expect_token(fixture, 5, tokens, &count);
    uint64_t before = fake_executor.steps;
    cancel(fixture, 5);
    cancel(fixture, 5);
    cancel(fixture, 12345);
    wait_until_idle(fixture);
    assert_true(fake_executor.steps - before <= 2); /* the one that ran, or had begun before the word arrived */
    expect_nothing(fixture, 2 * BEAT_MS);
}

static void test_credit(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {7, 8}, count = 2;
    accept_hello(fixture);
    generate(fixture, 1, tokens, 2, 8, 3);
    for (int i = 0; i < 3; i++)
        expect_token(fixture, 1, tokens, &count);
    expect_nothing(fixture, 3 * BEAT_MS);
    assert_int_equal(fixture->beat.running, 1);
    assert_int_equal(fixture->beat.last_step_age_ns, 0); /* stalled is not hung */
    uint32_t other[8] = {9}, other_count = 1;
    generate(fixture, 2, other, 1, 2, 0); /* goes on beside it */
    expect_token(fixture, 2, other, &other_count);
    expect_token(fixture, 2, other, &other_count);
    grant(fixture, 1, 2);
    expect_token(fixture, 1, tokens, &count);
    expect_token(fixture, 1, tokens, &count);
    expect_nothing(fixture, 2 * BEAT_MS);
    grant(fixture, 1, 100);
    for (int i = 0; i < 2; i++)
        expect_token(fixture, 1, tokens, &count);
    assert_int_equal(expect_token(fixture, 1, tokens, &count), MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
}

static void test_forward(void **state) {
    struct fixture *fixture = *state;
    enum { LONG = 70, SHORT = 3 };
    uint32_t first[LONG], second[SHORT] = {5, 6, 7};
    for (uint32_t i = 0; i < LONG; i++)
        first[i] = i * 31 % VOCAB;
    Moed__V1__Tokens sequences[2] = {MOED__V1__TOKENS__INIT, MOED__V1__TOKENS__INIT};
    Moed__V1__Tokens *pointers[2] = {&sequences[0], &sequences[1]};
    sequences[0].ids = first;
    sequences[0].n_ids = LONG;
    sequences[1].ids = second;
    sequences[1].n_ids = SHORT;
    accept_hello(fixture);
    for (int variant = 0; variant < 4; variant++) {
        bool all = variant & 1, top = variant & 2;
        Moed__V1__ForwardRequest request = MOED__V1__FORWARD_REQUEST__INIT;
        Moed__Worker__V1__ForwardWork work = MOED__WORKER__V1__FORWARD_WORK__INIT;
        request.sequences = pointers;
        request.n_sequences = 2;
        request.all_positions = all;
        request.top_logits = top ? 7 : 0;
        request.expert_routes = !top;
        work.id = 40 + (uint64_t)variant;
        work.request = &request;
        send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_FORWARD, &work);
        ToGateway *message = expect(fixture, FORWARD_OUTPUT);
        assert_int_equal(message->forward_output->id, work.id);
        Moed__V1__ForwardResponse *response = moed__v1__forward_response__unpack(
            NULL, message->forward_output->response.len, message->forward_output->response.data);
        assert_non_null(response);
        assert_string_equal(response->timing->worker, "under-test");
        assert_int_equal(response->n_logits, 2);
        for (uint32_t s = 0; s < 2; s++) {
            const Moed__V1__Logits *logits = response->logits[s];
            uint32_t length = (uint32_t)sequences[s].n_ids, columns = top ? 7 : VOCAB;
            assert_int_equal(logits->rows, all ? length : 1);
            assert_int_equal(logits->n_values, logits->rows * columns);
            assert_int_equal(logits->n_ids, top ? logits->n_values : 0);
            for (uint32_t row = 0; row < logits->rows; row++) {
                uint32_t end = all ? row + 1 : length;
                for (uint32_t i = 0; i < columns; i++) {
                    uint32_t token = top ? logits->ids[row * columns + i] : i;
                    float value = logits->values[row * columns + i];
                    assert_true(value == fake_executor_logit(sequences[s].ids, end, token));
                    assert_true(!top || i == 0 || value <= logits->values[row * columns + i - 1]);
                }
                uint32_t greater = 0; /* than the last of the chosen ones */
                for (uint32_t token = 0; top && token < VOCAB; token++)
                    greater += fake_executor_logit(sequences[s].ids, end, token) > logits->values[row * columns + 6];
                assert_int_equal(greater, top ? 6 : 0);
            }
        }
        assert_int_equal(response->n_routes, top ? 0 : 2);
        for (uint32_t s = 0; s < response->n_routes; s++) {
            uint32_t length = (uint32_t)sequences[s].n_ids;
            const struct model_config *config = &fixture->model.config;
            assert_int_equal(response->routes[s]->n_experts, config->block_count * length * config->expert_used_count);
            for (uint32_t i = 0; i < response->routes[s]->n_experts; i++) {
                uint32_t layer = i / 2 / length, position = i / 2 % length;
                assert_int_equal(response->routes[s]->experts[i],
                                 fake_executor_expert(config, sequences[s].ids[position], layer, i % 2));
                assert_true(response->routes[s]->weights[i] == 0.5f);
            }
        }
        moed__v1__forward_response__free_unpacked(response, NULL);
        let_go(message);
    }
    wait_until_idle(fixture);
}

static void test_failed_step(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1}, count = 1;
    accept_hello(fixture);
    fake_executor.fail_steps = 1;
    generate(fixture, 1, tokens, 1, 5, 0);
    expect_failure(fixture, 1, STATUS_INTERNAL);
    generate(fixture, 2, tokens, 1, 1, 0);
    expect_token(fixture, 2, tokens, &count);
    wait_until_idle(fixture);
}

static void test_duplicate_id(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[1] = {1};
    accept_hello(fixture);
    generate(fixture, 1, tokens, 1, 5, 0);
    generate(fixture, 1, tokens, 1, 5, 1);
    for (;;) { /* the first may have given a few tokens */
        ToGateway *message = receive(fixture, PATIENCE_MS);
        assert_non_null(message);
        bool failure = message->body_case == FAILURE;
        if (failure)
            assert_int_equal(message->failure->code, STATUS_ALREADY_EXISTS);
        else
            assert_int_equal(message->body_case, STEP_OUTPUT);
        bool ended = !failure && message->step_output->outputs[0]->finish_reason;
        let_go(message);
        if (failure || ended)
            break;
    }
    cancel(fixture, 1);
    wait_until_idle(fixture);
}

static void test_gateway_restart(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    accept_hello(fixture);
    generate(fixture, 1, tokens, 2, 200, 1);
    expect_token(fixture, 1, tokens, &count);
    fixture->incarnation = 78; /* the next acknowledgement gives it away */
    let_go(expect(fixture, HELLO));
    welcome(fixture);
    wait_until_idle(fixture);
    count = 2;
    generate(fixture, 1, tokens, 2, 1, 0);
    expect_token(fixture, 1, tokens, &count);
}

static void test_gateway_process_restart(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    accept_hello(fixture);
    generate(fixture, 1, tokens, 2, 200, 1);
    expect_token(fixture, 1, tokens, &count);
    zmq_close(fixture->router);
    usleep(3 * BEAT_MS * 1000);
    gateway_bind(fixture);
    fixture->incarnation = 79;
    let_go(expect(fixture, HELLO));
    welcome(fixture);
    wait_until_idle(fixture);
    count = 2;
    generate(fixture, 1, tokens, 2, 1, 0);
    expect_token(fixture, 1, tokens, &count);
}

static void test_identify(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    accept_hello(fixture);
    generate(fixture, 1, tokens, 2, 200, 1);
    expect_token(fixture, 1, tokens, &count);
    Moed__Worker__V1__Identify identify = MOED__WORKER__V1__IDENTIFY__INIT;
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_IDENTIFY, &identify);
    accept_hello(fixture);
    wait_until_idle(fixture);
}

static void test_silent_gateway(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    accept_hello(fixture);
    generate(fixture, 1, tokens, 2, 200, 1);
    expect_token(fixture, 1, tokens, &count);
    fixture->mute = true;
    let_go(expect(fixture, HELLO));
    fixture->mute = false;
    welcome(fixture);
    wait_until_idle(fixture);
}

static void test_refusal(void **state) {
    struct fixture *fixture = *state;
    Moed__Worker__V1__Refusal refusal = MOED__WORKER__V1__REFUSAL__INIT;
    let_go(expect(fixture, HELLO));
    refusal.code = STATUS_FAILED_PRECONDITION;
    refusal.reason = (char *)"another model";
    send_to_worker(fixture, MOED__WORKER__V1__TO_WORKER__BODY_REFUSAL, &refusal);
    uint32_t tokens[1] = {1};
    generate(fixture, 1, tokens, 1, 1, 0); /* not taken */
    expect_nothing(fixture, 6 * BEAT_MS);
    assert_int_equal(fixture->beats, 0);
    accept_hello(fixture);
    wait_until_idle(fixture);
}

static void send_frame(struct fixture *fixture, const void *bytes, size_t size) {
    zmq_send(fixture->router, fixture->worker_peer.bytes, fixture->worker_peer.length, ZMQ_SNDMORE);
    zmq_send(fixture->router, bytes, size, 0);
}

static void test_hostile_frames(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    unsigned char bytes[300];
    uint64_t random = (uint64_t)time(NULL);
    accept_hello(fixture);
    const unsigned char version[8] = {'m', 'o', 'e', 'd', 99, 0, 0, 0};
    send_frame(fixture, version, sizeof(version));
    send_frame(fixture, "moed\1\0\0\0", 8);  /* no body */
    send_frame(fixture, "moed\1\0\0\0\x3a\0", 10); /* an empty Cancel */
    send_frame(fixture, "moed\1\0\0\0\x2a\0", 10); /* an empty GenerateWork */
    expect_failure(fixture, 0, STATUS_INVALID_ARGUMENT);
    send_frame(fixture, "moed\1\0\0\0\x32\0", 10); /* an empty ForwardWork */
    expect_failure(fixture, 0, STATUS_INVALID_ARGUMENT);
    for (int i = 0; i < 3000; i++) {
        size_t size = random % sizeof(bytes);
        for (size_t j = 0; j < size; j++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            bytes[j] = (unsigned char)(random >> 56);
        }
        if (i % 2 && size >= 10) { /* behind a good header, a Credit, Cancel, Generate or Forward of random bytes */
            memcpy(bytes, "moed\1\0\0\0", 8);
            bytes[8] = (unsigned char)((5 + i / 2 % 4) << 3 | 2);
            bytes[9] = (unsigned char)(size - 10 < 128 ? size - 10 : 5);
        }
        send_frame(fixture, bytes, size);
    }
    for (ToGateway *message; (message = receive(fixture, 5 * BEAT_MS));)
        let_go(message);
    fixture->incarnation++;
    accept_hello(fixture);
    wait_until_idle(fixture);
    generate(fixture, 1, tokens, 2, 1, 0);
    expect_token(fixture, 1, tokens, &count);
}

static void test_beats_during_a_long_step(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    accept_hello(fixture);
    wait_until_idle(fixture);
    fake_executor.step_us = 12 * BEAT_MS * 1000;
    generate(fixture, 1, tokens, 2, 1, 0);
    uint32_t before = fixture->beats;
    wait_for_beats(fixture, 8);
    assert_true(fixture->beat.last_step_age_ns > 4 * BEAT_MS * 1000000ull);
    assert_int_equal(fixture->beat.running, 1);
    expect_token(fixture, 1, tokens, &count);
    assert_true(fixture->beats - before >= 8);
}

static void test_drain(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[CONTEXT] = {1, 2}, count = 2;
    accept_hello(fixture);
    fake_executor.step_us = 20000;
    generate(fixture, 1, tokens, 2, 10, 0);
    expect_token(fixture, 1, tokens, &count);
    stop_worker(fixture, 1);
    while (fixture->beat.state != MOED__V1__WORKER__STATE__DRAINING)
        expect_token(fixture, 1, tokens, &count);
    generate(fixture, 2, tokens, 2, 10, 0);
    bool refused = false;
    while (count < 12) {
        ToGateway *message = receive(fixture, PATIENCE_MS);
        assert_non_null(message);
        if (message->body_case == FAILURE) {
            assert_int_equal(message->failure->id, 2);
            assert_int_equal(message->failure->code, STATUS_UNAVAILABLE);
            refused = true;
        } else {
            assert_int_equal(message->body_case, STEP_OUTPUT);
            count++;
        }
        let_go(message);
    }
    assert_true(refused);
    ToGateway *message = expect(fixture, GOODBYE);
    assert_string_equal(message->goodbye->reason, "drained");
    let_go(message);
    join_worker(fixture);
}

static void test_second_stop(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[2] = {1, 2};
    accept_hello(fixture);
    fake_executor.step_us = 20000;
    generate(fixture, 1, tokens, 2, 200, 0);
    generate(fixture, 2, tokens, 2, 200, 1);
    let_go(expect(fixture, STEP_OUTPUT));
    stop_worker(fixture, 1);
    stop_worker(fixture, 1);
    uint64_t begun_ns = clock_now_ns();
    join_worker(fixture);
    assert_true(clock_now_ns() - begun_ns < 1000000000);
    for (;;) {
        ToGateway *message = receive(fixture, PATIENCE_MS);
        assert_non_null(message);
        bool goodbye = message->body_case == GOODBYE;
        let_go(message);
        if (goodbye)
            break;
    }
}

/* Without its device a worker is of no use: it says so, and its process ends, for a supervisor to start it again. */
static void test_lost_device(void **state) {
    struct fixture *fixture = *state;
    uint32_t tokens[2] = {1, 2};
    accept_hello(fixture);
    fake_executor.step_us = 20000;
    generate(fixture, 1, tokens, 2, 200, 0);
    let_go(expect(fixture, STEP_OUTPUT));
    generate(fixture, 2, tokens, 2, 200, 1);
    fake_executor.lost = true;
    for (bool left = false; !left;) { /* no request is told that it failed: others may go on with it */
        ToGateway *message = receive(fixture, PATIENCE_MS);
        assert_non_null(message);
        left = message->body_case == GOODBYE;
        if (left)
            assert_string_equal(message->goodbye->reason, "its device is lost");
        else
            assert_int_equal(message->body_case, STEP_OUTPUT);
        let_go(message);
    }
    join_worker(fixture);
    assert_int_equal(fixture->status.code, STATUS_UNAVAILABLE);
    assert_string_equal(fixture->status.message, "the device was told to be lost");
}

#define WORKER_TEST(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void) {
    log_setup("link_test", LOG_ERROR, LOG_TEXT);
    const struct CMUnitTest tests[] = {
        WORKER_TEST(test_hello),
        WORKER_TEST(test_generate),
        WORKER_TEST(test_context_end),
        WORKER_TEST(test_stop_and_logprobs),
        WORKER_TEST(test_one_message_a_step),
        WORKER_TEST(test_cancel_within_a_step),
        WORKER_TEST(test_credit),
        WORKER_TEST(test_forward),
        WORKER_TEST(test_failed_step),
        WORKER_TEST(test_duplicate_id),
        WORKER_TEST(test_gateway_restart),
        WORKER_TEST(test_gateway_process_restart),
        WORKER_TEST(test_identify),
        WORKER_TEST(test_silent_gateway),
        WORKER_TEST(test_refusal),
        WORKER_TEST(test_hostile_frames),
        WORKER_TEST(test_beats_during_a_long_step),
        WORKER_TEST(test_drain),
        WORKER_TEST(test_second_stop),
        WORKER_TEST(test_lost_device),
    };
    return cmocka_run_group_tests_name("link", tests, NULL, NULL);
}
