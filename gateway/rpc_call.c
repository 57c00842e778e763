#include "gateway/rpc_call.h"

#include <grpc/byte_buffer_reader.h>
#include <inttypes.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>

#include "common/clock.h"
#include "common/log.h"

struct rpc_call {
    pthread_mutex_t lock; /* guards what is sent: everything from `sending` to `message` */
    atomic_uint refs;
    struct rpc_poller *poller;
    const struct rpc_method *method;
    void *registered;
    void *state;
    uint64_t started_ns;

    grpc_server *server;
    grpc_call *call;
    grpc_call_details details; /* of an unregistered method */
    gpr_timespec deadline;
    grpc_metadata_array metadata;
    grpc_byte_buffer *request;
    int cancelled;
    bool read_any;
    struct rpc_tag accepted, received, sent, closed;
    struct rpc_call *next, **link; /* in poller->calls */

    bool sending, metadata_sent, finishing;
    bool over; /* nothing can be sent any more: the status was, or a write failed, or the call is closed */
    uint64_t sending_since_ns;
    struct status status;
    grpc_byte_buffer *reply;   /* the one message of a unary answer */
    grpc_byte_buffer *message; /* being sent */
};

#define CALL_OF(tag, member) ((struct rpc_call *)((char *)(tag) - offsetof(struct rpc_call, member)))

void rpc_call_ref(struct rpc_call *call) {
    atomic_fetch_add(&call->refs, 1);
}

void rpc_call_unref(struct rpc_call *call) {
    if (atomic_fetch_sub(&call->refs, 1) != 1)
        return;
    if (call->state && call->method->handler->destroy)
        call->method->handler->destroy(call->state);
    if (call->reply)
        grpc_byte_buffer_destroy(call->reply);
    if (call->call)
        grpc_call_unref(call->call);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    pthread_mutex_destroy(&call->lock);
    free(call);
}

const struct rpc_method *rpc_call_method(const struct rpc_call *call) {
    return call->method;
}

void *rpc_call_context(const struct rpc_call *call) {
    return call->method->context;
}

unsigned rpc_call_poller(const struct rpc_call *call) {
    return call->poller->index;
}

uint64_t rpc_call_started_ns(const struct rpc_call *call) {
    return call->started_ns;
}

void rpc_call_set_state(struct rpc_call *call, void *state) {
    call->state = state;
}

void *rpc_call_state(const struct rpc_call *call) {
    return call->state;
}

/* Starts a batch whose tag holds a reference until it fires. */
static int start_batch(struct rpc_call *call, const grpc_op *ops, size_t count, struct rpc_tag *tag) {
    rpc_call_ref(call);
    grpc_call_error error = grpc_call_start_batch(call->call, ops, count, tag, NULL);
    if (error == GRPC_CALL_OK)
        return 0;
    /* While the server stops, the queues close under the last calls; anything else is a defect here. */
    if (error != GRPC_CALL_ERROR_COMPLETION_QUEUE_SHUTDOWN)
        log_error("batch_failed", LOG_STR("method", call->method->path),
                  LOG_STR("error", grpc_call_error_to_string(error)));
    rpc_call_unref(call);
    return -1;
}

void rpc_call_read(struct rpc_call *call) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->request};
    start_batch(call, &op, 1, &call->received);
}

void rpc_call_lock(struct rpc_call *call) {
    pthread_mutex_lock(&call->lock);
}

void rpc_call_unlock(struct rpc_call *call) {
    pthread_mutex_unlock(&call->lock);
}

/*
 * Two rules of C-core shape the batch: the status must not go before the initial metadata (the call would hang until
 * its deadline), and only one message may be on its way. So the metadata ride with whatever is sent first, and the
 * status with the last message, for `next` gives all there is.
 */
