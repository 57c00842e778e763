#include "worker/link.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/wire.h"
#include "worker/endpoint.h"
#include "worker/memory.h"
#include "worker/output.h"
#include "worker/scheduler.h"

enum {
    SILENT_BEATS = 5,    /* after so many without a word a gateway is gone */
    REFUSED_BEATS = 10,  /* how long a refused worker waits before it tries again */
    MESSAGES_A_TURN = 64, /* of one socket before the others have their turn */
    LINGER_MS = 500,     /* for the goodbye */
};

static const uint64_t LOG_INTERVAL_NS = 1000000000;
static const uint64_t UNREACHED_NS = 50000000; /* to the next hello, where the last one found no connection yet */

struct peer {
    const char *endpoint;
    void *socket;
    uint32_t connection; /* as request.peer; 0: not welcome */
    uint64_t gateway_incarnation;
    uint64_t heard_ns, hello_ns; /* of the last word of the gateway; when to say hello next while not welcome */
    bool refused;
    uint64_t bad_messages, bad_logged_ns;
};

struct link {
    struct peer *peers;
    size_t peer_count;
    zmq_pollitem_t *items; /* [peer_count + 2]: peers, engine, stop_fd */
    void *zmq_context;
    const struct link_worker *worker;
    struct request_limits limits;
    uint64_t incarnation, heartbeat_ns, beat_ns;
    uint32_t connections;
    Moed__V1__Worker__State state;
};

static int peer_open(struct link *link, struct peer *peer, struct status *status) {
    const int linger = LINGER_MS, on = 1, no_limit = 0, reconnect_ms = 50, reconnect_max_ms = 1000;
    const int64_t message_max = WIRE_MESSAGE_MAX + 64;
    peer->socket = zmq_socket(link->zmq_context, ZMQ_DEALER);
    /* IMMEDIATE: nothing queues up for a gateway that is not there. Reports to one that is are bounded by credit, and
     * by its work ending when it falls silent. */
    if (!peer->socket || zmq_setsockopt(peer->socket, ZMQ_LINGER, &linger, sizeof(linger)) != 0 ||
        zmq_setsockopt(peer->socket, ZMQ_IMMEDIATE, &on, sizeof(on)) != 0 ||
        zmq_setsockopt(peer->socket, ZMQ_SNDHWM, &no_limit, sizeof(no_limit)) != 0 ||
        zmq_setsockopt(peer->socket, ZMQ_MAXMSGSIZE, &message_max, sizeof(message_max)) != 0 ||
        zmq_setsockopt(peer->socket, ZMQ_RECONNECT_IVL, &reconnect_ms, sizeof(reconnect_ms)) != 0 ||
        zmq_setsockopt(peer->socket, ZMQ_RECONNECT_IVL_MAX, &reconnect_max_ms, sizeof(reconnect_max_ms)) != 0)
        return status_set(status, STATUS_INTERNAL, "gateway socket: %s", zmq_strerror(zmq_errno()));
    return endpoint_connect(peer->socket, peer->endpoint, status);
}

/* ---- registration */

static void peer_forget(struct link *link, struct peer *peer) {
    if (peer->connection != 0)
        engine_drop_peer(link->worker->engine, peer->connection);
    peer->connection = 0;
    peer->hello_ns = 0;
}

/* 0, or -1 when the gateway cannot be reached: then it has lost what went before, and its work here ends. */
static int peer_send(struct link *link, struct peer *peer, const Moed__Worker__V1__ToGateway *message) {
    struct status status = {0};
    int result = wire_send(peer->socket, NULL, &message->base, &status);
    if (result == WIRE_OK)
        return 0;
    if (peer->connection != 0)
        log_warn("gateway_lost", LOG_STR("gateway", peer->endpoint),
                 LOG_STR("reason", result == WIRE_AGAIN ? "disconnected" : status.message));
    peer_forget(link, peer);
    return -1;
}

