#include "tests/integration/service.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t patience_ns = PATIENCE_S * UINT64_C(1000000000);

void model_write(const char *path, unsigned seed, unsigned context) {
    char seed_text[16], context_text[16];
    snprintf(seed_text, sizeof seed_text, "%u", seed);
    snprintf(context_text, sizeof context_text, "%u", context);
    const char *const argv[] = {"moed-synth", "--quiet", "--preset", "tiny", "--layers", "2", "--vocab", "512",
                                "--quant", "mixed", "--ctx", context_text, "--seed", seed_text, path, NULL};
    assert_int_equal(process_run("synth", argv), 0);
}

/* ---- processes */

static void connect_to(struct service *service) {
    struct status status;
    struct rpc_target target = {.address = service->address};
    assert_int_equal(rpc_channel_create(&target, &service->channel, &status), 0);
    service->queue = rpc_queue_create();
}

/* Appends to argv, which has room for `size` entries. */
static void append(const char **argv, size_t size, const char *const *extra) {
    size_t count = 0;
    while (argv[count])
        count++;
    for (; extra && *extra; extra++) {
        assert_true(count < size - 1);
        argv[count++] = *extra;
    }
}

void service_start(struct service *service, const char *worker_endpoint) {
    service_start_with(service, worker_endpoint, NULL);
}

void service_start_with(struct service *service, const char *worker_endpoint, const char *const *extra) {
    const char *argv[24] = {"moed-gateway", "--listen", "127.0.0.1:0", "--worker-endpoint", worker_endpoint};
    char line[512];
    append(argv, sizeof argv / sizeof *argv, extra);
    service->gateway = process_start("gateway", argv);
    process_wait_log(service->gateway, " listening ", "address=", line, sizeof line);
    assert_int_equal(sscanf(strstr(line, "address="), "address=%63s", service->address), 1);
    connect_to(service);
}

void service_close(struct service *service) {
    if (!service) /* the set-up failed */
        return;
    rpc_queue_destroy(service->queue);
    rpc_channel_destroy(service->channel);
    *service = (struct service){0};
}

struct process *worker_start(const char *id, const char *const *extra) {
    const char *argv[24] = {"moed-worker", "--model", MODEL_FILE, "--gateway", WORKER_ENDPOINT, "--backend", "cpu",
                            "--threads", "1", "--worker-id", id};
    append(argv, sizeof argv / sizeof *argv, extra);
    return process_start(id, argv);
}

/* ---- unary calls */

ProtobufCMessage *service_call(struct service *service, const struct rpc_method *method,
                               const ProtobufCMessage *request, struct status *status) {
    /* On a queue of its own: the service's may have streams. */
    struct rpc_queue *queue = rpc_queue_create();
    rpc_call_start(service->channel, queue, method, request, &(struct rpc_options){.timeout_ns = patience_ns});
    ProtobufCMessage *response = NULL;
    struct rpc_event event;
    do {
        rpc_queue_next(queue, RPC_FOREVER, &event);
        if (event.type == RPC_MESSAGE) {
            assert_null(response);
            response = event.message;
        }
    } while (event.type != RPC_END);
    *status = event.status;
    assert_int_equal(response != NULL, status->code == STATUS_OK);
    rpc_queue_destroy(queue);
    return response;
}

Moed__V1__ListWorkersResponse *service_workers(struct service *service) {
    Moed__V1__ListWorkersRequest request = MOED__V1__LIST_WORKERS_REQUEST__INIT;
    struct status status;
    ProtobufCMessage *response = service_call(service, &method_list_workers, &request.base, &status);
    if (!response)
        fail_msg("ListWorkers: %s: %s", status_code_name((int)status.code), status.message);
    return (Moed__V1__ListWorkersResponse *)response;
}

