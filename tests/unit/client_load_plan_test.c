#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/load_plan.h"

static struct load_length length(const char *text) {
    struct load_length parsed;
    struct status status = {0};
    if (load_length_parse("output-tokens", text, &parsed, &status) < 0)
        fail_msg("%s", status.message);
    return parsed;
}

static struct load_mix mix_of(const char *prompt, const char *output) {
    return (struct load_mix){.seed = 42, .prefix_seed = 7, .vocab_size = 1000, .context_length = 4096,
                             .prompt = length(prompt), .output = length(output)};
}

static void parses_lengths(void **state) {
    struct load_length fixed = length("17"), range = length("3:9"), normal = length("lognormal:250.5:0.75");
    assert_true(fixed.kind == LENGTH_UNIFORM && fixed.min == 17 && fixed.max == 17);
    assert_true(range.kind == LENGTH_UNIFORM && range.min == 3 && range.max == 9);
    assert_true(normal.kind == LENGTH_LOGNORMAL && normal.mean == 250.5 && normal.sigma == 0.75);
}

static void refuses_lengths(void **state) {
    static const char *const texts[] = {
        "0", "-1", "+1", " 1", "1 ", "x", "1x", "1.5", "16777217", "99999999999999999999999", "0:5", "5:4", "5:", ":5",
        "1:2:3", "1:-2", "lognormal", "lognormal:", "lognormal:5", "lognormal:5:", "lognormal:0.5:1", "lognormal:5:-1",
        "lognormal:5:11", "lognormal:nan:1", "lognormal:inf:1", "lognormal:1e999:1", "lognormal:5:1:1",
        "lognormal:0x10:1", "normal:5:1",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct load_length parsed;
        struct status status = {0};
        if (load_length_parse("output-tokens", texts[i], &parsed, &status) == 0)
            fail_msg("taken: %s", texts[i]);
        assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
        assert_non_null(strstr(status.message, "option --output-tokens: \""));
        assert_non_null(strstr(status.message, texts[i]));
        assert_non_null(strstr(status.message, "is not N, MIN:MAX (tokens, 1 to 16777216) or lognormal:MEAN:SIGMA"));
    }
}

static void uniform_lengths_reach_both_ends(void **state) {
    struct load_mix mix = mix_of("3:9", "5");
    size_t counts[10] = {0};
    for (uint64_t i = 0; i < 7000; i++) {
        struct load_request request;
        load_mix_request(&mix, i, &request);
        assert_in_range(request.prompt_tokens, 3, 9);
        assert_int_equal(request.output_tokens, 5);
        assert_int_equal(request.index, i);
        counts[request.prompt_tokens]++;
    }
    for (size_t i = 3; i <= 9; i++)
        assert_in_range(counts[i], 850, 1150); /* 1000 and five times their deviation of 29 */
}

static void lognormal_lengths_have_their_moments(void **state) {
    enum { COUNT = 200000 };
    struct load_mix mix = mix_of("1", "lognormal:100:0.5");
    double sum = 0, logs = 0, squares = 0;
    for (uint64_t i = 0; i < COUNT; i++) {
        struct load_request request;
        load_mix_request(&mix, i, &request);
        double logarithm = log(request.output_tokens);
        sum += request.output_tokens;
        logs += logarithm;
        squares += logarithm * logarithm;
    }
    double mean = logs / COUNT;
    assert_true(fabs(sum / COUNT - 100) < 1);
    assert_true(fabs(mean - (log(100) - 0.125)) < 0.01);
    assert_true(fabs(sqrt(squares / COUNT - mean * mean) - 0.5) < 0.01);
}

static void lognormal_lengths_are_cut_to_the_context(void **state) {
    static const char *const pairs[][2] = {
        {"lognormal:3000:2", "lognormal:3000:2"}, {"4000", "lognormal:3000:2"}, {"lognormal:3000:2", "4000"}};
    for (size_t pair = 0; pair < sizeof pairs / sizeof *pairs; pair++) {
        struct load_mix mix = mix_of(pairs[pair][0], pairs[pair][1]);
        mix.shared_prefix = 100;
        assert_int_equal(load_mix_check(&mix, NULL, NULL), 0);
        for (uint64_t i = 0; i < 10000; i++) {
            struct load_request request;
            load_mix_request(&mix, i, &request);
            assert_true(request.prompt_tokens >= 1 && request.output_tokens >= 1);
            assert_true(request.prompt_tokens + request.output_tokens <= 4096);
            assert_true(request.shared_prefix <= request.prompt_tokens);
        }
    }
}