static void say_hello(struct link *link, struct peer *peer, uint64_t now_ns) {
    const struct model_config *config = link->worker->model;
    Moed__V1__Model model = MOED__V1__MODEL__INIT;
    model.name = (char *)config->name;
    model.architecture = (char *)config->architecture;
    model.fingerprint = (char *)config->fingerprint;
    model.vocab_size = config->vocab_size;
    model.context_length = config->context_length;
    model.block_count = config->block_count;
    model.embedding_length = config->embedding_length;
    model.expert_count = config->expert_count;
    model.expert_used_count = config->expert_used_count;
    model.tensor_bytes = config->tensor_bytes;
    model.eos_token_id = config->eos_token_id;
    Moed__Worker__V1__Hello hello = MOED__WORKER__V1__HELLO__INIT;
    hello.worker_id = (char *)link->worker->id;
    hello.incarnation = link->incarnation;
    hello.backend = (char *)link->worker->info->backend;
    hello.device = (char *)link->worker->info->device;
    hello.model = &model;
    hello.max_sequences = link->worker->info->max_sequences;
    hello.step_tokens = link->worker->info->step_tokens;
    hello.kv_block_tokens = link->worker->info->kv_block_tokens;
    hello.kv_blocks_total = link->worker->info->kv_blocks;
    hello.memory_total_bytes = link->worker->info->memory_total;
    hello.context_length = link->limits.context_length;
    hello.state = link->state;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_HELLO;
    message.hello = &hello;
    int sent = peer_send(link, peer, &message);
    peer->hello_ns = now_ns + (sent == 0 ? link->heartbeat_ns : UNREACHED_NS);
}

static void beat(struct link *link, struct peer *peer) {
    struct engine_load load;
    engine_get_load(link->worker->engine, &load);
    Moed__Worker__V1__Heartbeat heartbeat = MOED__WORKER__V1__HEARTBEAT__INIT;
    heartbeat.state = link->state;
    heartbeat.running = load.running;
    heartbeat.waiting = load.waiting;
    heartbeat.kv_blocks_free = load.kv_blocks_free;
    heartbeat.memory_used_bytes = link->worker->info->memory_used;
    heartbeat.last_step_age_ns = load.last_step_age_ns;
    heartbeat.generated_tokens = load.generated_tokens;
    heartbeat.waiting_tokens = load.waiting_tokens;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_HEARTBEAT;
    message.heartbeat = &heartbeat;
    peer_send(link, peer, &message);
}

static void say_goodbye(struct link *link, const char *reason) {
    Moed__Worker__V1__Goodbye goodbye = MOED__WORKER__V1__GOODBYE__INIT;
    goodbye.reason = (char *)reason;
    Moed__Worker__V1__ToGateway message = MOED__WORKER__V1__TO_GATEWAY__INIT;
    message.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_GOODBYE;
    message.goodbye = &goodbye;
    for (size_t i = 0; i < link->peer_count; i++)
        if (link->peers[i].connection != 0)
            peer_send(link, &link->peers[i], &message);
}

/* A Welcome begins anew: the gateway has forgotten what it submitted before the Hello. */
static void on_welcome(struct link *link, struct peer *peer, const Moed__Worker__V1__Welcome *welcome) {
    peer_forget(link, peer);
    peer->connection = ++link->connections;
    peer->gateway_incarnation = welcome->gateway_incarnation;
    peer->refused = false;
    log_info("gateway_joined", LOG_STR("gateway", peer->endpoint), LOG_STR("gateway_id", welcome->gateway_id));
    beat(link, peer);
}

static void on_refusal(struct link *link, struct peer *peer, const Moed__Worker__V1__Refusal *refusal,
                       uint64_t now_ns) {
    if (!peer->refused || peer->connection != 0)
        log_error("gateway_refused", LOG_STR("gateway", peer->endpoint), LOG_STR("reason", refusal->reason),
                  LOG_STR("status", status_code_name((int)refusal->code)));
    peer_forget(link, peer);
    peer->refused = true;
    peer->hello_ns = now_ns + REFUSED_BEATS * link->heartbeat_ns;
}

