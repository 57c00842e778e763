#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/inference_check.h"

static const struct fleet_limits limits = {.ready = true,
                                           .vocab_size = 1000,
                                           .context_length = 64,
                                           .block_count = 4,
                                           .expert_count = 8,
                                           .expert_used_count = 2};

static uint32_t prompt[65];
static Moed__V1__Tokens tokens;
static Moed__V1__Sampling sampling;
static Moed__V1__GenerateRequest generate;
static Moed__V1__ForwardRequest forward;

static int setup(void **state) {
    static Moed__V1__Tokens *sequences[1] = {&tokens};
    memset(prompt, 0, sizeof prompt);
    moed__v1__tokens__init(&tokens);
    tokens.ids = prompt;
    tokens.n_ids = 3;
    moed__v1__sampling__init(&sampling);
    moed__v1__generate_request__init(&generate);
    generate.tokens = &tokens;
    generate.sampling = &sampling;
    moed__v1__forward_request__init(&forward);
    forward.sequences = sequences;
    forward.n_sequences = 1;
    return 0;
}

/* The request is refused with INVALID_ARGUMENT and a message that has these words. */
static void assert_refused(const char *words) {
    struct status status = {0};
    assert_int_equal(inference_check_generate(&generate, &limits, &status), -1);
    assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
    if (!strstr(status.message, words))
        fail_msg("\"%s\" is not in \"%s\"", words, status.message);
}

static void assert_taken(void) {
    struct status status = {0};
    if (inference_check_generate(&generate, &limits, &status))
        fail_msg("refused: %s", status.message);
}

static void takes_what_is_allowed(void **state) {
    uint32_t stops[] = {0, 999};
    char id[REQUEST_ID_MAX + 1];
    assert_taken();
    memset(id, 'x', REQUEST_ID_MAX);
    id[REQUEST_ID_MAX] = '\0';
    generate.request_id = id;
    generate.logprobs = LOGPROBS_MAX;
    generate.n_stop_token_ids = 2;
    generate.stop_token_ids = stops;
    tokens.n_ids = 64;
    prompt[63] = 999;
    sampling.temperature = 1e6f;
    sampling.top_p = 1;
    sampling.min_p = 1;
    sampling.presence_penalty = -2;
    sampling.frequency_penalty = -2;
    sampling.repetition_penalty = 1.1f;
    assert_taken();
    generate.sampling = NULL;
    assert_taken();
}

static void refuses_bad_prompts(void **state) {
    tokens.n_ids = 0;
    assert_refused("tokens.ids: empty");
    generate.tokens = NULL;
    assert_refused("tokens.ids: empty");
    setup(NULL);
    tokens.n_ids = 65;
    assert_refused("tokens.ids: 65 tokens; the context holds 64");
    tokens.n_ids = 3;
    prompt[2] = 1000;
    assert_refused("tokens.ids[2]: 1000; 0 to 999");
}

static void refuses_what_is_not_supported(void **state) {
    char *stops[] = {"end"};
    generate.text = "hello";
    assert_refused("text: 5 bytes");
    setup(NULL);
    generate.stop = stops;
    generate.n_stop = 1;
    assert_refused("stop: 1 texts");
}

static void refuses_bad_fields(void **state) {
    char id[REQUEST_ID_MAX + 2];
    uint32_t stops[STOP_TOKENS_MAX + 1] = {5, 4000000000u};
    memset(id, 'x', sizeof id - 1);
    id[sizeof id - 1] = '\0';
    generate.request_id = id;
    assert_refused("request_id: 129 bytes; at most 128");
    setup(NULL);
    generate.stop_token_ids = stops;
    generate.n_stop_token_ids = 2;
    assert_refused("stop_token_ids[1]: 4000000000; 0 to 999");
    stops[1] = 0;
    generate.n_stop_token_ids = STOP_TOKENS_MAX + 1;
    assert_refused("stop_token_ids: 257; at most 256");
    setup(NULL);
    generate.logprobs = 21;
    assert_refused("logprobs: 21; at most 20");
}

static void refuses_bad_sampling(void **state) {
    const float never[] = {NAN, INFINITY, -INFINITY};
    const struct {
        float *field;
        const char *name;
        float too_low, too_high;
    } fields[] = {
        {&sampling.temperature, "sampling.temperature: ", -0.01f, NAN},
        {&sampling.top_p, "sampling.top_p: ", -0.01f, 1.01f},
        {&sampling.min_p, "sampling.min_p: ", -0.01f, 1.01f},
        {&sampling.repetition_penalty, "sampling.repetition_penalty: ", -1, NAN},
        {&sampling.presence_penalty, "sampling.presence_penalty: ", NAN, NAN},
        {&sampling.frequency_penalty, "sampling.frequency_penalty: ", NAN, NAN},
    };
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++) {
        for (size_t i = 0; i < 3; i++) {
            *fields[f].field = never[i];
            assert_refused(fields[f].name);
        }
        *fields[f].field = fields[f].too_low;
        assert_refused(fields[f].name);
        *fields[f].field = fields[f].too_high;
        assert_refused(fields[f].name);
        *fields[f].field = 0;
        assert_taken();
    }
}

