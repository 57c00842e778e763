#include "common/metrics_http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/log.h"

/* Anybody may connect; what they can take up is bounded. */
enum { CONNECTIONS_MAX = 64, CONNECTION_BYTES = 16 << 10, IDLE_TIMEOUT_S = 30, BACKLOG = 16 };

#define OPTION "--metrics-listen"

struct metrics_http {
    int socket; /* -1: the daemon's */
    struct MHD_Daemon *daemon;
    metrics_render *render;
    void *context;
};

/* ---- addresses */

/* Takes "ADDR:PORT" apart; the brackets around an IPv6 address are left out. */
static int split(const char *address, char *host, size_t host_size, char *port, size_t port_size) {
    const char *colon = strrchr(address, ':');
    size_t length = colon ? (size_t)(colon - address) : 0;
    size_t digits = colon ? strspn(colon + 1, "0123456789") : 0;
    if (length == 0 || digits < 1 || digits > 5 || colon[1 + digits] != '\0' || atoi(colon + 1) > UINT16_MAX)
        return -1;
    snprintf(port, port_size, "%s", colon + 1);
    if (address[0] == '[' && address[length - 1] == ']') {
        address++;
        length -= 2;
    } else if (memchr(address, ':', length)) {
        return -1;
    }
    if (length == 0 || length >= host_size)
        return -1;
    snprintf(host, host_size, "%.*s", (int)length, address);
    return 0;
}

/* Tries what a name resolves to; -1 leaves the last reason in errno. */
static int bind_any(const struct addrinfo *list) {
    const int on = 1;
    for (const struct addrinfo *entry = list; entry; entry = entry->ai_next) {
        int fd = socket(entry->ai_family, entry->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, entry->ai_protocol);
        if (fd < 0)
            continue;
        if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
            bind(fd, entry->ai_addr, entry->ai_addrlen) == 0)
            return fd;
        int error = errno;
        close(fd);
        errno = error;
    }
    return -1;
}

int metrics_http_open(const char *address, struct metrics_http **out, struct status *status) {
    char host[256], port[8];
    struct addrinfo *list;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    *out = NULL;
    if (split(address, host, sizeof host, port, sizeof port))
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          OPTION ": \"%.300s\"; ADDR:PORT with a port up to 65535 is allowed", address);
    int error = getaddrinfo(host, port, &hints, &list);
    if (error)
        return status_set(status, STATUS_INVALID_ARGUMENT, OPTION ": %s: %s", address, gai_strerror(error));
    int fd = bind_any(list);
    freeaddrinfo(list);
    if (fd < 0)
        return status_set(status, STATUS_UNAVAILABLE, OPTION ": cannot listen on %s: %s", address, strerror(errno));
    struct metrics_http *http = calloc(1, sizeof *http);
    if (!http) {
        close(fd);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the metrics' listener");
    }
    http->socket = fd;
    *out = http;
    return 0;
}

static void describe(int fd, char *out, size_t size) {
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    char host[128] = "?", port[16] = "?";
    if (getsockname(fd, (struct sockaddr *)&address, &length) == 0)
        getnameinfo((struct sockaddr *)&address, length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV);
    snprintf(out, size, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
}

/* ---- requests, on the daemon's thread */

/* Queues an answer, whose bytes it takes where they are to be freed. */
static enum MHD_Result answer(struct MHD_Connection *connection, unsigned code, char *bytes, size_t size,
                              enum MHD_ResponseMemoryMode mode, const char *type) {
    struct MHD_Response *response = MHD_create_response_from_buffer(size, bytes, mode);
    if (!response) {
        if (mode == MHD_RESPMEM_MUST_FREE)
            free(bytes);
        return MHD_NO;
    }
    enum MHD_Result result = MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    if (result == MHD_YES && code == MHD_HTTP_METHOD_NOT_ALLOWED)
        result = MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, MHD_HTTP_METHOD_GET);
    if (result == MHD_YES)
        result = MHD_queue_response(connection, code, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result refuse(struct MHD_Connection *connection, unsigned code, const char *why) {
    return answer(connection, code, (char *)why, strlen(why), MHD_RESPMEM_PERSISTENT, "text/plain; charset=utf-8");
}

static enum MHD_Result send_page(const struct metrics_http *http, struct MHD_Connection *connection) {
    struct metrics_text text = {0};
    http->render(http->context, &text);
    if (text.failed) {
        metrics_text_free(&text);
        return refuse(connection, MHD_HTTP_INTERNAL_SERVER_ERROR, "no memory for the page\n");
    }
    return answer(connection, MHD_HTTP_OK, text.bytes, text.length, MHD_RESPMEM_MUST_FREE,
                  "text/plain; version=0.0.4; charset=utf-8");
}

/* Called when the header is there (*request is NULL), for every piece of a body, and at the end. */
static enum MHD_Result on_request(void *context, struct MHD_Connection *connection, const char *path,
                                  const char *method, const char *version, const char *body, size_t *body_size,
                                  void **request) {
    static char seen;
    if (*request == NULL) {
        *request = &seen;
        if (strcmp(path, "/metrics") != 0)
            return refuse(connection, MHD_HTTP_NOT_FOUND, "only /metrics is here\n");
        if (strcmp(method, MHD_HTTP_METHOD_GET) != 0)
            return refuse(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET is allowed\n");
        return MHD_YES;
    }
    if (*body_size > 0) {
        *body_size = 0;
        return MHD_YES;
    }
    return send_page(context, connection);
}

static void on_log(void *context, const char *format, va_list arguments) {
    char message[512];
    vsnprintf(message, sizeof message, format, arguments);
    message[strcspn(message, "\n")] = '\0';
    log_debug("metrics_http", LOG_STR("message", message));
}

/* ---- start and stop */

int metrics_http_serve(struct metrics_http *http, metrics_render *render, void *context, struct status *status) {
    char address[160];
    describe(http->socket, address, sizeof address);
    http->render = render;
    http->context = context;
    if (listen(http->socket, BACKLOG) != 0)
        return status_set(status, STATUS_UNAVAILABLE, OPTION ": cannot listen on %s: %s", address, strerror(errno));
    http->daemon = MHD_start_daemon(
        MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_request, http,
        MHD_OPTION_EXTERNAL_LOGGER, on_log, NULL, MHD_OPTION_LISTEN_SOCKET, http->socket, MHD_OPTION_CONNECTION_LIMIT,
        (unsigned)CONNECTIONS_MAX, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_BYTES,
        MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)IDLE_TIMEOUT_S, MHD_OPTION_END);
    http->socket = -1; /* also where it failed */
    if (!http->daemon)
        return status_set(status, STATUS_UNAVAILABLE, OPTION ": the HTTP server does not start");
    log_info("metrics_listening", LOG_STR("address", address));
    return 0;
}

void metrics_http_close(struct metrics_http *http) {
    if (!http)
        return;
    if (http->daemon)
        MHD_stop_daemon(http->daemon);
    if (http->socket >= 0)
        close(http->socket);
    free(http);
}
