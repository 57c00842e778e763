#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <grpc/byte_buffer_reader.h>

#include "gateway/reflection.h"
#include "google/protobuf/descriptor.pb-c.h"
#include "proto/descriptors.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest reflection_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflection_response;

static struct descriptors *descriptors;

static int setup(void **state) {
    grpc_init();
    descriptors = descriptors_load(proto_descriptors, proto_descriptors_size);
    return descriptors ? 0 : -1;
}

static int teardown(void **state) {
    descriptors_destroy(descriptors);
    grpc_shutdown();
    return 0;
}

static reflection_response *ask(reflection_request *request) {
    grpc_byte_buffer *answer = reflection_answer(descriptors, request);
    grpc_byte_buffer_reader reader;
    assert_non_null(answer);
    assert_true(grpc_byte_buffer_reader_init(&reader, answer));
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    reflection_response *response = grpc__reflection__v1__server_reflection_response__unpack(
        NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    assert_non_null(response);
    assert_int_equal(response->original_request->message_request_case, request->message_request_case);
    grpc_slice_unref(bytes);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(answer);
    return response;
}

static reflection_response *ask_symbol(char *symbol) {
    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    request.file_containing_symbol = symbol;
    return ask(&request);
}

static void done(reflection_response *response) {
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
}

/* The answer is this one file. */
static void assert_file(reflection_response *response, const char *name) {
    assert_int_equal(response->message_response_case,
                     GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE);
    assert_int_equal(response->file_descriptor_response->n_file_descriptor_proto, 1);
    ProtobufCBinaryData *bytes = &response->file_descriptor_response->file_descriptor_proto[0];
    Google__Protobuf__FileDescriptorProto *file =
        google__protobuf__file_descriptor_proto__unpack(NULL, bytes->len, bytes->data);
    assert_non_null(file);
    assert_string_equal(file->name, name);
    assert_int_equal(file->n_dependency, 0); /* or it would have to be sent along */
    google__protobuf__file_descriptor_proto__free_unpacked(file, NULL);
    done(response);
}

static void assert_error(reflection_response *response, int code) {
    assert_int_equal(response->message_response_case,
                     GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE);
    assert_int_equal(response->error_response->error_code, code);
    done(response);
}

static void lists_services(void **state) {
    static const char *const expected[] = {"moed.v1.Inference", "grpc.health.v1.Health",
                                           "grpc.reflection.v1.ServerReflection",
                                           "grpc.reflection.v1alpha.ServerReflection"};
    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
    request.list_services = "*";
    reflection_response *response = ask(&request);
    assert_int_equal(response->message_response_case,
                     GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE);
    assert_int_equal(response->list_services_response->n_service, 4);
    for (size_t e = 0; e < 4; e++) {
        int found = 0;
        for (size_t i = 0; i < 4; i++)
            found += strcmp(response->list_services_response->service[i]->name, expected[e]) == 0;
        assert_int_equal(found, 1);
    }
    done(response);
}

static void finds_files(void **state) {
    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    request.file_by_filename = "moed.proto";
    assert_file(ask(&request), "moed.proto");
    request.file_by_filename = "grpc/health/v1/health.proto";
    assert_file(ask(&request), "grpc/health/v1/health.proto");
    request.file_by_filename = "worker.proto"; /* not public */
    assert_error(ask(&request), STATUS_NOT_FOUND);
}

static void finds_symbols(void **state) {
    assert_file(ask_symbol("moed.v1.Inference"), "moed.proto");
    assert_file(ask_symbol("moed.v1.Inference.Generate"), "moed.proto");
    assert_file(ask_symbol("moed.v1.GenerateRequest"), "moed.proto");
    assert_file(ask_symbol("moed.v1.GenerateRequest.tokens"), "moed.proto");
    assert_file(ask_symbol("moed.v1.Worker.State"), "moed.proto");
    assert_file(ask_symbol("moed.v1.Worker.READY"), "moed.proto");
    assert_file(ask_symbol("grpc.health.v1.HealthCheckResponse.ServingStatus"), "grpc/health/v1/health.proto");
    assert_file(ask_symbol("grpc.reflection.v1alpha.ServerReflection"), "grpc/reflection/v1alpha/reflection.proto");
    assert_error(ask_symbol("moed.v1.Inferenc"), STATUS_NOT_FOUND);
    assert_error(ask_symbol("moed.v1"), STATUS_NOT_FOUND);
    assert_error(ask_symbol(""), STATUS_NOT_FOUND);
    assert_error(ask_symbol("moed.worker.v1.Hello"), STATUS_NOT_FOUND);
}

static void answers_the_rest(void **state) {
    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    Grpc__Reflection__V1__ExtensionRequest extension = GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
    assert_error(ask(&request), STATUS_INVALID_ARGUMENT); /* nothing asked */
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION;
    request.file_containing_extension = &extension;
    assert_error(ask(&request), STATUS_NOT_FOUND);
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE;
    request.all_extension_numbers_of_type = "no.such.Type";
    assert_error(ask(&request), STATUS_NOT_FOUND);
    request.all_extension_numbers_of_type = "moed.v1.Tokens";
    reflection_response *response = ask(&request);
    assert_string_equal(response->all_extension_numbers_response->base_type_name, "moed.v1.Tokens");
    assert_int_equal(response->all_extension_numbers_response->n_extension_number, 0);
    done(response);
}

static void refuses_what_is_no_set(void **state) {
    static const unsigned char garbage[] = {0xff, 0xff, 0xff};
    assert_null(descriptors_load(garbage, sizeof garbage));
    assert_null(descriptors_load(proto_descriptors, proto_descriptors_size - 1));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lists_services),         cmocka_unit_test(finds_files),
        cmocka_unit_test(finds_symbols),          cmocka_unit_test(answers_the_rest),
        cmocka_unit_test(refuses_what_is_no_set),
    };
    return cmocka_run_group_tests_name("gateway_reflection", tests, setup, teardown);
}
