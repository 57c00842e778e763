#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/integration/service.h"

/* What gateway and worker export, scraped over plain sockets: it must agree with what was asked of them. */

enum { CONTEXT = 8192 };

#define MODEL "{model_name=\"synthetic-tiny-mixed-seed1\"}"
#define MODEL_AND(label) "{model_name=\"synthetic-tiny-mixed-seed1\"," label "}"
#define WORKER_OPTIONS (const char *const[]) {"--metrics-listen", "127.0.0.1:0", "--heartbeat-interval", "50", NULL}

static uint32_t ids[] = {11, 12, 13, 14, 15, 16, 17};

/* ---- HTTP */

/* The port of a process's metrics, which its log tells. */
static uint16_t metrics_port(const struct process *process) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (;;) {
        unsigned port = 0;
        char *log = process_log(process), *found = strstr(log, " metrics_listening address=127.0.0.1:");
        bool whole = found && strchr(found, '\n') &&
                     sscanf(found, " metrics_listening address=127.0.0.1:%u", &port) == 1 && port <= UINT16_MAX;
        free(log);
        if (whole)
            return (uint16_t)port;
        pause_until(deadline, "metrics to be served");
    }
}

/* Sends these bytes and reads until the other side closes; to be freed. */
static char *exchange(uint16_t port, const char *request) {
    const struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(write(fd, request, strlen(request)), strlen(request));
    size_t length = 0, capacity = 1 << 20;
    char *answer = malloc(capacity);
    assert_non_null(answer);
    for (ssize_t n; (n = read(fd, answer + length, capacity - length - 1)) > 0;)
        length += (size_t)n;
    close(fd);
    answer[length] = '\0';
    return answer;
}

/* The page of GET /metrics; to be freed. */
static char *scrape(uint16_t port) {
    char *answer = exchange(port, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    char *body = strstr(answer, "\r\n\r\n");
    assert_non_null(body);
    assert_memory_equal(answer, "HTTP/1.1 200 ", 13);
    *body = '\0';
    assert_non_null(strstr(answer, "text/plain; version=0.0.4"));
    memmove(answer, body + 4, strlen(body + 4) + 1);
    return answer;
}

/* The value of the sample that begins so; -1: there is none. */
static double sample(const char *page, const char *series) {
    size_t length = strlen(series);
    for (const char *line = page; *line; line = strchr(line, '\n') + 1)
        if (strncmp(line, series, length) == 0 && line[length] == ' ')
            return strtod(line + length, NULL);
    return -1;
}

static double scrape_sample(uint16_t port, const char *series) {
    char *page = scrape(port);
    double value = sample(page, series);
    free(page);
    return value;
}

static void wait_sample(uint16_t port, const char *series, double value) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    while (scrape_sample(port, series) != value)
        pause_until(deadline, series);
}

struct expected {
    const char *series;
    double value;
};

static void assert_samples(const char *who, const char *page, const struct expected *expected) {
    for (; expected->series; expected++)
        if (sample(page, expected->series) != expected->value)
            fail_msg("%s: %s is %g, not %g", who, expected->series, sample(page, expected->series), expected->value);
}

/* Every family is told of before its samples; no number is negative or none; buckets do not fall. */
static void assert_well_formed(const char *page) {
    char family[128] = "", type[16] = "", bucket[256] = "";
    double below = 0;
    size_t lines = 0;
    for (const char *line = page; *line; line = strchr(line, '\n') + 1, lines++) {
        char series[256];
        double value;
        if (strncmp(line, "# HELP ", 7) == 0) {
            assert_int_equal(sscanf(line, "# HELP %127s", family), 1);
            continue;
        }
        if (line[0] == '#') {
            char typed[128];
            assert_int_equal(sscanf(line, "# TYPE %127s %15s", typed, type), 2);
            assert_string_equal(typed, family);
            continue;
        }
        assert_int_equal(sscanf(line, "%255s %lf", series, &value), 2);
        assert_true(strncmp(series, family, strlen(family)) == 0);
        if (!(value >= 0 && value < 1e15))
            fail_msg("%s is %g", series, value);
        char *le = strstr(series, "le=\"");
        if (strcmp(type, "histogram") != 0)
            continue;
        if (le) {
            le[4] = '\0';
            if (strcmp(series, bucket) != 0)
                below = 0;
            snprintf(bucket, sizeof bucket, "%s", series);
            assert_true(value >= below);
            below = value;
        } else if (strncmp(series + strlen(family), "_count", 6) == 0) {
            assert_true(value == below); /* the last bucket's */
        }
    }
    assert_in_range(lines, 50, 2000);
}

