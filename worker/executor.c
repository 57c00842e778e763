#include "worker/executor.h"

#include <string.h>

enum { SEQUENCES_MAX = 1 << 16, STEP_TOKENS_MAX = 1 << 16 };

int executor_check_options(const struct model_config *config, const struct executor_options *options,
                           double memory_fraction_max, struct status *status) {
    if (options->max_sequences < 1 || options->max_sequences > SEQUENCES_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "max_sequences: %u, allowed are 1 to %d",
                          options->max_sequences, SEQUENCES_MAX);
    if (options->step_tokens < 1 || options->step_tokens > STEP_TOKENS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "step_tokens: %u, allowed are 1 to %d", options->step_tokens,
                          STEP_TOKENS_MAX);
    if (options->context_length > config->context_length)
        return status_set(status, STATUS_INVALID_ARGUMENT, "context_length: %u, the model's is %u",
                          options->context_length, config->context_length);
    if (!(options->memory_fraction > 0 && options->memory_fraction <= memory_fraction_max))
        return status_set(status, STATUS_INVALID_ARGUMENT, "memory_fraction: %g, allowed is above 0 to %g",
                          options->memory_fraction, memory_fraction_max);
    return 0;
}

int executor_kv_type(const struct executor_options *options, enum quant_type *type, struct status *status) {
    const char *name = options->kv_type ? options->kv_type : "f16";
    if (strcmp(name, "f16") == 0)
        *type = QUANT_F16;
    else if (strcmp(name, "q8_0") == 0)
        *type = QUANT_Q8_0;
    else
        return status_set(status, STATUS_INVALID_ARGUMENT, "kv_type: \"%s\", allowed are f16 and q8_0", name);
    return 0;
}