static void on_ack(struct link *link, struct peer *peer, const Moed__Worker__V1__HeartbeatAck *ack, uint64_t now_ns) {
    if (peer->connection == 0 || ack->gateway_incarnation == peer->gateway_incarnation)
        return;
    log_warn("gateway_restarted", LOG_STR("gateway", peer->endpoint));
    peer_forget(link, peer);
    say_hello(link, peer, now_ns);
}

static void on_identify(struct link *link, struct peer *peer, uint64_t now_ns) {
    if (peer->connection == 0)
        return; /* the hello is on its way */
    log_warn("gateway_forgot_us", LOG_STR("gateway", peer->endpoint));
    peer_forget(link, peer);
    say_hello(link, peer, now_ns);
}

/* ---- work */

static void answer_failure(struct link *link, struct peer *peer, uint64_t id, const struct status *status) {
    Moed__Worker__V1__ToGateway *message = output_failure(id, status->code, status->message);
    peer_send(link, peer, message);
    moed__worker__v1__to_gateway__free_unpacked(message, NULL);
}

static void on_work(struct link *link, struct peer *peer, const Moed__Worker__V1__ToWorker *message, uint64_t now_ns) {
    bool generate = message->body_case == MOED__WORKER__V1__TO_WORKER__BODY_GENERATE;
    uint64_t id = generate ? message->generate->id : message->forward->id;
    struct status status = {0};
    struct request *request;
    int result;
    if (link->state == MOED__V1__WORKER__STATE__DRAINING)
        result = status_set(&status, STATUS_UNAVAILABLE, "worker %s is draining", link->worker->id);
    else if (generate)
        result = request_from_generate(message->generate, &link->limits, &request, &status);
    else
        result = request_from_forward(message->forward, &link->limits, &request, &status);
    if (result != 0) {
        answer_failure(link, peer, id, &status);
        return;
    }
    request->peer = peer->connection;
    request->submitted_ns = now_ns;
    engine_submit(link->worker->engine, request);
}

/* Anybody's garbage must not fill the log: one line a second. */
static void on_bad(struct peer *peer, const char *reason, uint64_t now_ns) {
    peer->bad_messages++;
    if (peer->bad_logged_ns != 0 && now_ns - peer->bad_logged_ns < LOG_INTERVAL_NS)
        return;
    peer->bad_logged_ns = now_ns;
    log_warn("bad_message", LOG_STR("gateway", peer->endpoint), LOG_STR("reason", reason),
             LOG_UINT("so_far", peer->bad_messages));
}

static void on_message(struct link *link, struct peer *peer, Moed__Worker__V1__ToWorker *message, uint64_t now_ns) {
    peer->heard_ns = now_ns;
    switch (message->body_case) {
    case MOED__WORKER__V1__TO_WORKER__BODY_WELCOME:
        on_welcome(link, peer, message->welcome);
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_REFUSAL:
        on_refusal(link, peer, message->refusal, now_ns);
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_IDENTIFY:
        on_identify(link, peer, now_ns);
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_ACK:
        on_ack(link, peer, message->ack, now_ns);
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_GENERATE:
    case MOED__WORKER__V1__TO_WORKER__BODY_FORWARD:
        if (peer->connection != 0)
            on_work(link, peer, message, now_ns);
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_CREDIT:
        if (message->credit->n_ids != message->credit->n_tokens) {
            on_bad(peer, "credit: ids and tokens differ in number", now_ns);
            break;
        }
        /* fall through */
    case MOED__WORKER__V1__TO_WORKER__BODY_CANCEL:
        if (peer->connection == 0)
            break;
        engine_apply(link->worker->engine, peer->connection, message);
        return;
    default:
        on_bad(peer, "a message without a body", now_ns);
    }
    moed__worker__v1__to_worker__free_unpacked(message, NULL);
}

