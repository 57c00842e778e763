#include "worker/options.h"

#include <string.h>

#include "common/metrics.h"

static const char *const backends[] = {"auto", "cpu", "cuda", NULL};
static const char *const kv_types[] = {"f16", "q8_0", NULL};
static const char *const isas[] = {"auto", "c", "avx2", "avx512", NULL};
static const char *const repacks[] = {"auto", "on", "off", NULL};
static const char *const switches[] = {"on", "off", NULL};
static const char *const levels[] = {"error", "warn", "info", "debug", NULL}; /* as enum log_level */
static const char *const formats[] = {"text", "json", NULL};                  /* as enum log_format */
static const char *const default_gateway[] = {"ipc:///run/moed/worker.sock"};

int worker_options_parse(int argc, char **argv, struct worker_options *out, struct status *status) {
    *out = (struct worker_options){
        .backend = "auto",
        .memory_fraction = 0.95,
        .kv_type = "f16",
        .isa = "auto",
        .repack = "auto",
        .prefix_cache = "on",
        .heartbeat_ms = 1000,
        .metrics_prefix = "vllm:",
        .log_level = "info",
        .log_format = "text",
    };
    const struct option options[] = {
        {.name = "model", .type = OPTION_STRING, .value = &out->model, .argument = "FILE",
         .help = "The model to serve: a GGUF file of the qwen3moe architecture."},
        {.name = "gateway", .type = OPTION_LIST, .value = &out->gateways, .argument = "ZMQ",
         .help = "Gateways to work for: ipc://PATH or tcp://HOST:PORT (default: ipc:///run/moed/worker.sock)."},
        {.name = "worker-id", .type = OPTION_STRING, .value = &out->worker_id, .argument = "NAME",
         .help = "The worker's name, its own among those of a gateway; host name and process id unless told "
                 "otherwise."},
        {.name = "backend", .type = OPTION_CHOICE, .value = &out->backend, .argument = "BACKEND", .choices = backends,
         .help = "What runs the model."},
        {.name = "device", .type = OPTION_UINT, .value = &out->device, .argument = "N", .max = 1023,
         .help = "Which GPU, counted from 0."},
        {.name = "threads", .type = OPTION_UINT, .value = &out->threads, .argument = "N", .max = 1024,
         .help = "Threads of the CPU backend, and of what a GPU leaves to the CPU; 0: one per processor this "
                 "process may use."},
        {.name = "max-sequences", .type = OPTION_UINT, .value = &out->max_sequences, .argument = "N",
         .max = 4096,
         .help = "Sequences that run at once; others wait; 0: 16 on CPUs, 256 on GPUs."},
        {.name = "step-tokens", .type = OPTION_UINT, .value = &out->step_tokens, .argument = "N",
         .max = 65536,
         .help = "Rows of one step: a token of each sequence that generates, the rest for prompts. More make prompts "
                 "faster, and streams wait longer for a token beside them; 0: 128 on CPUs, 2048 on GPUs."},
        {.name = "context-length", .type = OPTION_UINT, .value = &out->context_length, .argument = "N",
         .max = UINT32_MAX,
         .help = "Tokens of the longest sequence; 0: as many as the model and the KV cache allow."},
        {.name = "memory-fraction", .type = OPTION_REAL, .value = &out->memory_fraction, .argument = "F",
         .real_min = 0.01,
         .real_max = 1, .help = "Of the device's memory, for weights and KV cache together."},
        {.name = "kv-size", .type = OPTION_UINT, .value = &out->kv_bytes, .argument = "BYTES",
         .help = "Size of the KV cache; 0: what memory-fraction leaves, at most what all sequences can fill."},
        {.name = "kv-type", .type = OPTION_CHOICE, .value = &out->kv_type, .argument = "TYPE", .choices = kv_types,
         .help = "What the KV cache holds keys and values in: q8_0 takes 8.5 bits for each instead of 16, and rounds "
                 "them to 8."},
        {.name = "prefix-cache", .type = OPTION_CHOICE, .value = &out->prefix_cache, .argument = "WHEN",
         .choices = switches,
         .help = "Whether prompts that begin alike are computed once, as long as the KV cache has room for what they "
                 "share. Results are the same."},
        {.name = "isa", .type = OPTION_CHOICE, .value = &out->isa, .argument = "ISA", .choices = isas,
         .help = "Instruction set of the CPU kernels; auto is the best this processor has."},
        {.name = "repack", .type = OPTION_CHOICE, .value = &out->repack, .argument = "WHEN", .choices = repacks,
         .help = "Whether the CPU backend keeps a copy of the weights in its kernels' order: faster prompts, twice "
                 "the memory."},
        {.name = "heartbeat-interval", .type = OPTION_UINT, .value = &out->heartbeat_ms, .argument = "MS", .min = 10,
         .max = 60000, .help = "Between heartbeats; a gateway that is silent for five of them is called again."},
        {.name = "metrics-listen", .type = OPTION_STRING, .value = &out->metrics_listen, .argument = "ADDR:PORT",
         .help = "Where GET /metrics is answered, for Prometheus, once the model is loaded; nowhere unless told. Port "
                 "0 chooses a free one."},
        {.name = "metrics-prefix", .type = OPTION_STRING, .value = &out->metrics_prefix, .argument = "STRING",
         .help = "Begins the names of those metrics that vLLM has, too."},
        {.name = "log-level", .type = OPTION_CHOICE, .value = &out->log_level, .argument = "LEVEL", .choices = levels,
         .help = "What is logged."},
        {.name = "log-format", .type = OPTION_CHOICE, .value = &out->log_format, .argument = "FORMAT",
         .choices = formats,
         .help = "How it is logged."},
        {0},
    };
    const struct option_set set = {
        .program = "moed-worker",
        .synopsis = "--model FILE [OPTION]...",
        .summary = "Runs the forward pass of a quantized Qwen3-MoE model for the gateways it is told of.",
        .footer = "SIGTERM or SIGINT: no new work is taken, what runs finishes; a second one ends the worker after "
                  "the step it is in.",
        .options = options,
    };
    int operands = 0;
    int result = options_parse(&set, argc, argv, &operands, status);
    if (result == OPTIONS_RUN && operands > 0)
        return status_set(status, STATUS_INVALID_ARGUMENT, "operand \"%s\": none is allowed", argv[1]);
    if (result == OPTIONS_RUN && !out->model)
        return status_set(status, STATUS_INVALID_ARGUMENT, "option --model: missing; a GGUF file is wanted");
    if (result == OPTIONS_RUN)
        result = metrics_check_prefix(out->metrics_prefix, status);
    return result;
}

