#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/*
 * What a request gets in the press of many, with prompts that begin alike and a KV cache that does not hold them all,
 * against what it gets alone on a worker that shares nothing.
 */

enum { VOCAB = 512, CONTEXT = 256, REQUESTS = 200, LONG = 8, PREFIXES = 4, PREFIX = 90, IN_FLIGHT = 40 };

static uint32_t prefixes[PREFIXES][PREFIX];

static struct request {
    uint32_t ids[CONTEXT];
    struct prompt prompt;
    struct generation pressed, alone;
} requests[REQUESTS];

static void random_ids(uint64_t *random, uint32_t *ids, size_t count) {
    for (size_t i = 0; i < count; i++)
        ids[i] = (uint32_t)(random_next(random) % VOCAB);
}

static void random_request(uint64_t *random, struct request *request) {
    size_t alike = random_next(random) % 3 ? random_next(random) % (PREFIX + 1) : 0;
    size_t count = alike + 1 + random_next(random) % 60;
    memcpy(request->ids, prefixes[random_next(random) % PREFIXES], alike * sizeof *request->ids);
    random_ids(random, request->ids + alike, count - alike);
    prompt_init(&request->prompt, request->ids, count, 1 + (uint32_t)(random_next(random) % 60));
    request->prompt.request.logprobs = (uint32_t)(random_next(random) % 3);
    request->prompt.request.priority = (int32_t)(random_next(random) % 3) - 1;
    if (random_next(random) % 2) {
        Moed__V1__Sampling *sampling = &request->prompt.sampling;
        sampling->temperature = 0.5f + (float)(random_next(random) % 100) / 100;
        sampling->seed = 1 + random_next(random) % 1000;
        sampling->top_k = (uint32_t)(random_next(random) % 100);
        sampling->top_p = random_next(random) % 2 ? 0.9f : 0;
        sampling->repetition_penalty = random_next(random) % 2 ? 1.2f : 0;
        sampling->frequency_penalty = random_next(random) % 2 ? 0.2f : 0;
    }
}

/* Four of these fit when they begin, and two when they have grown: some must give way, whatever the timing. */
static void long_request(uint64_t *random, struct request *request) {
    random_ids(random, request->ids, 50);
    prompt_init(&request->prompt, request->ids, 50, 150);
    request->prompt.request.logprobs = 1;
}

static uint32_t cached(const struct generation *generation) {
    return generation->last->usage->cached_tokens;
}

/* Starts the requests, the long ones at once and the others at random times, some of them only to cancel them, and waits for their ends. */
static uint64_t press(struct service *service, uint64_t *random) {
    uint64_t cached_tokens = 0;
    size_t started = 0, ended = 0, oldest = 0;
    static struct generation given_up;
    while (ended < REQUESTS) {
        if (started < REQUESTS && started - oldest < IN_FLIGHT && (started < LONG || random_next(random) % 3)) {
            generation_start(service, &requests[started].pressed, &requests[started].prompt, RPC_FOREVER);
            if (started % 10 == 9) { /* the same again, at whatever point it is cut off */
                generation_start(service, &given_up, &requests[started].prompt, RPC_FOREVER);
                for (uint64_t events = random_next(random) % 20; events > 0 && given_up.call; events--)
                    generation_next(service, 2000000);
                if (given_up.call)
                    rpc_call_cancel(given_up.call);
                generation_finish(service, &given_up);
                generation_free(&given_up);
            }
            started++;
        } else {
            generation_next(service, 1000000);
        }
        for (ended = 0, oldest = started; started == REQUESTS && ended < REQUESTS && !requests[ended].pressed.call;)
            ended++;
        for (size_t i = started; i-- > 0;)
            if (requests[i].pressed.call)
                oldest = i;
    }
    for (size_t i = 0; i < REQUESTS; i++) {
        assert_int_equal(requests[i].pressed.status.code, STATUS_OK);
        assert_int_equal(requests[i].pressed.count, requests[i].prompt.request.max_tokens);
        assert_true(cached(&requests[i].pressed) < requests[i].prompt.tokens.n_ids);
        cached_tokens += cached(&requests[i].pressed);
    }
    return cached_tokens;
}

