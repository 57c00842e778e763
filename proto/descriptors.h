#ifndef MOED_PROTO_DESCRIPTORS_H
#define MOED_PROTO_DESCRIPTORS_H

#include <stddef.h>

/* A serialized google.protobuf.FileDescriptorSet of all files the gateway serves to callers. */
extern const unsigned char proto_descriptors[];
extern const size_t proto_descriptors_size;

#endif
