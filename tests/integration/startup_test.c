#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* What keeps gateway or worker from starting is told in one line, with exit status 1. */

/* Runs to the end: exit status 1, and exactly one error in the log, with both texts in it. */
static void assert_fails(const char *const *argv, const char *text, const char *also) {
    struct process *process = process_start("failing", argv);
    int status = process_wait(process);
    char *log = process_log(process), *line = NULL;
    size_t errors = 0;
    for (char *at = log; (at = strstr(at, " error moed-")); at++, errors++)
        line = at;
    if (status != 1 || errors != 1 || !strstr(line, text) || !strstr(line, also))
        fail_msg("%s: exit status %d; expected 1 and one error with '%s' and '%s', found:\n%s", argv[0], status, text,
                 also, log);
    free(log);
    process_finish(process);
}

#define GATEWAY(listen, endpoint) \
    (const char *const[]) { "moed-gateway", "--listen", (listen), "--worker-endpoint", (endpoint), NULL }
#define WORKER(model, gateway) \
    (const char *const[]) { "moed-worker", "--backend", "cpu", "--model", (model), "--gateway", (gateway), NULL }

static void port_in_use(void **state) {
    struct service service;
    service_start(&service, WORKER_ENDPOINT);
    assert_fails(GATEWAY(service.address, "ipc://second.sock"), service.address, "in use");
    service_close(&service);
}

static void worker_endpoint_in_use(void **state) {
    struct service service;
    service_start(&service, WORKER_ENDPOINT);
    assert_fails(GATEWAY("127.0.0.1:0", WORKER_ENDPOINT), WORKER_ENDPOINT, "another process listens there");
    worker_start("w0", NULL); /* the first one still has it */
    service_wait_workers(&service, 1);
    service_close(&service);
}

static void unusable_addresses(void **state) {
    assert_fails(GATEWAY("127.0.0.1:99999", WORKER_ENDPOINT), "127.0.0.1:99999", "");
    assert_fails(GATEWAY("nowhere", WORKER_ENDPOINT), "nowhere", "");
    assert_fails(GATEWAY("127.0.0.1:0", "ipc://missing/too/workers.sock"), "ipc://missing/too/workers.sock",
                 "No such file or directory");
    assert_fails(GATEWAY("127.0.0.1:0", "ipc://" MODEL_FILE "/workers.sock"), MODEL_FILE, "Not a directory");
    assert_fails(GATEWAY("127.0.0.1:0", "ipc://" MODEL_FILE), MODEL_FILE, "no socket");
    assert_fails(GATEWAY("127.0.0.1:0", "carrier-pigeon://coop"), "carrier-pigeon://coop", "");
    assert_fails(WORKER(MODEL_FILE, "carrier-pigeon://coop"), "carrier-pigeon://coop", "");
}

