#include "client/rpc.h"

#include <errno.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>


struct rpc_channel {
    grpc_channel *channel;
};

struct rpc_queue {
    grpc_completion_queue *queue;
    struct rpc_call *calls; /* doubly linked: what a destroy has to cancel */
};

/* One batch of a call is in flight at any time, so the call itself is its tag. */
struct rpc_call {
    grpc_call *call;
    struct rpc_queue *queue;
    struct rpc_call *next, *previous;
    const ProtobufCMessageDescriptor *response;
    void *user;
    bool ending; /* the batch in flight receives the status */
    bool malformed; /* an answer was not of the type it should have */
    grpc_byte_buffer *message;
    grpc_metadata_array initial_metadata, trailing_metadata;
    grpc_status_code code;
    grpc_slice details;
};

void rpc_init(void) {
    grpc_init();
}

void rpc_shutdown(void) {
    grpc_shutdown();
}

/* ---- channels */

static char *read_pem(const char *path, struct status *status) {
    enum { PEM_MAX = 1 << 20 };
    char *text = NULL;
    FILE *file = fopen(path, "re");
    if (!file) {
        status_set(status, STATUS_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
        return NULL;
    }
    text = malloc(PEM_MAX);
    size_t size = text ? fread(text, 1, PEM_MAX, file) : 0;
    fclose(file);
    if (text && size < PEM_MAX) {
        text[size] = '\0';
        if (strstr(text, "-----BEGIN "))
            return text;
    }
    status_set(status, STATUS_INVALID_ARGUMENT, "%s: not a PEM file of at most %d bytes", path, PEM_MAX - 1);
    free(text);
    return NULL;
}

static grpc_channel_credentials *credentials_create(const struct rpc_target *target, struct status *status) {
    grpc_channel_credentials *credentials = NULL;
    char *ca = NULL, *cert = NULL, *key = NULL;

    if (!target->tls && !target->ca_file && !target->cert_file && !target->key_file)
        return grpc_insecure_credentials_create();
    if (!target->cert_file != !target->key_file) {
        status_set(status, STATUS_INVALID_ARGUMENT, "a client certificate needs both its certificate and its key file");
        return NULL;
    }
    if (target->ca_file && !(ca = read_pem(target->ca_file, status)))
        goto out;
    if (target->cert_file && !(cert = read_pem(target->cert_file, status)))
        goto out;
    if (target->key_file && !(key = read_pem(target->key_file, status)))
        goto out;
    grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
    credentials = grpc_ssl_credentials_create(ca, cert ? &pair : NULL, NULL, NULL);
    if (!credentials)
        status_set(status, STATUS_INVALID_ARGUMENT, "the TLS certificates cannot be used");
out:
    free(ca);
    free(cert);
    free(key);
    return credentials;
}

int rpc_channel_create(const struct rpc_target *target, struct rpc_channel **out, struct status *status) {
    grpc_channel_credentials *credentials = credentials_create(target, status);
    if (!credentials)
        return -1;

    struct {
        const char *key;
        int value;
    } const integers[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RPC_MESSAGE_MAX},
        {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1}, /* the server says what it takes */
        {GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100},
        {GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000},
        {GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1}, /* a connection for each channel */
        {GRPC_ARG_ENABLE_HTTP_PROXY, 0},         /* a service of one's own network */
    };
    enum { COUNT = sizeof integers / sizeof *integers };
    grpc_arg args[COUNT];
    for (size_t i = 0; i < COUNT; i++)
        args[i] = (grpc_arg){
            .type = GRPC_ARG_INTEGER, .key = (char *)integers[i].key, .value.integer = integers[i].value};

    struct rpc_channel *channel = malloc(sizeof *channel);
    if (channel)
        channel->channel = grpc_channel_create(target->address, credentials, &(grpc_channel_args){COUNT, args});
    grpc_channel_credentials_release(credentials);
    if (!channel)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    *out = channel;
    return 0;
}

void rpc_channel_destroy(struct rpc_channel *channel) {
    if (!channel)
        return;
    grpc_channel_destroy(channel->channel);
    free(channel);
}

/* ---- calls */

static gpr_timespec time_after(uint64_t timeout_ns) {
    if (timeout_ns > INT64_MAX)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_nanos((int64_t)timeout_ns, GPR_TIMESPAN));
}

static void call_batch(struct rpc_call *call, const grpc_op *ops, size_t count) {
    /* Only a mistake in this file is refused here; going on would wait forever for an event. */
    if (grpc_call_start_batch(call->call, ops, count, call, NULL) != GRPC_CALL_OK)
        abort();
}

static struct rpc_call *call_start(struct rpc_channel *channel, struct rpc_queue *queue,
                                   const struct rpc_method *method, grpc_slice request,
                                   const struct rpc_options *options) {
    struct rpc_call *call = calloc(1, sizeof *call);
    if (!call)
        abort(); /* as C-core does */
    uint64_t timeout_ns = options ? options->timeout_ns : RPC_FOREVER;
    call->queue = queue;
    call->response = method->response;
    call->user = options ? options->user : NULL;
    call->call = grpc_channel_create_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue->queue,
                                          grpc_slice_from_static_string(method->path), NULL, time_after(timeout_ns),
                                          NULL);
    grpc_metadata_array_init(&call->initial_metadata);
    grpc_metadata_array_init(&call->trailing_metadata);
    call->details = grpc_empty_slice();
    call->next = queue->calls;
    if (call->next)
        call->next->previous = call;
    queue->calls = call;

    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&request, 1);
    uint32_t flags = options && options->wait_for_ready
                         ? GRPC_INITIAL_METADATA_WAIT_FOR_READY | GRPC_INITIAL_METADATA_WAIT_FOR_READY_EXPLICITLY_SET
                         : 0;
    grpc_op ops[] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = flags},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = buffer},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &call->initial_metadata},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->message},
    };
    call_batch(call, ops, sizeof ops / sizeof *ops);
    grpc_byte_buffer_destroy(buffer);
    grpc_slice_unref(request);
    return call;
}

