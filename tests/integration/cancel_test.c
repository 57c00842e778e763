#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* Streams that end before their time free their KV blocks, and nobody else notices. */

static uint32_t ids[200];

/* Generates for seconds: to the end of a long context. */
static void long_prompt(struct prompt *prompt, size_t count) {
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++)
        ids[i] = (uint32_t)(i * 7 % 512);
    prompt_init(prompt, ids, count, 0);
}

/* Waits until the worker has said that it is at work, so that its next word of idleness is about afterwards. */
static void wait_busy(struct service *service) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (bool busy = false; !busy;) {
        Moed__V1__ListWorkersResponse *workers = service_workers(service);
        assert_int_equal(workers->n_workers, 1);
        const Moed__V1__Worker *worker = workers->workers[0];
        busy = worker->running > 0 && worker->kv_blocks_free < worker->kv_blocks_total;
        rpc_message_free(&workers->base);
        if (!busy)
            pause_until(deadline, "the worker to be busy");
    }
}

static void cancelled_stream_frees_its_blocks(void **state) {
    struct service *service = *state;
    struct prompt prompt;
    struct generation generation;
    long_prompt(&prompt, 20);
    generation_start(service, &generation, &prompt, RPC_FOREVER);
    generation_wait(service, &generation, 3);
    wait_busy(service);
    assert_non_null(generation.call);
    rpc_call_cancel(generation.call);
    generation_finish(service, &generation);
    assert_int_equal(generation.status.code, STATUS_CANCELLED);
    service_wait_idle(service);
    generation_free(&generation);
}

/* Many at once, most of which have to wait for their turn. */
static void cancelled_before_the_first_token(void **state) {
    struct service *service = *state;
    enum { STREAMS = 40 };
    static struct generation generations[STREAMS];
    struct prompt prompt;
    long_prompt(&prompt, 200);
    for (size_t i = 0; i < STREAMS; i++)
        generation_start(service, &generations[i], &prompt, RPC_FOREVER);
    wait_busy(service);
    for (size_t i = 0; i < STREAMS; i++)
        rpc_call_cancel(generations[i].call);
    for (size_t i = 0; i < STREAMS; i++) {
        generation_finish(service, &generations[i]);
        assert_int_equal(generations[i].status.code, STATUS_CANCELLED);
        generation_free(&generations[i]);
    }
    service_wait_idle(service);
}

static void deadline_ends_streams(void **state) {
    struct service *service = *state;
    enum { STREAMS = 8 };
    static struct generation generations[STREAMS];
    struct prompt prompt;
    long_prompt(&prompt, 10);
    /* From a deadline that is over before the request is read to one well within the stream. */
    for (size_t i = 0; i < STREAMS; i++)
        generation_start(service, &generations[i], &prompt, i * i * i * 4000000);
    for (size_t i = 0; i < STREAMS; i++) {
        generation_finish(service, &generations[i]);
        assert_int_equal(generations[i].status.code, STATUS_DEADLINE_EXCEEDED);
        generation_free(&generations[i]);
    }
    service_wait_idle(service);
}

static void others_go_on_unchanged(void **state) {
    struct service *service = *state;
    enum { DOOMED = 6 };
    struct prompt prompt, doomed;
    struct generation alone, among, cancelled[DOOMED];
    long_prompt(&doomed, 30);
    prompt_init(&prompt, ids, 12, 60);
    generation_run(service, &alone, &prompt);
    for (size_t i = 0; i < DOOMED; i++)
        generation_start(service, &cancelled[i], &doomed, RPC_FOREVER);
    generation_start(service, &among, &prompt, RPC_FOREVER);
    for (size_t i = 0; i < DOOMED; i++) {
        generation_wait(service, &among, 8 * i);
        assert_non_null(cancelled[i].call);
        rpc_call_cancel(cancelled[i].call);
    }
    generation_finish(service, &among);
    assert_int_equal(among.status.code, STATUS_OK);
    assert_same_generation(&alone, &among);
    for (size_t i = 0; i < DOOMED; i++) {
        generation_finish(service, &cancelled[i]);
        assert_int_equal(cancelled[i].status.code, STATUS_CANCELLED);
        generation_free(&cancelled[i]);
    }
    generation_free(&alone);
    generation_free(&among);
    service_wait_idle(service);
}

/* A Forward of many sequences is cancelled while a stream proves that steps are being made. */
static void cancelled_forward(void **state) {
    struct service *service = *state;
    struct prompt prompt;
    struct generation generation;
    static struct sequences sequences;
    long_prompt(&prompt, 10);
    generation_start(service, &generation, &prompt, RPC_FOREVER);
    generation_wait(service, &generation, 1);
    sequences_init(&sequences, ids, 200);
    while (sequences.request.n_sequences < 160)
        sequences_add(&sequences, ids, 200);
    struct rpc_queue *queue = rpc_queue_create();
    struct rpc_call *call = rpc_call_start(service->channel, queue, &method_forward, &sequences.request.base, NULL);
    generation_wait(service, &generation, generation.count + 3);
    rpc_call_cancel(call);
    struct rpc_event event;
    rpc_queue_next(queue, RPC_FOREVER, &event);
    assert_int_equal(event.type, RPC_END);
    assert_int_equal(event.status.code, STATUS_CANCELLED);
    rpc_queue_destroy(queue);
    wait_busy(service);
    rpc_call_cancel(generation.call);
    generation_finish(service, &generation);
    generation_free(&generation);
    service_wait_idle(service);
}

/* A client that goes away without a word. */
static void lost_connection_frees_blocks(void **state) {
    struct service *service = *state;
    const char *const argv[] = {"moed-client", "generate", "--target", service->address, "--ignore-eos", "1,2,3", NULL};
    struct process *clients[3];
    for (size_t i = 0; i < 3; i++) {
        char name[16];
        snprintf(name, sizeof name, "client%zu", i);
        clients[i] = process_start(name, argv);
    }
    wait_busy(service);
    for (size_t i = 0; i < 3; i++) {
        process_signal(clients[i], SIGKILL);
        assert_int_equal(process_finish(clients[i]), 128 + SIGKILL);
    }
    service_wait_idle(service);
}

static int setup(void **state) {
    static struct service service;
    if (model_setup(state, 16384) != 0)
        return -1;
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", (const char *const[]){"--max-sequences", "8", NULL});
    service_wait_workers(&service, 1);
    *state = &service;
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cancelled_stream_frees_its_blocks), cmocka_unit_test(cancelled_before_the_first_token),
        cmocka_unit_test(deadline_ends_streams),             cmocka_unit_test(others_go_on_unchanged),
        cmocka_unit_test(cancelled_forward),                 cmocka_unit_test(lost_connection_frees_blocks),
    };
    return cmocka_run_group_tests(tests, setup, service_teardown);
}
