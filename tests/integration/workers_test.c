#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* Workers that come, go and die, and a gateway that does. Each test starts its own processes. */

enum { CONTEXT = 8192, LONG = 600 }; /* a stream of LONG tokens is under way long enough to have things happen to it */

static uint32_t ids[] = {11, 12, 13, 14};

static void assert_unavailable(struct service *service) {
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, 4, 2);
    generation_start(service, &generation, &prompt, RPC_FOREVER);
    generation_finish(service, &generation);
    assert_int_equal(generation.status.code, STATUS_UNAVAILABLE);
    generation_free(&generation);
}

static void without_a_worker(void **state) {
    struct service service;
    struct sequences sequences;
    struct status status;
    service_start(&service, WORKER_ENDPOINT);
    assert_unavailable(&service);
    sequences_init(&sequences, ids, 4);
    assert_null(service_call(&service, &method_forward, &sequences.request.base, &status));
    assert_int_equal(status.code, STATUS_UNAVAILABLE);
    Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
    assert_null(service_call(&service, &method_get_model, &request.base, &status));
    assert_int_equal(status.code, STATUS_UNAVAILABLE);
    Moed__V1__ListWorkersResponse *workers = service_workers(&service);
    assert_int_equal(workers->n_workers, 0);
    rpc_message_free(&workers->base);

    worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, 4, 5);
    generation_run(&service, &generation, &prompt);
    generation_free(&generation);
    service_close(&service);
}

/* Streams that start one after another go to both workers, and what they get does not depend on which. */
static void two_workers_share_the_streams(void **state) {
    enum { STREAMS = 12 };
    struct service service;
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    worker_start("w1", NULL);
    service_wait_workers(&service, 2);

    struct prompt prompt;
    static struct generation generations[STREAMS];
    prompt_init(&prompt, ids, 4, 100);
    prompt.request.logprobs = 1;
    for (size_t i = 0; i < STREAMS; i++)
        generation_start(&service, &generations[i], &prompt, RPC_FOREVER);
    size_t on[2] = {0};
    for (size_t i = 0; i < STREAMS; i++) {
        generation_finish(&service, &generations[i]);
        assert_int_equal(generations[i].status.code, STATUS_OK);
        assert_same_generation(&generations[0], &generations[i]);
        const char *worker = generations[i].last->timing->worker;
        assert_true(strcmp(worker, "w0") == 0 || strcmp(worker, "w1") == 0);
        on[worker[1] - '0']++;
    }
    for (size_t i = 0; i < STREAMS; i++)
        generation_free(&generations[i]);
    assert_in_range(on[0], STREAMS / 3, STREAMS - STREAMS / 3);

    Moed__V1__ListWorkersResponse *workers = service_workers(&service);
    assert_int_equal(workers->n_workers, 2);
    for (size_t i = 0; i < 2; i++) {
        assert_true(strcmp(workers->workers[i]->id, i ? "w1" : "w0") == 0 ||
                    strcmp(workers->workers[i]->id, i ? "w0" : "w1") == 0);
        assert_string_equal(workers->workers[i]->backend, "cpu");
        assert_true(workers->workers[i]->kv_blocks_total > 0);
        assert_true(workers->workers[i]->memory_total_bytes > 0);
    }
    rpc_message_free(&workers->base);
    service_wait_idle(&service);
    service_close(&service);
}

static void killed_worker_ends_its_streams(void **state) {
    struct service service;
    struct prompt prompt;
    struct generation generation;
    service_start(&service, WORKER_ENDPOINT);
    struct process *worker = worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    prompt_init(&prompt, ids, 4, 0);
    generation_start(&service, &generation, &prompt, RPC_FOREVER);
    generation_wait(&service, &generation, 2);
    process_signal(worker, SIGKILL);
    assert_int_equal(process_finish(worker), 128 + SIGKILL);
    generation_finish(&service, &generation); /* within PATIENCE_S */
    assert_int_equal(generation.status.code, STATUS_UNAVAILABLE);
    generation_free(&generation);
    assert_unavailable(&service);

    worker_start("w0", NULL); /* under the same name */
    service_wait_workers(&service, 1);
    prompt.request.max_tokens = 5;
    generation_run(&service, &generation, &prompt);
    generation_free(&generation);
    service_close(&service);
}

/* The other worker's streams do not notice, and new ones go there. */
static void one_of_two_workers_is_killed(void **state) {
    enum { STREAMS = 6 };
    struct service service;
    struct prompt prompt;
    struct generation alone, generations[STREAMS];
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    struct process *doomed = worker_start("w1", NULL);
    service_wait_workers(&service, 2);
    prompt_init(&prompt, ids, 4, LONG);
    generation_run(&service, &alone, &prompt);
    for (size_t i = 0; i < STREAMS; i++)
        generation_start(&service, &generations[i], &prompt, RPC_FOREVER);
    for (size_t i = 0; i < STREAMS; i++)
        generation_wait(&service, &generations[i], 1);
    process_signal(doomed, SIGKILL);
    assert_int_equal(process_finish(doomed), 128 + SIGKILL);
    size_t whole = 0;
    for (size_t i = 0; i < STREAMS; i++) {
        generation_finish(&service, &generations[i]);
        if (generations[i].status.code == STATUS_OK) {
            assert_same_generation(&alone, &generations[i]);
            whole++;
        } else {
            assert_int_equal(generations[i].status.code, STATUS_UNAVAILABLE);
        }
        generation_free(&generations[i]);
    }
    assert_in_range(whole, 1, STREAMS - 1);
    generation_free(&alone);
    service_wait_workers(&service, 1);
    prompt.request.max_tokens = 5;
    for (size_t i = 0; i < 4; i++) {
        generation_run(&service, &alone, &prompt);
        assert_string_equal(alone.last->timing->worker, "w0");
        generation_free(&alone);
    }
    service_close(&service);
}