static void pump(struct rpc_call *call) {
    if (call->sending || call->over)
        return;
    const struct rpc_handler *handler = call->method->handler;
    grpc_byte_buffer *message = call->reply;
    call->reply = NULL;
    if (!message && handler->next)
        message = handler->next(call);
    if (!message && !call->finishing)
        return;

    grpc_op ops[3] = {0};
    size_t count = 0;
    grpc_slice details = grpc_empty_slice();
    if (!call->metadata_sent)
        ops[count++].op = GRPC_OP_SEND_INITIAL_METADATA;
    if (message) {
        ops[count].op = GRPC_OP_SEND_MESSAGE;
        ops[count++].data.send_message.send_message = message;
    }
    if (call->finishing) {
        details = grpc_slice_from_copied_string(call->status.message);
        ops[count].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[count].data.send_status_from_server.status = (grpc_status_code)call->status.code;
        ops[count++].data.send_status_from_server.status_details = &details;
    }
    call->metadata_sent = true;
    call->over = call->finishing;
    call->sending = true;
    call->sending_since_ns = clock_now_ns();
    call->message = message;
    if (start_batch(call, ops, count, &call->sent)) {
        call->over = true;
        call->sending = false;
        call->message = NULL;
        if (message)
            grpc_byte_buffer_destroy(message);
    }
    grpc_slice_unref(details);
}

void rpc_call_pump_unlock(struct rpc_call *call) {
    pump(call);
    pthread_mutex_unlock(&call->lock);
}

static void finish(struct rpc_call *call, const struct status *status, grpc_byte_buffer *reply) {
    rpc_call_lock(call);
    if (call->finishing) {
        if (reply)
            grpc_byte_buffer_destroy(reply);
    } else {
        call->finishing = true;
        call->reply = reply;
        if (status)
            call->status = *status;
    }
    rpc_call_pump_unlock(call);
}

void rpc_call_finish(struct rpc_call *call, const struct status *status) {
    finish(call, status, NULL);
}

void rpc_call_reply(struct rpc_call *call, grpc_byte_buffer *message) {
    static const struct status no_memory = {STATUS_RESOURCE_EXHAUSTED, "no memory for the answer"};
    finish(call, message ? NULL : &no_memory, message);
}

grpc_byte_buffer *rpc_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

/* ---- completions, on the poller's thread */

static void on_sent(struct rpc_tag *tag, bool ok) {
    struct rpc_call *call = CALL_OF(tag, sent);
    rpc_call_lock(call);
    if (call->message)
        grpc_byte_buffer_destroy(call->message);
    bool had_message = call->message != NULL;
    call->message = NULL;
    call->sending = false;
    if (!ok)
        call->over = true;
    else if (had_message && call->method->handler->written)
        call->method->handler->written(call);
    rpc_call_pump_unlock(call);
    rpc_call_unref(call);
}

static void on_received(struct rpc_tag *tag, bool ok) {
    struct rpc_call *call = CALL_OF(tag, received);
    const struct rpc_handler *handler = call->method->handler;
    grpc_byte_buffer *request = call->request;
    grpc_byte_buffer_reader reader;
    struct status status = {0};
    call->request = NULL;
    if (ok && !request && handler->half_closed) {
        handler->half_closed(call);
    } else if (ok && !request) {
        status_set(&status, STATUS_INVALID_ARGUMENT, "the call ended without a request message");
    } else if (!ok || !grpc_byte_buffer_reader_init(&reader, request)) {
        /* Cancelled meanwhile, or too large, which C-core has answered, or not what its compression says it is. */
        status_set(&status, STATUS_RESOURCE_EXHAUSTED, "the request message cannot be read");
    } else {
        grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
        grpc_byte_buffer_reader_destroy(&reader);
        grpc_byte_buffer_destroy(request);
        request = NULL;
        handler->message(call, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes));
        grpc_slice_unref(bytes);
    }
    if (request)
        grpc_byte_buffer_destroy(request);
    if (status.code)
        rpc_call_finish(call, &status);
    rpc_call_unref(call);
}