struct rpc_call *rpc_call_start(struct rpc_channel *channel, struct rpc_queue *queue, const struct rpc_method *method,
                                const ProtobufCMessage *request, const struct rpc_options *options) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(request));
    protobuf_c_message_pack(request, GRPC_SLICE_START_PTR(slice));
    return call_start(channel, queue, method, slice, options);
}

struct rpc_call *rpc_call_start_bytes(struct rpc_channel *channel, struct rpc_queue *queue,
                                      const struct rpc_method *method, const void *bytes, size_t size,
                                      const struct rpc_options *options) {
    return call_start(channel, queue, method, grpc_slice_from_copied_buffer(bytes, size), options);
}

void rpc_call_cancel(struct rpc_call *call) {
    grpc_call_cancel(call->call, NULL);
}

static void call_free(struct rpc_call *call) {
    if (call->next)
        call->next->previous = call->previous;
    *(call->previous ? &call->previous->next : &call->queue->calls) = call->next;
    grpc_metadata_array_destroy(&call->initial_metadata);
    grpc_metadata_array_destroy(&call->trailing_metadata);
    grpc_slice_unref(call->details);
    grpc_call_unref(call->call);
    free(call);
}

static ProtobufCMessage *unpack(grpc_byte_buffer *buffer, const ProtobufCMessageDescriptor *descriptor) {
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer))
        return NULL;
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    ProtobufCMessage *message =
        protobuf_c_message_unpack(descriptor, NULL, GRPC_SLICE_LENGTH(slice), GRPC_SLICE_START_PTR(slice));
    grpc_slice_unref(slice);
    grpc_byte_buffer_reader_destroy(&reader);
    return message;
}

static void call_receive(struct rpc_call *call) {
    call_batch(call, &(grpc_op){.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->message}, 1);
}

static void call_finish(struct rpc_call *call) {
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &call->trailing_metadata;
    op.data.recv_status_on_client.status = &call->code;
    op.data.recv_status_on_client.status_details = &call->details;
    call->ending = true;
    call_batch(call, &op, 1);
}

/* Goes on after the batch in flight has ended. True: *event is to be told. */
static bool call_advance(struct rpc_call *call, struct rpc_event *event) {
    *event = (struct rpc_event){.call = call, .user = call->user};
    if (call->ending) {
        event->type = RPC_END;
        if (call->malformed)
            status_set(&event->status, STATUS_INTERNAL, "the answer is not a %s", call->response->name);
        else
            status_set(&event->status, (enum status_code)call->code, "%.*s", (int)GRPC_SLICE_LENGTH(call->details),
                       (const char *)GRPC_SLICE_START_PTR(call->details));
        call_free(call);
        return true;
    }
    if (!call->message) {
        call_finish(call);
        return false;
    }
    event->message = unpack(call->message, call->response);
    grpc_byte_buffer_destroy(call->message);
    call->message = NULL;
    if (!event->message) {
        call->malformed = true;
        rpc_call_cancel(call);
        call_finish(call);
        return false;
    }
    event->type = RPC_MESSAGE;
    call_receive(call);
    return true;
}

/* ---- queues */

struct rpc_queue *rpc_queue_create(void) {
    struct rpc_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        abort();
    queue->queue = grpc_completion_queue_create_for_next(NULL);
    return queue;
}

void rpc_queue_next(struct rpc_queue *queue, uint64_t timeout_ns, struct rpc_event *event) {
    /* C-core rounds up to milliseconds, also a deadline of just now. */
    gpr_timespec deadline = timeout_ns ? time_after(timeout_ns) : gpr_inf_past(GPR_CLOCK_MONOTONIC);
    for (;;) {
        grpc_event completion = grpc_completion_queue_next(queue->queue, deadline, NULL);
        if (completion.type != GRPC_OP_COMPLETE) {
            *event = (struct rpc_event){.type = RPC_TIMEOUT};
            return;
        }
        if (call_advance(completion.tag, event))
            return;
    }
}

void rpc_queue_destroy(struct rpc_queue *queue) {
    if (!queue)
        return;
    for (struct rpc_call *call = queue->calls; call; call = call->next)
        rpc_call_cancel(call);
    while (queue->calls) {
        struct rpc_event event;
        rpc_queue_next(queue, RPC_FOREVER, &event);
        rpc_message_free(event.message);
    }
    grpc_completion_queue_shutdown(queue->queue);
    while (grpc_completion_queue_next(queue->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(queue->queue);
    free(queue);
}

void rpc_message_free(ProtobufCMessage *message) {
    if (message)
        protobuf_c_message_free_unpacked(message, NULL);
}
