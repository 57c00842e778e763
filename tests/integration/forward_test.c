#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* What Forward returns: shapes, agreement of its options with each other, and the limit on its size. */

enum { VOCAB = 512, CONTEXT = 256 };

static Moed__V1__Model *get_model(struct service *service) {
    Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
    struct status status;
    ProtobufCMessage *response = service_call(service, &method_get_model, &request.base, &status);
    assert_non_null(response);
    return (Moed__V1__Model *)response;
}

static void model_is_described(void **state) {
    Moed__V1__Model *model = get_model(*state);
    assert_string_equal(model->architecture, "qwen3moe");
    assert_int_equal(strlen(model->fingerprint), 16);
    assert_int_equal(model->vocab_size, VOCAB);
    assert_int_equal(model->context_length, CONTEXT);
    assert_int_equal(model->block_count, 2);
    assert_true(model->expert_used_count > 0 && model->expert_used_count <= model->expert_count);
    assert_true(model->embedding_length > 0 && model->tensor_bytes > 0);
    rpc_message_free(&model->base);
}

/* A sequence's logits are the same bits alone, among others, at all positions or at the last. */
static void rows_agree(void **state) {
    struct service *service = *state;
    uint64_t random = random_seed();
    uint32_t ids[5][100];
    size_t counts[5];
    struct sequences all;
    for (size_t i = 0; i < 5; i++) {
        counts[i] = i == 0 ? 1 : 1 + random_next(&random) % 100;
        for (size_t j = 0; j < counts[i]; j++)
            ids[i][j] = (uint32_t)(random_next(&random) % VOCAB);
        if (i == 0)
            sequences_init(&all, ids[i], counts[i]);
        else
            sequences_add(&all, ids[i], counts[i]);
    }
    Moed__V1__ForwardResponse *last = forward_run(service, &all);
    all.request.all_positions = true;
    Moed__V1__ForwardResponse *every = forward_run(service, &all);
    assert_int_equal(last->n_logits, 5);
    assert_int_equal(every->n_logits, 5);
    assert_int_equal(last->n_routes, 0);
    for (size_t i = 0; i < 5; i++) {
        const Moed__V1__Logits *row = last->logits[i], *rows = every->logits[i];
        assert_int_equal(row->rows, 1);
        assert_int_equal(row->n_values, VOCAB);
        assert_int_equal(row->n_ids, 0);
        assert_int_equal(rows->rows, counts[i]);
        assert_int_equal(rows->n_values, counts[i] * VOCAB);
        assert_memory_equal(row->values, rows->values + (counts[i] - 1) * VOCAB, VOCAB * sizeof(float));
        for (size_t j = 0; j < rows->n_values; j++)
            assert_true(isfinite(rows->values[j]));

        struct sequences one;
        sequences_init(&one, ids[i], counts[i]);
        Moed__V1__ForwardResponse *alone = forward_run(service, &one);
        assert_memory_equal(row->values, alone->logits[0]->values, VOCAB * sizeof(float));
        rpc_message_free(&alone->base);
    }
    rpc_message_free(&last->base);
    rpc_message_free(&every->base);
}

static void top_logits_are_the_greatest(void **state) {
    struct service *service = *state;
    uint32_t ids[] = {1, 2, 3, 4, 5, 6, 7};
    struct sequences sequences;
    sequences_init(&sequences, ids, 7);
    sequences.request.all_positions = true;
    Moed__V1__ForwardResponse *all = forward_run(service, &sequences);
    static const uint32_t tops[] = {1, 10, VOCAB};
    for (size_t t = 0; t < 3; t++) {
        const size_t k = tops[t];
        sequences.request.top_logits = tops[t];
        Moed__V1__ForwardResponse *top = forward_run(service, &sequences);
        const Moed__V1__Logits *logits = top->logits[0];
        assert_int_equal(logits->rows, 7);
        assert_int_equal(logits->n_values, 7 * k);
        assert_int_equal(logits->n_ids, 7 * k);
        for (size_t row = 0; row < 7; row++) {
            const float *values = logits->values + row * k, *whole = all->logits[0]->values + row * VOCAB;
            const uint32_t *tokens = logits->ids + row * k;
            size_t greater = 0;
            for (size_t i = 0; i < k; i++) {
                assert_true(tokens[i] < VOCAB);
                assert_memory_equal(&values[i], &whole[tokens[i]], sizeof(float));
                assert_true(i == 0 || values[i] <= values[i - 1]);
            }
            for (size_t i = 0; i < VOCAB; i++)
                greater += whole[i] > values[k - 1];
            assert_true(greater < k);
        }
        rpc_message_free(&top->base);
    }
    rpc_message_free(&all->base);
}

static void routes_sum_to_one(void **state) {
    struct service *service = *state;
    Moed__V1__Model *model = get_model(service);
    const size_t used = model->expert_used_count, layers = model->block_count;
    uint32_t ids[] = {9, 8, 7, 6, 5}, more[] = {0, 511};
    struct sequences sequences;
    sequences_init(&sequences, ids, 5);
    sequences_add(&sequences, more, 2);
    sequences.request.expert_routes = true;
    Moed__V1__ForwardResponse *response = forward_run(service, &sequences);
    assert_int_equal(response->n_routes, 2);
    for (size_t i = 0; i < 2; i++) {
        const Moed__V1__ExpertRoutes *routes = response->routes[i];
        const size_t rows = layers * (i ? 2 : 5);
        assert_int_equal(routes->n_experts, rows * used);
        assert_int_equal(routes->n_weights, rows * used);
        for (size_t row = 0; row < rows; row++) {
            double sum = 0;
            for (size_t j = 0; j < used; j++) {
                const uint32_t expert = routes->experts[row * used + j];
                assert_true(expert < model->expert_count);
                for (size_t k = 0; k < j; k++)
                    assert_int_not_equal(expert, routes->experts[row * used + k]);
                sum += (double)routes->weights[row * used + j];
            }
            assert_float_equal(sum, 1, 1e-6);
        }
    }
    rpc_message_free(&response->base);
    rpc_message_free(&model->base);
}

static void too_large_an_answer_is_refused_with_its_size(void **state) {
    struct service *service = *state;
    const size_t count = 140; /* times 256 rows of 512 logits: 70 MiB */
    uint32_t ids[CONTEXT] = {0};
    static struct sequences sequences;
    sequences_init(&sequences, ids, CONTEXT);
    while (sequences.request.n_sequences < count)
        sequences_add(&sequences, ids, CONTEXT);
    sequences.request.all_positions = true;
    struct status status;
    assert_null(service_call(service, &method_forward, &sequences.request.base, &status));
    assert_int_equal(status.code, STATUS_RESOURCE_EXHAUSTED);
    unsigned long bytes = 0; /* the greatest number of the message */
    for (const char *at = status.message; *at; at++) {
        unsigned long number = strtoul(at, NULL, 10);
        bytes = number > bytes ? number : bytes;
    }
    if (bytes < count * CONTEXT * VOCAB * sizeof(float))
        fail_msg("no size in: %s", status.message);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(model_is_described),
        cmocka_unit_test(rows_agree),
        cmocka_unit_test(top_logits_are_the_greatest),
        cmocka_unit_test(routes_sum_to_one),
        cmocka_unit_test(too_large_an_answer_is_refused_with_its_size),
    };
    return cmocka_run_group_tests(tests, service_setup, service_teardown);
}
