#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/json.h"
#include "moed.pb-c.h"

static void assert_json(const ProtobufCMessage *message, const char *expected) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    json_print_line(out, message);
    assert_int_equal(fclose(out), 0);
    assert_string_equal(text, expected);
    free(text);
}

static void every_scalar_is_printed_and_no_absent_message(void **state) {
    Moed__V1__GenerateResponse response = MOED__V1__GENERATE_RESPONSE__INIT;
    assert_json(&response.base, "{\"token_ids\":[],\"text\":\"\",\"logprobs\":[],"
                                "\"finish_reason\":\"FINISH_REASON_UNSPECIFIED\"}\n");

    uint32_t ids[] = {0, 4294967295};
    Moed__V1__Usage usage = MOED__V1__USAGE__INIT;
    usage.prompt_tokens = 3;
    response.token_ids = ids;
    response.n_token_ids = 2;
    response.finish_reason = MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH;
    response.usage = &usage;
    assert_json(&response.base, "{\"token_ids\":[0,4294967295],\"text\":\"\",\"logprobs\":[],"
                                "\"finish_reason\":\"FINISH_REASON_LENGTH\","
                                "\"usage\":{\"prompt_tokens\":3,\"cached_tokens\":0,\"completion_tokens\":0}}\n");
}

static void numbers_keep_their_value(void **state) {
    Moed__V1__Worker worker = MOED__V1__WORKER__INIT;
    worker.id = "w\"0\\\n\x01";
    worker.state = (Moed__V1__Worker__State)77; /* a newer gateway's */
    worker.generated_tokens = UINT64_MAX;
    assert_json(&worker.base,
                "{\"id\":\"w\\\"0\\\\\\u000a\\u0001\",\"backend\":\"\",\"device\":\"\",\"state\":77,\"running\":0,"
                "\"waiting\":0,\"kv_blocks_total\":0,\"kv_blocks_free\":0,\"memory_used_bytes\":0,"
                "\"memory_total_bytes\":0,\"last_step_age_ns\":0,\"generated_tokens\":18446744073709551615}\n");

    Moed__V1__GenerateRequest request = MOED__V1__GENERATE_REQUEST__INIT;
    char *stop[] = {"a", "b"};
    request.stop = stop;
    request.n_stop = 2;
    request.ignore_eos = 1;
    request.priority = INT32_MIN;
    assert_json(&request.base, "{\"request_id\":\"\",\"text\":\"\",\"max_tokens\":0,\"stop_token_ids\":[],"
                               "\"stop\":[\"a\",\"b\"],\"ignore_eos\":true,\"logprobs\":0,\"priority\":-2147483648}\n");
}

static void floats_come_back_exactly(void **state) {
    float values[] = {0.1f, -0.0f, FLT_MIN, FLT_TRUE_MIN, FLT_MAX, 16777217.0f, NAN, INFINITY, -INFINITY};
    enum { COUNT = sizeof values / sizeof *values, FINITE = COUNT - 3 };
    Moed__V1__TokenLogprobs logprobs = MOED__V1__TOKEN_LOGPROBS__INIT;
    logprobs.top_logprobs = values;
    logprobs.n_top_logprobs = COUNT;

    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    json_print_line(out, &logprobs.base);
    fclose(out);
    char *at = strstr(text, "\"top_logprobs\":[");
    assert_non_null(at);
    at += strlen("\"top_logprobs\":[");
    for (size_t i = 0; i < FINITE; i++) {
        float value = strtof(at, &at);
        assert_memory_equal(&value, &values[i], sizeof value);
        assert_int_equal(*at++, ',');
    }
    assert_string_equal(at, "null,null,null]}\n");
    free(text);
}

static void messages_nest(void **state) {
    uint32_t experts[] = {3, 1};
    float weights[] = {0.75f, 0.25f};
    Moed__V1__ExpertRoutes routes = MOED__V1__EXPERT_ROUTES__INIT;
    routes.experts = experts;
    routes.n_experts = 2;
    routes.weights = weights;
    routes.n_weights = 2;
    Moed__V1__ExpertRoutes *list[] = {&routes, &routes};
    Moed__V1__ForwardResponse response = MOED__V1__FORWARD_RESPONSE__INIT;
    response.routes = list;
    response.n_routes = 2;
    assert_json(&response.base, "{\"logits\":[],\"routes\":[{\"experts\":[3,1],\"weights\":[0.75,0.25]},"
                                "{\"experts\":[3,1],\"weights\":[0.75,0.25]}]}\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_scalar_is_printed_and_no_absent_message),
        cmocka_unit_test(numbers_keep_their_value),
        cmocka_unit_test(floats_come_back_exactly),
        cmocka_unit_test(messages_nest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