/* The worker finds the next gateway by itself, and has dropped the work of the one that died. */
static void gateway_is_killed_and_restarted(void **state) {
    struct service service;
    struct prompt prompt;
    struct generation before, cut, after;
    service_start(&service, WORKER_ENDPOINT);
    struct process *worker = worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    prompt_init(&prompt, ids, 4, 40);
    generation_run(&service, &before, &prompt);
    prompt.request.max_tokens = 0;
    generation_start(&service, &cut, &prompt, RPC_FOREVER);
    generation_wait(&service, &cut, 1);
    process_signal(service.gateway, SIGKILL);
    assert_int_equal(process_finish(service.gateway), 128 + SIGKILL);
    generation_finish(&service, &cut);
    assert_int_equal(cut.status.code, STATUS_UNAVAILABLE);
    generation_free(&cut);
    service_close(&service);

    service_start(&service, WORKER_ENDPOINT);
    service_wait_workers(&service, 1);
    service_wait_idle(&service);
    prompt.request.max_tokens = 40;
    generation_run(&service, &after, &prompt);
    assert_same_generation(&before, &after);
    generation_free(&before);
    generation_free(&after);
    process_signal(worker, SIGTERM);
    assert_int_equal(process_finish(worker), 0);
    service_close(&service);
}

static void another_model_is_refused(void **state) {
    struct service service;
    model_write("other.gguf", 2, CONTEXT);
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    struct process *other = worker_start("w1", (const char *const[]){"--model", "other.gguf", NULL});
    char line[1024];
    process_wait_log(other, "refused", "model", line, sizeof line);
    process_wait_log(service.gateway, "refused", "w1", line, sizeof line);
    assert_non_null(strstr(line, "model"));
    struct prompt prompt;
    prompt_init(&prompt, ids, 4, 3);
    for (size_t i = 0; i < 4; i++) {
        struct generation generation;
        generation_run(&service, &generation, &prompt);
        assert_string_equal(generation.last->timing->worker, "w0");
        generation_free(&generation);
    }
    service_wait_workers(&service, 1);
    process_signal(other, SIGTERM);
    assert_int_equal(process_finish(other), 0);
    service_close(&service);
}

static void a_name_in_use_is_refused(void **state) {
    struct service service;
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    const char *const argv[] = {"moed-worker", "--model", MODEL_FILE, "--gateway", WORKER_ENDPOINT, "--backend", "cpu",
                                "--threads", "1", "--worker-id", "w0", NULL};
    struct process *twin = process_start("twin", argv);
    char line[1024];
    process_wait_log(twin, "refused", "w0", line, sizeof line);
    service_wait_workers(&service, 1);
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, 4, 3);
    generation_run(&service, &generation, &prompt);
    generation_free(&generation);
    service_close(&service);
}

/* SIGTERM: streams that run are finished, new ones refused, and the exit status is 0. */
static void worker_drains(void **state) {
    struct service service;
    struct prompt prompt;
    struct generation whole, generation;
    service_start(&service, WORKER_ENDPOINT);
    struct process *worker = worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    prompt_init(&prompt, ids, 4, LONG);
    generation_run(&service, &whole, &prompt);
    generation_start(&service, &generation, &prompt, RPC_FOREVER);
    generation_wait(&service, &generation, 1);
    process_signal(worker, SIGTERM);
    service_wait_workers(&service, 0);
    assert_unavailable(&service);
    generation_finish(&service, &generation);
    assert_int_equal(generation.status.code, STATUS_OK);
    assert_same_generation(&whole, &generation);
    assert_int_equal(process_finish(worker), 0);
    generation_free(&whole);
    generation_free(&generation);
    service_close(&service);
}

static void gateway_drains(void **state) {
    struct service service;
    struct prompt prompt;
    struct generation whole, generation;
    service_start(&service, WORKER_ENDPOINT);
    struct process *worker = worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    prompt_init(&prompt, ids, 4, LONG);
    generation_run(&service, &whole, &prompt);
    generation_start(&service, &generation, &prompt, RPC_FOREVER);
    generation_wait(&service, &generation, 1);
    process_signal(service.gateway, SIGTERM);
    generation_finish(&service, &generation);
    assert_int_equal(generation.status.code, STATUS_OK);
    assert_same_generation(&whole, &generation);
    assert_int_equal(process_finish(service.gateway), 0);
    generation_free(&whole);
    generation_free(&generation);
    process_signal(worker, SIGTERM); /* with no gateway there it ends, too */
    assert_int_equal(process_finish(worker), 0);
    service_close(&service);
}

static int setup(void **state) {
    return model_setup(state, CONTEXT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(without_a_worker, harness_stop_all),
        cmocka_unit_test_teardown(two_workers_share_the_streams, harness_stop_all),
        cmocka_unit_test_teardown(killed_worker_ends_its_streams, harness_stop_all),
        cmocka_unit_test_teardown(one_of_two_workers_is_killed, harness_stop_all),
        cmocka_unit_test_teardown(gateway_is_killed_and_restarted, harness_stop_all),
        cmocka_unit_test_teardown(another_model_is_refused, harness_stop_all),
        cmocka_unit_test_teardown(a_name_in_use_is_refused, harness_stop_all),
        cmocka_unit_test_teardown(worker_drains, harness_stop_all),
        cmocka_unit_test_teardown(gateway_drains, harness_stop_all),
    };
    return cmocka_run_group_tests(tests, setup, model_teardown);
}
