#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/metrics.h"

static struct worker_table *table;
static struct gateway_metrics *metrics;

static int setup(void **state) {
    table = worker_table_create();
    metrics = gateway_metrics_create("vllm:");
    return table && metrics ? 0 : -1;
}

static int teardown(void **state) {
    worker_table_destroy(table);
    gateway_metrics_destroy(metrics);
    return 0;
}

static struct worker *join(char *id, uint32_t blocks) {
    struct wire_identity peer = {.length = 1};
    Moed__V1__Model model = MOED__V1__MODEL__INIT;
    Moed__Worker__V1__Hello hello = MOED__WORKER__V1__HELLO__INIT;
    struct status status;
    struct worker *rival;
    bool back;
    model.name = "a \"model\"";
    model.fingerprint = "f00d";
    model.vocab_size = 100;
    model.context_length = hello.context_length = 64;
    hello.worker_id = id;
    hello.incarnation = peer.bytes[0] = (unsigned char)id[1];
    hello.model = &model;
    hello.state = MOED__V1__WORKER__STATE__READY;
    hello.kv_blocks_total = blocks;
    struct worker *worker = worker_table_hello(table, &peer, &hello, 1, &back, &rival, &status);
    assert_non_null(worker);
    return worker;
}

static void beat(struct worker *worker, uint32_t running, uint32_t waiting, uint32_t blocks_free) {
    Moed__Worker__V1__Heartbeat message = MOED__WORKER__V1__HEARTBEAT__INIT;
    message.state = MOED__V1__WORKER__STATE__READY;
    message.running = running;
    message.waiting = waiting;
    message.kv_blocks_free = blocks_free;
    assert_true(worker_beat(worker, &message, 2));
}

/* The page, after a look at the workers; to be freed. */
static char *render(void) {
    struct metrics_text text = {0};
    gateway_metrics_see_workers(metrics, table);
    gateway_metrics_render(metrics, &text);
    assert_false(text.failed);
    char *page = strndup(text.bytes, text.length);
    metrics_text_free(&text);
    return page;
}

static void assert_page(const char *const *lines, const char *absent) {
    char *page = render();
    for (; *lines; lines++)
        if (!strstr(page, *lines))
            fail_msg("no %s in:\n%s", *lines, page);
    if (absent && strstr(page, absent))
        fail_msg("%s in:\n%s", absent, page);
    free(page);
}

static void nothing_is_named_before_a_model_is_known(void **state) {
    assert_page((const char *const[]){"\nmoed_workers{state=\"ready\"} 0\n", NULL}, "vllm:");
}

static void workers_are_summed(void **state) {
    beat(join("w0", 100), 3, 1, 40);
    beat(join("w1", 300), UINT32_MAX, 2, 300);
    beat(join("w2", 0), 1, 0, UINT32_MAX); /* more free blocks than it has */
    struct worker *lost = join("w3", 50);
    beat(lost, 7, 7, 0);
    worker_lose(lost);
    assert_page((const char *const[]){"\nmoed_workers{state=\"ready\"} 3\n", "\nmoed_workers{state=\"lost\"} 1\n",
                                      "\nmoed_workers{state=\"loading\"} 0\n",
                                      "vllm:num_requests_running{model_name=\"a \\\"model\\\"\"} 4294967299\n",
                                      "vllm:num_requests_waiting{model_name=\"a \\\"model\\\"\"} 3\n",
                                      "vllm:kv_cache_usage_perc{model_name=\"a \\\"model\\\"\"} 0.15\n", NULL},
                NULL);
}

#define CALLS(method, code, count) \
    "\nmoed_requests_total{method=\"x.Service/" method "\",code=\"" code "\"} " count "\n"

static void calls_are_counted_by_method_and_code(void **state) {
    struct metric_counter *generate = gateway_metrics_method(metrics, "x.Service/Generate");
    struct metric_counter *forward = gateway_metrics_method(metrics, "x.Service/Forward");
    metric_add(&generate[STATUS_OK], 5);
    metric_add(&generate[STATUS_UNAUTHENTICATED], 2);
    metric_add(&forward[STATUS_CANCELLED], 1);
    assert_page((const char *const[]){CALLS("Generate", "OK", "5"), CALLS("Generate", "UNAUTHENTICATED", "2"),
                                      CALLS("Forward", "OK", "0"), CALLS("Forward", "CANCELLED", "1"), NULL},
                "DATA_LOSS");
    while (gateway_metrics_method(metrics, "more"))
        continue; /* ends */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(nothing_is_named_before_a_model_is_known, setup, teardown),
        cmocka_unit_test_setup_teardown(workers_are_summed, setup, teardown),
        cmocka_unit_test_setup_teardown(calls_are_counted_by_method_and_code, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