/* First tokens and the gaps behind them are the requests' whole times; the queue is a part of the first. */
static void assert_times_fit(const char *page) {
    double total = sample(page, "vllm:e2e_request_latency_seconds_sum" MODEL);
    double first = sample(page, "vllm:time_to_first_token_seconds_sum" MODEL);
    double gaps = sample(page, "vllm:inter_token_latency_seconds_sum" MODEL);
    double queue = sample(page, "vllm:request_queue_time_seconds_sum" MODEL);
    assert_true(first > 0 && gaps > 0 && queue > 0);
    assert_true(first + gaps <= total + 1e-6);
    assert_true(queue <= first);
}

/* ---- tests */

static void start(struct service *service, struct process **worker, uint16_t *gateway_port, uint16_t *worker_port) {
    service_start_with(service, WORKER_ENDPOINT, (const char *const[]){"--metrics-listen", "127.0.0.1:0", NULL});
    *gateway_port = metrics_port(service->gateway);
    *worker = worker_start("w0", WORKER_OPTIONS);
    *worker_port = metrics_port(*worker);
    service_wait_workers(service, 1);
}

static void counts_agree_with_what_was_asked(void **state) {
    struct service service;
    struct process *worker;
    uint16_t gateway_port, worker_port;
    struct prompt prompt;
    struct generation generation;
    struct sequences sequences;
    service_start_with(&service, WORKER_ENDPOINT, (const char *const[]){"--metrics-listen", "127.0.0.1:0", NULL});
    gateway_port = metrics_port(service.gateway);
    char *page = scrape(gateway_port); /* without a worker */
    assert_true(sample(page, "moed_workers{state=\"ready\"}") == 0);
    assert_null(strstr(page, "vllm:"));
    free(page);
    worker = worker_start("w0", WORKER_OPTIONS);
    worker_port = metrics_port(worker);
    wait_sample(gateway_port, "moed_workers{state=\"ready\"}", 1);
    static const struct expected nothing[] = {
        {"vllm:num_requests_running" MODEL, 0},
        {"vllm:num_requests_waiting" MODEL, 0},
        {"vllm:kv_cache_usage_perc" MODEL, 0},
        {"vllm:prompt_tokens_total" MODEL, 0},
        {"vllm:generation_tokens_total" MODEL, 0},
        {"vllm:e2e_request_latency_seconds_count" MODEL, 0},
        {NULL, 0},
    };
    page = scrape(gateway_port);
    assert_samples("gateway", page, nothing);
    free(page);
    page = scrape(worker_port);
    assert_samples("worker", page, nothing);
    assert_true(sample(page, "moed_step_seconds_count" MODEL) == 0);
    free(page);

    /* 4 and 20 tokens of prompts of 4 that end for their length; the 20 again, cut by a stop token; one token. */
    prompt_init(&prompt, ids, 4, 4);
    generation_run(&service, &generation, &prompt);
    generation_free(&generation);
    prompt.request.max_tokens = 20;
    generation_run(&service, &generation, &prompt);
    assert_int_equal(generation.count, 20);
    uint32_t stop = generation.tokens[9], stopped = 1;
    while (generation.tokens[stopped - 1] != stop)
        stopped++;
    generation_free(&generation);
    prompt.request.n_stop_token_ids = 1;
    prompt.request.stop_token_ids = &stop;
    generation_run(&service, &generation, &prompt);
    assert_int_equal(generation.count, stopped);
    generation_free(&generation);
    prompt_init(&prompt, ids, 7, 1);
    generation_run(&service, &generation, &prompt);
    generation_free(&generation);
    sequences_init(&sequences, ids, 5);
    sequences_add(&sequences, ids, 2);
    rpc_message_free(&forward_run(&service, &sequences)->base);
    prompt_init(&prompt, ids, 0, 1); /* refused */
    generation_start(&service, &generation, &prompt, RPC_FOREVER);
    generation_finish(&service, &generation);
    assert_int_equal(generation.status.code, STATUS_INVALID_ARGUMENT);
    generation_free(&generation);
    const struct rpc_method unknown = {"/moed.v1.Inference/Nothing", &moed__v1__model__descriptor};
    struct status status;
    assert_null(service_call(&service, &unknown, &sequences.request.base, &status));

    const double prompts = 4 + 4 + 4 + 7 + 5 + 2, generated = 4 + 20 + stopped + 1;
    const struct expected both[] = {
        {"vllm:prompt_tokens_total" MODEL, prompts},
        {"vllm:generation_tokens_total" MODEL, generated},
        {"vllm:request_success_total" MODEL_AND("finished_reason=\"length\""), 3},
        {"vllm:request_success_total" MODEL_AND("finished_reason=\"stop\""), 1},
        {"vllm:request_success_total" MODEL_AND("finished_reason=\"abort\""), 0},
        {"vllm:time_to_first_token_seconds_count" MODEL, 4},
        {"vllm:inter_token_latency_seconds_count" MODEL, generated - 4},
        {"vllm:request_time_per_output_token_seconds_count" MODEL, 3},
        {"vllm:e2e_request_latency_seconds_count" MODEL, 4},
        {"vllm:request_queue_time_seconds_count" MODEL, 4},
        {NULL, 0},
    };
    const struct expected gateway[] = {
        {"moed_requests_total{method=\"moed.v1.Inference/Generate\",code=\"OK\"}", 4},
        {"moed_requests_total{method=\"moed.v1.Inference/Generate\",code=\"INVALID_ARGUMENT\"}", 1},
        {"moed_requests_total{method=\"unregistered\",code=\"UNIMPLEMENTED\"}", 1},
        {"moed_requests_total{method=\"moed.v1.Inference/Forward\",code=\"OK\"}", 1},
        {"moed_requests_total{method=\"moed.v1.Inference/GetModel\",code=\"OK\"}", 0},
        {"vllm:prefix_cache_queries_total" MODEL, 4 + 4 + 4 + 7},
        {"vllm:prefix_cache_hits_total" MODEL, 0}, /* nothing is as long as a block */
        {NULL, 0},
    };
    /* A sequence's last token is never computed. */
    const struct expected own[] = {
        {"moed_step_rows_sum" MODEL, prompts + generated - 4},
        {"moed_preemptions_total" MODEL, 0},
        {NULL, 0},
    };
    /* A call is counted when it has closed, a moment after its caller has its answer. */
    wait_sample(gateway_port, gateway[0].series, 4);
    wait_sample(gateway_port, gateway[1].series, 1);
    wait_sample(gateway_port, gateway[2].series, 1);
    page = scrape(gateway_port);
    assert_samples("gateway", page, both);
    assert_samples("gateway", page, gateway);
    assert_well_formed(page);
    assert_times_fit(page);
    assert_true(sample(page, "process_resident_memory_bytes") > 0);
    double gateway_seconds = sample(page, "vllm:e2e_request_latency_seconds_sum" MODEL);
    free(page);
    page = scrape(worker_port);
    assert_samples("worker", page, both);
    assert_samples("worker", page, own);
    assert_times_fit(page);
    assert_well_formed(page);
    double steps = sample(page, "moed_step_seconds_count" MODEL);
    assert_true(steps >= generated && steps <= generated + 2);
    assert_true(sample(page, "moed_step_sequences_count" MODEL) == steps);
    assert_true(sample(page, "moed_expert_imbalance_count" MODEL) == steps);
    assert_true(sample(page, "moed_expert_imbalance_sum" MODEL) >= steps); /* never below 1 */
    double worker_seconds = sample(page, "vllm:e2e_request_latency_seconds_sum" MODEL);
    assert_true(worker_seconds > 0 && worker_seconds < gateway_seconds);
    free(page);
    service_close(&service);
}

