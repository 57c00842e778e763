#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "tests/integration/service.h"

/* moed-client as scripts and people see it: what it prints, and its exit statuses. */

/* Runs moed-client against the service (which may be NULL); the arguments end with NULL. */
static int run(struct service *service, const char *first, ...) {
    const char *argv[32] = {"moed-client", first};
    size_t count = 2;
    va_list arguments;
    va_start(arguments, first);
    for (const char *argument; (argument = va_arg(arguments, const char *)); count++) {
        assert_true(count < sizeof argv / sizeof *argv - 1);
        argv[count] = argument;
    }
    va_end(arguments);
    if (service)
        setenv("MOED_TARGET", service->address, 1);
    else
        unsetenv("MOED_TARGET");
    return process_run("client", argv);
}

static void assert_file(const char *path, const char *expected) {
    char *text = read_file(path, NULL);
    assert_string_equal(text, expected);
    free(text);
}

static void assert_in_file(const char *path, const char *expected) {
    char *text = read_file(path, NULL);
    if (!strstr(text, expected))
        fail_msg("%s: no '%s' in: %s", path, expected, text);
    free(text);
}

static void write_text(const char *path, const char *text) {
    FILE *file = fopen(path, "we");
    assert_non_null(file);
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
}

/* The tokens that the service gives, by another way. */
static void expected_tokens(struct service *service, uint32_t *ids, size_t count, char *text, size_t size) {
    struct prompt prompt;
    struct generation generation;
    prompt_init(&prompt, ids, count, 6);
    generation_run(service, &generation, &prompt);
    size_t length = 0;
    for (size_t i = 0; i < generation.count; i++)
        length += (size_t)snprintf(text + length, size - length, "%s%u", i ? " " : "", generation.tokens[i]);
    snprintf(text + length, size - length, "\n");
    generation_free(&generation);
}

static void generate_prints_tokens(void **state) {
    struct service *service = *state;
    uint32_t ids[] = {1, 22, 333};
    char expected[256];
    expected_tokens(service, ids, 3, expected, sizeof expected);
    assert_int_equal(run(service, "generate", "--ignore-eos", "--max-tokens", "6", "1", "22", "333", NULL), 0);
    assert_file("client.out", expected);
    assert_in_file("client.log", "6 tokens, the first after ");
    assert_in_file("client.log", "; FINISH_REASON_LENGTH, worker w0\n");

    write_text("prompt.txt", "1,\n22,\n333\n");
    assert_int_equal(run(service, "generate", "--ignore-eos", "--max-tokens=6", "--file", "prompt.txt", NULL), 0);
    assert_file("client.out", expected);

    /* Standard input of the processes of the harness is empty. */
    assert_int_equal(run(service, "generate", NULL), 1);
    assert_in_file("client.log", "standard input:1:1: the end without a token id");

    assert_int_equal(run(service, "generate", "--ignore-eos", "--max-tokens=6", "--logprobs=2", "1,22,333", NULL), 0);
    char *text = read_file("client.out", NULL);
    size_t lines = 0, pairs = 0;
    for (const char *c = text; *c; c++)
        lines += *c == '\n', pairs += *c == ':';
    assert_int_equal(lines, 6);
    assert_int_equal(pairs, 12);
    assert_int_equal(strtoul(text, NULL, 10), strtoul(expected, NULL, 10));
    free(text);
}

static void generate_prints_json(void **state) {
    struct service *service = *state;
    int status = run(service, "generate", "--json", "--ignore-eos", "--max-tokens=3", "--seed=7", "--temperature=0.5",
                     "--top-k=40", "--top-p=0.9", "--min-p=0.05", "--repetition-penalty=1.1", "--presence-penalty=0.1",
                     "--frequency-penalty=-0.1", "--stop-token=510,511", "--logprobs=1", "--request-id=r",
                     "--priority=-5", "5", NULL);
    assert_int_equal(status, 0);
    assert_file("client.log", "");
    char *text = read_file("client.out", NULL);
    static const char first[] = "{\"token_ids\":[";
    assert_memory_equal(text, first, strlen(first));
    char *end = strrchr(text, '{');
    assert_non_null(end);
    assert_non_null(strstr(text, "\"logprobs\":[{\"logprob\":-"));
    assert_non_null(strstr(text, "\"usage\":{\"prompt_tokens\":1,\"cached_tokens\":0,\"completion_tokens\":"));
    assert_non_null(strstr(end, "\"worker\":\"w0\",\"resumptions\":0}}\n"));
    free(text);
}

