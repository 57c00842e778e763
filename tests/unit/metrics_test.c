#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/metrics_process.h"
#include "common/metrics_serving.h"

/* The page, terminated. */
static const char *page_of(struct metrics_text *text) {
    static char *page;
    assert_false(text->failed);
    page = realloc(page, text->length + 1);
    assert_non_null(page);
    if (text->length)
        memcpy(page, text->bytes, text->length);
    page[text->length] = '\0';
    metrics_text_free(text);
    return page;
}

/* The value of the sample whose line begins so. */
static double sample(const char *page, const char *series) {
    size_t length = strlen(series);
    for (const char *line = page; *line; line = strchr(line, '\n') + 1)
        if (strncmp(line, series, length) == 0 && line[length] == ' ')
            return strtod(line + length, NULL);
    fail_msg("no sample %s in:\n%s", series, page);
    return 0;
}

/* ---- text */

static void a_counter_and_a_gauge_are_written(void **state) {
    struct metrics_text text = {0};
    struct metric_counter counter = {0};
    struct metric_gauge gauge = {0};
    metric_add(&counter, 3);
    metric_add(&counter, UINT64_C(1) << 52);
    metric_set(&gauge, 0.125);
    metrics_text_family(&text, METRIC_COUNTER, "x:", "things_total", "Things.");
    metrics_text_sample(&text, METRIC_LABELS(), (double)metric_count(&counter));
    metrics_text_family(&text, METRIC_GAUGE, "", "level", "How high.");
    metrics_text_sample(&text, METRIC_LABELS({"a", "1"}), metric_value(&gauge));
    metrics_text_sample(&text, METRIC_LABELS({"a", "2"}, {"b", ""}), -0.0);
    assert_string_equal(page_of(&text), "# HELP x:things_total Things.\n"
                                        "# TYPE x:things_total counter\n"
                                        "x:things_total 4503599627370499\n"
                                        "# HELP level How high.\n"
                                        "# TYPE level gauge\n"
                                        "level{a=\"1\"} 0.125\n"
                                        "level{a=\"2\",b=\"\"} 0\n");
}

static void what_is_no_number_is_left_out(void **state) {
    struct metrics_text text = {0};
    metrics_text_family(&text, METRIC_GAUGE, "", "g", "G.");
    metrics_text_sample(&text, METRIC_LABELS(), NAN);
    metrics_text_sample(&text, METRIC_LABELS(), INFINITY);
    assert_string_equal(page_of(&text), "# HELP g G.\n# TYPE g gauge\n");
}

static void labels_and_help_are_escaped(void **state) {
    struct metrics_text text = {0};
    metrics_text_family(&text, METRIC_GAUGE, "", "g", "a\\b\nc\"d");
    metrics_text_sample(&text, METRIC_LABELS({"name", "a\\b\nc\"d}"}), 1);
    metrics_text_sample(&text, METRIC_LABELS({"name", "\xc3\xa9\xff\xc3"}), 1); /* an e acute, and no UTF-8 */
    assert_string_equal(page_of(&text), "# HELP g a\\\\b\\nc\"d\n# TYPE g gauge\n"
                                        "g{name=\"a\\\\b\\nc\\\"d}\"} 1\n"
                                        "g{name=\"\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\"} 1\n");
}

static void a_page_grows(void **state) {
    struct metrics_text text = {0};
    char name[16];
    metrics_text_family(&text, METRIC_GAUGE, "", "g", "G.");
    for (int i = 0; i < 10000; i++) {
        snprintf(name, sizeof name, "%d", i);
        metrics_text_sample(&text, METRIC_LABELS({"i", name}), i);
    }
    const char *page = page_of(&text);
    assert_true(sample(page, "g{i=\"0\"}") == 0);
    assert_true(sample(page, "g{i=\"9999\"}") == 9999);
}

/* ---- histograms */

static const uint64_t bounds[] = {10, 20, 40};
static const struct metric_buckets buckets = {bounds, 3, 10};

