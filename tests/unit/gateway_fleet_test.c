#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

#include <cmocka.h>

#include "common/clock.h"
#include "common/log.h"
#include "gateway/fleet.h"

/* The fleet thread against workers that are raw DEALER sockets in this thread. */

enum { WAIT_MS = 20000 };

static char endpoint[64];
static const char *const endpoints[] = {endpoint};
static void *context;
static struct fleet *fleet;
static struct fleet_port *port;
static _Atomic int ready;
static void *dealers[8]; /* the workers' sockets; closed after the test, however it ends */
static size_t dealer_count;

static void on_ready(void *ignored, bool is_ready) {
    ready = is_ready;
}

static int start(uint64_t worker_timeout_s) {
    struct status status;
    const struct fleet_options options = {.endpoints = endpoints,
                                          .endpoint_count = 1,
                                          .worker_timeout_ns = worker_timeout_s * UINT64_C(1000000000),
                                          .ready_changed = on_ready};
    log_setup("gateway_fleet_test", LOG_ERROR, LOG_TEXT);
    ready = 0;
    snprintf(endpoint, sizeof endpoint, "ipc:///tmp/moed-fleet-%016llx", (unsigned long long)clock_random_u64());
    context = zmq_ctx_new();
    if (fleet_start(&options, context, &fleet, &status))
        return -1;
    port = fleet_port_open(fleet, &status);
    return port ? 0 : -1;
}

/* Workers are not lost while a test is slow... */
static int setup(void **state) {
    return start(3600);
}

/* ...but where it is about that. */
static int setup_impatient(void **state) {
    return start(1);
}

static int teardown(void **state) {
    fleet_stop(fleet);
    fleet_port_close(port);
    while (dealer_count)
        zmq_close(dealers[--dealer_count]);
    return zmq_ctx_term(context);
}

/* ---- a worker */

static Moed__V1__Model model = {PROTOBUF_C_MESSAGE_INIT(&moed__v1__model__descriptor),
                                .name = "m",
                                .architecture = "qwen3moe",
                                .fingerprint = "f00d",
                                .vocab_size = 100,
                                .context_length = 64};

static void *connect_worker(void) {
    const int linger = 0;
    void *dealer = zmq_socket(context, ZMQ_DEALER);
    zmq_setsockopt(dealer, ZMQ_LINGER, &linger, sizeof linger);
    assert_true(dealer_count < sizeof dealers / sizeof *dealers);
    dealers[dealer_count++] = dealer;
    assert_int_equal(zmq_connect(dealer, endpoints[0]), 0);
    return dealer;
}

static void disconnect(void *dealer) {
    size_t i = 0;
    while (dealers[i] != dealer)
        i++;
    dealers[i] = dealers[--dealer_count];
    zmq_close(dealer);
}

static void send_body(void *dealer, Moed__Worker__V1__ToGateway *message) {
    struct status status;
    assert_int_equal(wire_send(dealer, NULL, &message->base, &status), WIRE_OK);
}