static void on_closed(struct rpc_tag *tag, bool ok) {
    struct rpc_call *call = CALL_OF(tag, closed);
    if (!call->method->handler->idles)
        atomic_fetch_sub(&call->poller->busy, 1);
    *call->link = call->next;
    if (call->next)
        call->next->link = call->link;
    rpc_call_lock(call);
    call->over = true;
    int code = call->finishing ? (int)call->status.code : STATUS_CANCELLED;
    pthread_mutex_unlock(&call->lock);
    if (call->method->ended)
        metric_add(&call->method->ended[code], 1);
    if (call->method->handler->closed)
        call->method->handler->closed(call, call->cancelled != 0);
    log_debug("call_closed", LOG_STR("method", call->method->path), LOG_STR("status", status_code_name(code)),
              LOG_UINT("cancelled", call->cancelled != 0), LOG_UINT("us", (clock_now_ns() - call->started_ns) / 1000));
    rpc_call_unref(call);
}

static void on_accepted(struct rpc_tag *tag, bool ok) {
    struct rpc_call *call = CALL_OF(tag, accepted);
    if (!ok) { /* the server is stopping */
        rpc_call_unref(call);
        return;
    }
    if (rpc_call_post(call->server, call->poller, call->method, call->registered))
        log_error("post_failed", LOG_STR("method", call->method->path));
    if (!call->method->handler->idles)
        atomic_fetch_add(&call->poller->busy, 1);
    call->started_ns = clock_now_ns();
    call->next = call->poller->calls;
    call->link = &call->poller->calls;
    call->poller->calls = call;
    if (call->next)
        call->next->link = &call->next;

    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &call->cancelled};
    if (start_batch(call, &op, 1, &call->closed)) {
        call->cancelled = true;
        on_closed(&call->closed, false);
        return;
    }
    if (call->method->handler->open)
        call->method->handler->open(call);
    else
        rpc_call_read(call);
    rpc_call_unref(call);
}

int rpc_call_post(grpc_server *server, struct rpc_poller *poller, const struct rpc_method *method, void *registered) {
    struct rpc_call *call = calloc(1, sizeof *call);
    if (!call)
        return -1;
    pthread_mutex_init(&call->lock, NULL);
    call->refs = 1; /* the accepted tag's */
    call->server = server;
    call->poller = poller;
    call->method = method;
    call->registered = registered;
    call->accepted.fire = on_accepted;
    call->received.fire = on_received;
    call->sent.fire = on_sent;
    call->closed.fire = on_closed;
    grpc_metadata_array_init(&call->metadata);
    grpc_call_details_init(&call->details);
    /* The payload is never read along with the call: one that is too large would then never surface. */
    grpc_completion_queue *queue = poller->queue;
    grpc_call_error error;
    if (registered)
        error = grpc_server_request_registered_call(server, registered, &call->call, &call->deadline, &call->metadata,
                                                    NULL, queue, queue, &call->accepted);
    else
        error = grpc_server_request_call(server, &call->call, &call->details, &call->metadata, queue, queue,
                                         &call->accepted);
    if (error == GRPC_CALL_OK)
        return 0;
    rpc_call_unref(call);
    return -1;
}

void rpc_poller_cancel_stalled(struct rpc_poller *poller, uint64_t since_ns) {
    for (struct rpc_call *call = poller->calls; call; call = call->next) {
        rpc_call_lock(call);
        bool stalled = call->sending && call->sending_since_ns < since_ns;
        pthread_mutex_unlock(&call->lock);
        if (!stalled)
            continue;
        log_warn("call_stalled", LOG_STR("method", call->method->path),
                 LOG_STR("reason", "its caller reads nothing; it was cancelled"));
        grpc_call_cancel_with_status(call->call, GRPC_STATUS_RESOURCE_EXHAUSTED, "the caller reads nothing", NULL);
    }
}
