#ifndef MOED_TESTS_KERNELS_EXECUTOR_RUNS_H
#define MOED_TESTS_KERNELS_EXECUTOR_RUNS_H

#include "tests/kernels/executor_test.h"

/*
 * Texts through an executor: alone, in chunks, and in ragged batches with others whose blocks lie scattered and change
 * hands. What a text got first is what it must get ever after, to the bit.
 */

enum { SEQUENCES = 10, SHORT = 3, SLOTS = 6, STEPS = 300, BLOCKS_MAX = 64 };

struct text {
    uint32_t length;
    uint32_t *tokens;
    float *logits;     /* [length][vocabulary], computed alone and token by token */
    uint32_t *experts; /* [length][layers][used] */
    float *weights;
};

/* A text on its way through an executor. */
struct run {
    const struct text *text;
    uint32_t position;
    uint32_t blocks[BLOCKS_MAX], block_count;
};

struct pool {
    uint32_t free[4096], count;
};

static void pool_fill(struct pool *pool, uint32_t blocks) {
    pool->count = blocks < 4096 ? blocks : 4096;
    for (uint32_t i = 0; i < pool->count; i++)
        pool->free[i] = i;
}

/* Any of the free blocks, so that tables are out of order. */
static uint32_t pool_take(struct pool *pool) {
    uint32_t at = random_below(pool->count), block = pool->free[at];
    pool->free[at] = pool->free[--pool->count];
    return block;
}

static void run_cover(struct run *run, uint32_t positions, struct pool *pool) {
    while (run->block_count * 32 < positions)
        run->blocks[run->block_count++] = pool_take(pool);
}

static void run_end(struct run *run, struct pool *pool) {
    while (run->block_count)
        pool->free[pool->count++] = run->blocks[--run->block_count];
}

static struct batch_sequence run_rows(const struct run *run, uint32_t slot, uint32_t rows) {
    return (struct batch_sequence){
        .slot = slot, .position = run->position, .rows = rows, .blocks = run->blocks, .block_count = run->block_count};
}

static bool same_bits(const void *a, const void *b, size_t count) {
    return memcmp(a, b, count * sizeof(float)) == 0;
}

/* All of a text by itself in chunks, with logits of every row; into the text, or held against it. */
static bool run_alone(struct executor *executor, const struct model *model, struct text *text, uint32_t chunk,
                      bool keep) {
    const struct model_config *config = &model->config;
    size_t routes = (size_t)config->block_count * config->expert_used_count;
    struct pool pool;
    pool_fill(&pool, executor->info.kv_blocks);
    struct run run = {.text = text};
    struct batch_output outputs[128];
    bool same = true;
    while (run.position < text->length) {
        uint32_t rows = text->length - run.position < chunk ? text->length - run.position : chunk;
        run_cover(&run, run.position + rows, &pool);
        struct batch_sequence sequence = run_rows(&run, 0, rows);
        for (uint32_t i = 0; i < rows; i++)
            outputs[i] = (struct batch_output){.row = i, .logits = true};
        struct batch batch = {.tokens = text->tokens + run.position,
                              .rows = rows,
                              .sequences = &sequence,
                              .sequence_count = 1,
                              .outputs = outputs,
                              .output_count = rows,
                              .routes = true};
        struct batch_result result;
        struct status status = {0};
        if (executor->ops->step(executor, &batch, &result, &status) < 0) {
            tap_note("%s", status.message);
            return false;
        }
        for (uint32_t i = 0; i < rows; i++) {
            size_t at = run.position + i;
            float *logits = text->logits + at * config->vocab_size;
            if (keep) {
                memcpy(logits, result.logits[i], config->vocab_size * sizeof(float));
                memcpy(text->experts + at * routes, result.route_experts + i * routes, routes * sizeof(uint32_t));
                memcpy(text->weights + at * routes, result.route_weights + i * routes, routes * sizeof(float));
            } else {
                same = same && same_bits(logits, result.logits[i], config->vocab_size) &&
                       same_bits(text->experts + at * routes, result.route_experts + i * routes, routes) &&
                       same_bits(text->weights + at * routes, result.route_weights + i * routes, routes);
            }
        }
        run.position += rows;
    }
    return same;
}

static bool routes_are_sane(const struct model *model, const struct text *text) {
    uint32_t used = model->config.expert_used_count;
    for (size_t i = 0; i < (size_t)text->length * model->config.block_count; i++) {
        double sum = 0;
        for (uint32_t u = 0; u < used; u++) {
            uint32_t expert = text->experts[i * used + u];
            sum += text->weights[i * used + u];
            if (expert >= model->config.expert_count)
                return false;
            for (uint32_t v = 0; v < u; v++)
                if (text->experts[i * used + v] == expert)
                    return false;
        }
        if (!(fabs(sum - 1) <= 1e-6))
            return false;
    }
    return true;
}

/* Any way of sampling, greedy often. */
static struct sampling random_sampling(void) {
    struct sampling sampling = {.seed = random_below(1000)};
    if (random_below(3) > 0)
        sampling.temperature = (1 + (float)random_below(20)) / 10;
    if (random_below(2))
        sampling.top_k = 1 + random_below(60);
    if (random_below(2))
        sampling.top_p = (50 + (float)random_below(50)) / 100;
    if (random_below(4) == 0)
        sampling.min_p = 0.1f;
    if (random_below(4) == 0)
        sampling.repetition_penalty = 1.3f;
    if (random_below(4) == 0)
        sampling.frequency_penalty = 0.5f;
    return sampling;
}

