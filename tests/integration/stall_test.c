#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/integration/service.h"

/*
 * A caller that reads nothing: HTTP/2 by hand (RFC 9113), for no gRPC library would leave its window shut. The gateway
 * must cut it off, and nobody else may notice it.
 */

enum { FRAME_DATA = 0, FRAME_HEADERS = 1, FRAME_SETTINGS = 4, END_STREAM = 1, END_HEADERS = 4, WINDOW = 100 };

static size_t put_frame(unsigned char *out, unsigned type, unsigned flags, unsigned stream, const void *body,
                        size_t size) {
    const unsigned char header[9] = {0, (unsigned char)(size >> 8), (unsigned char)size, (unsigned char)type,
                                     (unsigned char)flags, 0, 0, 0, (unsigned char)stream};
    memcpy(out, header, sizeof header);
    memcpy(out + sizeof header, body, size);
    return sizeof header + size;
}

/* A header as a literal, not indexed and not compressed (RFC 7541, 6.2.2). */
static size_t put_header(unsigned char *out, const char *name, const char *value) {
    size_t name_size = strlen(name), value_size = strlen(value), at = 0;
    out[at++] = 0;
    out[at++] = (unsigned char)name_size;
    memcpy(out + at, name, name_size);
    at += name_size;
    out[at++] = (unsigned char)value_size;
    memcpy(out + at, value, value_size);
    return at + value_size;
}

/* Starts a Generate on a connection whose window holds a few tokens and never opens again. */
static int call_and_read_nothing(const char *address) {
    static const char *const headers[][2] = {{":method", "POST"}, {":scheme", "http"},
                                             {":path", "/moed.v1.Inference/Generate"}, {":authority", "x"},
                                             {"te", "trailers"}, {"content-type", "application/grpc"}};
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    static const unsigned char settings[] = {0, 4, 0, 0, 0, WINDOW}; /* INITIAL_WINDOW_SIZE */
    static const unsigned char request[] = {0, 0, 0, 0, 7, 0x12, 3, 0x0a, 1, 1, 0x40, 1}; /* tokens [1], ignore_eos */
    unsigned char bytes[1024], block[512];
    size_t size = sizeof preface - 1, block_size = 0;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    to.sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1));
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++)
        block_size += put_header(block + block_size, headers[i][0], headers[i][1]);
    memcpy(bytes, preface, size);
    size += put_frame(bytes + size, FRAME_SETTINGS, 0, 0, settings, sizeof settings);
    size += put_frame(bytes + size, FRAME_HEADERS, END_HEADERS, 1, block, block_size);
    size += put_frame(bytes + size, FRAME_DATA, END_STREAM, 1, request, sizeof request);
    int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(connection, (struct sockaddr *)&to, sizeof to), 0);
    assert_int_equal(send(connection, bytes, size, 0), size);
    return connection;
}

static void a_caller_that_reads_nothing_is_cut_off(void **state) {
    struct service *service = *state;
    char line[512];
    int connection = call_and_read_nothing(service->address);
    process_wait_log(service->gateway, "call_stalled", "Generate", line, sizeof line);
    service_wait_idle(service);
    close(connection);
}

static int setup(void **state) {
    static struct service service;
    if (model_setup(state, 256) != 0)
        return -1;
    setenv("MOED_STALL_TIMEOUT", "1", 1); /* after the harness has cleared the environment */
    service_start(&service, WORKER_ENDPOINT);
    worker_start("w0", NULL);
    service_wait_workers(&service, 1);
    *state = &service;
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_caller_that_reads_nothing_is_cut_off)};
    return cmocka_run_group_tests(tests, setup, service_teardown);
}
