/* worker/request.c: every field is checked, and errors name it, what it held and what is allowed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <math.h>

#include "worker/model.h"
#include "worker/request.h"

typedef Moed__Worker__V1__GenerateWork GenerateWork;

enum { VOCAB = 100, CONTEXT = 64, EOS = 42 };

static const struct request_limits limits = {.vocab_size = VOCAB,
                                             .block_count = 48,
                                             .expert_count = 128,
                                             .expert_used_count = 8,
                                             .context_length = CONTEXT,
                                             .eos = EOS};
static uint32_t prompt[CONTEXT + 1];

static GenerateWork good_work(Moed__V1__Sampling *sampling) {
    GenerateWork work = MOED__WORKER__V1__GENERATE_WORK__INIT;
    moed__v1__sampling__init(sampling);
    work.id = 5;
    work.tokens = prompt;
    work.n_tokens = 10;
    work.sampling = sampling;
    return work;
}

static void assert_refused(const GenerateWork *work, const char *first, const char *second) {
    struct request *request;
    struct status status = {0};
    assert_int_equal(request_from_generate(work, &limits, &request, &status), -1);
    assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
    if (!strstr(status.message, first) || !strstr(status.message, second))
        fail_msg("\"%s\" names not both \"%s\" and \"%s\"", status.message, first, second);
}

static struct request *assert_taken(const GenerateWork *work) {
    struct request *request;
    struct status status = {0};
    if (request_from_generate(work, &limits, &request, &status) != 0)
        fail_msg("%s", status.message);
    return request;
}

static void test_generate(void **state) {
    (void)state;
    Moed__V1__Sampling sampling;
    GenerateWork work = good_work(&sampling);
    uint32_t stop[2] = {3, 4};
    work.generated = 4;
    work.max_tokens = 9;
    work.stop_token_ids = stop;
    work.n_stop_token_ids = 2;
    work.credit = 7;
    work.priority = -3;
    sampling.temperature = 0.5f;
    sampling.top_p = 1;
    sampling.presence_penalty = -2;
    struct request *request = assert_taken(&work);
    const struct sequence *sequence = &request->sequences[0];
    assert_int_equal(request->id, 5);
    assert_int_equal(request->sequence_count, 1);
    assert_null(request->forward);
    assert_int_equal(sequence->token_count, 10);
    assert_int_equal(sequence->prompt_length, 6);
    assert_int_equal(sequence->longest, 15); /* 9 from the prompt's end */
    assert_int_equal(sequence->eos, EOS);
    assert_int_equal(sequence->stop_count, 2);
    assert_true(sequence->credit_limited && sequence->credit == 7);
    assert_int_equal(sequence->priority, -3);
    assert_true(sequence->sampling.presence_penalty == -2);
    request_destroy(request);

    work.max_tokens = UINT32_MAX;
    work.ignore_eos = true;
    work.credit = 0;
    work.sampling = NULL;
    work.n_tokens = CONTEXT;
    request = assert_taken(&work);
    assert_int_equal(request->sequences[0].longest, CONTEXT + 1);
    assert_int_equal(request->sequences[0].eos, MODEL_EOS_NONE);
    assert_false(request->sequences[0].credit_limited);
    request_destroy(request);
}

static void test_generate_refused(void **state) {
    (void)state;
    Moed__V1__Sampling sampling;
    GenerateWork work = good_work(&sampling);
    uint32_t ids[REQUEST_STOP_IDS_MAX + 1] = {0}, bad_prompt[3] = {1, VOCAB, 2};
    work.n_tokens = 0;
    assert_refused(&work, "tokens", "empty");
    work.n_tokens = CONTEXT + 1;
    assert_refused(&work, "65 tokens", "64");
    work.tokens = bad_prompt;
    work.n_tokens = 3;
    assert_refused(&work, "tokens[1]", "100");
    work = good_work(&sampling);
    work.generated = 10;
    assert_refused(&work, "generated", "10");
    work.generated = 5;
    work.max_tokens = 5;
    assert_refused(&work, "max_tokens", "5");
    work = good_work(&sampling);
    work.stop_token_ids = ids;
    work.n_stop_token_ids = REQUEST_STOP_IDS_MAX + 1;
    assert_refused(&work, "stop_token_ids", "1024");
    ids[1] = UINT32_MAX;
    work.n_stop_token_ids = 2;
    assert_refused(&work, "stop_token_ids[1]", "4294967295");
    work = good_work(&sampling);
    work.logprobs = 21;
    assert_refused(&work, "logprobs", "20");
}

