#include "gateway/rpc_server.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "gateway/rpc_listen.h"

enum {
    POSTED_CALLS = 16, /* of each method, on each poller */
    SWEEP_MS = 250,    /* how often a poller looks for stalled calls */
    KEEPALIVE_MS = 60000,
    KEEPALIVE_TIMEOUT_MS = 20000, /* finds callers whose machine is gone */
    MIN_PING_INTERVAL_MS = 5000,
};

struct poller_thread {
    struct rpc_poller poller;
    struct rpc_server *server;
    pthread_t thread;
    bool running;
};

struct rpc_server {
    grpc_server *server;
    uint64_t stall_timeout_ns;
    struct rpc_method unregistered;
    struct rpc_tag stopped_tag;
    sem_t stopped;
    bool started;
    unsigned poller_count;
    struct poller_thread pollers[];
};

static void answer_unimplemented(struct rpc_call *call) {
    struct status status;
    status_set(&status, STATUS_UNIMPLEMENTED, "unknown method; the services of this server are listed by reflection");
    rpc_call_finish(call, &status);
}

static const struct rpc_handler unregistered_handler = {.open = answer_unimplemented};

static void on_stopped(struct rpc_tag *tag, bool ok) {
    struct rpc_server *server = (struct rpc_server *)((char *)tag - offsetof(struct rpc_server, stopped_tag));
    sem_post(&server->stopped);
}

static void *poll_queue(void *argument) {
    struct poller_thread *self = argument;
    struct rpc_poller *poller = &self->poller;
    uint64_t stall_ns = self->server->stall_timeout_ns, next_sweep_ns = 0;
    for (;;) {
        gpr_timespec deadline =
            gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(SWEEP_MS, GPR_TIMESPAN));
        grpc_event event = grpc_completion_queue_next(poller->queue, deadline, NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (event.type == GRPC_OP_COMPLETE) {
            struct rpc_tag *tag = event.tag;
            tag->fire(tag, event.success != 0);
        }
        uint64_t now = clock_now_ns();
        if (now >= next_sweep_ns) {
            next_sweep_ns = now + SWEEP_MS * UINT64_C(1000000);
            rpc_poller_cancel_stalled(poller, now > stall_ns ? now - stall_ns : 0);
        }
    }
}

static grpc_server *create_server(uint64_t max_message_size) {
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, .value.integer = (int)max_message_size},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, .value.integer = (int)max_message_size},
        /* Two gateways on one port would each get some of the calls; it must be an error. */
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ALLOW_REUSEPORT, .value.integer = 0},
        /* Callers wait long for a token and ping meanwhile: that is no reason to hang up (GOAWAY too_many_pings). */
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
         .value.integer = MIN_PING_INTERVAL_MS},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_HTTP2_MAX_PING_STRIKES, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, .value.integer = 1},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_KEEPALIVE_TIME_MS, .value.integer = KEEPALIVE_MS},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_KEEPALIVE_TIMEOUT_MS, .value.integer = KEEPALIVE_TIMEOUT_MS},
    };
    const grpc_channel_args channel_args = {sizeof args / sizeof *args, args};
    return grpc_server_create(&channel_args, NULL);
}

static int post_calls(struct rpc_server *server, const struct rpc_method *methods, void *const *registered,
                      size_t count) {
    for (unsigned p = 0; p < server->poller_count; p++) {
        for (unsigned k = 0; k < POSTED_CALLS; k++) {
            for (size_t m = 0; m < count; m++)
                if (rpc_call_post(server->server, &server->pollers[p].poller, &methods[m], registered[m]))
                    return -1;
            if (rpc_call_post(server->server, &server->pollers[p].poller, &server->unregistered, NULL))
                return -1;
        }
    }
    return 0;
}

static int start_threads(struct rpc_server *server, struct status *status) {
    for (unsigned p = 0; p < server->poller_count; p++) {
        struct poller_thread *self = &server->pollers[p];
        int error = pthread_create(&self->thread, NULL, poll_queue, self);
        if (error)
            return status_set(status, STATUS_UNAVAILABLE, "a poller's thread: %s", strerror(error));
        self->running = true;
    }
    return 0;
}

