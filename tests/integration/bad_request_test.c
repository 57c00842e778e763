#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* Requests that no careful caller would send: each gets its status, and the service goes on. */

enum { VOCAB = 512, CONTEXT = 256 };

static uint32_t zeros[CONTEXT + 1];

static void assert_refused(struct service *service, const struct prompt *prompt, enum status_code code,
                           const char *message) {
    struct generation generation;
    generation_start(service, &generation, prompt, RPC_FOREVER);
    generation_finish(service, &generation);
    assert_int_equal(generation.count, 0);
    if (generation.status.code != code || !strstr(generation.status.message, message))
        fail_msg("%s: %s; expected %s with '%s'", status_code_name((int)generation.status.code),
                 generation.status.message, status_code_name((int)code), message);
    generation_free(&generation);
}

static void assert_serves(struct service *service) {
    uint32_t ids[] = {1, 2, 3};
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, 3, 4);
    generation_run(service, &generation, &prompt);
    assert_int_equal(generation.count, 4);
    generation_free(&generation);
    service_wait_idle(service);
}

static void prompts(void **state) {
    struct service *service = *state;
    struct prompt prompt;
    prompt_init(&prompt, zeros, 0, 4);
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "tokens.ids: empty");
    prompt.request.tokens = NULL;
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "tokens.ids: empty");
    prompt_init(&prompt, zeros, CONTEXT + 1, 4);
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "257");
    uint32_t outside[] = {1, 2, VOCAB}, far[] = {UINT32_MAX};
    prompt_init(&prompt, outside, 3, 4);
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "tokens.ids[2]: 512");
    prompt_init(&prompt, far, 1, 4);
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "tokens.ids[0]: 4294967295");
    prompt_init(&prompt, zeros, 1, 4);
    prompt.request.text = "hello";
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "text");
    prompt_init(&prompt, zeros, 1, 4);
    char *stop[] = {"."};
    prompt.request.stop = stop;
    prompt.request.n_stop = 1;
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "stop");
    prompt_init(&prompt, zeros, 1, 4);
    prompt.request.stop_token_ids = outside;
    prompt.request.n_stop_token_ids = 3;
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "stop_token_ids[2]: 512");
    prompt_init(&prompt, zeros, 1, 4);
    prompt.request.logprobs = 1000;
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "logprobs: 1000");
    assert_serves(service);
}

static void numbers(void **state) {
    struct service *service = *state;
    static const struct {
        const char *field;
        size_t offset;
        bool negative; /* is refused */
        bool over_one; /* is refused */
    } fields[] = {
        {"temperature", offsetof(Moed__V1__Sampling, temperature), true, false},
        {"top_p", offsetof(Moed__V1__Sampling, top_p), true, true},
        {"min_p", offsetof(Moed__V1__Sampling, min_p), true, true},
        {"repetition_penalty", offsetof(Moed__V1__Sampling, repetition_penalty), true, false},
        {"presence_penalty", offsetof(Moed__V1__Sampling, presence_penalty), false, false},
        {"frequency_penalty", offsetof(Moed__V1__Sampling, frequency_penalty), false, false},
    };
    static const float values[] = {NAN, INFINITY, -INFINITY, -0.5f, -FLT_MAX, 1.5f};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            const bool refused = !isfinite(values[j]) || (values[j] < 0 && fields[i].negative) ||
                                 (values[j] > 1 && fields[i].over_one);
            struct prompt prompt;
            prompt_init(&prompt, zeros, 1, 2);
            memcpy((char *)&prompt.sampling + fields[i].offset, &values[j], sizeof values[j]);
            if (refused) {
                assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, fields[i].field);
            } else { /* however odd, it must do no harm */
                struct generation generation;
                prompt.sampling.seed = 1;
                generation_run(service, &generation, &prompt);
                generation_free(&generation);
            }
        }
    assert_serves(service);
}

