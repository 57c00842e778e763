#ifndef MOED_GATEWAY_DESCRIPTORS_H
#define MOED_GATEWAY_DESCRIPTORS_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>

/* The public .proto files, indexed by name and by the symbols they define. Immutable once loaded. */
struct descriptors;

/* Loads a serialized google.protobuf.FileDescriptorSet. NULL: it is none, or there is no memory. */
struct descriptors *descriptors_load(const unsigned char *bytes, size_t size);
void descriptors_destroy(struct descriptors *descriptors);

/* The serialized FileDescriptorProto; NULL: no such file, or no file that defines such a symbol ("moed.v1.Tokens"). */
const ProtobufCBinaryData *descriptors_file(const struct descriptors *descriptors, const char *name);
const ProtobufCBinaryData *descriptors_file_of(const struct descriptors *descriptors, const char *symbol);

/* The full names of all services. */
size_t descriptors_service_count(const struct descriptors *descriptors);
const char *descriptors_service(const struct descriptors *descriptors, size_t index);

#endif