static void gauges_follow_a_stream_until_it_is_cancelled(void **state) {
    struct service service;
    struct process *worker;
    uint16_t ports[2];
    struct prompt prompt;
    struct generation generation;
    start(&service, &worker, &ports[0], &ports[1]);
    prompt_init(&prompt, ids, 7, 0); /* to the end of a long context */
    generation_start(&service, &generation, &prompt, RPC_FOREVER);
    generation_wait(&service, &generation, 1);
    for (int i = 0; i < 2; i++) {
        wait_sample(ports[i], "vllm:num_requests_running" MODEL, 1);
        double usage = scrape_sample(ports[i], "vllm:kv_cache_usage_perc" MODEL);
        assert_true(usage > 0 && usage < 1);
    }
    rpc_call_cancel(generation.call);
    generation_finish(&service, &generation);
    assert_int_equal(generation.status.code, STATUS_CANCELLED);
    generation_free(&generation);
    for (int i = 0; i < 2; i++) {
        wait_sample(ports[i], "vllm:num_requests_running" MODEL, 0);
        wait_sample(ports[i], "vllm:kv_cache_usage_perc" MODEL, 0);
        wait_sample(ports[i], "vllm:request_success_total" MODEL_AND("finished_reason=\"abort\""), 1);
        assert_true(scrape_sample(ports[i], "vllm:e2e_request_latency_seconds_count" MODEL) == 0);
    }
    wait_sample(ports[0], "moed_requests_total{method=\"moed.v1.Inference/Generate\",code=\"CANCELLED\"}", 1);
    process_signal(worker, SIGKILL);
    assert_int_equal(process_finish(worker), 128 + SIGKILL);
    wait_sample(ports[0], "moed_workers{state=\"lost\"}", 1);
    wait_sample(ports[0], "moed_workers{state=\"ready\"}", 0);
    service_close(&service);
}