static int receive_from(struct link *link, struct peer *peer, struct status *status) {
    for (int i = 0; i < MESSAGES_A_TURN; i++) {
        ProtobufCMessage *message;
        struct status reason = {0};
        int result = wire_receive(peer->socket, NULL, &moed__worker__v1__to_worker__descriptor, &message, &reason);
        if (result == WIRE_AGAIN)
            return 0;
        if (result == WIRE_OK) {
            on_message(link, peer, (Moed__Worker__V1__ToWorker *)message, clock_now_ns());
        } else if (result == WIRE_BAD || result == WIRE_VERSION_MISMATCH) {
            on_bad(peer, reason.message, clock_now_ns());
        } else {
            *status = reason;
            return status_prefix(status, "gateway %s", peer->endpoint);
        }
    }
    return 0;
}

static struct peer *peer_find(struct link *link, uint32_t connection) {
    for (size_t i = 0; i < link->peer_count; i++)
        if (link->peers[i].connection == connection)
            return &link->peers[i];
    return NULL; /* gone since; nobody waits for the report */
}

static void send_report(struct link *link, struct report *report) {
    struct peer *peer = report->peer != 0 ? peer_find(link, report->peer) : NULL;
    if (!peer)
        return;
    if (report->forward && forward_pack(report->forward, &report->message->forward_output->response) != 0) {
        struct status status;
        status_set(&status, STATUS_RESOURCE_EXHAUSTED, "the worker has no memory to send the answer");
        answer_failure(link, peer, report->message->forward_output->id, &status);
        return;
    }
    peer_send(link, peer, report->message);
}

/* Whether the engine has ended: it has drained, or lost its device (-1). */
static int forward_reports(struct link *link, struct status *status) {
    struct report report;
    for (int i = 0; i < MESSAGES_A_TURN && engine_receive(link->worker->engine, &report); i++) {
        if (report.drained)
            return 1;
        if (report.lost) {
            *status = *report.lost;
            return -1;
        }
        send_report(link, &report);
        report_clear(&report);
    }
    return 0;
}

/* ---- the loop */

/* What is due: heartbeats, hellos, and the end of a silent gateway's work. */
static int keep_time(struct link *link, uint64_t now_ns, struct status *status) {
    bool beat_due = now_ns >= link->beat_ns;
    if (beat_due)
        link->beat_ns = now_ns + link->heartbeat_ns;
    for (size_t i = 0; i < link->peer_count; i++) {
        struct peer *peer = &link->peers[i];
        if (peer->connection != 0 && now_ns - peer->heard_ns > SILENT_BEATS * link->heartbeat_ns) {
            log_warn("gateway_lost", LOG_STR("gateway", peer->endpoint), LOG_STR("reason", "silent"));
            peer_forget(link, peer);
            zmq_close(peer->socket); /* with a connection that may be dead without knowing it */
            if (peer_open(link, peer, status) != 0)
                return -1;
        }
        if (peer->connection != 0 && beat_due)
            beat(link, peer);
        if (peer->connection == 0 && now_ns >= peer->hello_ns)
            say_hello(link, peer, now_ns);
    }
    return 0;
}

static long poll_timeout_ms(const struct link *link, uint64_t now_ns) {
    uint64_t due_ns = link->beat_ns;
    for (size_t i = 0; i < link->peer_count; i++)
        if (link->peers[i].connection == 0 && link->peers[i].hello_ns < due_ns)
            due_ns = link->peers[i].hello_ns;
    return due_ns <= now_ns ? 0 : (long)((due_ns - now_ns) / 1000000 + 1);
}

static void begin_draining(struct link *link) {
    log_info("draining", LOG_STR("worker", link->worker->id));
    link->state = MOED__V1__WORKER__STATE__DRAINING;
    link->beat_ns = 0; /* tell the gateways at once */
    engine_drain(link->worker->engine);
}