static void forward_prints_logits(void **state) {
    struct service *service = *state;
    uint32_t ids[] = {1, 2, 3}, more[] = {4, 5};
    struct sequences sequences;
    sequences_init(&sequences, ids, 3);
    sequences_add(&sequences, more, 2);
    sequences.request.all_positions = true;
    sequences.request.top_logits = 2;
    Moed__V1__ForwardResponse *response = forward_run(service, &sequences);
    char expected[1024] = "SEQUENCE  POSITION  LOGITS\n";
    for (size_t row = 0; row < 5; row++) {
        const Moed__V1__Logits *logits = response->logits[row < 3 ? 0 : 1];
        const size_t at = 2 * (row < 3 ? row : row - 3), length = strlen(expected);
        snprintf(expected + length, sizeof expected - length, "%8d  %8zu  %u:%.5f %u:%.5f\n", row >= 3, at / 2,
                 logits->ids[at], (double)logits->values[at], logits->ids[at + 1], (double)logits->values[at + 1]);
    }
    rpc_message_free(&response->base);
    assert_int_equal(run(service, "forward", "--all-positions", "--top-logits=2", "1 2 3; 4 5", NULL), 0);
    assert_file("client.out", expected);

    assert_int_equal(run(service, "forward", "--routes", "1 2 3; 4 5", NULL), 0);
    assert_in_file("client.out", "SEQUENCE  LAYER  POSITION  EXPERTS\n       0      0         0  ");
    assert_in_file("client.out", "\n       1      1         1  ");

    assert_int_equal(run(service, "forward", "--json", "--top-logits=1", "--routes", "7", NULL), 0);
    assert_in_file("client.out", "{\"logits\":[{\"rows\":1,\"values\":[");
    assert_in_file("client.out", "\"routes\":[{\"experts\":[");

    sequences.request.top_logits = 0;
    response = forward_run(service, &sequences);
    assert_int_equal(run(service, "forward", "--all-positions", "--output", "logits.f32", "1 2 3; 4 5", NULL), 0);
    assert_file("client.out", "");
    size_t size;
    char *bytes = read_file("logits.f32", &size);
    assert_int_equal(size, 5 * 512 * sizeof(float));
    assert_memory_equal(bytes, response->logits[0]->values, 3 * 512 * sizeof(float));
    assert_memory_equal(bytes + 3 * 512 * sizeof(float), response->logits[1]->values, 2 * 512 * sizeof(float));
    free(bytes);
    rpc_message_free(&response->base);
}

static void model_and_workers(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "model", NULL), 0);
    assert_in_file("client.out", "architecture       qwen3moe\n");
    assert_in_file("client.out", "vocab_size         512\ncontext_length     256\nblock_count        2\n");
    assert_int_equal(run(service, "model", "--json", NULL), 0);
    assert_in_file("client.out", "\"vocab_size\":512,\"context_length\":256,\"block_count\":2,");
    assert_int_equal(run(service, "workers", NULL), 0);
    assert_in_file("client.out", "ID  STATE     BACKEND   RUNNING  WAITING");
    assert_in_file("client.out", "\nw0  READY     cpu             0        0  ");
    assert_int_equal(run(service, "workers", "--json", NULL), 0);
    assert_in_file("client.out", "{\"workers\":[{\"id\":\"w0\",\"backend\":\"cpu\",");
    assert_in_file("client.out", "\"state\":\"READY\",\"running\":0,\"waiting\":0,");
}