/* Whether an output got what the sampler makes of its logits. */
static bool sampled_right(const struct batch_output *output, const float *logits, uint32_t vocab,
                          const struct sampled *sampled) {
    struct sampled expected;
    void *scratch = malloc(sampler_scratch_bytes(vocab));
    sampler_sample(logits, vocab, output->sampling, output->history, output->history_length, output->prompt_length,
                   output->logprobs, scratch, &expected);
    free(scratch);
    return memcmp(&expected, sampled, sizeof expected) == 0;
}

/* One step of random rows of all runs, held against what each text gave alone. */
static bool ragged_step(struct executor *executor, const struct model *model, struct run *runs, struct pool *pool) {
    struct sampling samplings[96];
    uint32_t tokens[96], rows = 0, count = 0, output_count = 0, vocab = model->config.vocab_size;
    struct batch_sequence sequences[SLOTS];
    struct batch_output outputs[96];
    const float *expected[96];
    uint32_t room = executor->info.step_tokens, outputs_room = executor->info.max_outputs;
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        struct run *run = &runs[slot];
        if (!run->text || random_below(4) == 0 || rows == room)
            continue;
        uint32_t left = run->text->length - run->position, most = left < room - rows ? left : room - rows;
        uint32_t n = random_below(2) ? 1 : 1 + random_below(most < 40 ? most : 40);
        run_cover(run, run->position + n, pool);
        sequences[count++] = run_rows(run, slot, n);
        for (uint32_t i = 0; i < n; i++, rows++) {
            uint32_t at = run->position + i;
            tokens[rows] = run->text->tokens[at];
            if (output_count < outputs_room && (i == n - 1 ? random_below(4) : !random_below(8))) {
                expected[output_count] = run->text->logits + (size_t)at * vocab;
                samplings[output_count] = random_sampling();
                outputs[output_count] = (struct batch_output){
                    .row = rows,
                    .sampling = random_below(2) ? &samplings[output_count] : NULL,
                    .history = run->text->tokens,
                    .history_length = at + 1,
                    .prompt_length = 1,
                    .logprobs = random_below(3) ? 0 : 1 + random_below(SAMPLER_LOGPROBS_MAX),
                    .logits = true,
                };
                output_count++;
            }
        }
        run->position += n;
    }
    if (!rows)
        return true;
    struct batch batch = {.tokens = tokens,
                          .rows = rows,
                          .sequences = sequences,
                          .sequence_count = count,
                          .outputs = outputs,
                          .output_count = output_count,
                          .routes = random_below(8) == 0};
    struct batch_result result;
    struct status status = {0};
    if (executor->ops->step(executor, &batch, &result, &status) < 0) {
        tap_note("%s", status.message);
        return false;
    }
    for (uint32_t i = 0; i < output_count; i++) {
        if (!same_bits(result.logits[i], expected[i], vocab))
            return false;
        if (outputs[i].sampling && !sampled_right(&outputs[i], expected[i], vocab, &result.sampled[i]))
            return false;
    }
    return true;
}

/* Steps of random batches; texts end, their blocks go to others, texts begin. */
static bool run_ragged(struct executor *executor, const struct model *model, const struct text *texts, uint32_t count,
                       uint32_t steps) {
    struct pool pool;
    pool_fill(&pool, executor->info.kv_blocks);
    struct run runs[SLOTS] = {0};
    for (uint32_t step = 0; step < steps; step++) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            if (runs[slot].text && (runs[slot].position == runs[slot].text->length || random_below(60) == 0)) {
                run_end(&runs[slot], &pool);
                runs[slot].text = NULL;
            }
            if (!runs[slot].text && random_below(3) == 0)
                runs[slot] = (struct run){.text = &texts[random_below(count)]};
        }
        if (!ragged_step(executor, model, runs, &pool)) {
            tap_note("step %u", step);
            return false;
        }
    }
    return true;
}

static void texts_make(struct text *texts, const struct model *model) {
    const struct model_config *config = &model->config;
    for (int i = 0; i < SEQUENCES; i++) {
        struct text *text = &texts[i];
        /* The last is longer than one piece of attention. */
        text->length = i < SHORT ? 1 + random_below(20) : i < SEQUENCES - 1 ? 1 + random_below(90) : 270;
        size_t routes = (size_t)text->length * config->block_count * config->expert_used_count;
        text->tokens = malloc(text->length * sizeof(uint32_t));
        text->logits = malloc((size_t)text->length * config->vocab_size * sizeof(float));
        text->experts = malloc(routes * sizeof(uint32_t));
        text->weights = malloc(routes * sizeof(float));
        for (uint32_t p = 0; p < text->length; p++)
            text->tokens[p] = random_below(config->vocab_size);
    }
}

static void texts_free(struct text *texts) {
    for (int i = 0; i < SEQUENCES; i++) {
        free(texts[i].tokens);
        free(texts[i].logits);
        free(texts[i].experts);
        free(texts[i].weights);
    }
}

#endif