static void unusable_metrics_addresses(void **state) {
    struct service service;
    char metrics[64];
    service_start_with(&service, WORKER_ENDPOINT, (const char *const[]){"--metrics-listen", "127.0.0.1:0", NULL});
    char *log = process_log(service.gateway);
    assert_int_equal(sscanf(strstr(log, "metrics_listening"), "metrics_listening address=%63s", metrics), 1);
    free(log);
    struct {
        const char *address, *reason;
    } cases[] = {{metrics, "in use"}, {service.address, "in use"}, {"nowhere", "allowed"}, {"127.0.0.1:", "allowed"},
                 {"127.0.0.1:99999", "allowed"}, {"::1:5", "allowed"}, {"192.0.2.1:0", "assign"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const gateway[] = {"moed-gateway", "--listen", "127.0.0.1:0", "--worker-endpoint",
                                       "ipc://second.sock", "--metrics-listen", cases[i].address, NULL};
        const char *const worker[] = {"moed-worker", "--backend", "cpu", "--model", MODEL_FILE, "--gateway",
                                      WORKER_ENDPOINT, "--metrics-listen", cases[i].address, NULL};
        assert_fails(gateway, "--metrics-listen: ", cases[i].address);
        assert_fails(gateway, "--metrics-listen: ", cases[i].reason);
        assert_fails(worker, "--metrics-listen: ", cases[i].reason);
    }
    service_close(&service);

    static const char *const programs[] = {"moed-gateway", "moed-worker"};
    for (size_t i = 0; i < 2; i++) {
        const char *const argv[] = {programs[i], "--metrics-prefix", "no-name", i ? "--model" : NULL, MODEL_FILE, NULL};
        assert_int_equal(process_run("prefix", argv), 2);
        char *text = read_file("prefix.log", NULL);
        assert_non_null(strstr(text, "--metrics-prefix: \"no-name\""));
        free(text);
    }
}

static void write_file(const char *path, const char *bytes, size_t size) {
    FILE *file = fopen(path, "we");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static void unusable_models(void **state) {
    assert_fails(WORKER("missing.gguf", WORKER_ENDPOINT), "missing.gguf", "No such file or directory");
    assert_fails(WORKER(".", WORKER_ENDPOINT), ".", "");

    size_t size;
    char *model = read_file(MODEL_FILE, &size);
    for (size_t sixteenths = 0; sixteenths < 16; sixteenths += 3) {
        write_file("damaged.gguf", model, size * sixteenths / 16);
        assert_fails(WORKER("damaged.gguf", WORKER_ENDPOINT), "damaged.gguf", "");
    }
    /* The magic, the version, the number of tensors and that of keys: see common/gguf.h. */
    static const size_t fields[] = {0, 4, 8, 16};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        model[fields[i]] ^= 0x40;
        write_file("damaged.gguf", model, size);
        assert_fails(WORKER("damaged.gguf", WORKER_ENDPOINT), "damaged.gguf", "");
        model[fields[i]] ^= 0x40;
    }
    free(model);
}

static void help_and_wrong_usage(void **state) {
    static const char *const programs[] = {"moed-gateway", "moed-worker", "moed-client"};
    for (size_t i = 0; i < 3; i++) {
        const char *const help[] = {programs[i], "--help", NULL}, *const version[] = {programs[i], "--version", NULL};
        const char *const wrong[] = {programs[i], "--nonsense", NULL};
        assert_int_equal(process_run("help", help), 0);
        char *text = read_file("help.out", NULL);
        assert_non_null(strstr(text, programs[i]));
        free(text);
        assert_int_equal(process_run("version", version), 0);
        assert_int_equal(process_run("wrong", wrong), 2);
        text = read_file("wrong.log", NULL);
        assert_non_null(strstr(text, "--nonsense"));
        free(text);
    }
}

/* Both end at once when there is nothing to drain, whatever they are waiting for. */
static void nothing_to_drain(void **state) {
    static const int signals[] = {SIGTERM, SIGINT};
    for (size_t i = 0; i < 2; i++) {
        struct service service;
        struct process *worker = worker_start("w0", NULL); /* no gateway is there yet */
        service_start(&service, WORKER_ENDPOINT);
        service_wait_workers(&service, 1);
        process_signal(service.gateway, signals[i]);
        assert_int_equal(process_finish(service.gateway), 0);
        process_signal(worker, signals[i]);
        assert_int_equal(process_finish(worker), 0);
        service_close(&service);
    }
}

static int setup(void **state) {
    return model_setup(state, 256);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(port_in_use, harness_stop_all),
        cmocka_unit_test_teardown(worker_endpoint_in_use, harness_stop_all),
        cmocka_unit_test_teardown(unusable_addresses, harness_stop_all),
        cmocka_unit_test_teardown(unusable_metrics_addresses, harness_stop_all),
        cmocka_unit_test_teardown(unusable_models, harness_stop_all),
        cmocka_unit_test_teardown(help_and_wrong_usage, harness_stop_all),
        cmocka_unit_test_teardown(nothing_to_drain, harness_stop_all),
    };
    return cmocka_run_group_tests(tests, setup, model_teardown);
}