static void buckets_are_cumulative_and_hold_their_bound(void **state) {
    static const uint64_t values[] = {0, 10, 11, 20, 40, 41, 1000};
    struct metrics_text text = {0};
    struct metric_histogram histogram = {.buckets = &buckets};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        metric_observe(&histogram, values[i]);
    metrics_text_family(&text, METRIC_HISTOGRAM, "p_", "h", "H.");
    metrics_text_histogram(&text, METRIC_LABELS({"m", "x"}), &histogram);
    metrics_text_histogram(&text, METRIC_LABELS(), &(struct metric_histogram){.buckets = &buckets});
    assert_string_equal(page_of(&text), "# HELP p_h H.\n# TYPE p_h histogram\n"
                                        "p_h_bucket{m=\"x\",le=\"1\"} 2\n"
                                        "p_h_bucket{m=\"x\",le=\"2\"} 4\n"
                                        "p_h_bucket{m=\"x\",le=\"4\"} 5\n"
                                        "p_h_bucket{m=\"x\",le=\"+Inf\"} 7\n"
                                        "p_h_sum{m=\"x\"} 112.2\n"
                                        "p_h_count{m=\"x\"} 7\n"
                                        "p_h_bucket{le=\"1\"} 0\n"
                                        "p_h_bucket{le=\"2\"} 0\n"
                                        "p_h_bucket{le=\"4\"} 0\n"
                                        "p_h_bucket{le=\"+Inf\"} 0\n"
                                        "p_h_sum 0\n"
                                        "p_h_count 0\n");
}

static void bounds_rise(void **state) {
    static const struct metric_buckets *const all[] = {&metric_buckets_step, &metric_buckets_request,
                                                       &metric_buckets_rows, &metric_buckets_ratio};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        assert_in_range(all[i]->count, 2, METRIC_BOUNDS_MAX);
        assert_true(all[i]->unit >= 1);
        for (uint32_t b = 1; b < all[i]->count; b++)
            assert_true(all[i]->bounds[b - 1] < all[i]->bounds[b]);
    }
}

enum { WRITERS = 4, EACH = 50000 };

static struct metric_histogram shared = {.buckets = &buckets};
static struct metric_counter shared_count;
static atomic_uint writers_left;

static void *write_many(void *argument) {
    for (uint64_t i = 0; i < EACH; i++) {
        metric_observe(&shared, i % 50);
        metric_add(&shared_count, 2);
    }
    atomic_fetch_sub(&writers_left, 1);
    return NULL;
}

/* Pages written meanwhile agree with themselves; in the end nothing is missing. */
static void many_threads_count_at_once(void **state) {
    pthread_t threads[WRITERS];
    double before = 0;
    bool last = false;
    atomic_store(&writers_left, WRITERS);
    for (int i = 0; i < WRITERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, write_many, NULL), 0);
    while (!last) {
        last = atomic_load(&writers_left) == 0;
        struct metrics_text text = {0};
        metrics_text_family(&text, METRIC_HISTOGRAM, "", "h", "H.");
        metrics_text_histogram(&text, METRIC_LABELS(), &shared);
        const char *page = page_of(&text);
        double count = sample(page, "h_count"), below = 0;
        assert_true(sample(page, "h_bucket{le=\"+Inf\"}") == count);
        assert_true(count >= before);
        before = count;
        static const char *const series[] = {"h_bucket{le=\"1\"}", "h_bucket{le=\"2\"}", "h_bucket{le=\"4\"}",
                                             "h_bucket{le=\"+Inf\"}"};
        for (int i = 0; i < 4; i++) {
            assert_true(sample(page, series[i]) >= below);
            below = sample(page, series[i]);
        }
        if (last) {
            assert_true(count == WRITERS * EACH);
            assert_true(sample(page, "h_sum") == WRITERS * EACH * 24.5 / 10);
        }
    }
    for (int i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(metric_count(&shared_count), 2 * WRITERS * EACH);
}

/* ---- names */

static void prefixes_give_legal_names(void **state) {
    static const char *const good[] = {"", "vllm:", "moed_", "_", ":", "A9z", "x::y_"};
    static const char *const bad[] = {"9x", "vllm-", "a b", "a.b", "\xc3\xa9", "a\n", "{", "a\"",
                                      "a234567890123456789012345678901234567890123456789012345678901234_"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct status status = {0};
        if (metrics_check_prefix(good[i], &status))
            fail_msg("\"%s\": %s", good[i], status.message);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct status status = {0};
        if (metrics_check_prefix(bad[i], &status) == 0)
            fail_msg("\"%s\" was taken", bad[i]);
        assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
        assert_non_null(strstr(status.message, "--metrics-prefix"));
        assert_non_null(strstr(status.message, bad[i]));
    }
}

/* ---- what is served */

