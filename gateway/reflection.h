#ifndef MOED_GATEWAY_REFLECTION_H
#define MOED_GATEWAY_REFLECTION_H

#include "gateway/descriptors.h"
#include "gateway/rpc_call.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

/*
 * Server reflection (https://github.com/grpc/grpc/blob/master/doc/server-reflection.md), so that generic clients need
 * no .proto files. v1 and v1alpha differ in nothing but their names. The handler's context is a struct descriptors.
 */
extern const struct rpc_handler reflection_info;

/* The packed answer to one request. */
grpc_byte_buffer *reflection_answer(const struct descriptors *descriptors,
                                    Grpc__Reflection__V1__ServerReflectionRequest *request);

#endif
