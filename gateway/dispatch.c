#include "gateway/dispatch.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/wire.h"
#include "gateway/request_table.h"

enum {
    PROBE_AFTER_MS = 1500, /* a worker that skipped a beat is asked whether it is still there */
    FORGET_AFTER_S = 300,  /* lost workers are listed for so long */
    COMPLAINTS_PER_SECOND = 10,
};

struct dispatch {
    void *router;
    uint64_t incarnation;
    uint64_t worker_timeout_ns;
    void (*ready_changed)(void *context, bool ready);
    void *ready_context;
    void (*ticked)(void *context, struct worker_table *workers);
    void *ticked_context;
    struct worker_table *workers;
    struct request_table *requests;
    uint64_t complaints_since_ns, complaints, unlogged;
    bool was_ready;

    pthread_mutex_t limits_lock;
    struct fleet_limits limits;
};

int dispatch_create(const struct fleet_options *options, void *router, struct dispatch **out, struct status *status) {
    struct dispatch *dispatch = calloc(1, sizeof *dispatch);
    *out = dispatch;
    if (!dispatch)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the fleet");
    pthread_mutex_init(&dispatch->limits_lock, NULL);
    dispatch->router = router;
    dispatch->incarnation = clock_random_u64();
    dispatch->worker_timeout_ns = options->worker_timeout_ns;
    dispatch->ready_changed = options->ready_changed;
    dispatch->ready_context = options->ready_context;
    dispatch->ticked = options->ticked;
    dispatch->ticked_context = options->ticked_context;
    dispatch->workers = worker_table_create();
    dispatch->requests = request_table_create();
    if (dispatch->workers && dispatch->requests)
        return 0;
    dispatch_destroy(dispatch);
    *out = NULL;
    return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the fleet");
}

void dispatch_destroy(struct dispatch *dispatch) {
    if (!dispatch)
        return;
    request_table_destroy(dispatch->requests);
    worker_table_destroy(dispatch->workers);
    pthread_mutex_destroy(&dispatch->limits_lock);
    free(dispatch);
}

struct worker_table *dispatch_workers(struct dispatch *dispatch) {
    return dispatch->workers;
}

struct fleet_limits dispatch_get_limits(struct dispatch *dispatch) {
    pthread_mutex_lock(&dispatch->limits_lock);
    struct fleet_limits limits = dispatch->limits;
    pthread_mutex_unlock(&dispatch->limits_lock);
    return limits;
}

/* Anybody who can connect can send garbage; that must not fill the log. */
static void complain(struct dispatch *dispatch, const char *event, const char *worker, const struct status *status) {
    uint64_t now = clock_now_ns();
    if (now - dispatch->complaints_since_ns > UINT64_C(1000000000)) {
        dispatch->complaints_since_ns = now;
        dispatch->complaints = 0;
    }
    if (dispatch->complaints++ >= COMPLAINTS_PER_SECOND) {
        dispatch->unlogged++;
        return;
    }
    log_warn(event, LOG_STR("worker", worker), LOG_STR("status", status_code_name(status->code)),
             LOG_STR("reason", status->message), LOG_UINT("unlogged", dispatch->unlogged));
    dispatch->unlogged = 0;
}

/* ---- to the workers */

static int send_body(struct dispatch *dispatch, const struct wire_identity *peer, Moed__Worker__V1__ToWorker *message) {
    struct status status;
    int result = wire_send(dispatch->router, peer, &message->base, &status);
    if (result < 0)
        log_error("send_failed", LOG_STR("reason", status.message));
    return result == WIRE_OK ? 0 : -1;
}

