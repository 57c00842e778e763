#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* What a stream of Generate holds, against the logits of Forward and against itself. */

enum { VOCAB = 512, CONTEXT = 256 };

static void random_ids(uint64_t *random, uint32_t *ids, size_t count) {
    for (size_t i = 0; i < count; i++)
        ids[i] = (uint32_t)(random_next(random) % VOCAB);
}

static uint32_t argmax(const float *logits) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < VOCAB; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static double log_probability(const float *logits, uint32_t token) {
    double greatest = (double)logits[argmax(logits)], sum = 0;
    for (uint32_t i = 0; i < VOCAB; i++)
        sum += exp((double)logits[i] - greatest);
    return (double)logits[token] - greatest - log(sum);
}

/* The logits of every position of a prompt and what was generated from it; free the response. */
static const float *forward_over(struct service *service, const uint32_t *prompt, size_t count,
                                 const struct generation *generation, Moed__V1__ForwardResponse **response) {
    uint32_t ids[CONTEXT];
    struct sequences sequences;
    size_t total = count + generation->count - 1;
    assert_true(total <= CONTEXT);
    memcpy(ids, prompt, count * sizeof *ids);
    memcpy(ids + count, generation->tokens, (generation->count - 1) * sizeof *ids);
    sequences_init(&sequences, ids, total);
    sequences.request.all_positions = true;
    *response = forward_run(service, &sequences);
    assert_int_equal((*response)->logits[0]->rows, total);
    assert_int_equal((*response)->logits[0]->n_values, total * VOCAB);
    return (*response)->logits[0]->values;
}

static void greedy_takes_the_greatest_logit(void **state) {
    struct service *service = *state;
    uint64_t random = random_seed();
    for (unsigned round = 0; round < 3; round++) {
        uint32_t ids[40];
        size_t count = 1 + random_next(&random) % 40;
        random_ids(&random, ids, count);
        struct prompt prompt;
        struct generation generation;
        prompt_init(&prompt, ids, count, 20);
        generation_run(service, &generation, &prompt);
        assert_int_equal(generation.count, 20);
        assert_int_equal(generation.last->finish_reason, MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
        assert_string_equal(generation.last->timing->worker, "w0");
        assert_true(generation.last->timing->total_ns > 0);

        Moed__V1__ForwardResponse *response;
        const float *logits = forward_over(service, ids, count, &generation, &response);
        for (size_t i = 0; i < generation.count; i++)
            assert_int_equal(generation.tokens[i], argmax(logits + (count - 1 + i) * VOCAB));
        rpc_message_free(&response->base);
        generation_free(&generation);
    }
}

static void a_seed_gives_the_same_tokens_again(void **state) {
    struct service *service = *state;
    uint32_t ids[] = {5, 4, 3, 2, 1};
    struct prompt prompt;
    struct generation first, second, other, fresh;
    prompt_init(&prompt, ids, 5, 32);
    prompt.sampling.temperature = 1.5f;
    prompt.sampling.top_p = 0.98f;
    prompt.sampling.repetition_penalty = 1.1f;
    prompt.sampling.frequency_penalty = 0.1f;
    prompt.request.logprobs = 2;
    prompt.sampling.seed = 1234567890123;
    generation_run(service, &first, &prompt);
    generation_run(service, &second, &prompt);
    assert_same_generation(&first, &second);
    prompt.sampling.seed++;
    generation_run(service, &other, &prompt);
    assert_memory_not_equal(first.tokens, other.tokens, 32 * sizeof *first.tokens);
    prompt.sampling.seed = 0;
    generation_run(service, &fresh, &prompt);
    generation_free(&second);
    generation_run(service, &second, &prompt);
    assert_memory_not_equal(fresh.tokens, second.tokens, 32 * sizeof *first.tokens);
    generation_free(&first);
    generation_free(&second);
    generation_free(&other);
    generation_free(&fresh);
}

static void logprobs_are_those_of_the_logits(void **state) {
    struct service *service = *state;
    uint32_t ids[] = {17, 100, 511, 0};
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, 4, 16);
    prompt.request.logprobs = 5;
    prompt.sampling.temperature = 2;
    prompt.sampling.seed = 99;
    generation_run(service, &generation, &prompt);
    Moed__V1__ForwardResponse *response;
    const float *logits = forward_over(service, ids, 4, &generation, &response);
    for (size_t i = 0; i < generation.count; i++) {
        const Moed__V1__TokenLogprobs *logprobs = generation.logprobs[i];
        const float *row = logits + (3 + i) * VOCAB;
        assert_non_null(logprobs);
        assert_float_equal(logprobs->logprob, log_probability(row, generation.tokens[i]), 1e-4);
        assert_int_equal(logprobs->n_top_ids, 5);
        assert_int_equal(logprobs->n_top_logprobs, 5);
        assert_int_equal(logprobs->top_ids[0], argmax(row));
        for (size_t j = 0; j < 5; j++) {
            assert_float_equal(logprobs->top_logprobs[j], log_probability(row, logprobs->top_ids[j]), 1e-4);
            assert_true(j == 0 || logprobs->top_logprobs[j] <= logprobs->top_logprobs[j - 1]);
        }
    }
    rpc_message_free(&response->base);
    generation_free(&generation);
}