int rpc_server_start(const struct rpc_server_options *options, const struct rpc_method *methods, size_t method_count,
                     struct rpc_server **out, struct status *status) {
    int result = -1;
    char address[512];
    void **registered = calloc(method_count, sizeof *registered);
    struct rpc_server *server = calloc(1, sizeof *server + options->pollers * sizeof *server->pollers);
    *out = NULL;
    if (!registered || !server) {
        free(registered);
        free(server);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the server");
    }
    server->stall_timeout_ns = options->stall_timeout_ns;
    server->unregistered = (struct rpc_method){
        .path = "(unregistered)", .handler = &unregistered_handler, .ended = options->unregistered_ended};
    server->stopped_tag.fire = on_stopped;
    sem_init(&server->stopped, 0, 0);
    server->server = create_server(options->max_message_size);
    server->poller_count = options->pollers;
    for (unsigned p = 0; p < server->poller_count; p++) {
        struct poller_thread *self = &server->pollers[p];
        self->server = server;
        self->poller.index = p;
        self->poller.queue = grpc_completion_queue_create_for_next(NULL);
        grpc_server_register_completion_queue(server->server, self->poller.queue, NULL);
    }
    for (size_t m = 0; m < method_count; m++) {
        registered[m] = grpc_server_register_method(server->server, methods[m].path, NULL, GRPC_SRM_PAYLOAD_NONE, 0);
        if (!registered[m]) {
            status_set(status, STATUS_INTERNAL, "the method %s cannot be registered", methods[m].path);
            goto out;
        }
    }
    if (rpc_listen(server->server, options, address, sizeof address, status))
        goto out;
    grpc_server_start(server->server);
    server->started = true;
    if (post_calls(server, methods, registered, method_count)) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "the first calls cannot be posted");
        goto out;
    }
    if (start_threads(server, status))
        goto out;
    log_info("listening", LOG_STR("address", address),
             LOG_STR("tls", !options->tls_cert       ? "off"
                            : options->tls_client_ca ? "mutual"
                                                     : "on"));
    *out = server;
    result = 0;
out:
    free(registered);
    if (result) {
        if (server->started && server->pollers[0].running) {
            rpc_server_shutdown(server);
            rpc_server_cancel(server);
        }
        rpc_server_destroy(server);
    }
    return result;
}

void rpc_server_shutdown(struct rpc_server *server) {
    grpc_server_shutdown_and_notify(server->server, server->pollers[0].poller.queue, &server->stopped_tag);
}

unsigned rpc_server_calls(const struct rpc_server *server) {
    unsigned calls = 0;
    for (unsigned p = 0; p < server->poller_count; p++)
        calls += atomic_load(&server->pollers[p].poller.busy);
    return calls;
}

void rpc_server_cancel(struct rpc_server *server) {
    grpc_server_cancel_all_calls(server->server);
    while (sem_wait(&server->stopped) && errno == EINTR)
        continue;
}

/* Takes what is left off a queue without a thread, so that it can be destroyed. */
static void drain_queue(grpc_completion_queue *queue) {
    for (;;) {
        grpc_event event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return;
        struct rpc_tag *tag = event.tag;
        tag->fire(tag, event.success != 0);
    }
}

void rpc_server_destroy(struct rpc_server *server) {
    if (!server)
        return;
    /* A server that never got its threads is shut down here: C-core insists, and its tag wants a queue. */
    bool idle = !server->pollers[0].running;
    if (idle) {
        rpc_server_shutdown(server);
        grpc_server_cancel_all_calls(server->server);
    }
    for (unsigned p = 0; p < server->poller_count; p++) {
        struct poller_thread *self = &server->pollers[p];
        grpc_completion_queue_shutdown(self->poller.queue);
        if (self->running)
            pthread_join(self->thread, NULL);
        else
            drain_queue(self->poller.queue);
    }
    grpc_server_destroy(server->server);
    for (unsigned p = 0; p < server->poller_count; p++)
        grpc_completion_queue_destroy(server->pollers[p].poller.queue);
    sem_destroy(&server->stopped);
    free(server);
}