/* What the types can hold at most, where it is allowed. */
static void extremes(void **state) {
    struct service *service = *state;
    struct prompt prompt;
    struct generation generation;
    uint32_t id = 3;
    prompt_init(&prompt, &id, 1, UINT32_MAX);
    prompt.sampling.top_k = UINT32_MAX;
    prompt.sampling.temperature = FLT_MAX;
    prompt.sampling.seed = UINT64_MAX;
    prompt.sampling.repetition_penalty = FLT_TRUE_MIN;
    prompt.sampling.presence_penalty = FLT_MAX;
    prompt.sampling.frequency_penalty = -FLT_MAX;
    prompt.request.priority = INT32_MIN;
    generation_run(service, &generation, &prompt);
    assert_int_equal(generation.count, CONTEXT);
    for (size_t i = 0; i < generation.count; i++)
        assert_true(generation.tokens[i] < VOCAB);
    generation_free(&generation);
    prompt_init(&prompt, &id, 1, 3);
    prompt.sampling.temperature = FLT_TRUE_MIN;
    prompt.sampling.top_p = FLT_TRUE_MIN;
    prompt.sampling.min_p = 1;
    generation_run(service, &generation, &prompt);
    assert_int_equal(generation.count, 3);
    generation_free(&generation);
    assert_serves(service);
}

static void request_ids_are_unique(void **state) {
    struct service *service = *state;
    struct prompt prompt;
    struct generation first, again;
    prompt_init(&prompt, zeros, 1, 0);
    prompt.request.request_id = "the one";
    generation_start(service, &first, &prompt, RPC_FOREVER);
    generation_wait(service, &first, 1);
    assert_refused(service, &prompt, STATUS_ALREADY_EXISTS, "the one");
    rpc_call_cancel(first.call);
    generation_finish(service, &first);
    generation_free(&first);
    service_wait_idle(service);
    prompt.request.max_tokens = 2;
    generation_run(service, &again, &prompt); /* its name is free again */
    generation_free(&again);

    static char long_id[100000];
    memset(long_id, 'x', sizeof long_id - 1);
    prompt.request.request_id = long_id;
    assert_refused(service, &prompt, STATUS_INVALID_ARGUMENT, "request_id");
    assert_serves(service);
}

static void assert_forward_refused(struct service *service, const struct sequences *sequences, const char *message) {
    struct status status;
    assert_null(service_call(service, &method_forward, &sequences->request.base, &status));
    assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
    if (!strstr(status.message, message))
        fail_msg("%s; expected '%s'", status.message, message);
}

static void forwards(void **state) {
    struct service *service = *state;
    struct sequences sequences;
    uint32_t outside[] = {1, VOCAB};
    sequences_init(&sequences, zeros, 1);
    sequences.request.n_sequences = 0;
    assert_forward_refused(service, &sequences, "sequences: 0");
    sequences_init(&sequences, zeros, 1);
    sequences_add(&sequences, zeros, 0);
    assert_forward_refused(service, &sequences, "sequences[1].ids: empty");
    sequences_init(&sequences, zeros, CONTEXT + 1);
    assert_forward_refused(service, &sequences, "sequences[0].ids: 257");
    sequences_init(&sequences, outside, 2);
    assert_forward_refused(service, &sequences, "sequences[0].ids[1]: 512");
    sequences_init(&sequences, zeros, 1);
    sequences.request.top_logits = VOCAB + 1;
    assert_forward_refused(service, &sequences, "top_logits: 513");
    assert_serves(service);
}

/* The end of a call with any bytes as its request. */
static struct status call_bytes(struct service *service, const char *path, const void *bytes, size_t size) {
    struct rpc_method method = {path, &moed__v1__generate_response__descriptor};
    struct rpc_queue *queue = rpc_queue_create();
    struct rpc_options options = {.timeout_ns = PATIENCE_S * UINT64_C(1000000000)};
    rpc_call_start_bytes(service->channel, queue, &method, bytes, size, &options);
    struct rpc_event event;
    do {
        rpc_queue_next(queue, RPC_FOREVER, &event);
        rpc_message_free(event.message);
    } while (event.type != RPC_END);
    rpc_queue_destroy(queue);
    return event.status;
}

