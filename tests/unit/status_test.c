#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "common/status.h"

static void sets_code_and_message(void **state) {
    struct status status = {0};
    assert_int_equal(status_set(&status, STATUS_NOT_FOUND, "%s has %d", "x", 7), -1);
    assert_int_equal(status.code, STATUS_NOT_FOUND);
    assert_string_equal(status.message, "x has 7");
}

static void takes_no_status(void **state) {
    assert_int_equal(status_set(NULL, STATUS_INTERNAL, "lost"), -1);
    assert_int_equal(status_prefix(NULL, "lost"), -1);
}

static void prefixes(void **state) {
    struct status status = {0};
    status_set(&status, STATUS_INTERNAL, "inner");
    assert_int_equal(status_prefix(&status, "outer %d", 1), -1);
    assert_string_equal(status.message, "outer 1: inner");
    assert_int_equal(status.code, STATUS_INTERNAL);
}

static void cuts_to_fit(void **state) {
    char text[2 * sizeof((struct status){0}.message)];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    struct status status = {0};
    status_set(&status, STATUS_INTERNAL, "%s", text);
    assert_int_equal(strlen(status.message), sizeof status.message - 1);
    status_prefix(&status, "%s", "p");
    assert_int_equal(strlen(status.message), sizeof status.message - 1);
    assert_memory_equal(status.message, "p: aaa", 6);
    status_prefix(&status, "%s", text);
    assert_int_equal(strlen(status.message), sizeof status.message - 1);
}

static void names_codes(void **state) {
    assert_string_equal(status_code_name(STATUS_OK), "OK");
    assert_string_equal(status_code_name(STATUS_RESOURCE_EXHAUSTED), "RESOURCE_EXHAUSTED");
    assert_string_equal(status_code_name(STATUS_UNAUTHENTICATED), "UNAUTHENTICATED");
    assert_string_equal(status_code_name(17), "UNKNOWN");
    assert_string_equal(status_code_name(-1), "UNKNOWN");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sets_code_and_message), cmocka_unit_test(takes_no_status), cmocka_unit_test(prefixes),
        cmocka_unit_test(cuts_to_fit),           cmocka_unit_test(names_codes),
    };
    return cmocka_run_group_tests_name("status", tests, NULL, NULL);
}