void service_wait_workers(struct service *service, size_t ready) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (;;) {
        Moed__V1__ListWorkersResponse *workers = service_workers(service);
        size_t found = 0;
        for (size_t i = 0; i < workers->n_workers; i++)
            found += workers->workers[i]->state == MOED__V1__WORKER__STATE__READY;
        rpc_message_free(&workers->base);
        if (found == ready)
            return;
        pause_until(deadline, "the workers to be ready");
    }
}

void service_wait_idle(struct service *service) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (;;) {
        Moed__V1__ListWorkersResponse *workers = service_workers(service);
        bool idle = true;
        for (size_t i = 0; i < workers->n_workers; i++) {
            const Moed__V1__Worker *worker = workers->workers[i];
            if (worker->state == MOED__V1__WORKER__STATE__READY)
                idle = idle && !worker->running && !worker->waiting &&
                       worker->kv_blocks_free == worker->kv_blocks_total;
        }
        rpc_message_free(&workers->base);
        if (idle)
            return;
        pause_until(deadline, "the workers to be idle");
    }
}

int model_setup(void **state, unsigned context) {
    if (harness_setup(state) != 0)
        return -1;
    rpc_init();
    model_write(MODEL_FILE, 1, context);
    return 0;
}

int model_teardown(void **state) {
    rpc_shutdown();
    return harness_teardown(state);
}

int service_setup(void **state) {
    static struct service service;
    if (model_setup(state, 256) != 0)
        return -1;
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    *state = &service;
    return 0;
}

int service_teardown(void **state) {
    service_close(*state);
    return model_teardown(state);
}

/* ---- Generate */

void prompt_init(struct prompt *prompt, uint32_t *ids, size_t count, uint32_t max_tokens) {
    prompt->request = (Moed__V1__GenerateRequest)MOED__V1__GENERATE_REQUEST__INIT;
    prompt->tokens = (Moed__V1__Tokens)MOED__V1__TOKENS__INIT;
    prompt->sampling = (Moed__V1__Sampling)MOED__V1__SAMPLING__INIT;
    prompt->tokens.ids = ids;
    prompt->tokens.n_ids = count;
    prompt->request.tokens = &prompt->tokens;
    prompt->request.sampling = &prompt->sampling;
    prompt->request.max_tokens = max_tokens;
    prompt->request.ignore_eos = true; /* tests tell by themselves where a stream ends */
}

void generation_start(struct service *service, struct generation *generation, const struct prompt *prompt,
                      uint64_t timeout_ns) {
    *generation = (struct generation){0};
    struct rpc_options options = {.timeout_ns = timeout_ns, .user = generation};
    generation->call =
        rpc_call_start(service->channel, service->queue, &method_generate, &prompt->request.base, &options);
}

static void *grow(void *array, size_t count, size_t size) {
    array = realloc(array, (count ? count : 1) * size);
    assert_non_null(array);
    return array;
}

static void generation_take(struct generation *generation, Moed__V1__GenerateResponse *response) {
    assert_int_equal(response->n_logprobs, response->n_logprobs ? response->n_token_ids : 0);
    if (generation->last) /* the last message alone has these */
        assert_true(!generation->last->finish_reason && !generation->last->usage && !generation->last->timing);
    generation->last = response;
    generation->held = grow(generation->held, generation->messages + 1, sizeof *generation->held);
    generation->held[generation->messages++] = response;
    size_t count = generation->count + response->n_token_ids;
    generation->tokens = grow(generation->tokens, count, sizeof *generation->tokens);
    generation->logprobs = grow(generation->logprobs, count, sizeof *generation->logprobs);
    for (size_t i = 0; i < response->n_token_ids; i++) {
        generation->tokens[generation->count] = response->token_ids[i];
        generation->logprobs[generation->count++] = response->n_logprobs ? response->logprobs[i] : NULL;
    }
}

