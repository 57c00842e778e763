#include <errno.h>
#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <zmq.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/metrics_http.h"
#include "gateway/admission.h"
#include "gateway/fleet.h"
#include "gateway/health.h"
#include "gateway/inference.h"
#include "gateway/metrics.h"
#include "gateway/options.h"
#include "gateway/reflection.h"
#include "gateway/rpc_server.h"
#include "proto/descriptors.h"

enum { EXIT_USAGE = 2, DRAIN_POLL_MS = 20 };

struct gateway {
    void *zmq_context;
    struct gateway_metrics *metrics;
    struct metrics_http *metrics_http;
    struct admission *admission;
    struct health *health;
    struct descriptors *descriptors;
    struct fleet *fleet;
    struct inference *inference;
    struct rpc_server *server;
};

static uint64_t nanoseconds(double seconds) {
    return (uint64_t)(seconds * 1e9);
}

/* C-core's own messages, in our log's form. */
static void log_grpc(gpr_log_func_args *entry) {
    enum log_level level = entry->severity == GPR_LOG_SEVERITY_ERROR ? LOG_WARN : LOG_DEBUG;
    log_event_at(level, "grpc", LOG_STR("message", entry->message));
}

static void ready_changed(void *context, bool ready) {
    log_info(ready ? "ready" : "not_ready");
    health_set_ready(context, ready);
}

static int start(struct gateway *gateway, const struct gateway_options *options, struct status *status) {
    gateway->zmq_context = zmq_ctx_new();
    gateway->metrics = gateway_metrics_create(options->metrics_prefix);
    gateway->admission = admission_create(options->max_requests, options->max_queued_tokens);
    gateway->health = health_create();
    gateway->descriptors = descriptors_load(proto_descriptors, proto_descriptors_size);
    if (!gateway->zmq_context || !gateway->metrics || !gateway->admission || !gateway->health || !gateway->descriptors)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory");

    struct fleet_options fleet_options = {
        .worker_timeout_ns = nanoseconds(options->worker_timeout),
        .ready_changed = ready_changed,
        .ready_context = gateway->health,
        .ticked = gateway_metrics_see_workers,
        .ticked_context = gateway->metrics,
    };
    fleet_options.endpoints = gateway_options_endpoints(options, &fleet_options.endpoint_count);
    if (fleet_start(&fleet_options, gateway->zmq_context, &gateway->fleet, status))
        return -1;

    const struct inference_options inference_options = {
        .admission = gateway->admission,
        .fleet = gateway->fleet,
        .metrics = gateway_metrics_serving(gateway->metrics),
        .pollers = (unsigned)options->pollers,
        .max_message_size = options->max_message_size,
    };
    if (inference_create(&inference_options, &gateway->inference, status))
        return -1;

    static struct rpc_method methods[] = {
        {.path = "/moed.v1.Inference/Generate", .handler = &inference_generate},
        {.path = "/moed.v1.Inference/Forward", .handler = &inference_forward},
        {.path = "/moed.v1.Inference/GetModel", .handler = &inference_get_model},
        {.path = "/moed.v1.Inference/ListWorkers", .handler = &inference_list_workers},
        {.path = "/grpc.health.v1.Health/Check", .handler = &health_check},
        {.path = "/grpc.health.v1.Health/Watch", .handler = &health_watch},
        {.path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", .handler = &reflection_info},
        {.path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", .handler = &reflection_info},
    };
    void *const contexts[] = {gateway->inference, gateway->inference, gateway->inference,   gateway->inference,
                              gateway->health,    gateway->health,    gateway->descriptors, gateway->descriptors};
    const size_t method_count = sizeof methods / sizeof *methods;
    for (size_t i = 0; i < method_count; i++) {
        methods[i].context = contexts[i];
        methods[i].ended = gateway_metrics_method(gateway->metrics, methods[i].path + 1);
    }
    const struct rpc_server_options server_options = {
        .listen = options->listen,
        .pollers = (unsigned)options->pollers,
        .max_message_size = options->max_message_size,
        .stall_timeout_ns = nanoseconds(options->stall_timeout),
        .tls_cert = options->tls_cert,
        .tls_key = options->tls_key,
        .tls_client_ca = options->tls_client_ca,
        .unregistered_ended = gateway_metrics_method(gateway->metrics, "unregistered"),
    };
    if (options->metrics_listen &&
        (metrics_http_open(options->metrics_listen, &gateway->metrics_http, status) ||
         metrics_http_serve(gateway->metrics_http, gateway_metrics_render, gateway->metrics, status)))
        return -1;
    return rpc_server_start(&server_options, methods, method_count, &gateway->server, status);
}

/* No new calls, and running ones end: by themselves, or after the timeout, or at a second signal. */
static void drain(struct gateway *gateway, const sigset_t *signals, uint64_t timeout_ns) {
    const struct timespec poll = {.tv_nsec = DRAIN_POLL_MS * 1000000L};
    uint64_t begun = clock_now_ns();
    log_info("draining", LOG_UINT("requests", admission_requests(gateway->admission)));
    admission_drain(gateway->admission);
    health_drain(gateway->health);
    rpc_server_shutdown(gateway->server);
    const char *outcome = "timeout";
    while (clock_now_ns() - begun < timeout_ns) {
        if (rpc_server_calls(gateway->server) == 0) {
            outcome = "complete";
            break;
        }
        if (sigtimedwait(signals, NULL, &poll) > 0) {
            outcome = "second signal";
            break;
        }
    }
    log_info("drained", LOG_STR("outcome", outcome), LOG_UINT("requests", admission_requests(gateway->admission)));
    rpc_server_cancel(gateway->server);
}

static void stop(struct gateway *gateway) {
    metrics_http_close(gateway->metrics_http);
    rpc_server_destroy(gateway->server);
    fleet_stop(gateway->fleet);
    inference_destroy(gateway->inference);
    descriptors_destroy(gateway->descriptors);
    health_destroy(gateway->health);
    admission_destroy(gateway->admission);
    gateway_metrics_destroy(gateway->metrics);
    if (gateway->zmq_context)
        while (zmq_ctx_term(gateway->zmq_context) && zmq_errno() == EINTR)
            continue;
}

int main(int argc, char **argv) {
    struct gateway_options options;
    struct gateway gateway = {0};
    struct status status = {0};
    int result = gateway_options_parse(argc, argv, &options, &status);
    if (result == OPTIONS_EXIT)
        return EXIT_SUCCESS;
    if (result < 0) {
        fprintf(stderr, "moed-gateway: %s\nTry 'moed-gateway --help'.\n", status.message);
        return EXIT_USAGE;
    }
    log_setup("moed-gateway", gateway_options_log_level(&options), gateway_options_log_format(&options));
    gpr_set_log_function(log_grpc);

    /* All threads inherit the mask: signals are only ever waited for, here. */
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);

    grpc_init();
    int exit_status = EXIT_SUCCESS;
    if (start(&gateway, &options, &status)) {
        log_error("start_failed", LOG_STR("status", status_code_name(status.code)), LOG_STR("reason", status.message));
        exit_status = EXIT_FAILURE;
    } else {
        int number;
        sigwait(&signals, &number);
        drain(&gateway, &signals, nanoseconds(options.drain_timeout));
    }
    stop(&gateway);
    grpc_shutdown();
    gateway_options_free(&options);
    log_info("stopped");
    return exit_status;
}
