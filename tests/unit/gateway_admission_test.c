#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/admission.h"

static void bounds_requests_and_tokens(void **state) {
    struct status status = {0};
    struct admission *admission = admission_create(2, 100);
    assert_int_equal(admission_enter(admission, 60, NULL), 0);
    assert_int_equal(admission_enter(admission, 41, &status), -1);
    assert_int_equal(status.code, STATUS_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(status.message, "41 tokens while 60 are in flight; at most 100"));
    assert_int_equal(admission_requests(admission), 1); /* the refused one has left no trace */
    assert_int_equal(admission_enter(admission, 40, NULL), 0);
    assert_int_equal(admission_enter(admission, 0, &status), -1);
    assert_int_equal(status.code, STATUS_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(status.message, "2 requests are in flight; at most 2"));
    admission_leave(admission, 60);
    assert_int_equal(admission_enter(admission, UINT64_MAX, &status), -1); /* does not wrap */
    assert_int_equal(admission_enter(admission, 60, NULL), 0);
    admission_destroy(admission);
}

static void refuses_all_while_draining(void **state) {
    struct status status = {0};
    struct admission *admission = admission_create(10, 100);
    assert_int_equal(admission_enter(admission, 1, NULL), 0);
    assert_false(admission_draining(admission));
    admission_drain(admission);
    assert_true(admission_draining(admission));
    assert_int_equal(admission_enter(admission, 1, &status), -1);
    assert_int_equal(status.code, STATUS_UNAVAILABLE);
    assert_int_equal(admission_requests(admission), 1);
    admission_leave(admission, 1);
    assert_int_equal(admission_requests(admission), 0);
    admission_destroy(admission);
}

enum { THREADS = 4, ROUNDS = 20000, LIMIT = 3 };

static void *enter_and_leave(void *argument) {
    struct admission *admission = argument;
    for (int i = 0; i < ROUNDS; i++) {
        if (admission_enter(admission, 7, NULL))
            continue;
        if (admission_requests(admission) > LIMIT)
            return "more than the limit";
        admission_leave(admission, 7);
    }
    return NULL;
}

static void holds_under_threads(void **state) {
    struct admission *admission = admission_create(LIMIT, 7 * LIMIT);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, enter_and_leave, admission), 0);
    for (int i = 0; i < THREADS; i++) {
        void *failure;
        pthread_join(threads[i], &failure);
        assert_null(failure);
    }
    assert_int_equal(admission_requests(admission), 0);
    assert_int_equal(admission_enter(admission, 7 * LIMIT, NULL), 0); /* all tokens were paid back */
    admission_destroy(admission);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bounds_requests_and_tokens),
        cmocka_unit_test(refuses_all_while_draining),
        cmocka_unit_test(holds_under_threads),
    };
    return cmocka_run_group_tests_name("gateway_admission", tests, NULL, NULL);
}
