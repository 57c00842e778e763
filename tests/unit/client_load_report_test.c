#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "client/load_report.h"

static const struct load_config closed_loop = {
    .target = "host:1",
    .model = "m \"1\"",
    .prompt_tokens = "1:9",
    .output_tokens = "4",
    .seed = UINT64_MAX,
    .connections = 2,
    .requests = 3,
    .max_in_flight = 99,
    .warmup = 1,
    .slo_itl_ms = 50,
};

static struct load_figures figures_of(void) {
    struct load_figures figures = {
        .load = 8,
        .ttft = {.count = 2, .mean_ms = 1.5, .p50_ms = 2, .p90_ms = 3, .p95_ms = 4, .p99_ms = 5, .max_ms = 6},
        .succeeded = 2,
        .failed = 3,
        .warmup = 1,
        .errors = {[STATUS_OK] = 1, [STATUS_UNAVAILABLE] = 2},
        .seconds = 4,
        .requests_per_s = 0.5,
        .limited = true,
        .good = 1,
        .good_share = 0.2,
        .good_per_s = 0.25,
        .tokens_in = 100,
        .prompt_tokens = 80,
        .cached_tokens = 20,
        .tokens_out = 16,
        .messages = 15,
        .resumptions = 7,
    };
    status_set(&figures.first_error, STATUS_UNAVAILABLE, "gone\xff");
    return figures;
}

static json_t *json_of(const struct load_config *config, const struct load_figures *figures, size_t count) {
    char *text = NULL;
    size_t size = 0;
    json_error_t error;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    assert_int_equal(load_print_json(out, config, figures, count), 0);
    assert_int_equal(fclose(out), 0);
    assert_ptr_equal(strchr(text, '\n'), text + size - 1);
    json_t *report = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (!report)
        fail_msg("%s in %s", error.text, text);
    free(text);
    return report;
}

static void json_has_everything(void **state) {
    struct load_figures figures[2] = {figures_of(), {.load = 16}};
    json_t *report = json_of(&closed_loop, figures, 2), *config = json_object_get(report, "config");
    assert_string_equal(json_string_value(json_object_get(report, "model")), "m \"1\"");
    assert_true(json_is_false(json_object_get(report, "interrupted")));
    assert_string_equal(json_string_value(json_object_get(config, "target")), "host:1");
    assert_string_equal(json_string_value(json_object_get(config, "loop")), "closed");
    assert_string_equal(json_string_value(json_object_get(config, "prompt_tokens")), "1:9");
    assert_string_equal(json_string_value(json_object_get(config, "seed")), "18446744073709551615");
    assert_int_equal(json_integer_value(json_object_get(config, "requests")), 3);
    assert_true(json_is_null(json_object_get(config, "arrivals")));
    assert_true(json_is_null(json_object_get(config, "max_in_flight")));
    assert_true(json_is_null(json_object_get(config, "slo_ttft_ms")));
    assert_true(json_real_value(json_object_get(config, "slo_itl_ms")) == 50);

    json_t *runs = json_object_get(report, "runs"), *run = json_array_get(runs, 0);
    assert_int_equal(json_array_size(runs), 2);
    assert_true(json_number_value(json_object_get(run, "concurrency")) == 8);
    assert_int_equal(json_integer_value(json_object_get(run, "succeeded")), 2);
    assert_int_equal(json_integer_value(json_object_get(run, "failed")), 3);
    assert_string_equal(json_string_value(json_object_get(run, "first_error")), "gone?");
    json_t *errors = json_object_get(run, "errors");
    assert_int_equal(json_object_size(errors), 2);
    assert_int_equal(json_integer_value(json_object_get(errors, "UNAVAILABLE")), 2);
    assert_int_equal(json_integer_value(json_object_get(errors, "WRONG_LENGTH")), 1);
    assert_true(json_real_value(json_object_get(json_object_get(run, "goodput"), "share")) == 0.2);
    assert_int_equal(json_integer_value(json_object_get(json_object_get(run, "tokens"), "cached")), 20);
    assert_int_equal(json_integer_value(json_object_get(run, "resumptions")), 7);
    json_t *latency = json_object_get(run, "latency");
    assert_true(json_real_value(json_object_get(json_object_get(latency, "ttft_ms"), "p99")) == 5);
    assert_true(json_is_null(json_object_get(json_object_get(latency, "itl_ms"), "p99")));
    assert_true(json_is_null(json_object_get(json_array_get(runs, 1), "goodput")));
    assert_true(json_is_null(json_object_get(json_array_get(runs, 1), "first_error")));
    json_decref(report);
}

