#include "gateway/link.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "common/log.h"
#include "common/wire.h"
#include "gateway/unix_path.h"

struct link {
    void *router;
    const char *const *endpoints;
    size_t bound; /* so many of the endpoints are ours */
};

static const char *ipc_path(const char *endpoint) {
    return strncmp(endpoint, "ipc://", 6) == 0 ? endpoint + 6 : NULL;
}

static int bind_endpoint(void *router, const char *endpoint, struct status *status) {
    char bound[256];
    size_t size = sizeof bound;
    if (ipc_path(endpoint) && unix_path_clear(ipc_path(endpoint), status))
        return status_prefix(status, "--worker-endpoint: %s", endpoint);
    if (zmq_bind(router, endpoint))
        return status_set(status, STATUS_UNAVAILABLE, "--worker-endpoint: %s: %s", endpoint,
                          zmq_errno() == EINVAL || zmq_errno() == EPROTONOSUPPORT
                              ? "no endpoint; ipc://PATH or tcp://ADDR:PORT is allowed"
                              : zmq_strerror(zmq_errno()));
    if (zmq_getsockopt(router, ZMQ_LAST_ENDPOINT, bound, &size))
        snprintf(bound, sizeof bound, "%s", endpoint);
    log_info("workers_listening", LOG_STR("endpoint", bound));
    return 0;
}

struct link *link_bind(void *zmq_context, const char *const *endpoints, size_t count, struct status *status) {
    /*
     * A send to a peer that is gone must fail (MANDATORY) and one to a peer that is there must not: so there is no
     * high-water mark on what goes out. What can pile up is bounded by admission, credit and the worker's timeout.
     */
    const int on = 1, linger_ms = 100, unlimited = 0;
    const int64_t max_message = (int64_t)WIRE_MESSAGE_MAX + 64;
    struct link *link = calloc(1, sizeof *link);
    if (!link) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the workers' socket");
        return NULL;
    }
    void *router = link->router = zmq_socket(zmq_context, ZMQ_ROUTER);
    if (!router || zmq_setsockopt(router, ZMQ_ROUTER_MANDATORY, &on, sizeof on) ||
        zmq_setsockopt(router, ZMQ_LINGER, &linger_ms, sizeof linger_ms) ||
        zmq_setsockopt(router, ZMQ_SNDHWM, &unlimited, sizeof unlimited) ||
        zmq_setsockopt(router, ZMQ_IPV6, &on, sizeof on) ||
        zmq_setsockopt(router, ZMQ_MAXMSGSIZE, &max_message, sizeof max_message)) {
        status_set(status, STATUS_UNAVAILABLE, "the workers' socket: %s", zmq_strerror(zmq_errno()));
        goto fail;
    }
    link->endpoints = endpoints;
    for (; link->bound < count; link->bound++)
        if (bind_endpoint(router, endpoints[link->bound], status))
            goto fail;
    return link;
fail:
    link_close(link);
    return NULL;
}

void link_close(struct link *link) {
    if (!link)
        return;
    /* ZeroMQ leaves them. As long as we listen they are ours, so they go before the socket does. */
    for (size_t i = 0; i < link->bound; i++)
        if (ipc_path(link->endpoints[i]))
            unlink(ipc_path(link->endpoints[i]));
    if (link->router)
        zmq_close(link->router);
    free(link);
}

void *link_socket(const struct link *link) {
    return link->router;
}
