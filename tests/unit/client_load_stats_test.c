#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/load_stats.h"

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* By nearest rank in a sorted list. */
static uint64_t exact_quantile(const uint64_t *sorted, size_t count, double share) {
    size_t rank = (size_t)ceil(share * (double)count);
    return sorted[rank ? rank - 1 : 0];
}

static void quantiles_agree_with_a_sort(void **state) {
    static const double shares[] = {0, 0.001, 0.1, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999, 1};
    static const size_t counts[] = {1, 2, 3, 10, 99, 100, 101, 5000};
    uint64_t random = 1, *values = calloc(5000, sizeof *values);
    struct histogram *histogram = malloc(sizeof *histogram);
    assert_true(values && histogram);
    for (size_t round = 0; round < 64; round++) {
        size_t count = counts[round % (sizeof counts / sizeof *counts)];
        double sum = 0;
        memset(histogram, 0, sizeof *histogram);
        for (size_t i = 0; i < count; i++) {
            random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            values[i] = random >> (random & 1 ? 20 + round % 40 : round); /* of very different sizes */
            histogram_add(histogram, values[i]);
            sum += (double)values[i];
        }
        qsort(values, count, sizeof *values, compare);
        assert_int_equal(histogram->count, count);
        assert_int_equal(histogram->max, values[count - 1]);
        assert_true(histogram->sum == sum);
        for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
            double expected = (double)exact_quantile(values, count, shares[i]);
            double found = (double)histogram_quantile(histogram, shares[i]);
            if (fabs(found - expected) > expected / 256)
                fail_msg("share %g of %zu: %.0f, not %.0f", shares[i], count, found, expected);
        }
    }
    free(histogram);
    free(values);
}

static void histograms_take_any_value(void **state) {
    struct histogram *histogram = calloc(1, sizeof *histogram);
    assert_non_null(histogram);
    assert_int_equal(histogram_quantile(histogram, 0.5), 0);
    histogram_add(histogram, 0);
    histogram_add(histogram, UINT64_MAX);
    histogram_add(histogram, UINT64_MAX);
    assert_int_equal(histogram_quantile(histogram, 0), 0);
    assert_int_equal(histogram_quantile(histogram, 1), UINT64_MAX);
    assert_true(histogram_quantile(histogram, 0.5) > UINT64_MAX - UINT64_MAX / 256);
    free(histogram);
}

/* Intended at 1 s, started 10 ms late, first token (two of them) after 100 ms, then gaps of 20 and 30 ms. */
static struct load_sample sample_of(void) {
    return (struct load_sample){
        .intended_ns = 1000000000,
        .started_ns = 1010000000,
        .first_ns = 1100000000,
        .last_ns = 1150000000,
        .ended_ns = 1151000000,
        .gap_max_ns = 30000000,
        .prompt_tokens = 100,
        .asked_tokens = 4,
        .tokens = 4,
        .first_tokens = 2,
        .cached_tokens = 32,
        .resumptions = 1,
    };
}

static struct load_stats *stats_create(void) {
    struct load_stats *stats = calloc(1, sizeof *stats);
    assert_non_null(stats);
    stats->begin_ns = 1000000000;
    return stats;
}

static void samples_become_figures(void **state) {
    struct load_stats *stats = stats_create();
    struct load_sample sample = sample_of(), warm = sample_of(), failed = sample_of(), cut = sample_of();
    struct load_sample brief = sample_of();
    struct load_figures figures;
    warm.warmup = true;
    warm.ended_ns = 9000000000;
    failed.tokens = 3;
    failed.ended_ns = 3000000000;
    status_set(&failed.status, STATUS_UNAVAILABLE, "the worker was lost");
    cut.tokens = cut.first_tokens = 0;
    cut.first_ns = cut.last_ns = 0;
    cut.unfinished = true;
    status_set(&cut.status, STATUS_CANCELLED, "CANCELLED");
    brief.tokens = 3;

    load_stats_add(stats, &warm);
    load_stats_add(stats, &sample);
    load_stats_add(stats, &failed);
    load_stats_add(stats, &cut);
    load_stats_add(stats, &brief);
    load_stats_add_gap(stats, 20000000);
    load_stats_add_gap(stats, 30000000);
    load_figures_compute(stats, 8, &figures);

    assert_true(figures.load == 8 && figures.seconds == 2);
    assert_true(figures.warmup == 1 && figures.succeeded == 1 && figures.failed == 2 && figures.unfinished == 1);
    assert_int_equal(figures.errors[STATUS_UNAVAILABLE], 1);
    assert_int_equal(figures.errors[STATUS_OK], 1); /* brief: ended well, but too soon */
    assert_string_equal(figures.first_error.message, "the worker was lost");
    assert_true(figures.ttft.count == 1 && figures.ttft.max_ms == 100);
    assert_true(figures.e2e.count == 1 && figures.e2e.max_ms == 151);
    assert_true(figures.tpot.count == 1 && figures.tpot.max_ms == 25); /* 50 ms for the two behind the first message */
    assert_true(figures.itl.count == 2 && figures.itl.mean_ms == 25 && figures.itl.max_ms == 30);
    assert_true(figures.delay.count == 4 && figures.delay.mean_ms == 10);
    assert_true(figures.tokens_in == 300 && figures.tokens_out == 4 + 3 + 3);
    assert_true(figures.prompt_tokens == 100 && figures.cached_tokens == 32 && figures.resumptions == 4);
    assert_true(figures.requests_per_s == 0.5 && figures.tokens_in_per_s == 150 && figures.tokens_out_per_s == 5);
    assert_false(figures.limited);
    free(stats);
}

static void goodput_needs_every_limit_met(void **state) {
    static const struct {
        double ttft_ms, itl_ms;
        bool good;
    } cases[] = {
        {100, 30, true},  {100, 0, true}, {0, 30, true},  {99, 30, false},
        {100, 29, false}, {99, 0, false}, {0, 29, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct load_stats *stats = stats_create();
        struct load_sample sample = sample_of(), failed = sample_of();
        struct load_figures figures;
        stats->slo_ttft_ns = (uint64_t)(cases[i].ttft_ms * 1e6);
        stats->slo_itl_ns = (uint64_t)(cases[i].itl_ms * 1e6);
        sample.ended_ns = 1500000000;
        status_set(&failed.status, STATUS_INTERNAL, "failed");
        load_stats_add(stats, &sample);
        load_stats_add(stats, &failed);
        load_figures_compute(stats, 1, &figures);
        assert_true(figures.limited);
        assert_int_equal(figures.good, cases[i].good);
        assert_true(figures.good_share == (cases[i].good ? 0.5 : 0));
        assert_true(figures.good_per_s == (cases[i].good ? 2 : 0));
        free(stats);
    }
}

static void nothing_gives_zeros(void **state) {
    struct load_stats *stats = stats_create();
    struct load_figures figures;
    load_figures_compute(stats, 1, &figures);
    assert_true(figures.seconds == 0 && figures.requests_per_s == 0 && figures.ttft.count == 0);

    struct load_sample odd = sample_of();
    odd.status.code = (enum status_code)4711;
    load_stats_add(stats, &odd);
    assert_int_equal(stats->errors[STATUS_UNKNOWN], 1);
    free(stats);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantiles_agree_with_a_sort),
        cmocka_unit_test(histograms_take_any_value),
        cmocka_unit_test(samples_become_figures),
        cmocka_unit_test(goodput_needs_every_limit_met),
        cmocka_unit_test(nothing_gives_zeros),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