static void random_bytes(void **state) {
    struct service *service = *state;
    static const char *const paths[] = {"/moed.v1.Inference/Generate", "/moed.v1.Inference/Forward",
                                        "/moed.v1.Inference/GetModel", "/moed.v1.Inference/ListWorkers",
                                        "/grpc.health.v1.Health/Check",
                                        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"};
    uint64_t random = random_seed();
    for (unsigned i = 0; i < 300; i++) {
        unsigned char bytes[300];
        size_t size = 1 + random_next(&random) % sizeof bytes;
        for (size_t j = 0; j < size; j++)
            bytes[j] = (unsigned char)random_next(&random);
        struct status status = call_bytes(service, paths[i % 6], bytes, size);
        assert_int_not_equal(status.code, STATUS_DEADLINE_EXCEEDED);
        assert_int_not_equal(status.code, STATUS_UNAVAILABLE);
    }
    assert_serves(service);
}

/* A good request cut short or with single bytes changed. */
static void mutated_requests(void **state) {
    struct service *service = *state;
    uint64_t random = random_seed();
    uint32_t ids[] = {1, 200, 300};
    struct prompt prompt;
    prompt_init(&prompt, ids, 3, 3);
    prompt.request.request_id = "mutated";
    prompt.sampling.temperature = 0.5f;
    size_t size = protobuf_c_message_get_packed_size(&prompt.request.base);
    unsigned char *good = malloc(size), *bad = malloc(size);
    assert_true(good && bad);
    protobuf_c_message_pack(&prompt.request.base, good);
    for (size_t i = 0; i < 200; i++) {
        memcpy(bad, good, size);
        if (i >= size)
            bad[random_next(&random) % size] = (unsigned char)random_next(&random);
        struct status status = call_bytes(service, method_generate.path, bad, i < size ? i : size);
        assert_int_not_equal(status.code, STATUS_UNAVAILABLE);
        assert_int_not_equal(status.code, STATUS_DEADLINE_EXCEEDED);
    }
    free(good);
    free(bad);
    assert_serves(service);
}

static void oversized_messages(void **state) {
    struct service *service = *state;
    size_t size = ((size_t)64 << 20) + 1;
    unsigned char *bytes = calloc(1, size);
    assert_non_null(bytes);
    assert_int_equal(call_bytes(service, method_generate.path, bytes, size).code, STATUS_RESOURCE_EXHAUSTED);
    assert_int_equal(call_bytes(service, method_forward.path, bytes, size).code, STATUS_RESOURCE_EXHAUSTED);
    /* Just below the limit it is read, and refused for what it is: a prompt of far too many tokens. */
    size = 60 << 20;
    const size_t ids = size - 10;
    bytes[0] = 2 << 3 | 2; /* tokens { ids: 0, 0, ... } */
    for (unsigned i = 0; i < 4; i++) {
        bytes[1 + i] = (unsigned char)((ids + 5) >> (7 * i) | 0x80);
        bytes[6 + i] = (unsigned char)(ids >> (7 * i) | 0x80);
    }
    bytes[4] &= 0x7f;
    bytes[5] = 1 << 3 | 2;
    bytes[9] &= 0x7f;
    struct status status = call_bytes(service, method_generate.path, bytes, size);
    assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "tokens.ids: 62914550"));
    free(bytes);
    assert_serves(service);
}

static void unknown_methods(void **state) {
    struct service *service = *state;
    static const char *const paths[] = {"/moed.v1.Inference/Train", "/moed.v2.Inference/Generate", "/", "/a/b/c"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        assert_int_equal(call_bytes(service, paths[i], "", 0).code, STATUS_UNIMPLEMENTED);
    assert_serves(service);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prompts),
        cmocka_unit_test(numbers),
        cmocka_unit_test(extremes),
        cmocka_unit_test(request_ids_are_unique),
        cmocka_unit_test(forwards),
        cmocka_unit_test(random_bytes),
        cmocka_unit_test(mutated_requests),
        cmocka_unit_test(oversized_messages),
        cmocka_unit_test(unknown_methods),
    };
    return cmocka_run_group_tests(tests, service_setup, service_teardown);
}