static void json_of_a_trace(void **state) {
    struct load_config config = closed_loop;
    struct load_figures figures = figures_of();
    config.open_loop = config.interrupted = true;
    config.arrivals = "trace";
    config.trace = "a\xe9.jsonl";
    config.requests = UINT64_MAX;
    json_t *report = json_of(&config, &figures, 1), *told = json_object_get(report, "config");
    assert_true(json_is_true(json_object_get(report, "interrupted")));
    assert_string_equal(json_string_value(json_object_get(told, "trace")), "a?.jsonl");
    assert_string_equal(json_string_value(json_object_get(told, "arrivals")), "trace");
    assert_true(json_is_null(json_object_get(told, "prompt_tokens")));
    assert_true(json_is_null(json_object_get(told, "requests")));
    assert_int_equal(json_integer_value(json_object_get(told, "max_in_flight")), 99);
    assert_true(json_is_null(json_object_get(json_array_get(json_object_get(report, "runs"), 0), "rate")));
    json_decref(report);
}

static void report_tells_errors_and_goodput(void **state) {
    struct load_figures figures = figures_of();
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    load_print_report(out, &closed_loop, &figures);
    assert_int_equal(fclose(out), 0);
    static const char *const parts[] = {
        "closed loop: 8 streams; 2 connections, seed 18446744073709551615\n",
        "2 succeeded, 3 failed, in 4.00 s; before them 1 to warm up\n",
        "1 x OK, but not as many tokens as asked for\n",
        "failed         2 x UNAVAILABLE\n",
        "20.0 % of the requests, 0.25 requests/s (every ITL at most 50 ms)\n",
        "100 in (25.0 % cached), 16 out in 15 messages\n",
        "TTFT                1.500      2.000      3.000      4.000      5.000      6.000\n",
        "ITL                     -          -          -          -          -          -\n",
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strstr(text, parts[i]))
            fail_msg("no '%s' in: %s", parts[i], text);
    assert_null(strstr(text, "interrupt"));
    assert_null(strstr(text, "late starts"));
    free(text);
}

static void csv_has_a_column_for_each_name(void **state) {
    struct load_sample full = {
        .index = 12, .intended_ns = 1500000000, .started_ns = 1500001000, .first_ns = 1510000000,
        .last_ns = 1530000000, .ended_ns = 1531000000, .gap_max_ns = 12000000, .prompt_tokens = 9,
        .cached_tokens = 4, .asked_tokens = 3, .tokens = 3, .first_tokens = 1, .resumptions = 2};
    struct load_sample failed = {.index = 13, .warmup = true, .ended_ns = 1000000, .asked_tokens = 3,
                                 .status.code = STATUS_UNAVAILABLE};
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    load_print_csv_header(out);
    load_print_csv_row(out, 2.5, &full);
    load_print_csv_row(out, 2.5, &failed);
    assert_int_equal(fclose(out), 0);
    assert_string_equal(text, "load,index,warmup,intended_s,started_s,ttft_ms,tpot_ms,itl_max_ms,e2e_ms,prompt_tokens,"
                              "cached_tokens,asked_tokens,tokens,resumptions,status\n"
                              "2.5,12,0,1.500000,1.500001,10.000,10.000,12.000,31.000,9,4,3,3,2,OK\n"
                              "2.5,13,1,0.000000,0.000000,,,,1.000,0,0,3,0,0,UNAVAILABLE\n");
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_has_everything),
        cmocka_unit_test(json_of_a_trace),
        cmocka_unit_test(report_tells_errors_and_goodput),
        cmocka_unit_test(csv_has_a_column_for_each_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