static void only_get_metrics_is_answered(void **state) {
    static const struct {
        const char *request, *answer;
    } cases[] = {
        {"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 404 "},
        {"GET /metrics/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 404 "},
        {"POST /other HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab", "HTTP/1.1 404 "},
        {"POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab", "HTTP/1.1 405 "},
        {"HEAD /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 405 "},
        {"DELETE /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 405 "},
        {"GET /metrics?x=1 HTTP/1.0\r\n\r\n", "HTTP/1.1 200 "},
        {"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab", "HTTP/1.1 200 "},
        {"nonsense\r\n\r\n", ""},
    };
    struct service service;
    struct process *worker;
    uint16_t ports[2];
    start(&service, &worker, &ports[0], &ports[1]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int p = 0; p < 2; p++) {
            char *answer = exchange(ports[p], cases[i].request);
            if (strncmp(answer, cases[i].answer, strlen(cases[i].answer)) != 0)
                fail_msg("%s was answered with %.200s", cases[i].request, answer);
            free(answer);
        }
    free(scrape(ports[0])); /* still there */
    free(scrape(ports[1]));
    service_close(&service);
}

static void a_prefix_replaces_that_of_vllm(void **state) {
    struct service service;
    const char *const extra[] = {"--metrics-listen", "127.0.0.1:0", "--metrics-prefix", "my_", NULL};
    service_start_with(&service, WORKER_ENDPOINT, extra);
    struct process *worker = worker_start("w0", extra);
    service_wait_workers(&service, 1);
    uint16_t ports[2] = {metrics_port(service.gateway), metrics_port(worker)};
    for (int p = 0; p < 2; p++) {
        wait_sample(ports[p], "my_num_requests_running" MODEL, 0);
        char *page = scrape(ports[p]);
        assert_null(strstr(page, "vllm"));
        assert_non_null(strstr(page, "\nmoed_"));
        free(page);
    }
    service_close(&service);
}

static int setup(void **state) {
    return model_setup(state, CONTEXT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(counts_agree_with_what_was_asked, harness_stop_all),
        cmocka_unit_test_teardown(gauges_follow_a_stream_until_it_is_cancelled, harness_stop_all),
        cmocka_unit_test_teardown(only_get_metrics_is_answered, harness_stop_all),
        cmocka_unit_test_teardown(a_prefix_replaces_that_of_vllm, harness_stop_all),
    };
    return cmocka_run_group_tests(tests, setup, model_teardown);
}