static void a_request_is_counted(void **state) {
    enum { MS = 1000000 };
    struct serving_metrics metrics = {0};
    struct metrics_text text = {0};
    const struct serving_gauges gauges = {.running = 2, .waiting = 3, .kv_usage = 0.5};
    serving_metrics_init(&metrics);
    serving_metrics_first(&metrics, 7 * MS, 100, 1);
    serving_metrics_next(&metrics, 4 * MS, 1);
    serving_metrics_next(&metrics, 8 * MS, 1);
    serving_metrics_finish(&metrics, &(struct serving_request){SERVING_LENGTH, 2 * MS, 12 * MS, 19 * MS, 3});
    serving_metrics_first(&metrics, 1 * MS, 5, 1); /* one token: it has no time between tokens */
    serving_metrics_finish(&metrics, &(struct serving_request){SERVING_STOP, 0, 0, 1 * MS, 1});
    metric_add(&metrics.ended[SERVING_ABORT], 4);
    metric_counter_set(&metrics.prefix_queries, 105);
    metric_counter_set(&metrics.prefix_hits, 64);
    serving_metrics_render(&metrics, &gauges, "p:", "m", &text);
    static const struct {
        const char *series;
        double value;
    } expected[] = {
        {"p:num_requests_running{model_name=\"m\"}", 2},
        {"p:num_requests_waiting{model_name=\"m\"}", 3},
        {"p:kv_cache_usage_perc{model_name=\"m\"}", 0.5},
        {"p:prompt_tokens_total{model_name=\"m\"}", 105},
        {"p:generation_tokens_total{model_name=\"m\"}", 4},
        {"p:prefix_cache_queries_total{model_name=\"m\"}", 105},
        {"p:prefix_cache_hits_total{model_name=\"m\"}", 64},
        {"p:request_success_total{model_name=\"m\",finished_reason=\"stop\"}", 1},
        {"p:request_success_total{model_name=\"m\",finished_reason=\"length\"}", 1},
        {"p:request_success_total{model_name=\"m\",finished_reason=\"abort\"}", 4},
        {"p:time_to_first_token_seconds_count{model_name=\"m\"}", 2},
        {"p:time_to_first_token_seconds_sum{model_name=\"m\"}", 0.008},
        {"p:time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.005\"}", 1},
        {"p:time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.01\"}", 2},
        {"p:inter_token_latency_seconds_count{model_name=\"m\"}", 2},
        {"p:inter_token_latency_seconds_sum{model_name=\"m\"}", 0.012},
        {"p:request_time_per_output_token_seconds_count{model_name=\"m\"}", 1},
        {"p:request_time_per_output_token_seconds_sum{model_name=\"m\"}", 0.006},
        {"p:e2e_request_latency_seconds_count{model_name=\"m\"}", 2},
        {"p:e2e_request_latency_seconds_sum{model_name=\"m\"}", 0.02},
        {"p:request_queue_time_seconds_count{model_name=\"m\"}", 2},
        {"p:request_queue_time_seconds_sum{model_name=\"m\"}", 0.002},
    };
    const char *page = page_of(&text);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if (fabs(sample(page, expected[i].series) - expected[i].value) > 1e-12)
            fail_msg("%s is %g, not %g", expected[i].series, sample(page, expected[i].series), expected[i].value);
}

static void usage_is_a_share(void **state) {
    assert_true(serving_kv_usage(0, 0) == 0);
    assert_true(serving_kv_usage(0, 5) == 0);
    assert_true(serving_kv_usage(8, 8) == 0);
    assert_true(serving_kv_usage(8, 9) == 0); /* a worker may say anything */
    assert_true(serving_kv_usage(8, 2) == 0.75);
    assert_true(serving_kv_usage(8, 0) == 1);
}

static void a_process_has_memory_and_time(void **state) {
    struct metrics_text text = {0};
    double started = metrics_process_now();
    metrics_process_render(&text, started);
    const char *page = page_of(&text);
    assert_true(sample(page, "process_resident_memory_bytes") > 100000);
    assert_true(sample(page, "process_cpu_seconds_total") > 0);
    assert_true(fabs(sample(page, "process_start_time_seconds") - started) < 0.001);
    assert_true(started > 1.7e9);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_counter_and_a_gauge_are_written),
        cmocka_unit_test(what_is_no_number_is_left_out),
        cmocka_unit_test(labels_and_help_are_escaped),
        cmocka_unit_test(a_page_grows),
        cmocka_unit_test(buckets_are_cumulative_and_hold_their_bound),
        cmocka_unit_test(bounds_rise),
        cmocka_unit_test(many_threads_count_at_once),
        cmocka_unit_test(prefixes_give_legal_names),
        cmocka_unit_test(a_request_is_counted),
        cmocka_unit_test(usage_is_a_share),
        cmocka_unit_test(a_process_has_memory_and_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
