#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <cmocka.h>

#include "common/clock.h"

static void goes_forward_in_nanoseconds(void **state) {
    struct timespec pause = {.tv_nsec = 20000000};
    uint64_t before = clock_now_ns();
    nanosleep(&pause, NULL);
    uint64_t passed = clock_now_ns() - before;
    assert_in_range(passed, 20000000, 60000000000);
    for (int i = 0; i < 1000; i++) {
        before = clock_now_ns();
        assert_true(clock_now_ns() >= before);
    }
}

/* Each bit is 0 and 1 at least once in 64 draws, but for one run in 2^57. */
static void draws_all_bits(void **state) {
    uint64_t seen = 0, missed = 0;
    for (int i = 0; i < 64; i++) {
        uint64_t bits = clock_random_u64();
        seen |= bits;
        missed |= ~bits;
    }
    assert_int_equal(seen, UINT64_MAX);
    assert_int_equal(missed, UINT64_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(goes_forward_in_nanoseconds),
        cmocka_unit_test(draws_all_bits),
    };
    return cmocka_run_group_tests_name("clock", tests, NULL, NULL);
}