#define SEND(dealer, kind, field, value)                                                                               \
    send_body((dealer), &(Moed__Worker__V1__ToGateway){                                                                \
                            PROTOBUF_C_MESSAGE_INIT(&moed__worker__v1__to_gateway__descriptor),                        \
                            .body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_##kind, .field = (value)})

static void send_hello(void *dealer, char *id, uint64_t incarnation, char *fingerprint) {
    Moed__Worker__V1__Hello hello = MOED__WORKER__V1__HELLO__INIT;
    Moed__V1__Model own = model;
    own.fingerprint = fingerprint;
    hello.worker_id = id;
    hello.incarnation = incarnation;
    hello.state = MOED__V1__WORKER__STATE__READY;
    hello.context_length = 64;
    hello.model = &own;
    SEND(dealer, HELLO, hello, &hello);
}

static void send_beat(void *dealer, Moed__V1__Worker__State worker_state) {
    Moed__Worker__V1__Heartbeat beat = MOED__WORKER__V1__HEARTBEAT__INIT;
    beat.state = worker_state;
    SEND(dealer, HEARTBEAT, heartbeat, &beat);
}

static void send_tokens(void *dealer, uint64_t id, uint32_t token, Moed__V1__FinishReason reason) {
    Moed__Worker__V1__SequenceOutput output = MOED__WORKER__V1__SEQUENCE_OUTPUT__INIT;
    Moed__Worker__V1__StepOutput step = MOED__WORKER__V1__STEP_OUTPUT__INIT;
    output.id = id;
    output.n_token_ids = 1;
    output.token_ids = &token;
    output.finish_reason = reason;
    step.n_outputs = 1;
    step.outputs = (Moed__Worker__V1__SequenceOutput *[]){&output};
    SEND(dealer, STEP_OUTPUT, step_output, &step);
}

static uint64_t deadline_ns(void) {
    return clock_now_ns() + WAIT_MS * UINT64_C(1000000);
}

/* The next message that is no acknowledgement or, where one is waited for, any. */
static Moed__Worker__V1__ToWorker *next_message(void *dealer, bool acks, uint64_t deadline) {
    while (clock_now_ns() < deadline) {
        zmq_pollitem_t item = {.socket = dealer, .events = ZMQ_POLLIN};
        ProtobufCMessage *message;
        struct status status;
        zmq_poll(&item, 1, 100);
        if (wire_receive(dealer, NULL, &moed__worker__v1__to_worker__descriptor, &message, &status) != WIRE_OK)
            continue;
        if (acks || ((Moed__Worker__V1__ToWorker *)message)->body_case != MOED__WORKER__V1__TO_WORKER__BODY_ACK)
            return (Moed__Worker__V1__ToWorker *)message;
        protobuf_c_message_free_unpacked(message, NULL);
    }
    fail_msg("no message");
    return NULL;
}

/* The next message of this kind; others are passed over. */
static Moed__Worker__V1__ToWorker *expect(void *dealer, Moed__Worker__V1__ToWorker__BodyCase kind) {
    uint64_t deadline = deadline_ns();
    for (;;) {
        Moed__Worker__V1__ToWorker *message = next_message(dealer, true, deadline);
        if (message->body_case == kind)
            return message;
        moed__worker__v1__to_worker__free_unpacked(message, NULL);
    }
}

static void done(Moed__Worker__V1__ToWorker *message) {
    moed__worker__v1__to_worker__free_unpacked(message, NULL);
}

#define EXPECT(dealer, kind) expect((dealer), MOED__WORKER__V1__TO_WORKER__BODY_##kind)

static void *join(char *id) {
    void *dealer = connect_worker();
    send_hello(dealer, id, 1, "f00d");
    done(EXPECT(dealer, WELCOME));
    return dealer;
}

/* ---- a request; static ones outlast a test that fails */

struct caller {
    struct fleet_request request;
    Moed__Worker__V1__GenerateWork work;
    _Atomic int references, tokens, ends, code, refuse_output;
    _Atomic uint32_t last_token;
    char message[512];
};

static struct caller *caller_of(struct fleet_request *request) {
    return (struct caller *)request;
}

static void retain(struct fleet_request *request) {
    caller_of(request)->references++;
}

static void release(struct fleet_request *request) {
    caller_of(request)->references--;
}

static int on_output(struct fleet_request *request, Moed__Worker__V1__SequenceOutput *output,
                     const struct worker *worker, struct status *status) {
    struct caller *caller = caller_of(request);
    if (caller->refuse_output)
        return status_set(status, STATUS_INTERNAL, "refused");
    caller->last_token = output->token_ids[0];
    caller->tokens += (int)output->n_token_ids;
    return 0;
}

static void on_end(struct fleet_request *request, const struct status *status) {
    struct caller *caller = caller_of(request);
    snprintf(caller->message, sizeof caller->message, "%s", status->message);
    caller->code = (int)status->code;
    caller->ends++;
}

static const struct fleet_request_ops ops = {.retain = retain, .release = release, .output = on_output, .end = on_end};

static void submit(struct caller *caller, const char *name, uint64_t prompt_tokens) {
    memset(caller, 0, sizeof *caller);
    moed__worker__v1__generate_work__init(&caller->work);
    caller->request.ops = &ops;
    caller->request.request_id = name;
    caller->request.generate = &caller->work;
    caller->request.prompt_tokens = caller->request.longest_sequence = prompt_tokens;
    caller->request.model_generation = fleet_get_limits(fleet).generation;
    caller->code = -1;
    fleet_submit(port, &caller->request);
}

/* Waits until *value is (at least) what is expected. */
static void wait_for(_Atomic int *value, int expected) {
    const struct timespec pause = {.tv_nsec = 1000000};
    for (int i = 0; i < WAIT_MS && *value < expected; i++)
        nanosleep(&pause, NULL);
    assert_int_equal(*value, expected);
}

static void assert_ended(struct caller *caller, int code, const char *words) {
    const struct timespec pause = {.tv_nsec = 1000000};
    wait_for(&caller->ends, 1);
    assert_int_equal(caller->code, code);
    if (!strstr(caller->message, words))
        fail_msg("\"%s\" is not in \"%s\"", words, caller->message);
    for (int i = 0; i < WAIT_MS && caller->references; i++)
        nanosleep(&pause, NULL);
    assert_int_equal(caller->references, 0);
    assert_int_equal(caller->ends, 1);
}

static void wait_ready(bool expected) {
    const struct timespec pause = {.tv_nsec = 1000000};
    for (int i = 0; i < WAIT_MS && ready != expected; i++)
        nanosleep(&pause, NULL);
    assert_int_equal(ready, expected);
}

/* ---- tests */

static void serves_a_request(void **state) {
    static struct caller caller, again;
    submit(&caller, "early", 3);
    assert_ended(&caller, STATUS_UNAVAILABLE, "no worker is ready");
    void *worker = join("a");
    wait_ready(true);
    assert_int_equal(fleet_get_limits(fleet).vocab_size, 100);
    assert_int_equal(fleet_get_limits(fleet).context_length, 64);

    submit(&caller, "one", 3);
    Moed__Worker__V1__ToWorker *work = EXPECT(worker, GENERATE);
    uint64_t id = work->generate->id;
    done(work);
    send_tokens(worker, id + 1000, 5, 0); /* nobody's */
    send_tokens(worker, id, 42, 0);
    wait_for(&caller.tokens, 1);
    assert_int_equal(caller.last_token, 42);
    fleet_credit(port, &caller.request, 7);
    Moed__Worker__V1__ToWorker *credit = EXPECT(worker, CREDIT);
    assert_int_equal(credit->credit->ids[0], id);
    assert_int_equal(credit->credit->tokens[0], 7);
    done(credit);
    send_tokens(worker, id, 43, MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
    assert_ended(&caller, STATUS_OK, "");
    assert_int_equal(caller.tokens, 2);
    send_tokens(worker, id, 44, 0); /* after its end */
    fleet_cancel(port, &caller.request);
    fleet_credit(port, &caller.request, 1);
    submit(&again, "one", 3); /* the name is free again */
    done(EXPECT(worker, GENERATE));
    fleet_cancel(port, &again.request);
    done(EXPECT(worker, CANCEL));
    assert_ended(&again, STATUS_CANCELLED, "cancelled");
    assert_int_equal(again.tokens, 0);
    assert_ended(&caller, STATUS_OK, "");
    assert_int_equal(caller.tokens, 2);
}

static void ignores_output_of_the_wrong_worker(void **state) {
    static struct caller caller;
    void *worker = join("a");
    submit(&caller, "x", 1);
    Moed__Worker__V1__ToWorker *work = EXPECT(worker, GENERATE);
    void *other = join("b");
    send_tokens(other, work->generate->id, 66, MOED__V1__FINISH_REASON__FINISH_REASON_STOP);
    send_beat(other, MOED__V1__WORKER__STATE__READY);
    done(EXPECT(other, ACK)); /* so the output before it has been seen */
    assert_int_equal(caller.tokens, 0);
    send_tokens(worker, work->generate->id, 77, MOED__V1__FINISH_REASON__FINISH_REASON_STOP);
    assert_ended(&caller, STATUS_OK, "");
    assert_int_equal(caller.last_token, 77);
    done(work);
}

static void refuses_a_name_in_flight(void **state) {
    static struct caller first, second;
    join("a");
    submit(&first, "name", 1);
    submit(&second, "name", 1);
    assert_ended(&second, STATUS_ALREADY_EXISTS, "\"name\"");
    assert_int_equal(first.ends, 0);
    fleet_cancel(port, &second.request); /* must not touch the first */
    fleet_cancel(port, &first.request);
    assert_ended(&first, STATUS_CANCELLED, "");
}

static void balances_and_releases_load(void **state) {
    static struct caller callers[6];
    static char names[6][8];
    void *workers[2] = {join("a"), join("b")};
    uint64_t ids[2][3];
    for (int i = 0; i < 6; i++) {
        snprintf(names[i], sizeof names[i], "r%d", i);
        submit(&callers[i], names[i], 10);
    }
    for (int w = 0; w < 2; w++) {
        for (int i = 0; i < 3; i++) {
            Moed__Worker__V1__ToWorker *work = EXPECT(workers[w], GENERATE);
            ids[w][i] = work->generate->id;
            done(work);
        }
    }
    /* Not before all are placed: an answer changes where the next one goes. */
    for (int w = 0; w < 2; w++)
        for (int i = 0; i < 3; i++)
            send_tokens(workers[w], ids[w][i], 1, w ? 0 : MOED__V1__FINISH_REASON__FINISH_REASON_STOP);
    for (int i = 0; i < 6; i++)
        wait_for(&callers[i].tokens, 1);
    /* a has nothing left, b three that decode */
    for (int i = 0; i < 6; i += 2)
        wait_for(&callers[i].ends, 1);
    static struct caller next;
    submit(&next, "next", 1);
    done(EXPECT(workers[0], GENERATE));
}

static void passes_failures_on(void **state) {
    static struct caller caller;
    void *worker = join("a");
    const struct {
        uint32_t sent;
        int got;
    } codes[] = {{STATUS_INTERNAL, STATUS_INTERNAL},
                 {STATUS_RESOURCE_EXHAUSTED, STATUS_RESOURCE_EXHAUSTED},
                 {0, STATUS_INTERNAL},
                 {99, STATUS_INTERNAL}};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        submit(&caller, "x", 1);
        Moed__Worker__V1__ToWorker *work = EXPECT(worker, GENERATE);
        Moed__Worker__V1__Failure failure = MOED__WORKER__V1__FAILURE__INIT;
        failure.id = work->generate->id;
        failure.code = codes[i].sent;
        failure.message = "device lost";
        SEND(worker, FAILURE, failure, &failure);
        done(work);
        assert_ended(&caller, codes[i].got, "device lost");
    }
    submit(&caller, "x", 1);
    caller.refuse_output = 1;
    Moed__Worker__V1__ToWorker *work = EXPECT(worker, GENERATE);
    send_tokens(worker, work->generate->id, 1, 0);
    done(EXPECT(worker, CANCEL));
    done(work);
    assert_ended(&caller, STATUS_INTERNAL, "refused");
}

static void refuses_workers(void **state) {
    void *first = join("a"), *other_model = connect_worker(), *same_name = connect_worker(),
         *stranger = connect_worker();
    send_hello(other_model, "b", 1, "beef");
    Moed__Worker__V1__ToWorker *refusal = EXPECT(other_model, REFUSAL);
    assert_int_equal(refusal->refusal->code, STATUS_FAILED_PRECONDITION);
    assert_non_null(strstr(refusal->refusal->reason, "beef"));
    assert_non_null(strstr(refusal->refusal->reason, "f00d"));
    done(refusal);
    send_hello(same_name, "a", 2, "f00d");
    refusal = EXPECT(same_name, REFUSAL);
    assert_int_equal(refusal->refusal->code, STATUS_ALREADY_EXISTS);
    done(refusal);
    send_beat(stranger, MOED__V1__WORKER__STATE__READY);
    done(EXPECT(stranger, IDENTIFY));
    assert_int_equal(zmq_send(stranger, "moed\x02\0\0\0", 8, 0), 8); /* another version */
    refusal = EXPECT(stranger, REFUSAL);
    assert_int_equal(refusal->refusal->code, STATUS_FAILED_PRECONDITION);
    done(refusal);
    disconnect(first); /* its successor need not wait for the timeout, only until the disconnection is noticed */
    bool welcome = false;
    for (int i = 0; i < 100 && !welcome; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        send_hello(same_name, "a", 2, "f00d");
        Moed__Worker__V1__ToWorker *answer = next_message(same_name, false, deadline_ns());
        welcome = answer->body_case == MOED__WORKER__V1__TO_WORKER__BODY_WELCOME;
        done(answer);
    }
    assert_true(welcome);
}

static void loses_silent_workers(void **state) {
    static struct caller caller;
    void *worker = join("a");
    submit(&caller, "x", 1);
    done(EXPECT(worker, GENERATE));
    assert_ended(&caller, STATUS_UNAVAILABLE, "worker lost: a: no heartbeat");
    wait_ready(false);
    submit(&caller, "y", 1);
    assert_ended(&caller, STATUS_UNAVAILABLE, "no worker is ready");
    send_beat(worker, MOED__V1__WORKER__STATE__READY); /* it only slept */
    done(EXPECT(worker, IDENTIFY));
    send_hello(worker, "a", 1, "f00d");
    done(EXPECT(worker, WELCOME));
    wait_ready(true);
}

static void ends_work_of_a_worker_that_begins_anew_or_leaves(void **state) {
    static struct caller caller;
    Moed__Worker__V1__Goodbye goodbye = MOED__WORKER__V1__GOODBYE__INIT;
    void *worker = join("a");
    submit(&caller, "x", 1);
    done(EXPECT(worker, GENERATE));
    send_hello(worker, "a", 1, "f00d");
    assert_ended(&caller, STATUS_UNAVAILABLE, "it began anew");
    submit(&caller, "x", 1);
    done(EXPECT(worker, GENERATE));
    SEND(worker, GOODBYE, goodbye, &goodbye);
    assert_ended(&caller, STATUS_UNAVAILABLE, "it left");
    wait_ready(false);
}

static void honours_draining(void **state) {
    static struct caller caller, late;
    void *worker = join("a");
    submit(&caller, "x", 1);
    Moed__Worker__V1__ToWorker *work = EXPECT(worker, GENERATE);
    send_beat(worker, MOED__V1__WORKER__STATE__DRAINING);
    wait_ready(false);
    submit(&late, "y", 1);
    assert_ended(&late, STATUS_UNAVAILABLE, "no worker is ready");
    send_tokens(worker, work->generate->id, 1, MOED__V1__FINISH_REASON__FINISH_REASON_STOP); /* what runs goes on */
    assert_ended(&caller, STATUS_OK, "");
    done(work);
}

static void ends_all_when_it_stops(void **state) {
    static struct caller callers[3];
    const char *const names[] = {"x", "y", "z"};
    join("a");
    for (int i = 0; i < 3; i++)
        submit(&callers[i], names[i], 1);
    fleet_stop(fleet);
    for (int i = 0; i < 3; i++)
        assert_ended(&callers[i], STATUS_UNAVAILABLE, "shutting down");
    fleet = NULL;
}

static void survives_garbage(void **state) {
    static struct caller caller;
    void *worker = join("a"), *vandal = connect_worker();
    uint64_t seed = clock_random_u64();
    print_message("# seed %llu\n", (unsigned long long)seed);
    srand((unsigned)seed);
    for (int i = 0; i < 3000; i++) {
        unsigned char bytes[64] = {'m', 'o', 'e', 'd', 1, 0, 0, 0};
        size_t size = (size_t)rand() % sizeof bytes;
        for (size_t b = i % 2 ? 8 : 0; b < sizeof bytes; b++)
            bytes[b] = (unsigned char)rand();
        zmq_send(i % 3 ? vandal : worker, bytes, size, rand() % 8 ? 0 : ZMQ_SNDMORE);
    }
    zmq_send(worker, "", 0, 0); /* ends what may be left open */
    zmq_send(vandal, "", 0, 0);
    join("b"); /* still at work */
    send_hello(worker, "a", 1, "f00d");
    done(EXPECT(worker, WELCOME));
    submit(&caller, "x", 1);
    fleet_cancel(port, &caller.request);
    assert_ended(&caller, STATUS_CANCELLED, "");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(serves_a_request, setup, teardown),
        cmocka_unit_test_setup_teardown(ignores_output_of_the_wrong_worker, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_a_name_in_flight, setup, teardown),
        cmocka_unit_test_setup_teardown(balances_and_releases_load, setup, teardown),
        cmocka_unit_test_setup_teardown(passes_failures_on, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_workers, setup, teardown),
        cmocka_unit_test_setup_teardown(loses_silent_workers, setup_impatient, teardown),
        cmocka_unit_test_setup_teardown(ends_work_of_a_worker_that_begins_anew_or_leaves, setup, teardown),
        cmocka_unit_test_setup_teardown(honours_draining, setup, teardown),
        cmocka_unit_test_setup_teardown(ends_all_when_it_stops, setup, teardown),
        cmocka_unit_test_setup_teardown(survives_garbage, setup, teardown),
    };
    return cmocka_run_group_tests_name("gateway_fleet", tests, NULL, NULL);
}
