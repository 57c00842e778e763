#include "gateway/options.h"

#include <string.h>
#include <unistd.h>

#include "common/metrics.h"

enum { POLLERS_DEFAULT_MAX = 2, POLLERS_MAX = 64 };

static const char *const levels[] = {"error", "warn", "info", "debug", NULL}; /* as enum log_level */
static const char *const formats[] = {"text", "json", NULL};                  /* as enum log_format */
static const char *default_endpoint[] = {"ipc:///run/moed/worker.sock"};

int gateway_options_parse(int argc, char **argv, struct gateway_options *out, struct status *status) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    *out = (struct gateway_options){
        .listen = "127.0.0.1:50051",
        .pollers = cores > 0 && cores < POLLERS_DEFAULT_MAX ? (uint64_t)cores : POLLERS_DEFAULT_MAX,
        .max_message_size = UINT64_C(64) << 20,
        .max_requests = 1024,
        .max_queued_tokens = UINT64_C(1) << 20,
        .worker_timeout = 5,
        .stall_timeout = 60,
        .drain_timeout = 30,
        .metrics_prefix = "vllm:",
        .log_level = "info",
        .log_format = "text",
    };
    const struct option options[] = {
        {"listen", OPTION_STRING, &out->listen, "ADDR:PORT",
         "Where callers connect; unix:PATH for a socket in the file system. Port 0 chooses a free one.", .min = 0},
        {"worker-endpoint", OPTION_LIST, &out->worker_endpoints, "ZMQ",
         "Where workers connect: ipc://PATH or tcp://ADDR:PORT (default: ipc:///run/moed/worker.sock). Who can connect "
         "there can be a worker.", .min = 0},
        {"pollers", OPTION_UINT, &out->pollers, "N", "Threads that serve RPCs.", .min = 1, .max = POLLERS_MAX},
        {"max-message-size", OPTION_UINT, &out->max_message_size, "BYTES", "Largest request and largest answer.",
         .min = 1024, .max = UINT64_C(255) << 20},
        {"max-requests", OPTION_UINT, &out->max_requests, "N",
         "Generate and Forward requests in flight; more are refused.", .min = 1, .max = 1 << 20},
        {"max-queued-tokens", OPTION_UINT, &out->max_queued_tokens, "N",
         "Prompt tokens of all requests in flight; more are refused.", .min = 1, .max = UINT64_C(1) << 40},
        {"worker-timeout", OPTION_REAL, &out->worker_timeout, "SECONDS",
         "A worker without a heartbeat for so long is lost.", .real_min = 1, .real_max = 3600},
        {"stall-timeout", OPTION_REAL, &out->stall_timeout, "SECONDS",
         "A caller that reads nothing of what waits for it for so long is cut off.", .real_min = 1, .real_max = 86400},
        {"drain-timeout", OPTION_REAL, &out->drain_timeout, "SECONDS",
         "After SIGTERM, running requests have so long to end.", .real_min = 0, .real_max = 86400},
        {"tls-cert", OPTION_STRING, &out->tls_cert, "FILE", "Certificate chain (PEM); turns TLS on.", .min = 0},
        {"tls-key", OPTION_STRING, &out->tls_key, "FILE", "Private key of the certificate (PEM).", .min = 0},
        {"tls-client-ca", OPTION_STRING, &out->tls_client_ca, "FILE",
         "Callers must have a certificate of this authority (PEM).", .min = 0},
        {"metrics-listen", OPTION_STRING, &out->metrics_listen, "ADDR:PORT",
         "Where GET /metrics is answered, for Prometheus; nowhere unless told. Port 0 chooses a free one.", .min = 0},
        {"metrics-prefix", OPTION_STRING, &out->metrics_prefix, "STRING",
         "Begins the names of those metrics that vLLM has, too.", .min = 0},
        {"log-level", OPTION_CHOICE, &out->log_level, "LEVEL", "What is logged.", .choices = levels},
        {"log-format", OPTION_CHOICE, &out->log_format, "FORMAT", "How it is logged.", .choices = formats},
        {0},
    };
    const struct option_set set = {
        .program = "moed-gateway",
        .synopsis = "[OPTION]...",
        .summary =
            "Serves moed.v1.Inference over gRPC and hands the work to the moed-worker processes that connect to it.",
        .footer = "SIGTERM or SIGINT: running requests end, then the gateway does; a second one ends it at once.",
        .options = options,
    };
    int operands = 0;
    int result = options_parse(&set, argc, argv, &operands, status);
    if (result == OPTIONS_RUN && operands)
        result = status_set(status, STATUS_INVALID_ARGUMENT, "operand \"%s\": none is allowed", argv[1]);
    if (result == OPTIONS_RUN)
        result = metrics_check_prefix(out->metrics_prefix, status);
    if (result < 0)
        gateway_options_free(out);
    return result;
}

const char *const *gateway_options_endpoints(const struct gateway_options *options, size_t *count) {
    *count = options->worker_endpoints.count ? options->worker_endpoints.count : 1;
    return options->worker_endpoints.count ? options->worker_endpoints.items : default_endpoint;
}

void gateway_options_free(struct gateway_options *options) {
    options_free_list(&options->worker_endpoints);
}

static int index_of(const char *const *choices, const char *choice) {
    int i = 0;
    while (strcmp(choices[i], choice) != 0)
        i++;
    return i;
}

enum log_level gateway_options_log_level(const struct gateway_options *options) {
    return (enum log_level)index_of(levels, options->log_level);
}

enum log_format gateway_options_log_format(const struct gateway_options *options) {
    return (enum log_format)index_of(formats, options->log_format);
}
