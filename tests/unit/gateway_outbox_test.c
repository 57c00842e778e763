#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "common/clock.h"
#include "gateway/outbox.h"

static Moed__V1__TokenLogprobs *new_logprobs(float value) {
    Moed__V1__TokenLogprobs *logprobs = malloc(sizeof *logprobs);
    assert_non_null(logprobs);
    moed__v1__token_logprobs__init(logprobs);
    logprobs->logprob = value;
    return logprobs;
}

static void keeps_order_across_the_end(void **state) {
    struct outbox outbox = {0};
    uint64_t seed = clock_random_u64();
    print_message("# seed %llu\n", (unsigned long long)seed);
    srand((unsigned)seed);
    uint32_t pushed = 0, taken = 0;
    for (int round = 0; round < 1000; round++) {
        uint32_t ids[OUTBOX_TOKENS], count = (uint32_t)rand() % OUTBOX_TOKENS;
        for (uint32_t i = 0; i < count; i++)
            ids[i] = pushed + i;
        if (count <= OUTBOX_TOKENS - outbox.count) {
            assert_int_equal(outbox_push(&outbox, ids, NULL, count), 0);
            pushed += count;
        } else {
            assert_int_equal(outbox_push(&outbox, ids, NULL, count), -1);
        }
        if (rand() % 3 == 0) {
            Moed__V1__TokenLogprobs *logprobs[OUTBOX_TOKENS];
            uint32_t got = outbox_take(&outbox, ids, logprobs);
            assert_int_equal(outbox.count, 0);
            for (uint32_t i = 0; i < got; i++) {
                assert_int_equal(ids[i], taken++);
                assert_null(logprobs[i]);
            }
        }
    }
    assert_int_equal(pushed, taken + outbox.count);
    assert_true(taken > OUTBOX_TOKENS);
}

static void takes_logprobs_over(void **state) {
    struct outbox outbox = {0};
    uint32_t ids[OUTBOX_TOKENS] = {1, 2};
    Moed__V1__TokenLogprobs *logprobs[OUTBOX_TOKENS] = {new_logprobs(-1), new_logprobs(-2)};
    assert_int_equal(outbox_push(&outbox, ids, logprobs, 2), 0);
    assert_null(logprobs[0]);
    assert_null(logprobs[1]);
    assert_int_equal(outbox_take(&outbox, ids, logprobs), 2);
    assert_true(logprobs[0]->logprob == -1 && logprobs[1]->logprob == -2);
    assert_int_equal(outbox_push(&outbox, ids, logprobs, 2), 0);
    outbox_clear(&outbox); /* frees them: a leak check would tell */
    assert_int_equal(outbox.count, 0);
}

static void refuses_more_than_it_holds(void **state) {
    struct outbox outbox = {0};
    uint32_t ids[OUTBOX_TOKENS + 1] = {0};
    Moed__V1__TokenLogprobs *logprobs[OUTBOX_TOKENS];
    assert_int_equal(outbox_push(&outbox, ids, NULL, OUTBOX_TOKENS + 1), -1);
    assert_int_equal(outbox.count, 0);
    assert_int_equal(outbox_push(&outbox, ids, NULL, OUTBOX_TOKENS), 0);
    assert_int_equal(outbox_push(&outbox, ids, NULL, 1), -1);
    assert_int_equal(outbox_push(&outbox, ids, NULL, UINT32_MAX), -1);
    assert_int_equal(outbox_take(&outbox, ids, logprobs), OUTBOX_TOKENS);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_order_across_the_end),
        cmocka_unit_test(takes_logprobs_over),
        cmocka_unit_test(refuses_more_than_it_holds),
    };
    return cmocka_run_group_tests_name("gateway_outbox", tests, NULL, NULL);
}