static void test_sampling_refused(void **state) {
    (void)state;
    Moed__V1__Sampling sampling;
    const struct {
        const char *name;
        size_t offset;
        bool negative, above_one; /* allowed */
    } fields[] = {
        {"sampling.temperature", offsetof(Moed__V1__Sampling, temperature), false, true},
        {"sampling.top_p", offsetof(Moed__V1__Sampling, top_p), false, false},
        {"sampling.min_p", offsetof(Moed__V1__Sampling, min_p), false, false},
        {"sampling.repetition_penalty", offsetof(Moed__V1__Sampling, repetition_penalty), false, true},
        {"sampling.presence_penalty", offsetof(Moed__V1__Sampling, presence_penalty), true, true},
        {"sampling.frequency_penalty", offsetof(Moed__V1__Sampling, frequency_penalty), true, true},
    };
    const struct {
        float value;
        bool negative, above_one;
        const char *text;
    } values[] = {{NAN, false, false, "nan"},      {INFINITY, false, false, "inf"}, {-INFINITY, false, false, "-inf"},
                  {-0.5f, true, false, "-0.5"},    {1.5f, false, true, "1.5"},      {-1e-30f, true, false, "-1e-30"},
                  {1.0001f, false, true, "1.0001"}};
    for (size_t field = 0; field < sizeof(fields) / sizeof(fields[0]); field++)
        for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++) {
            GenerateWork work = good_work(&sampling);
            memcpy((char *)&sampling + fields[field].offset, &values[i].value, sizeof(float));
            if ((values[i].negative && fields[field].negative) || (values[i].above_one && fields[field].above_one))
                request_destroy(assert_taken(&work));
            else
                assert_refused(&work, fields[field].name, values[i].text);
        }
}

static void assert_forward(Moed__V1__ForwardRequest *message, enum status_code code, const char *text) {
    struct request *request;
    struct status status = {0};
    Moed__Worker__V1__ForwardWork work = MOED__WORKER__V1__FORWARD_WORK__INIT;
    work.request = message;
    int result = request_from_forward(&work, &limits, &request, &status);
    assert_int_equal(result, code == STATUS_OK ? 0 : -1);
    if (result == 0) {
        request_destroy(request);
        return;
    }
    assert_int_equal(status.code, code);
    if (!strstr(status.message, text))
        fail_msg("\"%s\" does not name \"%s\"", status.message, text);
}

static void test_forward(void **state) {
    (void)state;
    enum { MANY = REQUEST_SEQUENCES_MAX + 1 };
    Moed__V1__Tokens tokens = MOED__V1__TOKENS__INIT;
    Moed__V1__Tokens **pointers = calloc(MANY, sizeof(*pointers));
    Moed__V1__ForwardRequest message = MOED__V1__FORWARD_REQUEST__INIT;
    for (int i = 0; i < MANY; i++)
        pointers[i] = &tokens;
    assert_forward(NULL, STATUS_INVALID_ARGUMENT, "sequences: empty");
    assert_forward(&message, STATUS_INVALID_ARGUMENT, "sequences: empty");
    message.sequences = pointers;
    message.n_sequences = 2;
    assert_forward(&message, STATUS_INVALID_ARGUMENT, "sequences[0].ids: empty");
    tokens.ids = prompt;
    tokens.n_ids = CONTEXT + 1;
    assert_forward(&message, STATUS_INVALID_ARGUMENT, "65 tokens");
    tokens.n_ids = CONTEXT;
    prompt[7] = VOCAB;
    assert_forward(&message, STATUS_INVALID_ARGUMENT, "sequences[0].ids[7]: token 100");
    prompt[7] = 0;
    message.top_logits = VOCAB + 1;
    assert_forward(&message, STATUS_INVALID_ARGUMENT, "top_logits: 101");
    message.top_logits = VOCAB;
    message.all_positions = message.expert_routes = true;
    assert_forward(&message, STATUS_OK, "");
    message.n_sequences = MANY - 1; /* 4096 * 64 * (100 * 5 + 48 * 8 * 5) bytes */
    assert_forward(&message, STATUS_RESOURCE_EXHAUSTED, "bytes");
    message.n_sequences = MANY;
    assert_forward(&message, STATUS_INVALID_ARGUMENT, "sequences: 4097");
    free(pointers);
}

