#include "config.h"

#include <signal.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "tests/integration/service.h"

/* The standard services: health (liveness as "", readiness as the service's name) and reflection. */

#define SERVICE_NAME "moed.v1.Inference"
enum {
    SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING,
    NOT_SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING,
    SERVICE_UNKNOWN = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN,
};

/* The health of a service by Check, or minus the status code. */
static int check(struct service *service, const char *name) {
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)name;
    struct status status;
    ProtobufCMessage *response = service_call(service, &method_check, &request.base, &status);
    int health = response ? (int)((Grpc__Health__V1__HealthCheckResponse *)response)->status : -(int)status.code;
    rpc_message_free(response);
    return health;
}

static struct rpc_call *watch(struct service *service, const char *name) {
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)name;
    return rpc_call_start(service->channel, service->queue, &method_watch, &request.base, NULL);
}

/* What the watched service is now told to be. */
static int watched(struct service *service) {
    struct rpc_event event;
    rpc_queue_next(service->queue, PATIENCE_S * UINT64_C(1000000000), &event);
    assert_int_equal(event.type, RPC_MESSAGE);
    int health = (int)((Grpc__Health__V1__HealthCheckResponse *)event.message)->status;
    rpc_message_free(event.message);
    return health;
}

static struct status ended(struct service *service) {
    struct rpc_event event;
    do {
        rpc_queue_next(service->queue, PATIENCE_S * UINT64_C(1000000000), &event);
        assert_int_not_equal(event.type, RPC_TIMEOUT);
        rpc_message_free(event.message);
    } while (event.type != RPC_END);
    return event.status;
}

static void health_follows_the_workers(void **state) {
    struct service *service = *state;
    assert_int_equal(check(service, ""), SERVING);
    assert_int_equal(check(service, SERVICE_NAME), NOT_SERVING);
    assert_int_equal(check(service, "moed.v1.Nothing"), -STATUS_NOT_FOUND);

    struct rpc_call *call = watch(service, SERVICE_NAME);
    assert_int_equal(watched(service), NOT_SERVING);
    struct process *worker = worker_start("w0", NULL);
    assert_int_equal(watched(service), SERVING);
    assert_int_equal(check(service, SERVICE_NAME), SERVING);
    process_signal(worker, SIGTERM);
    assert_int_equal(watched(service), NOT_SERVING);
    assert_int_equal(process_finish(worker), 0);
    assert_int_equal(check(service, SERVICE_NAME), NOT_SERVING);
    assert_int_equal(check(service, ""), SERVING);
    rpc_call_cancel(call);
    assert_int_equal(ended(service).code, STATUS_CANCELLED);
}

static void an_unknown_service_is_watched(void **state) {
    struct service *service = *state;
    struct rpc_call *call = watch(service, "moed.v1.Nothing");
    assert_int_equal(watched(service), SERVICE_UNKNOWN);
    rpc_call_cancel(call);
    assert_int_equal(ended(service).code, STATUS_CANCELLED);
}

/* The answer to one question on a stream of its own; rpc_message_free. */
static Grpc__Reflection__V1__ServerReflectionResponse *reflect(
    struct service *service, const char *path, const Grpc__Reflection__V1__ServerReflectionRequest *request) {
    struct rpc_method method = {path, &grpc__reflection__v1__server_reflection_response__descriptor};
    struct status status;
    ProtobufCMessage *response = service_call(service, &method, &request->base, &status);
    if (!response)
        fail_msg("%s: %s: %s", path, status_code_name((int)status.code), status.message);
    return (Grpc__Reflection__V1__ServerReflectionResponse *)response;
}

static bool contains(const ProtobufCBinaryData *bytes, const char *text) {
    return memmem(bytes->data, bytes->len, text, strlen(text));
}

static void reflection_describes_the_services(void **state) {
    struct service *service = *state;
    static const char *const paths[] = {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    for (size_t i = 0; i < 2; i++) {
        Grpc__Reflection__V1__ServerReflectionRequest request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
        request.message_request_case = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
        request.list_services = "";
        Grpc__Reflection__V1__ServerReflectionResponse *response = reflect(service, paths[i], &request);
        assert_int_equal(response->message_response_case,
                         GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE);
        unsigned found = 0;
        for (size_t j = 0; j < response->list_services_response->n_service; j++) {
            const char *name = response->list_services_response->service[j]->name;
            found |= strcmp(name, SERVICE_NAME) == 0 ? 1 : strcmp(name, "grpc.health.v1.Health") == 0 ? 2 : 0;
        }
        assert_int_equal(found, 3);
        rpc_message_free(&response->base);

        request.message_request_case =
            GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
        static const char *const symbols[] = {SERVICE_NAME, SERVICE_NAME ".Generate", "moed.v1.GenerateRequest"};
        for (size_t j = 0; j < 3; j++) {
            request.file_containing_symbol = (char *)symbols[j];
            response = reflect(service, paths[i], &request);
            assert_int_equal(
                response->message_response_case,
                GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE);
            const Grpc__Reflection__V1__FileDescriptorResponse *files = response->file_descriptor_response;
            assert_true(files->n_file_descriptor_proto > 0);
            assert_true(contains(&files->file_descriptor_proto[0], "moed.proto"));
            assert_true(contains(&files->file_descriptor_proto[0], "GenerateRequest"));
            rpc_message_free(&response->base);
        }

        request.file_containing_symbol = "moed.v1.Nothing";
        response = reflect(service, paths[i], &request);
        assert_int_equal(response->message_response_case,
                         GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE);
        assert_int_equal(response->error_response->error_code, STATUS_NOT_FOUND);
        rpc_message_free(&response->base);
    }
}

/* A gateway that is told to end does not wait for watchers. */
static void watchers_do_not_hold_the_gateway(void **state) {
    struct service *service = *state;
    watch(service, "");
    assert_int_equal(watched(service), SERVING);
    process_signal(service->gateway, SIGTERM);
    ended(service);
    assert_int_equal(process_finish(service->gateway), 0);
}

static int setup(void **state) {
    static struct service service;
    if (model_setup(state, 256) != 0)
        return -1;
    service_start(&service, WORKER_ENDPOINT);
    *state = &service;
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(health_follows_the_workers),
        cmocka_unit_test(an_unknown_service_is_watched),
        cmocka_unit_test(reflection_describes_the_services),
        cmocka_unit_test(watchers_do_not_hold_the_gateway),
    };
    return cmocka_run_group_tests(tests, setup, service_teardown);
}