/* send_body of a message whose body is `field`. */
#define SEND(dispatch, peer, kind, field, value)                                                                       \
    send_body((dispatch), (peer),                                                                                      \
              &(Moed__Worker__V1__ToWorker){PROTOBUF_C_MESSAGE_INIT(&moed__worker__v1__to_worker__descriptor),         \
                                            .body_case = MOED__WORKER__V1__TO_WORKER__BODY_##kind, .field = (value)})

static int send_ack(struct dispatch *dispatch, const struct wire_identity *peer) {
    Moed__Worker__V1__HeartbeatAck ack = MOED__WORKER__V1__HEARTBEAT_ACK__INIT;
    ack.gateway_incarnation = dispatch->incarnation;
    return SEND(dispatch, peer, ACK, ack, &ack);
}

static void send_refusal(struct dispatch *dispatch, const struct wire_identity *peer, const struct status *status) {
    Moed__Worker__V1__Refusal refusal = MOED__WORKER__V1__REFUSAL__INIT;
    refusal.code = status->code;
    refusal.reason = (char *)status->message;
    SEND(dispatch, peer, REFUSAL, refusal, &refusal);
}

static void send_cancel(struct dispatch *dispatch, const struct worker *worker, uint64_t id) {
    Moed__Worker__V1__Cancel cancel = MOED__WORKER__V1__CANCEL__INIT;
    cancel.n_ids = 1;
    cancel.ids = &id;
    SEND(dispatch, &worker->peer, CANCEL, cancel, &cancel);
}

/* ---- requests */

/* Every request that was submitted comes through here once: load and names are given back on every path. */
static void end_request(struct dispatch *dispatch, struct fleet_request *request, const struct status *status) {
    static const struct status ok = {0};
    if (request->worker) {
        request->worker->own_load -= request->load;
        request->worker->requests--;
        request->worker = NULL;
    }
    if (request->id)
        request_table_remove(dispatch->requests, request);
    request->ops->end(request, status ? status : &ok);
    request->ops->release(request);
}

static void set_load(struct fleet_request *request, uint64_t load) {
    request->worker->own_load += load - request->load;
    request->load = load;
}

/* ---- workers */

static void publish(struct dispatch *dispatch) {
    const struct model_facts *model = worker_table_model(dispatch->workers);
    bool ready = worker_table_ready(dispatch->workers) > 0;
    pthread_mutex_lock(&dispatch->limits_lock);
    dispatch->limits = (struct fleet_limits){
        .ready = ready,
        .generation = model->generation,
        .vocab_size = model->vocab_size,
        .context_length = worker_table_context_length(dispatch->workers),
        .block_count = model->block_count,
        .expert_count = model->expert_count,
        .expert_used_count = model->expert_used_count,
    };
    pthread_mutex_unlock(&dispatch->limits_lock);
    if (ready != dispatch->was_ready && dispatch->ready_changed)
        dispatch->ready_changed(dispatch->ready_context, ready);
    dispatch->was_ready = ready;
}

static void end_requests_of(struct dispatch *dispatch, const struct worker *worker, const char *why) {
    struct fleet_request *request;
    struct status status;
    status_set(&status, STATUS_UNAVAILABLE, "worker lost: %s: %s", worker->id, why);
    while (worker->requests && (request = request_table_any(dispatch->requests, worker)))
        end_request(dispatch, request, &status);
}

static void lose_worker(struct dispatch *dispatch, struct worker *worker, const char *why) {
    log_warn("worker_lost", LOG_STR("worker", worker->id), LOG_STR("reason", why),
             LOG_UINT("requests", worker->requests));
    worker_lose(worker);
    end_requests_of(dispatch, worker, why);
    publish(dispatch);
}

void dispatch_submit(struct dispatch *dispatch, struct fleet_request *request) {
    struct status status;
    struct worker *worker;
    int failed;
    if (request_table_find_name(dispatch->requests, request->request_id)) {
        status_set(&status, STATUS_ALREADY_EXISTS, "request_id: \"%s\" is in flight", request->request_id);
        end_request(dispatch, request, &status);
        return;
    }
    request_table_add(dispatch->requests, request);
    do {
        worker = worker_table_place(dispatch->workers, request->longest_sequence);
        if (!worker || request->model_generation != worker_table_model(dispatch->workers)->generation) {
            status_set(&status, STATUS_UNAVAILABLE, "no worker is ready for a sequence of %" PRIu64 " tokens",
                       request->longest_sequence);
            end_request(dispatch, request, &status);
            return;
        }
        if (request->generate) {
            request->generate->id = request->id;
            failed = SEND(dispatch, &worker->peer, GENERATE, generate, request->generate);
        } else {
            request->forward->id = request->id;
            failed = SEND(dispatch, &worker->peer, FORWARD, forward, request->forward);
        }
        if (failed)
            lose_worker(dispatch, worker, "its connection is gone");
    } while (failed);
    request->worker = worker;
    request->load = request->prompt_tokens;
    worker_placed(dispatch->workers, worker, request->load);
}

void dispatch_cancel(struct dispatch *dispatch, struct fleet_request *request, const struct status *status) {
    if (!request->id)
        return;
    send_cancel(dispatch, request->worker, request->id);
    end_request(dispatch, request, status);
}

void dispatch_cancel_all(struct dispatch *dispatch, const struct status *status) {
    struct fleet_request *request;
    while ((request = request_table_any(dispatch->requests, NULL)))
        dispatch_cancel(dispatch, request, status);
}

void dispatch_credit(struct dispatch *dispatch, struct fleet_request *request, uint32_t tokens) {
    if (!request->id)
        return;
    Moed__Worker__V1__Credit credit = MOED__WORKER__V1__CREDIT__INIT;
    credit.n_ids = credit.n_tokens = 1;
    credit.ids = &request->id;
    credit.tokens = &tokens;
    SEND(dispatch, &request->worker->peer, CREDIT, credit, &credit);
}

/* ---- from the workers */

static void on_hello(struct dispatch *dispatch, const struct wire_identity *peer,
                     const Moed__Worker__V1__Hello *hello) {
    struct status status;
    struct worker *rival;
    bool back;
    uint64_t now = clock_now_ns();
    struct worker *worker = worker_table_hello(dispatch->workers, peer, hello, now, &back, &rival, &status);
    /* The one that has the name may have died a moment ago, and this be its successor. */
    if (!worker && rival && send_ack(dispatch, &rival->peer)) {
        lose_worker(dispatch, rival, "its connection is gone");
        worker = worker_table_hello(dispatch->workers, peer, hello, now, &back, &rival, &status);
    }
    if (!worker) {
        complain(dispatch, "worker_refused", hello->worker_id, &status);
        send_refusal(dispatch, peer, &status);
        return;
    }
    end_requests_of(dispatch, worker, "it began anew");
    log_info(back ? "worker_returned" : "worker_joined", LOG_STR("worker", worker->id),
             LOG_STR("backend", worker->backend), LOG_STR("device", worker->device),
             LOG_STR("state", worker_state_name(worker->state)),
             LOG_STR("fingerprint", worker_table_model(dispatch->workers)->fingerprint));
    char gateway_id[32];
    snprintf(gateway_id, sizeof gateway_id, "%016" PRIx64, dispatch->incarnation);
    Moed__Worker__V1__Welcome welcome = MOED__WORKER__V1__WELCOME__INIT;
    welcome.gateway_id = gateway_id;
    welcome.gateway_incarnation = dispatch->incarnation;
    publish(dispatch); /* first: whoever sees the worker welcomed may count on it */
    if (SEND(dispatch, peer, WELCOME, welcome, &welcome))
        lose_worker(dispatch, worker, "its connection is gone");
}

static void on_heartbeat(struct dispatch *dispatch, struct worker *worker, const Moed__Worker__V1__Heartbeat *beat) {
    struct status status;
    Moed__V1__Worker__State before = worker->state;
    if (!worker_beat(worker, beat, clock_now_ns())) {
        status_set(&status, STATUS_INVALID_ARGUMENT, "state: %d; LOADING, READY or DRAINING is allowed",
                   (int)beat->state);
        complain(dispatch, "bad_message", worker->id, &status);
        return;
    }
    if (worker->state != before) {
        log_info("worker_state", LOG_STR("worker", worker->id), LOG_STR("state", worker_state_name(worker->state)));
        publish(dispatch);
    }
    if (send_ack(dispatch, &worker->peer))
        lose_worker(dispatch, worker, "its connection is gone");
}

/* A request that this worker has; outputs for others are leftovers of what was cancelled. */
static struct fleet_request *request_on(struct dispatch *dispatch, const struct worker *worker, uint64_t id) {
    struct fleet_request *request = request_table_find(dispatch->requests, id);
    return request && request->worker == worker ? request : NULL;
}

static void on_output(struct dispatch *dispatch, struct worker *worker, Moed__Worker__V1__SequenceOutput *output) {
    struct status status;
    struct fleet_request *request = request_on(dispatch, worker, output->id);
    if (!request || !request->generate)
        return;
    set_load(request, 1); /* its prompt is done; from now on it is one row a step */
    if (request->ops->output(request, output, worker, &status)) {
        log_error("bad_output", LOG_STR("worker", worker->id), LOG_STR("reason", status.message));
        send_cancel(dispatch, worker, request->id);
        end_request(dispatch, request, &status);
    } else if (output->finish_reason != MOED__V1__FINISH_REASON__FINISH_REASON_UNSPECIFIED) {
        end_request(dispatch, request, NULL);
    }
}

static void on_forward_output(struct dispatch *dispatch, struct worker *worker,
                              const Moed__Worker__V1__ForwardOutput *output) {
    struct fleet_request *request = request_on(dispatch, worker, output->id);
    if (!request || !request->forward)
        return;
    request->ops->answer(request, &output->response, worker);
    end_request(dispatch, request, NULL);
}

static void on_failure(struct dispatch *dispatch, struct worker *worker, const Moed__Worker__V1__Failure *failure) {
    struct status status;
    struct fleet_request *request = request_on(dispatch, worker, failure->id);
    if (!request)
        return;
    bool known = failure->code > STATUS_OK && failure->code <= STATUS_UNAUTHENTICATED;
    status_set(&status, known ? (enum status_code)failure->code : STATUS_INTERNAL, "%s", failure->message);
    end_request(dispatch, request, &status);
}

static void on_goodbye(struct dispatch *dispatch, struct worker *worker, const Moed__Worker__V1__Goodbye *goodbye) {
    log_info("worker_left", LOG_STR("worker", worker->id), LOG_STR("reason", goodbye->reason),
             LOG_UINT("requests", worker->requests));
    end_requests_of(dispatch, worker, "it left");
    worker_table_remove(dispatch->workers, worker);
    publish(dispatch);
}

static void on_message(struct dispatch *dispatch, const struct wire_identity *peer,
                       Moed__Worker__V1__ToGateway *message) {
    static const struct status no_body = {STATUS_INVALID_ARGUMENT, "a message without a body"};
    struct worker *worker = worker_table_find(dispatch->workers, peer);
    if (message->body_case == MOED__WORKER__V1__TO_GATEWAY__BODY_HELLO) {
        on_hello(dispatch, peer, message->hello);
        return;
    }
    if (!worker) {
        Moed__Worker__V1__Identify identify = MOED__WORKER__V1__IDENTIFY__INIT;
        if (message->body_case != MOED__WORKER__V1__TO_GATEWAY__BODY_GOODBYE)
            SEND(dispatch, peer, IDENTIFY, identify, &identify);
        return;
    }
    switch (message->body_case) {
    case MOED__WORKER__V1__TO_GATEWAY__BODY_HEARTBEAT:
        on_heartbeat(dispatch, worker, message->heartbeat);
        break;
    case MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT:
        for (size_t i = 0; i < message->step_output->n_outputs; i++)
            on_output(dispatch, worker, message->step_output->outputs[i]);
        break;
    case MOED__WORKER__V1__TO_GATEWAY__BODY_FORWARD_OUTPUT:
        on_forward_output(dispatch, worker, message->forward_output);
        break;
    case MOED__WORKER__V1__TO_GATEWAY__BODY_FAILURE:
        on_failure(dispatch, worker, message->failure);
        break;
    case MOED__WORKER__V1__TO_GATEWAY__BODY_GOODBYE:
        on_goodbye(dispatch, worker, message->goodbye);
        break;
    default:
        complain(dispatch, "bad_message", worker->id, &no_body);
    }
}

bool dispatch_receive(struct dispatch *dispatch) {
    struct wire_identity peer = {.length = 0};
    ProtobufCMessage *message;
    struct status status;
    int result = wire_receive(dispatch->router, &peer, &moed__worker__v1__to_gateway__descriptor, &message, &status);
    if (result < 0)
        log_error("receive_failed", LOG_STR("reason", status.message));
    if (result < 0 || result == WIRE_AGAIN)
        return false;
    if (result == WIRE_OK) {
        on_message(dispatch, &peer, (Moed__Worker__V1__ToGateway *)message);
        protobuf_c_message_free_unpacked(message, NULL);
        return true;
    }
    complain(dispatch, "bad_message", "", &status);
    if (result == WIRE_VERSION_MISMATCH && peer.length)
        send_refusal(dispatch, &peer, &status);
    return true;
}

/* ---- as time goes by */

void dispatch_tick(struct dispatch *dispatch, uint64_t now) {
    for (size_t i = worker_table_count(dispatch->workers); i-- > 0;) {
        struct worker *worker = worker_table_at(dispatch->workers, i);
        if (worker->state == MOED__V1__WORKER__STATE__LOST)
            continue;
        if (now - worker->seen_ns > dispatch->worker_timeout_ns)
            lose_worker(dispatch, worker, "no heartbeat");
        else if (now - worker->seen_ns > PROBE_AFTER_MS * UINT64_C(1000000) && send_ack(dispatch, &worker->peer))
            lose_worker(dispatch, worker, "its connection is gone");
    }
    uint64_t forget_ns = FORGET_AFTER_S * UINT64_C(1000000000);
    worker_table_expire(dispatch->workers, now > forget_ns ? now - forget_ns : 0);
    if (dispatch->ticked)
        dispatch->ticked(dispatch->ticked_context, dispatch->workers);
}
