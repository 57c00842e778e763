#include "common/wire.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

enum { WIRE_HEADER_BYTES = 8 };

static const unsigned char wire_header[WIRE_HEADER_BYTES] = {
    'm', 'o', 'e', 'd', WIRE_VERSION & 0xff, WIRE_VERSION >> 8,
};

static int socket_failed(const char *what, struct status *status) {
    int error = zmq_errno();
    return status_set(status, error == ETERM ? STATUS_CANCELLED : STATUS_UNAVAILABLE, "%s: %s", what,
                      zmq_strerror(error));
}

/* zmq_msg_send that closes the message on failure. */
static int send_frame(void *socket, zmq_msg_t *frame, int flags, struct status *status) {
    while (zmq_msg_send(frame, socket, flags | ZMQ_DONTWAIT) < 0) {
        int error = zmq_errno();
        if (error == EINTR)
            continue;
        zmq_msg_close(frame);
        return error == EAGAIN || error == EHOSTUNREACH ? WIRE_AGAIN : socket_failed("send", status);
    }
    return WIRE_OK;
}

int wire_send(void *socket, const struct wire_identity *to, const ProtobufCMessage *message, struct status *status) {
    size_t size = protobuf_c_message_get_packed_size(message);
    if (size > WIRE_MESSAGE_MAX)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "a %s of %zu bytes; at most %d can be sent",
                          message->descriptor->name, size, WIRE_MESSAGE_MAX);
    zmq_msg_t body, identity;
    if (zmq_msg_init_size(&body, WIRE_HEADER_BYTES + size))
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for a frame of %zu bytes", size);
    unsigned char *bytes = zmq_msg_data(&body);
    memcpy(bytes, wire_header, WIRE_HEADER_BYTES);
    protobuf_c_message_pack(message, bytes + WIRE_HEADER_BYTES);

    int result = WIRE_OK;
    if (to) {
        if (zmq_msg_init_size(&identity, to->length)) {
            zmq_msg_close(&body);
            return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for an identity frame");
        }
        memcpy(zmq_msg_data(&identity), to->bytes, to->length);
        result = send_frame(socket, &identity, ZMQ_SNDMORE, status);
    }
    if (result != WIRE_OK) {
        zmq_msg_close(&body);
        return result;
    }
    return send_frame(socket, &body, 0, status);
}

/*
 * Unpacked, two bytes on the wire can become a hundred in memory. What honest messages need is allowed: four times the
 * frame for large ones, which hold packed numbers or bytes, and much more for small ones.
 */
enum { UNPACKED_BYTES_MIN = 64 << 20, UNPACKED_BYTES_FACTOR = 4 };

struct budget {
    size_t left;
    bool spent;
};

static void *budget_alloc(void *data, size_t size) {
    struct budget *budget = data;
    if (size > budget->left) {
        budget->spent = true;
        return NULL;
    }
    budget->left -= size;
    return malloc(size);
}

static void budget_free(void *data, void *memory) {
    free(memory);
}

int wire_unpack(const void *bytes, size_t size, const ProtobufCMessageDescriptor *descriptor,
                ProtobufCMessage **message, struct status *status) {
    struct budget budget = {.left = UNPACKED_BYTES_MIN + UNPACKED_BYTES_FACTOR * size};
    ProtobufCAllocator allocator = {.alloc = budget_alloc, .free = budget_free, .allocator_data = &budget};
    *message = protobuf_c_message_unpack(descriptor, &allocator, size, bytes);
    if (*message)
        return 0;
    if (budget.spent)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "a %s of %zu bytes takes more memory than any honest one",
                          descriptor->name, size);
    return status_set(status, STATUS_INVALID_ARGUMENT, "%zu bytes are no %s", size, descriptor->name);
}