bool generation_next(struct service *service, uint64_t timeout_ns) {
    struct rpc_event event;
    rpc_queue_next(service->queue, timeout_ns, &event);
    struct generation *generation = event.user;
    if (event.type == RPC_MESSAGE) {
        generation_take(generation, (Moed__V1__GenerateResponse *)event.message);
    } else if (event.type == RPC_END) {
        generation->call = NULL;
        generation->status = event.status;
    }
    return event.type != RPC_TIMEOUT;
}

void generation_wait(struct service *service, struct generation *generation, size_t count) {
    while (generation->call && generation->count < count)
        if (!generation_next(service, patience_ns))
            fail_msg("no token came within %d s; %zu of %zu did", PATIENCE_S, generation->count, count);
}

void generation_finish(struct service *service, struct generation *generation) {
    generation_wait(service, generation, SIZE_MAX);
}

void generation_free(struct generation *generation) {
    assert_null(generation->call);
    for (size_t i = 0; i < generation->messages; i++)
        rpc_message_free(&generation->held[i]->base);
    free(generation->held);
    free(generation->logprobs);
    free(generation->tokens);
    *generation = (struct generation){0};
}

void generation_run(struct service *service, struct generation *generation, const struct prompt *prompt) {
    generation_start(service, generation, prompt, RPC_FOREVER);
    generation_finish(service, generation);
    if (generation->status.code != STATUS_OK)
        fail_msg("Generate: %s: %s", status_code_name((int)generation->status.code), generation->status.message);
    assert_non_null(generation->last);
    assert_non_null(generation->last->usage);
    assert_non_null(generation->last->timing);
    assert_int_not_equal(generation->last->finish_reason, 0);
    assert_int_equal(generation->last->usage->prompt_tokens, prompt->tokens.n_ids);
    assert_int_equal(generation->last->usage->completion_tokens, generation->count);
}

void assert_same_generation(const struct generation *a, const struct generation *b) {
    assert_int_equal(a->count, b->count);
    assert_memory_equal(a->tokens, b->tokens, a->count * sizeof *a->tokens);
    for (size_t i = 0; i < a->count; i++) {
        const Moed__V1__TokenLogprobs *x = a->logprobs[i], *y = b->logprobs[i];
        assert_int_equal(!x, !y);
        if (!x)
            continue;
        assert_memory_equal(&x->logprob, &y->logprob, sizeof x->logprob);
        assert_int_equal(x->n_top_ids, y->n_top_ids);
        assert_int_equal(x->n_top_logprobs, x->n_top_ids);
        assert_int_equal(y->n_top_logprobs, x->n_top_ids);
        assert_memory_equal(x->top_ids, y->top_ids, x->n_top_ids * sizeof *x->top_ids);
        assert_memory_equal(x->top_logprobs, y->top_logprobs, x->n_top_ids * sizeof *x->top_logprobs);
    }
    assert_int_equal(a->last->finish_reason, b->last->finish_reason);
}

/* ---- Forward */

void sequences_init(struct sequences *sequences, uint32_t *ids, size_t count) {
    sequences->request = (Moed__V1__ForwardRequest)MOED__V1__FORWARD_REQUEST__INIT;
    sequences->request.sequences = sequences->pointers;
    sequences_add(sequences, ids, count);
}

void sequences_add(struct sequences *sequences, uint32_t *ids, size_t count) {
    size_t at = sequences->request.n_sequences++;
    assert_true(at < sizeof sequences->tokens / sizeof *sequences->tokens);
    sequences->tokens[at] = (Moed__V1__Tokens)MOED__V1__TOKENS__INIT;
    sequences->tokens[at].ids = ids;
    sequences->tokens[at].n_ids = count;
    sequences->pointers[at] = &sequences->tokens[at];
}

Moed__V1__ForwardResponse *forward_run(struct service *service, const struct sequences *sequences) {
    struct status status;
    ProtobufCMessage *response = service_call(service, &method_forward, &sequences->request.base, &status);
    if (!response)
        fail_msg("Forward: %s: %s", status_code_name((int)status.code), status.message);
    return (Moed__V1__ForwardResponse *)response;
}