static void ends_at_a_stop_token(void **state) {
    struct service *service = *state;
    uint32_t ids[] = {7, 8, 9};
    struct prompt prompt;
    struct generation whole, stopped;
    prompt_init(&prompt, ids, 3, 24);
    prompt.sampling.temperature = 3; /* so that tokens seldom repeat */
    prompt.sampling.seed = 3;
    generation_run(service, &whole, &prompt);
    uint32_t stops[] = {VOCAB - 1, whole.tokens[10]};
    size_t end = 0;
    while (whole.tokens[end] != stops[0] && whole.tokens[end] != stops[1])
        end++;
    prompt.request.stop_token_ids = stops;
    prompt.request.n_stop_token_ids = 2;
    generation_run(service, &stopped, &prompt);
    assert_int_equal(stopped.count, end + 1);
    assert_memory_equal(stopped.tokens, whole.tokens, stopped.count * sizeof *whole.tokens);
    assert_int_equal(stopped.last->finish_reason, MOED__V1__FINISH_REASON__FINISH_REASON_STOP);
    generation_free(&whole);
    generation_free(&stopped);
}

static void ends_at_the_models_end_token(void **state) {
    struct service *service = *state;
    Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
    struct status status;
    Moed__V1__Model *model = (Moed__V1__Model *)service_call(service, &method_get_model, &request.base, &status);
    assert_non_null(model);
    assert_int_equal(model->vocab_size, VOCAB);
    assert_int_equal(model->context_length, CONTEXT);
    uint32_t eos = model->eos_token_id;
    rpc_message_free(&model->base);
    assert_true(eos < VOCAB);

    /* Draws until one seed gives the end token early: a very high temperature makes all tokens likely. */
    uint32_t ids[] = {1};
    struct prompt prompt;
    prompt_init(&prompt, ids, 1, 250);
    prompt.sampling.temperature = 50;
    for (prompt.sampling.seed = 1; prompt.sampling.seed < 100; prompt.sampling.seed++) {
        struct generation whole, ended;
        prompt.request.ignore_eos = true;
        generation_run(service, &whole, &prompt);
        assert_int_equal(whole.count, 250);
        size_t end = 0;
        while (end < whole.count && whole.tokens[end] != eos)
            end++;
        bool found = end < whole.count - 1;
        if (found) {
            prompt.request.ignore_eos = false;
            generation_run(service, &ended, &prompt);
            assert_int_equal(ended.count, end + 1);
            assert_int_equal(ended.last->finish_reason, MOED__V1__FINISH_REASON__FINISH_REASON_STOP);
            generation_free(&ended);
        }
        generation_free(&whole);
        if (found)
            return;
    }
    fail_msg("no seed gave the end token");
}

/* The last token comes from the last position of the context, and needs none itself. */
static void ends_with_the_context(void **state) {
    struct service *service = *state;
    uint64_t random = random_seed();
    uint32_t ids[CONTEXT];
    random_ids(&random, ids, CONTEXT);
    static const struct {
        size_t count;
        uint32_t max_tokens, tokens;
    } cases[] = {{CONTEXT - 6, 0, 7}, {CONTEXT - 6, 1000, 7}, {CONTEXT - 6, 6, 6}, {CONTEXT, 0, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct prompt prompt;
        struct generation generation;
        prompt_init(&prompt, ids, cases[i].count, cases[i].max_tokens);
        generation_run(service, &generation, &prompt);
        assert_int_equal(generation.count, cases[i].tokens);
        assert_int_equal(generation.last->finish_reason, MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
        generation_free(&generation);
    }
}

/* Many streams at once, of all kinds, have the very bits each of them has alone. */
static void concurrent_streams_are_the_same_as_alone(void **state) {
    struct service *service = *state;
    enum { STREAMS = 24 };
    uint64_t random = random_seed();
    static uint32_t ids[STREAMS][120];
    static struct prompt prompts[STREAMS];
    static struct generation together[STREAMS];
    for (size_t i = 0; i < STREAMS; i++) {
        size_t count = 1 + random_next(&random) % 120;
        random_ids(&random, ids[i], count);
        prompt_init(&prompts[i], ids[i], count, 1 + (uint32_t)(random_next(&random) % 40));
        prompts[i].request.logprobs = (uint32_t)(random_next(&random) % 4);
        if (i % 2) {
            prompts[i].sampling.temperature = 1;
            prompts[i].sampling.seed = 1 + random_next(&random) % 1000;
            prompts[i].sampling.top_k = (uint32_t)(random_next(&random) % 50);
            prompts[i].sampling.min_p = 0.01f;
            prompts[i].sampling.presence_penalty = 0.3f;
        }
        generation_start(service, &together[i], &prompts[i], RPC_FOREVER);
    }
    struct sequences sequences;
    sequences_init(&sequences, ids[0], 50); /* a Forward among them */
    Moed__V1__ForwardResponse *busy = forward_run(service, &sequences);
    for (size_t i = 0; i < STREAMS; i++) {
        generation_finish(service, &together[i]);
        assert_int_equal(together[i].status.code, STATUS_OK);
        assert_int_equal(together[i].count, prompts[i].request.max_tokens);
    }
    for (size_t i = 0; i < STREAMS; i++) {
        struct generation alone;
        generation_run(service, &alone, &prompts[i]);
        assert_same_generation(&alone, &together[i]);
        generation_free(&alone);
        generation_free(&together[i]);
    }
    Moed__V1__ForwardResponse *idle = forward_run(service, &sequences);
    assert_memory_equal(busy->logits[0]->values, idle->logits[0]->values, VOCAB * sizeof(float));
    rpc_message_free(&busy->base);
    rpc_message_free(&idle->base);
    service_wait_idle(service);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_greatest_logit),
        cmocka_unit_test(a_seed_gives_the_same_tokens_again),
        cmocka_unit_test(logprobs_are_those_of_the_logits),
        cmocka_unit_test(ends_at_a_stop_token),
        cmocka_unit_test(ends_at_the_models_end_token),
        cmocka_unit_test(ends_with_the_context),
        cmocka_unit_test(concurrent_streams_are_the_same_as_alone),
    };
    return cmocka_run_group_tests(tests, service_setup, service_teardown);
}