static void wrong_usage(void **state) {
    static const struct {
        const char *arguments[4], *error;
    } cases[] = {
        {{"", NULL}, "no command ''"},
        {{"train", NULL}, "no command 'train'"},
        {{"model", "now", NULL}, "operand 'now' where none is taken"},
        {{"model", "--tokens", NULL}, "option --tokens is unknown"},
        {{"generate", "1 2 x", NULL}, "operands:1:5: 'x', expected token ids"},
        {{"generate", "4294967296", NULL}, "operands:1:10: a number over 4294967295"},
        {{"generate", "1;2", NULL}, "2 prompts, one is taken"},
        {{"generate", "--max-tokens=-1", "1", NULL}, "option --max-tokens"},
        {{"generate", "--temperature=nan", "1", NULL}, "option --temperature"},
        {{"generate", "--priority=0.5", "1", NULL}, "--priority: 0.5"},
        {{"generate", "--stop-token=a", "1", NULL}, "--stop-token:1:1: 'a'"},
        {{"generate", "--file=prompt.txt", "1", NULL}, "both as operands and from --file"},
        {{"forward", "1;;2", NULL}, "operands:1:3: ';' without a token id"},
        {{"forward", "--timeout=-1", "1", NULL}, "option --timeout"},
        {{"load", "1", NULL}, "operand '1' where none is taken"},
        {{"load", "--concurrency=2M", NULL}, "option --concurrency"},
        {{"load", "--concurrency=4", "--rate=4"}, "only one is taken"},
        {{"load", "--rate=1e-9", NULL}, "--rate: 1e-09; 0, or 1e-06 to 1e+06, is allowed"},
        {{"load", "--sweep=1,2", "--rate-sweep=1"}, "only one is taken"},
        {{"load", "--sweep=1,2.5", NULL}, "option --sweep: \"2.5\" is not a whole number from 1"},
        {{"load", "--rate-sweep=0", NULL}, "option --rate-sweep: \"0\" is not a number"},
        {{"load", "--rate-sweep=1,nan", NULL}, "option --rate-sweep: \"nan\" is not a number"},
        {{"load", "--arrivals=uniform", NULL}, "option --arrivals"},
        {{"load", "--prompt-tokens=9:8", NULL}, "option --prompt-tokens: \"9:8\" is not N, MIN:MAX"},
        {{"load", "--output-tokens=0", NULL}, "option --output-tokens: \"0\" is not N, MIN:MAX"},
        {{"load", "--trace=t", "--rate=1"}, "--trace has its own arrivals"},
        {{"load", "--plot=p.svg", "--rate=1"}, "--plot draws a --sweep"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const *arguments = cases[i].arguments;
        assert_int_equal(run(NULL, arguments[0], arguments[1], arguments[1] ? arguments[2] : NULL, NULL), 2);
        assert_in_file("client.log", cases[i].error);
        assert_file("client.out", "");
    }
}

static void local_errors(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "generate", "--file=/nonexistent/prompt", NULL), 1);
    assert_file("client.log", "moed-client: /nonexistent/prompt: No such file or directory\n");
    assert_int_equal(run(service, "forward", "--output=/nonexistent/logits", "1", NULL), 1);
    assert_file("client.log", "moed-client: /nonexistent/logits: No such file or directory\n");
    assert_int_equal(run(service, "model", "--tls-ca=/nonexistent/ca", NULL), 1);
    assert_file("client.log", "moed-client: /nonexistent/ca: No such file or directory\n");
    assert_int_equal(run(service, "model", "--tls-cert=prompt.txt", NULL), 1);
    assert_in_file("client.log", "needs both");
}

static void failing_calls(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "generate", "512", NULL), 10 + STATUS_INVALID_ARGUMENT);
    assert_in_file("client.log", "moed-client: INVALID_ARGUMENT: tokens.ids[0]: 512");
    assert_file("client.out", "");
    assert_int_equal(run(service, "generate", "--timeout=0.000001", "1", NULL), 10 + STATUS_DEADLINE_EXCEEDED);
    assert_in_file("client.log", "moed-client: DEADLINE_EXCEEDED: ");

    /* Where nobody listens: a port that the kernel gave and that is closed again. */
    struct service gone;
    service_start(&gone, "ipc://gone.sock");
    assert_int_equal(run(&gone, "generate", "1", NULL), 10 + STATUS_UNAVAILABLE);
    assert_in_file("client.log", "moed-client: UNAVAILABLE: ");
    assert_int_equal(run(&gone, "model", "--wait-ready=0.2", NULL), 10 + STATUS_UNAVAILABLE);
    assert_in_file("client.log", "was not ready within 0.2 s");
    process_signal(gone.gateway, SIGKILL);
    process_finish(gone.gateway);
    assert_int_equal(run(&gone, "workers", NULL), 10 + STATUS_UNAVAILABLE);
    assert_int_equal(run(&gone, "model", "--wait-ready=0.2", NULL), 10 + STATUS_UNAVAILABLE);
    service_close(&gone);
}

