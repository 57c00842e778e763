#include "gateway/reflection.h"

#include <stdlib.h>

typedef Grpc__Reflection__V1__ServerReflectionRequest reflection_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflection_response;

static grpc_byte_buffer *answer_error(reflection_response *response, enum status_code code, const char *message) {
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.error_code = code;
    error.error_message = (char *)message;
    response->message_response_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    response->error_response = &error;
    return rpc_pack(&response->base);
}

/* None of the files imports another, so one is all there is to send. */
static grpc_byte_buffer *answer_file(reflection_response *response, const ProtobufCBinaryData *file) {
    if (!file)
        return answer_error(response, STATUS_NOT_FOUND, "no such file or symbol");
    Grpc__Reflection__V1__FileDescriptorResponse files = GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    files.n_file_descriptor_proto = 1;
    files.file_descriptor_proto = (ProtobufCBinaryData *)file;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    response->file_descriptor_response = &files;
    return rpc_pack(&response->base);
}

static grpc_byte_buffer *answer_services(reflection_response *response, const struct descriptors *descriptors) {
    size_t count = descriptors_service_count(descriptors);
    Grpc__Reflection__V1__ServiceResponse services[count + 1], *pointers[count + 1];
    Grpc__Reflection__V1__ListServiceResponse list = GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    for (size_t i = 0; i < count; i++) {
        grpc__reflection__v1__service_response__init(&services[i]);
        services[i].name = (char *)descriptors_service(descriptors, i);
        pointers[i] = &services[i];
    }
    list.n_service = count;
    list.service = pointers;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    response->list_services_response = &list;
    return rpc_pack(&response->base);
}

/* The files define no extensions: known types have none. */
static grpc_byte_buffer *answer_extensions(reflection_response *response, const struct descriptors *descriptors,
                                           char *type) {
    if (!descriptors_file_of(descriptors, type))
        return answer_error(response, STATUS_NOT_FOUND, "no such type");
    Grpc__Reflection__V1__ExtensionNumberResponse none = GRPC__REFLECTION__V1__EXTENSION_NUMBER_RESPONSE__INIT;
    none.base_type_name = type;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ALL_EXTENSION_NUMBERS_RESPONSE;
    response->all_extension_numbers_response = &none;
    return rpc_pack(&response->base);
}

grpc_byte_buffer *reflection_answer(const struct descriptors *descriptors, reflection_request *request) {
    reflection_response response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    response.valid_host = request->host;
    response.original_request = request;
    switch (request->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        return answer_file(&response, descriptors_file(descriptors, request->file_by_filename));
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        return answer_file(&response, descriptors_file_of(descriptors, request->file_containing_symbol));
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
        return answer_error(&response, STATUS_NOT_FOUND, "there are no extensions");
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        return answer_extensions(&response, descriptors, request->all_extension_numbers_of_type);
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        return answer_services(&response, descriptors);
    default:
        return answer_error(&response, STATUS_INVALID_ARGUMENT,
                            "message_request: empty; one of its fields must be set");
    }
}

/* The state of a stream: the answer that waits to be sent. One request is read at a time. */
struct exchange {
    grpc_byte_buffer *answer;
};

static void opened(struct rpc_call *call) {
    struct exchange *exchange = calloc(1, sizeof *exchange);
    if (!exchange) {
        rpc_call_reply(call, NULL);
        return;
    }
    rpc_call_set_state(call, exchange);
    rpc_call_read(call);
}

static void received(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    struct exchange *exchange = rpc_call_state(call);
    reflection_request *request = grpc__reflection__v1__server_reflection_request__unpack(NULL, size, bytes);
    if (!request) {
        struct status status;
        status_set(&status, STATUS_INVALID_ARGUMENT, "%zu bytes are no ServerReflectionRequest", size);
        rpc_call_finish(call, &status);
        return;
    }
    rpc_call_lock(call);
    exchange->answer = reflection_answer(rpc_call_context(call), request);
    rpc_call_pump_unlock(call);
    grpc__reflection__v1__server_reflection_request__free_unpacked(request, NULL);
}

static grpc_byte_buffer *next_answer(struct rpc_call *call) {
    struct exchange *exchange = rpc_call_state(call);
    if (!exchange)
        return NULL;
    grpc_byte_buffer *answer = exchange->answer;
    exchange->answer = NULL;
    return answer;
}

static void half_closed(struct rpc_call *call) {
    rpc_call_finish(call, NULL);
}

static void destroy(void *state) {
    struct exchange *exchange = state;
    if (exchange->answer)
        grpc_byte_buffer_destroy(exchange->answer);
    free(exchange);
}

const struct rpc_handler reflection_info = {
    .open = opened,
    .message = received,
    .half_closed = half_closed,
    .next = next_answer,
    .written = rpc_call_read,
    .destroy = destroy,
    .idles = true,
};
