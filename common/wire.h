#ifndef MOED_COMMON_WIRE_H
#define MOED_COMMON_WIRE_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * A protobuf message in a ZeroMQ frame. The frame begins with eight bytes: "moed", the protocol version as a
 * little-endian u16, and two zero bytes. A message that is not exactly one such frame (behind a ROUTER's identity
 * frame) is an error with a reason, never a crash; a wrong version is told apart so that the peer can be answered.
 */
enum { WIRE_VERSION = 1, WIRE_IDENTITY_MAX = 255, WIRE_MESSAGE_MAX = 256 << 20 };

struct wire_identity {
    unsigned char bytes[WIRE_IDENTITY_MAX];
    size_t length; /* 0: the socket is no ROUTER */
};

enum wire_result {
    WIRE_OK = 0,
    WIRE_AGAIN = 1,    /* nothing there now (or, sending, the peer's queue is full) */
    WIRE_BAD = 2,      /* a malformed frame was taken off the socket; status says why */
    WIRE_VERSION_MISMATCH = 3,
    /* -1: the socket failed, or ETERM; status says why */
};

/* Sends without waiting. `to` is NULL but for a ROUTER; there WIRE_AGAIN also means that the peer is gone. */
int wire_send(void *socket, const struct wire_identity *to, const ProtobufCMessage *message, struct status *status);

/*
 * Takes one message off the socket without waiting. On WIRE_OK *message is to be freed with
 * protobuf_c_message_free_unpacked(*message, NULL). `from` is NULL but for a ROUTER, and filled in whatever the
 * result, if there was an identity frame. Enum fields and bytes are as the peer sent them: check before use.
 */
int wire_receive(void *socket, struct wire_identity *from, const ProtobufCMessageDescriptor *descriptor,
                 ProtobufCMessage **message, struct status *status);

/*
 * Unpacks a message that a stranger sent, within bounds of memory. 0, or -1 with INVALID_ARGUMENT or RESOURCE_EXHAUSTED. To
 * be freed as above.
 */
int wire_unpack(const void *bytes, size_t size, const ProtobufCMessageDescriptor *descriptor,
                ProtobufCMessage **message, struct status *status);

/* wire_receive over one frame's bytes, for tests and fuzzing: WIRE_OK, WIRE_BAD or WIRE_VERSION_MISMATCH. */
int wire_decode(const void *frame, size_t size, const ProtobufCMessageDescriptor *descriptor,
                ProtobufCMessage **message, struct status *status);

#endif