static void interrupt_cancels_the_call(void **state) {
    struct service *service = *state;
    const char *const argv[] = {"moed-client", "generate", "--target", service->address, "--ignore-eos", "1", NULL};
    /* The stream may end first, on a fast machine: then again. */
    for (unsigned tries = 0; tries < 20; tries++) {
        struct process *client = process_start("interrupted", argv);
        uint64_t deadline = deadline_after(PATIENCE_S);
        for (bool begun = false; !begun;) {
            char *output = process_output(client);
            begun = *output;
            free(output);
            if (!begun)
                pause_until(deadline, "the first token");
        }
        process_signal(client, SIGINT);
        int status = process_finish(client);
        service_wait_idle(service);
        if (status == 130)
            return;
        assert_int_equal(status, 0);
    }
    fail_msg("20 streams ended before the interrupt");
}

/* ---- load */

static json_t *read_json(const char *path) {
    json_error_t error;
    json_t *report = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (!report)
        fail_msg("%s: %s", path, error.text);
    return report;
}

static json_int_t whole(const json_t *object, const char *name) {
    const json_t *value = json_object_get(object, name);
    if (!json_is_integer(value))
        fail_msg("%s is no whole number", name);
    return json_integer_value(value);
}

static json_int_t samples(const json_t *run, const char *name) {
    return whole(json_object_get(json_object_get(run, "latency"), name), "count");
}

static size_t count_lines(const char *path) {
    char *text = read_file(path, NULL);
    size_t lines = 0;
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    free(text);
    return lines;
}

static void load_counts_what_it_sent(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "load", "--json", "--concurrency=4", "--requests=12", "--warmup=3", "--connections=2",
                         "--prompt-tokens=10", "--output-tokens=5", "--slo-ttft=1000000", "--csv=load.csv", NULL),
                     0);
    assert_file("client.log", "");
    json_t *report = read_json("client.out"), *result = json_array_get(json_object_get(report, "runs"), 0);
    assert_int_equal(whole(result, "succeeded"), 12);
    assert_int_equal(whole(result, "failed"), 0);
    assert_int_equal(whole(result, "warmup"), 3);
    assert_int_equal(samples(result, "ttft_ms"), 12);
    assert_int_equal(samples(result, "e2e_ms"), 12);
    const json_t *tokens = json_object_get(result, "tokens");
    assert_int_equal(whole(tokens, "in"), 120);
    assert_int_equal(whole(tokens, "out"), 60);
    assert_int_equal(samples(result, "itl_ms"), whole(tokens, "messages") - 12);
    assert_int_equal(whole(json_object_get(result, "goodput"), "requests"), 12);
    json_decref(report);
    assert_int_equal(count_lines("load.csv"), 1 + 15);
    service_wait_idle(service);
}

static void load_keeps_a_rate(void **state) {
    struct service *service = *state;
    uint64_t begin = clock_now_ns();
    assert_int_equal(run(service, "load", "--json", "--rate=20", "--arrivals=constant", "--duration=1",
                         "--prompt-tokens=2:6", "--output-tokens=1", NULL),
                     0);
    assert_true(clock_now_ns() - begin > UINT64_C(950000000));
    json_t *report = read_json("client.out"), *result = json_array_get(json_object_get(report, "runs"), 0);
    assert_int_equal(whole(result, "succeeded"), 20);
    assert_int_equal(samples(result, "late_starts_ms"), 20);
    json_decref(report);
}