static void assert_forward(int code, const char *words) {
    struct status status = {0};
    assert_int_equal(inference_check_forward(&forward, &limits, 100000, &status), code ? -1 : 0);
    assert_int_equal(status.code, code);
    if (!strstr(status.message, words))
        fail_msg("\"%s\" is not in \"%s\"", words, status.message);
}

static void checks_forward(void **state) {
    Moed__V1__Tokens *many[FORWARD_SEQUENCES_MAX + 1];
    assert_forward(0, "");
    forward.n_sequences = 0;
    assert_forward(STATUS_INVALID_ARGUMENT, "sequences: 0; 1 to 1024");
    for (size_t i = 0; i <= FORWARD_SEQUENCES_MAX; i++)
        many[i] = &tokens;
    forward.sequences = many;
    forward.n_sequences = FORWARD_SEQUENCES_MAX + 1;
    assert_forward(STATUS_INVALID_ARGUMENT, "sequences: 1025");
    forward.n_sequences = 2;
    tokens.n_ids = 0;
    assert_forward(STATUS_INVALID_ARGUMENT, "sequences[0].ids: empty");
    tokens.n_ids = 65;
    assert_forward(STATUS_INVALID_ARGUMENT, "sequences[0].ids: 65 tokens; the context holds 64");
    tokens.n_ids = 2;
    prompt[1] = 1000;
    assert_forward(STATUS_INVALID_ARGUMENT, "sequences[0].ids[1]: 1000");
    prompt[1] = 0;
    forward.top_logits = 1001;
    assert_forward(STATUS_INVALID_ARGUMENT, "top_logits: 1001; at most the vocabulary's 1000");
}

static void tells_the_size_of_an_answer_too_large(void **state) {
    tokens.n_ids = 30;
    assert_forward(0, "");
    forward.all_positions = true; /* 30 * 1000 * 4 bytes of logits, and a little */
    assert_forward(STATUS_RESOURCE_EXHAUSTED, "the answer would have 1202");
    forward.top_logits = 10;
    assert_forward(0, "");
}

/* The real answer never has more bytes than were foreseen, and not many less. */
static void foresees_the_size_of_an_answer(void **state) {
    float values[64 * 1000];
    uint32_t ids[64 * 1000], experts[64 * 4 * 2];
    for (size_t i = 0; i < 64 * 1000; i++) {
        values[i] = 1;
        ids[i] = 999;
    }
    for (size_t i = 0; i < 64 * 4 * 2; i++)
        experts[i] = 7;
    for (int variant = 0; variant < 8; variant++) {
        tokens.n_ids = 64;
        forward.all_positions = variant & 1;
        forward.top_logits = variant & 2 ? 20 : 0;
        forward.expert_routes = variant & 4;
        Moed__V1__Logits logits = MOED__V1__LOGITS__INIT;
        Moed__V1__ExpertRoutes routes = MOED__V1__EXPERT_ROUTES__INIT;
        logits.rows = variant & 1 ? 64 : 1;
        logits.n_values = logits.rows * (variant & 2 ? 20 : 1000);
        logits.values = values;
        logits.n_ids = variant & 2 ? logits.n_values : 0;
        logits.ids = ids;
        routes.n_experts = routes.n_weights = 64 * 4 * 2;
        routes.experts = experts;
        routes.weights = values;
        Moed__V1__ForwardResponse response = MOED__V1__FORWARD_RESPONSE__INIT;
        response.logits = (Moed__V1__Logits *[]){&logits};
        response.n_logits = 1;
        response.routes = (Moed__V1__ExpertRoutes *[]){&routes};
        response.n_routes = variant & 4 ? 1 : 0;
        size_t real = moed__v1__forward_response__get_packed_size(&response);
        uint64_t foreseen = inference_forward_bytes(&forward, &limits);
        assert_in_range(real, foreseen > 512 ? foreseen - 512 : 0, foreseen);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(takes_what_is_allowed, setup),
        cmocka_unit_test_setup(refuses_bad_prompts, setup),
        cmocka_unit_test_setup(refuses_what_is_not_supported, setup),
        cmocka_unit_test_setup(refuses_bad_fields, setup),
        cmocka_unit_test_setup(refuses_bad_sampling, setup),
        cmocka_unit_test_setup(checks_forward, setup),
        cmocka_unit_test_setup(tells_the_size_of_an_answer_too_large, setup),
        cmocka_unit_test_setup(foresees_the_size_of_an_answer, setup),
    };
    return cmocka_run_group_tests_name("gateway_check", tests, NULL, NULL);
}
