#ifndef MOED_WORKER_OPTIONS_H
#define MOED_WORKER_OPTIONS_H

#include "common/log.h"
#include "common/options.h"
#include "worker/executor.h"

/* The command line of moed-worker. */
struct worker_options {
    const char *model;
    const char *backend;
    struct option_list gateways;
    const char *worker_id;
    uint64_t device, threads, max_sequences, step_tokens, context_length, kv_bytes;
    double memory_fraction;
    const char *kv_type, *isa, *repack, *prefix_cache;
    uint64_t heartbeat_ms;
    const char *metrics_listen, *metrics_prefix; /* listen NULL: no metrics */
    const char *log_level, *log_format;
};

/* As options_parse; *out is to be freed with worker_options_free, also on failure. */
int worker_options_parse(int argc, char **argv, struct worker_options *out, struct status *status);
void worker_options_free(struct worker_options *options);

const char *const *worker_options_gateways(const struct worker_options *options, size_t *count);
void worker_options_executor(const struct worker_options *options, struct executor_options *out);
bool worker_options_prefix_cache(const struct worker_options *options);
enum log_level worker_options_log_level(const struct worker_options *options);
enum log_format worker_options_log_format(const struct worker_options *options);

#endif