/* One at a time, all due at once: the last one's latency is that of all together, though it was started late. */
static void load_hides_no_queue(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "load", "--json", "--rate=1000000", "--arrivals=constant", "--requests=8",
                         "--max-in-flight=1", "--output-tokens=20", "--prompt-tokens=4", NULL),
                     0);
    json_t *report = read_json("client.out"), *result = json_array_get(json_object_get(report, "runs"), 0);
    double slowest_s = json_real_value(json_object_get(
                           json_object_get(json_object_get(result, "latency"), "e2e_ms"), "max")) / 1e3;
    double all_s = json_real_value(json_object_get(result, "seconds"));
    assert_int_equal(whole(result, "succeeded"), 8);
    assert_true(slowest_s > 0.95 * all_s && slowest_s <= all_s);
    json_decref(report);
}

static void load_replays_a_trace(void **state) {
    struct service *service = *state;
    write_text("trace.jsonl", "{\"arrival\": 5, \"prompt_tokens\": 3, \"output_tokens\": 2}\n"
                              "{\"arrival\": 5.3, \"prompt_tokens\": 7, \"output_tokens\": 4, \"shared_prefix\": 7}\n");
    assert_int_equal(run(service, "load", "--json", "--trace=trace.jsonl", NULL), 0);
    json_t *report = read_json("client.out"), *result = json_array_get(json_object_get(report, "runs"), 0);
    assert_int_equal(whole(result, "succeeded"), 2);
    assert_int_equal(whole(json_object_get(result, "tokens"), "in"), 10);
    assert_int_equal(whole(json_object_get(result, "tokens"), "out"), 6);
    assert_true(json_real_value(json_object_get(result, "seconds")) > 0.3);
    json_decref(report);

    write_text("trace.jsonl", "{\"arrival\": 5, \"prompt_tokens\": 3, \"output_tokens\": 2}\n{\"arrival\": \"6\"}\n");
    assert_int_equal(run(service, "load", "--trace=trace.jsonl", NULL), 1);
    assert_in_file("client.log", "trace.jsonl:2: arrival: \"6\"; a number of seconds from 5");
    write_text("trace.jsonl", "{\"arrival\": 5, \"prompt_tokens\": 250, \"output_tokens\": 7}\n");
    assert_int_equal(run(service, "load", "--trace=trace.jsonl", NULL), 2);
    assert_in_file("client.log", "trace.jsonl:1: prompt_tokens and output_tokens: 250 and 7; the model's context "
                                 "holds 256");
    assert_int_equal(run(service, "load", "--trace=trace.jsonl", "--warmup=1", NULL), 2);
    assert_in_file("client.log", "--warmup: 1 requests, but trace.jsonl has only 1");
}

static void load_sweeps_and_plots(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "load", "--sweep=1,2,4", "--requests=6", "--prompt-tokens=4", "--output-tokens=3",
                         "--plot=sweep.svg", NULL),
                     0);
    assert_in_file("client.out", "\n        1        6       0  ");
    assert_in_file("client.out", "\n        4        6       0  ");
    assert_int_equal(count_lines("client.out"), 5);
    assert_in_file("sweep.svg", ">time to first token, ms</text>");
    assert_in_file("sweep.svg", "</svg>\n");
}

static void load_tells_failures(void **state) {
    struct service *service = *state;
    assert_int_equal(run(service, "load", "--requests=4", "--timeout=0.000001", "--json", NULL),
                     10 + STATUS_DEADLINE_EXCEEDED); /* of the model's description, which comes first */
    assert_int_equal(run(service, "load", "--csv=/nonexistent/csv", NULL), 1);
    assert_file("client.log", "moed-client: /nonexistent/csv: No such file or directory\n");
    assert_int_equal(run(service, "load", "--csv=/dev/full", "--requests=1", NULL), 1);
    assert_in_file("client.log", "/dev/full: cannot be written");
    assert_int_equal(run(service, "load", "--output-tokens=200", NULL), 2);
    assert_in_file("client.log", "up to 128 and 200; the model's context holds 256 together");

    /* A gateway without a worker: all requests fail, and the report says how. */
    struct service lonely;
    service_start(&lonely, "ipc://lonely.sock");
    assert_int_equal(run(&lonely, "load", NULL), 10 + STATUS_UNAVAILABLE);
    process_signal(lonely.gateway, SIGKILL);
    process_finish(lonely.gateway);
    assert_int_equal(run(&lonely, "load", NULL), 10 + STATUS_UNAVAILABLE);
    assert_in_file("client.log", "moed-client: UNAVAILABLE: ");
    service_close(&lonely);
}

