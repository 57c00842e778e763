#include <stdlib.h>
#include <string.h>

#include "common/wire.h"
#include "tests/fuzz/fuzz.h"
#include "worker.pb-c.h"

const char fuzz_seeds[] = "tests/fuzz/seeds/wire";

/* A message that was taken must pack into as many bytes as it says. */
static void decode(const unsigned char *bytes, size_t size, const ProtobufCMessageDescriptor *descriptor) {
    struct status status = {0};
    ProtobufCMessage *message;
    int result = wire_decode(bytes, size, descriptor, &message, &status);
    if ((result == WIRE_OK) != (message != NULL) || (result == WIRE_OK) != (status.code == STATUS_OK))
        abort();
    if (!message)
        return;
    size_t packed_size = protobuf_c_message_get_packed_size(message);
    unsigned char *packed = malloc(packed_size ? packed_size : 1);
    if (protobuf_c_message_pack(message, packed) != packed_size)
        abort();
    free(packed);
    protobuf_c_message_free_unpacked(message, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    unsigned char *bytes = malloc(size ? size : 1);
    if (size)
        memcpy(bytes, data, size);
    decode(bytes, size, &moed__worker__v1__to_gateway__descriptor);
    decode(bytes, size, &moed__worker__v1__to_worker__descriptor);
    free(bytes);
    return 0;
}
