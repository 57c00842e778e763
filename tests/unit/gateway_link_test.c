#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include <cmocka.h>

#include "common/log.h"
#include "gateway/link.h"

static void *context;
static char directory[64], path[128], endpoint[160];
static const char *endpoints[] = {endpoint};
static struct link *open_link; /* closed after the test, however it ends */

static int setup(void **state) {
    strcpy(directory, "/tmp/moed-link-XXXXXX");
    log_setup("gateway_link_test", LOG_ERROR, LOG_TEXT);
    context = zmq_ctx_new();
    if (!mkdtemp(directory))
        return -1;
    snprintf(path, sizeof path, "%s/run/worker.sock", directory);
    snprintf(endpoint, sizeof endpoint, "ipc://%s", path);
    return 0;
}

static int teardown(void **state) {
    link_close(open_link);
    open_link = NULL;
    zmq_ctx_term(context);
    unlink(path);
    *strrchr(path, '/') = '\0';
    rmdir(path);
    return rmdir(directory);
}

static void assert_refused(const char *words) {
    struct status status = {0};
    struct link *second = link_bind(context, endpoints, 1, &status);
    link_close(second);
    assert_null(second);
    assert_non_null(strstr(status.message, "--worker-endpoint"));
    if (!strstr(status.message, words))
        fail_msg("\"%s\" is not in \"%s\"", words, status.message);
}

static void makes_the_directory_and_cleans_up(void **state) {
    struct status status;
    open_link = link_bind(context, endpoints, 1, &status);
    assert_non_null(open_link);
    assert_int_equal(access(path, F_OK), 0);
    link_close(open_link);
    open_link = NULL;
    assert_int_equal(access(path, F_OK), -1);
}

static void replaces_a_stale_socket(void **state) {
    struct status status;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    *strrchr(path, '/') = '\0';
    mkdir(path, 0755);
    path[strlen(path)] = '/';
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int dead = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(dead, (struct sockaddr *)&address, sizeof address), 0);
    close(dead); /* nobody listens, the file stays */
    open_link = link_bind(context, endpoints, 1, &status);
    assert_non_null(open_link);
}

static void leaves_a_living_socket_alone(void **state) {
    struct status status;
    open_link = link_bind(context, endpoints, 1, &status);
    assert_non_null(open_link);
    assert_refused("another process listens there");
    assert_int_equal(access(path, F_OK), 0);
}

static void refuses_what_it_cannot_bind(void **state) {
    FILE *file;
    *strrchr(path, '/') = '\0';
    mkdir(path, 0755);
    path[strlen(path)] = '/';
    file = fopen(path, "w");
    assert_non_null(file);
    fclose(file);
    assert_refused("no socket is in the way");
    assert_int_equal(access(path, F_OK), 0);

    strcpy(endpoint, "ipc:///proc/nowhere/worker.sock");
    assert_refused("/proc/nowhere");
    strcpy(endpoint, "ipc://");
    assert_refused("a path of 0 bytes");
    snprintf(endpoint, sizeof endpoint, "ipc:///%0130d", 0);
    assert_refused("a path of 131 bytes; 1 to 107");
    strcpy(endpoint, "carrier-pigeon://coop");
    assert_refused("ipc://PATH or tcp://ADDR:PORT");
    strcpy(endpoint, "tcp://127.0.0.1");
    assert_refused("ipc://PATH or tcp://ADDR:PORT");
}

static void refuses_a_port_in_use(void **state) {
    struct sockaddr address = {.sa_family = AF_INET};
    socklen_t size = sizeof address;
    int other = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(other, &address, sizeof address), 0);
    assert_int_equal(listen(other, 1), 0);
    assert_int_equal(getsockname(other, &address, &size), 0);
    unsigned port = (unsigned)(unsigned char)address.sa_data[0] << 8 | (unsigned char)address.sa_data[1];
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:%u", port);
    assert_refused("Address already in use");
    close(other);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(makes_the_directory_and_cleans_up, setup, teardown),
        cmocka_unit_test_setup_teardown(replaces_a_stale_socket, setup, teardown),
        cmocka_unit_test_setup_teardown(leaves_a_living_socket_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_what_it_cannot_bind, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_a_port_in_use, setup, teardown),
    };
    return cmocka_run_group_tests_name("gateway_link", tests, NULL, NULL);
}