void worker_options_free(struct worker_options *options) {
    options_free_list(&options->gateways);
}

const char *const *worker_options_gateways(const struct worker_options *options, size_t *count) {
    *count = options->gateways.count ? options->gateways.count : 1;
    return options->gateways.count ? options->gateways.items : default_gateway;
}

void worker_options_executor(const struct worker_options *options, struct executor_options *out) {
    *out = (struct executor_options){
        .device = (uint32_t)options->device,
        .threads = (uint32_t)options->threads,
        .max_sequences = (uint32_t)options->max_sequences,
        .step_tokens = (uint32_t)options->step_tokens,
        .context_length = (uint32_t)options->context_length,
        .memory_fraction = options->memory_fraction,
        .kv_bytes = options->kv_bytes,
        .kv_type = options->kv_type,
        .isa = options->isa,
        .repack = options->repack,
    };
}

bool worker_options_prefix_cache(const struct worker_options *options) {
    return strcmp(options->prefix_cache, "on") == 0;
}

static int index_of(const char *const *choices, const char *choice) {
    int i = 0;
    while (strcmp(choices[i], choice) != 0)
        i++;
    return i;
}

enum log_level worker_options_log_level(const struct worker_options *options) {
    return (enum log_level)index_of(levels, options->log_level);
}

enum log_format worker_options_log_format(const struct worker_options *options) {
    return (enum log_format)index_of(formats, options->log_format);
}
