#include <signal.h>
#include <stdio.h>

#include "common/log.h"
#include "worker/backend.h"
#include "worker/options.h"
#include "worker/stop_signal.h"
#include "worker/worker.h"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

static int serve(const struct worker_options *options, struct status *status) {
    struct worker_setup setup = {.worker_id = options->worker_id, .heartbeat_ms = options->heartbeat_ms,
                                 .prefix_cache = worker_options_prefix_cache(options),
                                 .metrics_listen = options->metrics_listen, .metrics_prefix = options->metrics_prefix};
    struct model *model;
    int stop_fd = stop_signal_open(status);
    if (stop_fd < 0 || !(setup.backend = backend_find(options->backend, status)))
        return -1;
    setup.gateways = worker_options_gateways(options, &setup.gateway_count);
    worker_options_executor(options, &setup.executor);
    if (setup.executor.max_sequences == 0)
        setup.executor.max_sequences = setup.backend->max_sequences;
    if (setup.executor.step_tokens == 0)
        setup.executor.step_tokens = setup.backend->step_tokens;
    if (model_open(options->model, &model, status) != 0)
        return -1;
    setup.model = model;
    int result = worker_run(&setup, stop_fd, status);
    model_close(model);
    return result;
}

int main(int argc, char **argv) {
    struct worker_options options;
    struct status status = {0};
    int exit_status = EXIT_OK;
    int parsed = worker_options_parse(argc, argv, &options, &status);
    if (parsed < 0) {
        fprintf(stderr, "moed-worker: %s\nTry 'moed-worker --help'.\n", status.message);
        exit_status = EXIT_USAGE;
    } else if (parsed == OPTIONS_RUN) {
        log_setup("moed-worker", worker_options_log_level(&options), worker_options_log_format(&options));
        signal(SIGPIPE, SIG_IGN);
        if (serve(&options, &status) != 0) {
            log_error("worker_failed", LOG_STR("status", status_code_name(status.code)),
                      LOG_STR("reason", status.message));
            exit_status = EXIT_FAILED;
        } else {
            log_info("stopped");
        }
    }
    worker_options_free(&options);
    return exit_status;
}