/* How many bytes were waiting. */
static int read_stop(int stop_fd) {
    char bytes[16];
    ssize_t count = read(stop_fd, bytes, sizeof(bytes));
    return count > 0 ? (int)count : 0;
}

static void begin(struct link *link, const struct link_worker *worker) {
    const struct model_config *model = worker->model;
    link->worker = worker;
    link->limits = (struct request_limits){
        .vocab_size = model->vocab_size,
        .block_count = model->block_count,
        .expert_count = model->expert_count,
        .expert_used_count = model->expert_used_count,
        .context_length = scheduler_context_length(worker->info),
        .eos = model->eos_token_id,
    };
    link->incarnation = clock_random_u64();
    link->state = MOED__V1__WORKER__STATE__READY;
}

int link_run(struct link *link, const struct link_worker *worker, int stop_fd, struct status *status) {
    zmq_pollitem_t *items = link->items;
    size_t engine_item = link->peer_count, stop_item = link->peer_count + 1;
    int stops = 0;
    begin(link, worker);
    for (;;) {
        if (keep_time(link, clock_now_ns(), status) != 0)
            return -1;
        for (size_t i = 0; i < link->peer_count; i++)
            items[i] = (zmq_pollitem_t){.socket = link->peers[i].socket, .events = ZMQ_POLLIN};
        items[engine_item] = (zmq_pollitem_t){.socket = engine_socket(link->worker->engine), .events = ZMQ_POLLIN};
        items[stop_item] = (zmq_pollitem_t){.fd = stop_fd, .events = ZMQ_POLLIN};
        if (zmq_poll(items, (int)stop_item + 1, poll_timeout_ms(link, clock_now_ns())) < 0 && zmq_errno() != EINTR)
            return status_set(status, STATUS_INTERNAL, "poll: %s", zmq_strerror(zmq_errno()));
        int ended = forward_reports(link, status);
        if (ended != 0) {
            say_goodbye(link, ended > 0 ? "drained" : "its device is lost");
            return ended > 0 ? 0 : -1;
        }
        for (size_t i = 0; i < link->peer_count; i++)
            if (items[i].revents && receive_from(link, &link->peers[i], status) != 0)
                return -1;
        int before = stops;
        if (items[stop_item].revents)
            stops += read_stop(stop_fd);
        if (stops >= 2) {
            say_goodbye(link, "stopped");
            return 0;
        }
        if (stops == 1 && before == 0)
            begin_draining(link);
    }
}

static int check_twice(const struct link_options *options, size_t index, struct status *status) {
    for (size_t i = 0; i < index; i++)
        if (strcmp(options->endpoints[i], options->endpoints[index]) == 0)
            return status_set(status, STATUS_INVALID_ARGUMENT, "gateway: \"%s\" is given twice", options->endpoints[i]);
    return 0;
}

int link_create(const struct link_options *options, void *zmq_context, struct link **out, struct status *status) {
    struct link *link = memory_allocate(1, sizeof(*link));
    link->zmq_context = zmq_context;
    link->heartbeat_ns = options->heartbeat_ns;
    link->peers = memory_allocate(options->endpoint_count, sizeof(*link->peers));
    link->items = memory_allocate(options->endpoint_count + 2, sizeof(*link->items));
    for (size_t i = 0; i < options->endpoint_count; i++) {
        struct peer *peer = &link->peers[link->peer_count++];
        peer->endpoint = options->endpoints[i];
        if (check_twice(options, i, status) != 0 || peer_open(link, peer, status) != 0) {
            link_destroy(link);
            return -1;
        }
    }
    *out = link;
    return 0;
}

void link_destroy(struct link *link) {
    if (!link)
        return;
    for (size_t i = 0; i < link->peer_count; i++)
        if (link->peers[i].socket)
            zmq_close(link->peers[i].socket);
    free(link->peers);
    free(link->items);
    free(link);
}