/* forward_bytes is never less than what is packed. */
static void test_forward_bytes(void **state) {
    (void)state;
    for (int variant = 0; variant < 8; variant++) {
        uint32_t lengths[3] = {1, 64, 17};
        const struct forward_shape shape = {.vocab_size = VOCAB,
                                            .block_count = 48,
                                            .expert_count = 128,
                                            .expert_used_count = 8,
                                            .all_positions = variant & 1,
                                            .routes = variant & 2,
                                            .top_logits = variant & 4 ? 9 : 0,
                                            .sequence_count = 3,
                                            .lengths = lengths};
        struct forward *forward;
        struct status status;
        float logits[VOCAB];
        uint32_t experts[48 * 8];
        float weights[48 * 8] = {0};
        for (uint32_t i = 0; i < VOCAB; i++)
            logits[i] = (float)i; /* the greatest ids come first */
        for (uint32_t i = 0; i < 48 * 8; i++)
            experts[i] = 127;
        assert_int_equal(forward_create(&shape, &forward, &status), 0);
        for (uint32_t sequence = 0; sequence < 3; sequence++)
            for (uint32_t position = 0; position < lengths[sequence]; position++) {
                forward_take_logits(forward, sequence, position, logits);
                if (shape.routes)
                    forward_take_routes(forward, sequence, position, 1, experts, weights);
            }
        ProtobufCBinaryData packed;
        assert_int_equal(forward_pack(forward, &packed), 0);
        uint64_t bound = forward_bytes(&shape);
        assert_true(packed.len <= bound && packed.len * 2 + 600 > bound);
        free(packed.data);
        forward_destroy(forward);
    }
}

/* Random bytes that happen to be messages: taken or refused, without leaks or reads out of bounds. */
static void test_random_messages(void **state) {
    (void)state;
    uint64_t random = (uint64_t)time(NULL);
    unsigned char bytes[64];
    unsigned unpacked = 0;
    printf("# seed %llu\n", (unsigned long long)random);
    for (int i = 0; i < 200000; i++) {
        size_t size = (size_t)i % sizeof(bytes);
        for (size_t j = 0; j < size; j++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            bytes[j] = (unsigned char)(random >> 56) & (j % 2 ? 0xff : 0x3f);
        }
        struct request *request;
        struct status status;
        GenerateWork *generate = moed__worker__v1__generate_work__unpack(NULL, size, bytes);
        if (generate && ++unpacked && request_from_generate(generate, &limits, &request, &status) == 0)
            request_destroy(request);
        moed__worker__v1__generate_work__free_unpacked(generate, NULL);
        Moed__Worker__V1__ForwardWork *forward = moed__worker__v1__forward_work__unpack(NULL, size, bytes);
        if (forward && ++unpacked && request_from_forward(forward, &limits, &request, &status) == 0)
            request_destroy(request);
        moed__worker__v1__forward_work__free_unpacked(forward, NULL);
    }
    assert_true(unpacked > 1000);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_generate),      cmocka_unit_test(test_generate_refused),
        cmocka_unit_test(test_sampling_refused), cmocka_unit_test(test_forward),
        cmocka_unit_test(test_forward_bytes), cmocka_unit_test(test_random_messages),
    };
    return cmocka_run_group_tests_name("request", tests, NULL, NULL);
}
