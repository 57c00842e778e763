/*
 * A moed-worker whose executor answers at once: everything but the forward pass, for measuring what gateway, link and
 * engine add, and for tests that need tokens that can be foretold. Not installed.
 */
#include <signal.h>
#include <stdio.h>

#include "common/log.h"
#include "common/options.h"
#include "tests/fake_executor.h"
#include "worker/stop_signal.h"
#include "worker/worker.h"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

int main(int argc, char **argv) {
    struct option_list gateways = {0};
    const char *worker_id = NULL;
    uint64_t vocab = 151936, context_length = 40960, step_us = 0, max_sequences = 64,
             step_tokens = 512, heartbeat_ms = 1000;
    const struct option options[] = {
        {.name = "gateway", .type = OPTION_LIST, .value = &gateways, .argument = "ZMQ",
         .help = "Gateways to work for."},
        {.name = "worker-id", .type = OPTION_STRING, .value = &worker_id, .argument = "NAME",
         .help = "The worker's name."},
        {.name = "vocab", .type = OPTION_UINT, .value = &vocab, .argument = "N", .min = 2, .max = 1 << 24,
         .help = "Tokens of the vocabulary."},
        {.name = "context-length", .type = OPTION_UINT, .value = &context_length, .argument = "N", .min = 1,
         .max = 1 << 20,
         .help = "Tokens of the longest sequence."},
        {.name = "step-us", .type = OPTION_UINT, .value = &step_us, .argument = "US", .max = 60000000,
         .help = "How long a step takes."},
        {.name = "max-sequences", .type = OPTION_UINT, .value = &max_sequences, .argument = "N", .min = 1, .max = 4096,
         .help = "Sequences that run at once."},
        {.name = "step-tokens", .type = OPTION_UINT, .value = &step_tokens, .argument = "N", .min = 1, .max = 65536,
         .help = "Rows of a step."},
        {.name = "heartbeat-interval", .type = OPTION_UINT, .value = &heartbeat_ms, .argument = "MS", .min = 10,
         .max = 60000,
         .help = "Between heartbeats."},
        {0},
    };
    const struct option_set set = {.program = "worker_null",
                                   .synopsis = "--gateway ZMQ [OPTION]...",
                                   .summary = "A worker whose executor answers at once.",
                                   .options = options};
    struct status status = {0};
    int operands = 0;
    int parsed = options_parse(&set, argc, argv, &operands, &status);
    if (parsed == OPTIONS_RUN && (gateways.count == 0 || operands > 0))
        parsed = status_set(&status, STATUS_INVALID_ARGUMENT, "--gateway, and no operands, is wanted");
    if (parsed != OPTIONS_RUN) {
        if (parsed < 0)
            fprintf(stderr, "worker_null: %s\n", status.message);
        options_free_list(&gateways);
        return parsed < 0 ? EXIT_USAGE : EXIT_OK;
    }
    log_setup("worker_null", LOG_INFO, LOG_TEXT);
    signal(SIGPIPE, SIG_IGN);
    struct model model;
    fake_model(&model, (uint32_t)vocab, (uint32_t)context_length);
    fake_executor.unchecked = true;
    fake_executor.max_outputs = (uint32_t)max_sequences;
    fake_executor.step_us = (uint32_t)step_us;
    const struct worker_setup setup = {
        .model = &model,
        .backend = &fake_executor_ops,
        .executor = {.max_sequences = (uint32_t)max_sequences, .step_tokens = (uint32_t)step_tokens},
        .gateways = gateways.items,
        .gateway_count = gateways.count,
        .worker_id = worker_id,
        .heartbeat_ms = heartbeat_ms,
        .prefix_cache = true,
    };
    int stop_fd = stop_signal_open(&status);
    int result = stop_fd < 0 ? -1 : worker_run(&setup, stop_fd, &status);
    if (result != 0)
        log_error("worker_failed", LOG_STR("reason", status.message));
    options_free_list(&gateways);
    return result == 0 ? EXIT_OK : EXIT_FAILED;
}
