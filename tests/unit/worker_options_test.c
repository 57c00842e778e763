/* worker/options.c: what the command line says of the KV cache reaches the executor. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/options.h"

static int parse(const char *argument, struct executor_options *executor, struct status *status) {
    char *argv[] = {"moed-worker", "--model=m.gguf", (char *)argument, NULL};
    struct worker_options options;
    int result = worker_options_parse(3, argv, &options, status);
    worker_options_executor(&options, executor);
    worker_options_free(&options);
    return result;
}

static void test_kv_type(void **state) {
    struct executor_options executor;
    struct status status = {0};
    enum quant_type type;
    unsetenv("MOED_KV_TYPE"); /* as an option */
    assert_int_equal(parse("--kv-size=5", &executor, &status), OPTIONS_RUN);
    assert_int_equal(executor.kv_bytes, 5);
    assert_int_equal(executor_kv_type(&executor, &type, &status), 0);
    assert_int_equal(type, QUANT_F16);
    assert_int_equal(parse("--kv-type=f16", &executor, &status), OPTIONS_RUN);
    assert_int_equal(executor_kv_type(&executor, &type, &status), 0);
    assert_int_equal(type, QUANT_F16);
    assert_int_equal(parse("--kv-type=q8_0", &executor, &status), OPTIONS_RUN);
    assert_int_equal(executor_kv_type(&executor, &type, &status), 0);
    assert_int_equal(type, QUANT_Q8_0);
}

static void test_other_kv_types_are_refused(void **state) {
    struct executor_options executor;
    struct status status = {0};
    assert_int_equal(parse("--kv-type=q4_0", &executor, &status), -1);
    assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
    assert_non_null(strstr(status.message, "--kv-type"));
    assert_non_null(strstr(status.message, "q4_0"));
    assert_non_null(strstr(status.message, "f16"));
    assert_non_null(strstr(status.message, "q8_0"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kv_type),
        cmocka_unit_test(test_other_kv_types_are_refused),
    };
    return cmocka_run_group_tests_name("worker_options", tests, NULL, NULL);
}
