#include "tests/fake_executor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct fake {
    struct executor base;
    const struct model_config *config;
    uint32_t *kv; /* [kv_blocks * kv_block_tokens]: a hash of the tokens up to each position */
    struct sampled *sampled;
    float *logits;
    const float **logits_rows;
    uint32_t *route_experts;
    float *route_weights;
};

struct fake_executor_control fake_executor;

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

uint32_t fake_executor_next(const uint32_t *tokens, uint32_t count, uint32_t vocab_size) {
    return (uint32_t)(mix((uint64_t)count << 32 | tokens[count - 1]) % vocab_size);
}

float fake_executor_logit(const uint32_t *tokens, uint32_t count, uint32_t token) {
    uint64_t hash = mix(mix((uint64_t)count << 32 | tokens[count - 1]) + token);
    return (float)(hash >> 40) * 0x1p-23f - 1.0f;
}

uint32_t fake_executor_expert(const struct model_config *config, uint32_t token, uint32_t layer, uint32_t i) {
    return (token + layer + i) % config->expert_count;
}

void fake_model(struct model *model, uint32_t vocab_size, uint32_t context_length) {
    *model = (struct model){.config = {.name = "fake",
                                       .architecture = "qwen3moe",
                                       .fingerprint = "00000000000fa4e5",
                                       .vocab_size = vocab_size,
                                       .context_length = context_length,
                                       .block_count = 3,
                                       .embedding_length = 64,
                                       .expert_count = 8,
                                       .expert_used_count = 2,
                                       .eos_token_id = MODEL_EOS_NONE}};
}

static void require(bool holds, const char *what) {
    if (holds)
        return;
    fprintf(stderr, "fake executor: %s\n", what);
    abort();
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    require(memory, "no memory");
    return memory;
}

static int fake_open(const struct model *model, const struct executor_options *options, struct executor **out,
                     struct status *status) {
    (void)status;
    struct fake *fake = allocate(1, sizeof(*fake));
    struct executor_info *info = &fake->base.info;
    uint32_t context = options->context_length ? options->context_length : model->config.context_length;
    fake->config = &model->config;
    fake->base.ops = &fake_executor_ops;
    *info = (struct executor_info){.backend = "fake",
                                   .device = "none",
                                   .kv_block_tokens = fake_executor.kv_block_tokens,
                                   .kv_blocks = fake_executor.kv_blocks,
                                   .max_sequences = options->max_sequences,
                                   .step_tokens = options->step_tokens,
                                   .context_length = context,
                                   .max_outputs = fake_executor.max_outputs,
                                   .memory_used = 1 << 20,
                                   .memory_total = 1 << 30};
    if (info->kv_block_tokens == 0)
        info->kv_block_tokens = 16;
    if (info->kv_blocks == 0)
        info->kv_blocks = info->max_sequences * ((context + info->kv_block_tokens - 1) / info->kv_block_tokens);
    if (info->max_outputs == 0)
        info->max_outputs = info->max_sequences + 64;
    size_t routes = (size_t)info->step_tokens * model->config.block_count * model->config.expert_used_count;
    fake->kv = allocate((size_t)info->kv_blocks * info->kv_block_tokens, sizeof(*fake->kv));
    fake->sampled = allocate(info->max_outputs, sizeof(*fake->sampled));
    fake->logits = allocate((size_t)info->max_outputs * model->config.vocab_size, sizeof(*fake->logits));
    fake->logits_rows = allocate(info->max_outputs, sizeof(*fake->logits_rows));
    fake->route_experts = allocate(routes, sizeof(*fake->route_experts));
    fake->route_weights = allocate(routes, sizeof(*fake->route_weights));
    *out = &fake->base;
    return 0;
}

static void fake_close(struct executor *executor) {
    struct fake *fake = (struct fake *)executor;
    free(fake->kv);
    free(fake->sampled);
    free(fake->logits);
    free(fake->logits_rows);
    free(fake->route_experts);
    free(fake->route_weights);
    free(fake);
}

static void check_batch(const struct fake *fake, const struct batch *batch) {
    const struct executor_info *info = &fake->base.info;
    require(batch->rows >= 1 && batch->rows <= info->step_tokens, "rows");
    require(batch->sequence_count >= 1 && batch->sequence_count <= info->max_sequences, "sequence_count");
    require(batch->output_count <= info->max_outputs, "output_count");
    uint64_t rows = 0;
    for (uint32_t i = 0; i < batch->sequence_count; i++) {
        const struct batch_sequence *sequence = &batch->sequences[i];
        require(sequence->rows >= 1 && sequence->slot < info->max_sequences, "a sequence's rows or slot");
        for (uint32_t j = 0; j < i; j++)
            require(batch->sequences[j].slot != sequence->slot, "a slot twice");
        uint64_t end = (uint64_t)sequence->position + sequence->rows;
        require(end <= info->context_length, "a position behind the context's end");
        require(end <= (uint64_t)sequence->block_count * info->kv_block_tokens, "a position without a block");
        for (uint32_t j = 0; j < sequence->block_count; j++)
            require(sequence->blocks[j] < info->kv_blocks, "a block id");
        rows += sequence->rows;
    }
    require(rows == batch->rows, "the sequences' rows");
    for (uint32_t i = 0; i < batch->rows; i++)
        require(batch->tokens[i] < fake->config->vocab_size, "a token");
    for (uint32_t i = 0; i < batch->output_count; i++)
        require(batch->outputs[i].row < batch->rows && (i == 0 || batch->outputs[i].row > batch->outputs[i - 1].row),
                "an output's row");
}