static void lengths_beyond_the_context_are_refused(void **state) {
    struct status status = {0};
    struct load_mix mix = mix_of("96", "2000:4000");
    assert_int_equal(load_mix_check(&mix, NULL, &status), 0);
    mix = mix_of("97", "2000:4000");
    assert_int_equal(load_mix_check(&mix, NULL, &status), -1);
    assert_string_equal(status.message, "--prompt-tokens and --output-tokens: up to 97 and 4000; the model's context "
                                        "holds 4096 together");
    mix = mix_of("lognormal:5:1", "4096");
    assert_int_equal(load_mix_check(&mix, NULL, &status), -1);

    struct load_trace_entry entries[] = {{0, 4000, 96, 0, 1, 0}, {0, 4000, 97, 0, 3, 0}};
    struct load_trace trace = {entries, 2};
    mix.trace = &trace;
    assert_int_equal(load_mix_check(&mix, "day.jsonl", &status), -1);
    assert_string_equal(status.message, "day.jsonl:3: prompt_tokens and output_tokens: 4000 and 97; the model's "
                                        "context holds 4096 together");
    trace.count = 1;
    assert_int_equal(load_mix_check(&mix, "day.jsonl", &status), 0);
}

static void prompts_follow_the_seed(void **state) {
    struct load_mix mix = mix_of("64", "1");
    struct load_request request;
    uint32_t a[64], b[64];
    mix.shared_prefix = 16;
    load_mix_request(&mix, 5, &request);
    load_mix_prompt(&mix, &request, a);
    load_mix_prompt(&mix, &request, b);
    assert_memory_equal(a, b, sizeof a);
    for (size_t i = 0; i < 64; i++)
        assert_in_range(a[i], 0, 999);

    /* Another request shares the prefix and nothing else; one chance in a thousand a token. */
    load_mix_request(&mix, 6, &request);
    load_mix_prompt(&mix, &request, b);
    assert_memory_equal(a, b, 16 * sizeof *a);
    size_t same = 0;
    for (size_t i = 16; i < 64; i++)
        same += a[i] == b[i];
    assert_in_range(same, 0, 3);

    /* So does one of another seed of the requests, but none of another prefix. */
    mix.seed = 43;
    load_mix_prompt(&mix, &request, a);
    assert_memory_equal(a, b, 16 * sizeof *a);
    assert_memory_not_equal(a + 16, b + 16, 48 * sizeof *a);
    request.prefix_id = 1;
    load_mix_prompt(&mix, &request, a);
    assert_memory_not_equal(a, b, 16 * sizeof *a);
}

static void poisson_arrivals_keep_their_rate(void **state) {
    enum { COUNT = 100000 };
    struct load_arrivals arrivals = {.kind = ARRIVALS_POISSON, .rate = 40, .seed = 3}, again = arrivals;
    struct load_arrivals other = {.kind = ARRIVALS_POISSON, .rate = 40, .seed = 4};
    double previous = 0, squares = 0, at, at_again, at_other;
    size_t same = 0;
    for (size_t i = 0; i < COUNT; i++) {
        assert_true(load_arrivals_next(&arrivals, &at) && load_arrivals_next(&again, &at_again) &&
                    load_arrivals_next(&other, &at_other));
        assert_true(at == at_again && at >= previous);
        same += at == at_other;
        squares += (at - previous) * (at - previous);
        previous = at;
    }
    assert_int_equal(same, 0);
    /* Exponential gaps: mean 1/40, mean square 2/40^2; within five deviations. */
    assert_true(fabs(at * 40 / COUNT - 1) < 5 / sqrt(COUNT));
    assert_true(fabs(squares * 800 / COUNT - 1) < 5 * sqrt(5.0 / COUNT));
}

static void constant_arrivals_are_even(void **state) {
    struct load_arrivals arrivals = {.kind = ARRIVALS_CONSTANT, .rate = 8};
    for (size_t i = 0; i < 1000; i++) {
        double at;
        assert_true(load_arrivals_next(&arrivals, &at));
        assert_true(at == (double)i / 8);
    }
}

static void traces_give_arrivals_and_lengths(void **state) {
    struct load_trace_entry entries[] = {{0, 10, 20, 5, 1, 9}, {2.5, 30, 40, 0, 2, 0}};
    struct load_trace trace = {entries, 2};
    struct load_arrivals arrivals = {.kind = ARRIVALS_TRACE, .trace = &trace};
    struct load_mix mix = mix_of("1", "1");
    struct load_request request;
    double at;
    mix.trace = &trace;
    assert_true(load_arrivals_next(&arrivals, &at) && at == 0);
    assert_true(load_arrivals_next(&arrivals, &at) && at == 2.5);
    assert_false(load_arrivals_next(&arrivals, &at));
    load_mix_request(&mix, 0, &request);
    assert_true(request.prompt_tokens == 10 && request.output_tokens == 20 && request.shared_prefix == 5 &&
                request.prefix_id == 9);
    load_mix_request(&mix, 1, &request);
    assert_true(request.prompt_tokens == 30 && request.output_tokens == 40 && request.shared_prefix == 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parses_lengths),
        cmocka_unit_test(refuses_lengths),
        cmocka_unit_test(uniform_lengths_reach_both_ends),
        cmocka_unit_test(lognormal_lengths_have_their_moments),
        cmocka_unit_test(lognormal_lengths_are_cut_to_the_context),
        cmocka_unit_test(lengths_beyond_the_context_are_refused),
        cmocka_unit_test(prompts_follow_the_seed),
        cmocka_unit_test(poisson_arrivals_keep_their_rate),
        cmocka_unit_test(constant_arrivals_are_even),
        cmocka_unit_test(traces_give_arrivals_and_lengths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