/* Until a worker runs something. */
static void wait_busy(struct service *service) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (bool busy = false; !busy;) {
        Moed__V1__ListWorkersResponse *workers = service_workers(service);
        for (size_t i = 0; i < workers->n_workers; i++)
            busy = busy || workers->workers[i]->running;
        rpc_message_free(&workers->base);
        if (!busy)
            pause_until(deadline, "a request to run");
    }
}

static void load_outlives_its_server(void **state) {
    struct service service;
    service_start(&service, "ipc://brief.sock");
    const char *const worker[] = {"moed-worker", "--model", MODEL_FILE, "--gateway", "ipc://brief.sock",
                                  "--backend=cpu", "--threads=1", NULL};
    struct process *brief = process_start("brief", worker);
    service_wait_workers(&service, 1);
    const char *const argv[] = {"moed-client", "load", "--target", service.address, "--requests=500",
                                "--concurrency=4", "--output-tokens=100", NULL};
    struct process *client = process_start("outlives", argv);
    wait_busy(&service);
    process_signal(service.gateway, SIGKILL);
    process_finish(service.gateway);
    assert_int_equal(process_finish(client), 3);
    assert_in_file("outlives.out", " x UNAVAILABLE\n");
    process_signal(brief, SIGTERM);
    process_finish(brief);
    service_close(&service);
}

static void load_ends_at_an_interrupt(void **state) {
    struct service *service = *state;
    const char *const argv[] = {"moed-client", "load", "--target", service->address, "--duration=300",
                                "--concurrency=3", "--csv=cut.csv", "--output-tokens=100", "--json", NULL};
    struct process *client = process_start("cut", argv);
    wait_busy(service);
    process_signal(client, SIGINT);
    assert_int_equal(process_finish(client), 130);
    json_t *report = read_json("cut.out"), *result = json_array_get(json_object_get(report, "runs"), 0);
    assert_true(json_is_true(json_object_get(report, "interrupted")));
    assert_int_equal(whole(result, "failed"), 0);
    assert_int_equal(count_lines("cut.csv"), 1 + whole(result, "succeeded") + whole(result, "unfinished"));
    json_decref(report);
    service_wait_idle(service);
}

static void full_standard_output(void **state) {
    struct service *service = *state;
    char command[512];
    snprintf(command, sizeof command, "../moed-client generate --target %s --ignore-eos 1 >/dev/full 2>full.log",
             service->address);
    assert_int_equal(WEXITSTATUS(system(command)), 1);
    assert_file("full.log", "moed-client: standard output: No space left on device\n");
    snprintf(command, sizeof command,
             "(../moed-client generate --target %s --ignore-eos 1; echo $? >status) 2>pipe.log | :", service->address);
    assert_int_equal(system(command), 0);
    assert_file("status", "1\n");
    assert_file("pipe.log", "moed-client: standard output: Broken pipe\n");
    service_wait_idle(service);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(generate_prints_tokens),
        cmocka_unit_test(generate_prints_json),
        cmocka_unit_test(forward_prints_logits),
        cmocka_unit_test(model_and_workers),
        cmocka_unit_test(wrong_usage),
        cmocka_unit_test(local_errors),
        cmocka_unit_test(failing_calls),
        cmocka_unit_test(interrupt_cancels_the_call),
        cmocka_unit_test(load_counts_what_it_sent),
        cmocka_unit_test(load_keeps_a_rate),
        cmocka_unit_test(load_hides_no_queue),
        cmocka_unit_test(load_replays_a_trace),
        cmocka_unit_test(load_sweeps_and_plots),
        cmocka_unit_test(load_tells_failures),
        cmocka_unit_test(load_outlives_its_server),
        cmocka_unit_test(load_ends_at_an_interrupt),
        cmocka_unit_test(full_standard_output),
    };
    return cmocka_run_group_tests(tests, service_setup, service_teardown);
}