static uint32_t *kv_at(struct fake *fake, const struct batch_sequence *sequence, uint32_t position) {
    uint32_t block_tokens = fake->base.info.kv_block_tokens;
    return &fake->kv[(size_t)sequence->blocks[position / block_tokens] * block_tokens + position % block_tokens];
}

static uint32_t kv_value(uint32_t before, uint32_t token) {
    return (uint32_t)mix((uint64_t)before << 32 | token) + 1;
}

static void answer(struct fake *fake, const struct batch_sequence *sequence, uint32_t position,
                   const struct batch_output *output, uint32_t index) {
    uint32_t vocab = fake->config->vocab_size;
    require(output->history_length == position + 1, "history_length");
    if (!fake_executor.unchecked)
        for (uint32_t i = 0, value = 0; i <= position; i++)
            require(*kv_at(fake, sequence, i) == (value = kv_value(value, output->history[i])),
                    "the KV cache holds another's tokens");
    struct sampled *sampled = &fake->sampled[index];
    if (output->sampling) {
        *sampled = (struct sampled){.token = fake_executor_next(output->history, position + 1, vocab)};
        if (output->logprobs > 0)
            sampled->logprob = -0.5f;
        for (; sampled->top_count < output->logprobs; sampled->top_count++) {
            sampled->top_ids[sampled->top_count] = sampled->top_count;
            sampled->top_logprobs[sampled->top_count] = -1.0f - (float)sampled->top_count;
        }
    }
    fake->logits_rows[index] = NULL;
    if (!output->logits)
        return;
    float *logits = fake->logits + (size_t)index * vocab;
    for (uint32_t token = 0; token < vocab; token++)
        logits[token] = fake_executor_logit(output->history, position + 1, token);
    fake->logits_rows[index] = logits;
}

static void route(struct fake *fake, uint32_t row, uint32_t token) {
    uint32_t layers = fake->config->block_count, used = fake->config->expert_used_count;
    for (uint32_t layer = 0; layer < layers; layer++)
        for (uint32_t i = 0; i < used; i++) {
            size_t place = ((size_t)row * layers + layer) * used + i;
            fake->route_experts[place] = fake_executor_expert(fake->config, token, layer, i);
            fake->route_weights[place] = 1.0f / (float)used;
        }
}

static int fake_step(struct executor *executor, const struct batch *batch, struct batch_result *result,
                     struct status *status) {
    struct fake *fake = (struct fake *)executor;
    check_batch(fake, batch);
    atomic_fetch_add(&fake_executor.steps, 1);
    atomic_fetch_add(&fake_executor.rows, batch->rows);
    uint32_t step_us = atomic_load(&fake_executor.step_us);
    if (step_us > 0)
        nanosleep(&(struct timespec){step_us / 1000000, step_us % 1000000 * 1000L}, NULL);
    if (atomic_load(&fake_executor.lost))
        return status_set(status, STATUS_UNAVAILABLE, "the device was told to be lost");
    if (atomic_load(&fake_executor.fail_steps) > 0) {
        atomic_fetch_sub(&fake_executor.fail_steps, 1);
        return status_set(status, STATUS_INTERNAL, "the device was told to fail");
    }
    uint32_t row = 0, output = 0;
    for (uint32_t i = 0; i < batch->sequence_count; i++) {
        const struct batch_sequence *sequence = &batch->sequences[i];
        for (uint32_t j = 0; j < sequence->rows; j++, row++) {
            uint32_t position = sequence->position + j;
            *kv_at(fake, sequence, position) =
                kv_value(position ? *kv_at(fake, sequence, position - 1) : 0, batch->tokens[row]);
            if (batch->routes)
                route(fake, row, batch->tokens[row]);
            if (output < batch->output_count && batch->outputs[output].row == row) {
                answer(fake, sequence, sequence->position + j, &batch->outputs[output], output);
                output++;
            }
        }
    }
    *result = (struct batch_result){.sampled = fake->sampled, .logits = fake->logits_rows};
    if (batch->routes) {
        result->route_experts = fake->route_experts;
        result->route_weights = fake->route_weights;
    }
    return 0;
}

const struct executor_ops fake_executor_ops = {
    .name = "fake", .open = fake_open, .close = fake_close, .step = fake_step};