int wire_decode(const void *frame, size_t size, const ProtobufCMessageDescriptor *descriptor,
                ProtobufCMessage **message, struct status *status) {
    const unsigned char *bytes = frame;
    *message = NULL;
    if (size < WIRE_HEADER_BYTES || memcmp(bytes, wire_header, 4) != 0) {
        status_set(status, STATUS_INVALID_ARGUMENT, "a frame of %zu bytes does not begin with a header of moed", size);
        return WIRE_BAD;
    }
    unsigned version = bytes[4] | (unsigned)bytes[5] << 8;
    if (version != WIRE_VERSION) {
        status_set(status, STATUS_FAILED_PRECONDITION, "the peer speaks protocol version %u; this side speaks %d",
                   version, WIRE_VERSION);
        return WIRE_VERSION_MISMATCH;
    }
    if (bytes[6] || bytes[7]) {
        status_set(status, STATUS_INVALID_ARGUMENT, "the header's last bytes are %u and %u; they must be zero",
                   bytes[6], bytes[7]);
        return WIRE_BAD;
    }
    size -= WIRE_HEADER_BYTES;
    if (size > WIRE_MESSAGE_MAX) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "a %s of %zu bytes; at most %d are taken", descriptor->name, size,
                   WIRE_MESSAGE_MAX);
        return WIRE_BAD;
    }
    return wire_unpack(bytes + WIRE_HEADER_BYTES, size, descriptor, message, status) ? WIRE_BAD : WIRE_OK;
}

/* Takes the frames that are left of a message off the socket and says how many there were. */
static unsigned drop_rest(void *socket, const zmq_msg_t *frame) {
    unsigned dropped = 0;
    bool more = zmq_msg_more(frame);
    while (more) {
        zmq_msg_t rest;
        zmq_msg_init(&rest);
        more = zmq_msg_recv(&rest, socket, ZMQ_DONTWAIT) >= 0 ? zmq_msg_more(&rest) : zmq_errno() == EINTR;
        zmq_msg_close(&rest);
        dropped++;
    }
    return dropped;
}

/* An initialised frame, whatever the result. */
static int receive_frame(void *socket, zmq_msg_t *frame, struct status *status) {
    zmq_msg_init(frame);
    while (zmq_msg_recv(frame, socket, ZMQ_DONTWAIT) < 0)
        if (zmq_errno() != EINTR)
            return zmq_errno() == EAGAIN ? WIRE_AGAIN : socket_failed("receive", status);
    return WIRE_OK;
}

/* Takes the identity frame that a ROUTER puts before a message. */
static int receive_identity(void *socket, struct wire_identity *from, struct status *status) {
    zmq_msg_t frame;
    from->length = 0;
    int result = receive_frame(socket, &frame, status);
    if (result == WIRE_OK && (zmq_msg_size(&frame) > WIRE_IDENTITY_MAX || !zmq_msg_more(&frame))) {
        status_set(status, STATUS_INVALID_ARGUMENT,
                   "an identity of %zu bytes with%s a message; at most %d bytes are taken",
                   zmq_msg_size(&frame), zmq_msg_more(&frame) ? "" : "out", WIRE_IDENTITY_MAX);
        drop_rest(socket, &frame);
        result = WIRE_BAD;
    }
    if (result == WIRE_OK) {
        from->length = zmq_msg_size(&frame);
        memcpy(from->bytes, zmq_msg_data(&frame), from->length);
    }
    zmq_msg_close(&frame);
    return result;
}

int wire_receive(void *socket, struct wire_identity *from, const ProtobufCMessageDescriptor *descriptor,
                 ProtobufCMessage **message, struct status *status) {
    zmq_msg_t frame;
    *message = NULL;
    int result = from ? receive_identity(socket, from, status) : WIRE_OK;
    if (result != WIRE_OK)
        return result;
    result = receive_frame(socket, &frame, status);
    unsigned extra = result == WIRE_OK ? drop_rest(socket, &frame) : 0;
    if (extra) {
        status_set(status, STATUS_INVALID_ARGUMENT, "a message of %u frames; one is allowed", extra + 1);
        result = WIRE_BAD;
    } else if (result == WIRE_OK) {
        result = wire_decode(zmq_msg_data(&frame), zmq_msg_size(&frame), descriptor, message, status);
    }
    zmq_msg_close(&frame);
    return result;
}
