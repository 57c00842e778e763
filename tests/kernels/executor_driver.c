#include "tests/kernels/executor_driver.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DRIVER_STEP_TOKENS = 64 };

struct executor_driver {
    const struct executor_ops *ops;
    struct model *model;
    struct executor *executor;
    uint32_t *blocks; /* the sequence's block table: all blocks, the last one first */
};

int driver_open(const struct executor_ops *ops, const char *path, const char *isa, const char *repack,
                const char *kv_type, struct executor_driver **out, struct status *status) {
    const struct executor_options options = {
        .threads = 2, .max_sequences = 1, .step_tokens = DRIVER_STEP_TOKENS, .memory_fraction = 0.5,
        .isa = isa, .repack = repack, .kv_type = kv_type,
    };
    struct executor_driver *driver = calloc(1, sizeof *driver);
    if (!driver) return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    driver->ops = ops;
    if (model_open(path, &driver->model, status)) goto fail;
    if (ops->open(driver->model, &options, &driver->executor, status)) goto fail;
    uint32_t count = driver->executor->info.kv_blocks;
    driver->blocks = malloc(count * sizeof *driver->blocks);
    if (!driver->blocks) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto fail;
    }
    for (uint32_t i = 0; i < count; i++) driver->blocks[i] = count - 1 - i;
    *out = driver;
    return 0;
fail:
    driver_close(driver);
    return -1;
}

void driver_close(struct executor_driver *driver) {
    if (!driver) return;
    if (driver->executor) driver->ops->close(driver->executor);
    model_close(driver->model);
    free(driver->blocks);
    free(driver);
}

const struct executor_info *driver_info(const struct executor_driver *driver) {
    return &driver->executor->info;
}

/* Whether what an executor says of its experts' load is what its routes say. */
static int check_imbalance(const struct executor_driver *driver, uint32_t rows, const struct batch_result *result,
                           struct status *status) {
    const struct model_config *config = &driver->model->config;
    const uint32_t layers = config->block_count, used = config->expert_used_count;
    double sum = 0;
    for (uint32_t layer = 0; layer < layers; layer++) {
        uint32_t busiest = 0;
        for (uint32_t expert = 0, count = 0; expert < config->expert_count; expert++, count = 0) {
            for (uint32_t row = 0; row < rows; row++)
                for (uint32_t u = 0; u < used; u++)
                    count += result->route_experts[((size_t)row * layers + layer) * used + u] == expert;
            if (count > busiest) busiest = count;
        }
        sum += busiest;
    }
    const double expected = sum / layers * config->expert_count / ((double)rows * used);
    if (fabs(result->expert_imbalance - expected) < 1e-9 * expected) return 0;
    return status_set(status, STATUS_INTERNAL, "expert_imbalance is %g; its routes give %g", result->expert_imbalance,
                      expected);
}

/* One step of rows [position, position + rows) of the sequence. */
static int step(struct executor_driver *driver, const uint32_t *tokens, uint32_t position, uint32_t rows,
                const struct batch_output *outputs, uint32_t output_count, bool routes, struct batch_result *result,
                struct status *status) {
    const struct executor_info *info = &driver->executor->info;
    const uint32_t block_count = (position + rows + info->kv_block_tokens - 1) / info->kv_block_tokens;
    if (position + rows > info->context_length || block_count > info->kv_blocks)
        return status_set(status, STATUS_OUT_OF_RANGE, "the sequence does not fit");
    const struct batch_sequence sequence = {
        .position = position, .rows = rows, .blocks = driver->blocks, .block_count = block_count,
    };
    const struct batch batch = {
        .tokens = tokens + position, .rows = rows, .sequences = &sequence, .sequence_count = 1,
        .outputs = outputs, .output_count = output_count, .routes = routes,
    };
    if (driver->ops->step(driver->executor, &batch, result, status)) return -1;
    return routes ? check_imbalance(driver, rows, result, status) : 0;
}

static uint32_t least(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

int driver_forward(struct executor_driver *driver, const uint32_t *tokens, uint32_t count, uint32_t chunk,
                   struct driver_result *result, struct status *status) {
    const struct model_config *c = &driver->model->config;
    const size_t vocab = c->vocab_size, routes = (size_t)c->block_count * c->expert_used_count;
    const uint32_t most = least(DRIVER_STEP_TOKENS, driver->executor->info.max_outputs);
    struct batch_output outputs[DRIVER_STEP_TOKENS];
    struct batch_result got;

    *result = (struct driver_result){
        .tokens = count,
        .logits = malloc(count * vocab * sizeof *result->logits),
        .experts = malloc(count * routes * sizeof *result->experts),
        .weights = malloc(count * routes * sizeof *result->weights),
    };
    if (!result->logits || !result->experts || !result->weights) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto fail;
    }
    for (uint32_t at = 0, rows; at < count; at += rows) {
        rows = least(count - at, chunk ? least(chunk, most) : most);
        for (uint32_t i = 0; i < rows; i++) outputs[i] = (struct batch_output){.row = i, .logits = true};
        if (step(driver, tokens, at, rows, outputs, rows, true, &got, status)) goto fail;
        for (uint32_t i = 0; i < rows; i++)
            memcpy(result->logits + (at + i) * vocab, got.logits[i], vocab * sizeof *result->logits);
        memcpy(result->experts + at * routes, got.route_experts, rows * routes * sizeof *result->experts);
        memcpy(result->weights + at * routes, got.route_weights, rows * routes * sizeof *result->weights);
    }
    return 0;
fail:
    driver_result_free(result);
    return -1;
}

void driver_result_free(struct driver_result *result) {
    free(result->logits);
    free(result->experts);
    free(result->weights);
    *result = (struct driver_result){0};
}

int driver_greedy(struct executor_driver *driver, const uint32_t *tokens, uint32_t count, uint32_t length,
                  uint32_t *continuation, struct status *status) {
    const struct sampling greedy = {0};
    uint32_t *history = malloc((count + length) * sizeof *history), have = count, done = 0;
    int result = -1;
    if (!history) return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    memcpy(history, tokens, count * sizeof *history);
    while (have < count + length) {
        uint32_t rows = least(have - done, DRIVER_STEP_TOKENS);
        bool last = done + rows == have;
        const struct batch_output output = {
            .row = rows - 1, .sampling = &greedy, .history = history, .history_length = have, .prompt_length = count,
        };
        struct batch_result got;
        if (step(driver, history, done, rows, &output, last, false, &got, status)) goto out;
        done += rows;
        if (last) history[have++] = got.sampled[0].token;
    }
    memcpy(continuation, history + count, length * sizeof *continuation);
    result = 0;
out:
    free(history);
    return result;
}
