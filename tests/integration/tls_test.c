#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/service.h"

/* TLS between clients and the gateway, with certificates that openssl(1) makes: skipped where that is missing. */

static struct process *gateway;
static char address[64];

static void certificate(const char *name) {
    char command[512];
    snprintf(command, sizeof command,
             "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout %s.key -out %s.pem "
             "-subj /CN=%s -addext subjectAltName=IP:127.0.0.1 2>%s.err",
             name, name, name, name);
    assert_int_equal(system(command), 0);
}

static void gateway_start(const char *client_ca) {
    const char *const argv[] = {"moed-gateway", "--listen", "127.0.0.1:0", "--worker-endpoint", WORKER_ENDPOINT,
                                "--tls-cert", "server.pem", "--tls-key", "server.key",
                                client_ca ? "--tls-client-ca" : NULL, client_ca, NULL};
    char line[512];
    gateway = process_start("gateway", argv);
    process_wait_log(gateway, " listening ", "address=", line, sizeof line);
    assert_int_equal(sscanf(strstr(line, "address="), "address=%63s", address), 1);
}

/* Calls ListWorkers with moed-client and these options; its exit status. */
static int call(const char *first, const char *second, const char *third) {
    const char *const argv[] = {"moed-client", "workers", "--timeout=20", "--target", address,
                                first,         second,    third,          NULL};
    return process_run("client", argv);
}

static void the_gateway_shows_its_certificate(void **state) {
    certificate("server");
    certificate("other");
    gateway_start(NULL);
    assert_int_equal(call("--tls-ca=server.pem", NULL, NULL), 0);
    assert_int_equal(call("--tls-ca=other.pem", NULL, NULL), 10 + STATUS_UNAVAILABLE);
    assert_int_equal(call("--tls", NULL, NULL), 10 + STATUS_UNAVAILABLE); /* the system knows no such authority */
    assert_int_equal(call(NULL, NULL, NULL), 10 + STATUS_UNAVAILABLE);
    assert_int_equal(call("--tls-ca=server.pem", NULL, NULL), 0);
}

static void the_client_shows_its_certificate(void **state) {
    certificate("server");
    certificate("client");
    certificate("other");
    gateway_start("client.pem");
    const int refused = 10 + STATUS_UNAVAILABLE;
    assert_int_equal(call("--tls-ca=server.pem", "--tls-cert=client.pem", "--tls-key=client.key"), 0);
    assert_int_equal(call("--tls-ca=server.pem", "--tls-cert=other.pem", "--tls-key=other.key"), refused);
    assert_int_equal(call("--tls-ca=server.pem", NULL, NULL), refused);
    assert_int_equal(call("--tls-ca=server.pem", "--tls-cert=client.pem", "--tls-key=client.key"), 0);
}

int main(void) {
    if (system("openssl version >/dev/null 2>&1") != 0) {
        puts("1..0 # SKIP there is no openssl program"); /* cmocka's own skip() reads as a failure in TAP */
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(the_gateway_shows_its_certificate, harness_stop_all),
        cmocka_unit_test_teardown(the_client_shows_its_certificate, harness_stop_all),
    };
    return cmocka_run_group_tests(tests, harness_setup, harness_teardown);
}
