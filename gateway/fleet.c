#include "gateway/fleet.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "common/clock.h"
#include "gateway/dispatch.h"
#include "gateway/link.h"

/* ThreadSanitizer does not see that ZeroMQ, not built with it, orders what is before a send and after its receive. */
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
#define __tsan_release(address) ((void)(address))
#define __tsan_acquire(address) ((void)(address))
#endif

enum {
    TICK_MS = 250,
    BATCH = 256, /* messages taken from one socket before the other has its turn */
};

enum command_type { COMMAND_SUBMIT, COMMAND_CANCEL, COMMAND_CREDIT, COMMAND_ASK, COMMAND_STOP };

/* What goes through a port, by value. */
struct command {
    enum command_type type;
    uint32_t tokens;
    union {
        struct fleet_request *request;
        struct fleet_query *query;
    };
};

struct fleet_port {
    void *push;
};

struct fleet {
    void *zmq_context, *pull;
    struct link *link;
    struct dispatch *dispatch;
    struct fleet_port *control;
    char inbox[48]; /* the ports' address */
    pthread_t thread;
    bool running, stopping;
};

static const struct status stopped = {STATUS_UNAVAILABLE, "the gateway is shutting down"};

static void run_command(struct fleet *fleet, const struct command *command) {
    static const struct status cancelled = {STATUS_CANCELLED, "cancelled"};
    struct fleet_request *request = command->request;
    switch (command->type) {
    case COMMAND_SUBMIT:
        dispatch_submit(fleet->dispatch, request);
        return; /* with the message's reference */
    case COMMAND_CANCEL:
        dispatch_cancel(fleet->dispatch, request, &cancelled);
        break;
    case COMMAND_CREDIT:
        dispatch_credit(fleet->dispatch, request, command->tokens);
        break;
    case COMMAND_ASK:
        command->query->answer(command->query, dispatch_workers(fleet->dispatch), clock_now_ns());
        return;
    case COMMAND_STOP:
        fleet->stopping = true;
        return;
    }
    request->ops->release(request);
}

/* false: there was none. */
static bool receive_command(struct fleet *fleet) {
    struct command command;
    if (zmq_recv(fleet->pull, &command, sizeof command, ZMQ_DONTWAIT) != sizeof command)
        return false;
    __tsan_acquire(command.request);
    run_command(fleet, &command);
    return true;
}

static void *run_fleet(void *argument) {
    struct fleet *fleet = argument;
    uint64_t next_tick_ns = 0;
    while (!fleet->stopping) {
        zmq_pollitem_t items[] = {{.socket = link_socket(fleet->link), .events = ZMQ_POLLIN},
                                  {.socket = fleet->pull, .events = ZMQ_POLLIN}};
        zmq_poll(items, 2, TICK_MS);
        for (int i = 0; i < BATCH && dispatch_receive(fleet->dispatch); i++)
            continue;
        for (int i = 0; i < BATCH && receive_command(fleet); i++)
            continue;
        /* After the messages: if this whole machine stood still, the beats are in the queue. */
        uint64_t now = clock_now_ns();
        if (now >= next_tick_ns) {
            next_tick_ns = now + TICK_MS * UINT64_C(1000000);
            dispatch_tick(fleet->dispatch, now);
        }
    }
    while (receive_command(fleet))
        continue;
    dispatch_cancel_all(fleet->dispatch, &stopped);
    return NULL;
}

int fleet_start(const struct fleet_options *options, void *zmq_context, struct fleet **out, struct status *status) {
    const int unlimited = 0;
    struct fleet *fleet = calloc(1, sizeof *fleet);
    *out = NULL;
    if (!fleet)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the fleet");
    fleet->zmq_context = zmq_context;
    fleet->link = link_bind(zmq_context, options->endpoints, options->endpoint_count, status);
    if (!fleet->link || dispatch_create(options, link_socket(fleet->link), &fleet->dispatch, status))
        goto fail;
    snprintf(fleet->inbox, sizeof fleet->inbox, "inproc://fleet-%016" PRIx64, clock_random_u64());
    fleet->pull = zmq_socket(zmq_context, ZMQ_PULL);
    if (!fleet->pull || zmq_setsockopt(fleet->pull, ZMQ_RCVHWM, &unlimited, sizeof unlimited) ||
        zmq_bind(fleet->pull, fleet->inbox)) {
        status_set(status, STATUS_UNAVAILABLE, "the fleet's inbox: %s", zmq_strerror(zmq_errno()));
        goto fail;
    }
    fleet->control = fleet_port_open(fleet, status);
    if (!fleet->control)
        goto fail;
    int error = pthread_create(&fleet->thread, NULL, run_fleet, fleet);
    if (error) {
        status_set(status, STATUS_UNAVAILABLE, "the fleet's thread: %s", strerror(error));
        goto fail;
    }
    fleet->running = true;
    *out = fleet;
    return 0;
fail:
    fleet_stop(fleet);
    return -1;
}

/* Ports have no high-water mark: what is in them is bounded by the calls there are. So sending fails only at ETERM. */
static void send_command(struct fleet_port *port, struct command command) {
    __tsan_release(command.request);
    while (zmq_send(port->push, &command, sizeof command, 0) < 0 && zmq_errno() == EINTR)
        continue;
}

void fleet_stop(struct fleet *fleet) {
    if (!fleet)
        return;
    if (fleet->running) {
        send_command(fleet->control, (struct command){.type = COMMAND_STOP});
        pthread_join(fleet->thread, NULL);
    }
    fleet_port_close(fleet->control);
    if (fleet->pull)
        zmq_close(fleet->pull);
    dispatch_destroy(fleet->dispatch);
    link_close(fleet->link);
    free(fleet);
}

struct fleet_limits fleet_get_limits(struct fleet *fleet) {
    return dispatch_get_limits(fleet->dispatch);
}

struct fleet_port *fleet_port_open(struct fleet *fleet, struct status *status) {
    const int unlimited = 0, linger_ms = 0;
    struct fleet_port *port = calloc(1, sizeof *port);
    if (port && (port->push = zmq_socket(fleet->zmq_context, ZMQ_PUSH)) &&
        !zmq_setsockopt(port->push, ZMQ_SNDHWM, &unlimited, sizeof unlimited) &&
        !zmq_setsockopt(port->push, ZMQ_LINGER, &linger_ms, sizeof linger_ms) && !zmq_connect(port->push, fleet->inbox))
        return port;
    status_set(status, STATUS_UNAVAILABLE, "a port to the fleet: %s", zmq_strerror(zmq_errno()));
    fleet_port_close(port);
    return NULL;
}

void fleet_port_close(struct fleet_port *port) {
    if (!port)
        return;
    if (port->push)
        zmq_close(port->push);
    free(port);
}

void fleet_submit(struct fleet_port *port, struct fleet_request *request) {
    request->ops->retain(request);
    send_command(port, (struct command){.type = COMMAND_SUBMIT, .request = request});
}

void fleet_cancel(struct fleet_port *port, struct fleet_request *request) {
    request->ops->retain(request);
    send_command(port, (struct command){.type = COMMAND_CANCEL, .request = request});
}

void fleet_credit(struct fleet_port *port, struct fleet_request *request, uint32_t tokens) {
    request->ops->retain(request);
    send_command(port, (struct command){.type = COMMAND_CREDIT, .request = request, .tokens = tokens});
}

void fleet_ask(struct fleet_port *port, struct fleet_query *query) {
    send_command(port, (struct command){.type = COMMAND_ASK, .query = query});
}