static void pressed_are_as_alone(const char *kv_type, const char *kv_size) {
    const char *const shared[] = {"--max-sequences=12", "--step-tokens=64", kv_size, kv_type, "--log-level=debug", NULL};
    const char *const plain[] = {"--max-sequences=1", "--prefix-cache=off", kv_type, NULL};
    struct service service;
    uint64_t random = random_seed();
    for (size_t i = 0; i < PREFIXES; i++)
        random_ids(&random, prefixes[i], PREFIX);
    for (size_t i = 0; i < REQUESTS; i++)
        (i < LONG ? long_request : random_request)(&random, &requests[i]);

    service_start(&service, WORKER_ENDPOINT);
    struct process *worker = worker_start("w0", shared);
    service_wait_workers(&service, 1);
    uint64_t cached_tokens = press(&service, &random);
    print_message("# %llu tokens were cached\n", (unsigned long long)cached_tokens);
    assert_true(cached_tokens > 100);
    service_wait_idle(&service);
    char *log = process_log(worker);
    assert_non_null(strstr(log, " preempted ")); /* else the KV cache was too large for this test */
    free(log);
    process_signal(worker, SIGTERM);
    assert_int_equal(process_finish(worker), 0);

    worker_start("w1", plain);
    service_wait_workers(&service, 1);
    for (size_t i = 0; i < REQUESTS; i++) {
        generation_run(&service, &requests[i].alone, &requests[i].prompt);
        assert_int_equal(cached(&requests[i].alone), 0);
        assert_same_generation(&requests[i].alone, &requests[i].pressed);
        generation_free(&requests[i].alone);
        generation_free(&requests[i].pressed);
    }
    service_close(&service);
}

static void pressed_requests_are_the_same_as_alone(void **state) {
    pressed_are_as_alone("--kv-type=f16", "--kv-size=400k");
}

static void pressed_requests_are_the_same_with_a_cache_in_q8_0(void **state) {
    pressed_are_as_alone("--kv-type=q8_0", "--kv-size=212k");
}

/* A conversation computes what is new of it, its own answers included; a Forward shares it, too. */
static void a_conversation_computes_what_is_new(void **state) {
    struct service service;
    uint64_t random = random_seed();
    uint32_t ids[CONTEXT];
    size_t count = 70;
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    random_ids(&random, ids, count);
    for (unsigned turn = 0, had = 0; turn < 3; turn++) {
        struct prompt prompt;
        struct generation generation, again;
        prompt_init(&prompt, ids, count, 20);
        generation_run(&service, &generation, &prompt);
        assert_in_range(cached(&generation), had > 32 ? had - 32 : 0, had);
        generation_run(&service, &again, &prompt);
        assert_in_range(cached(&again), count - 32, count - 1);
        assert_same_generation(&generation, &again);
        had = (unsigned)count + 19; /* the last token was sampled, not run */
        memcpy(ids + count, generation.tokens, 20 * sizeof *ids);
        random_ids(&random, ids + count + 20, 15);
        count += 35;
        generation_free(&generation);
        generation_free(&again);
    }
    struct sequences sequences;
    sequences_init(&sequences, ids, 70);
    Moed__V1__ForwardResponse *last = forward_run(&service, &sequences);
    sequences.request.all_positions = true;
    Moed__V1__ForwardResponse *all = forward_run(&service, &sequences);
    assert_memory_equal(last->logits[0]->values, all->logits[0]->values + 69 * VOCAB, VOCAB * sizeof(float));
    rpc_message_free(&last->base);
    rpc_message_free(&all->base);
    service_close(&service);
}

static int setup(void **state) {
    return model_setup(state, CONTEXT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(pressed_requests_are_the_same_as_alone, harness_stop_all),
        cmocka_unit_test_teardown(pressed_requests_are_the_same_with_a_cache_in_q8_0, harness_stop_all),
        cmocka_unit_test_teardown(a_conversation_computes_what_is_new, harness_stop_all),
    };
    return cmocka_run_group_tests(tests, setup, model_teardown);
}
