/*
 * The CUDA executor: against the float64 reference on models of several formats, and what a sequence gets is its own to the
 * bit, token by token in captured graphs, in chunks, in ragged batches with others, sampled as the CPU samples. With
 * MOED_TEST_MODEL=FILE only that file is tried, against the CPU executor.
 */
#include <inttypes.h>

#include "common/log.h"
#include "tests/kernels/executor_runs.h"
#include "tests/kernels/parity.h"

enum { STEPS_RAGGED = 1000, PARITY_TOKENS = 70, MANY_TOKENS = 600, MANY_CHUNK = 100 };

/* As large as a real layer in everything but the vocabulary. */
static const struct synth_shape shape_layer = {.hidden = 2048,
                                               .layers = 2,
                                               .heads = 32,
                                               .kv_heads = 4,
                                               .head_dim = 128,
                                               .experts = 128,
                                               .topk = 8,
                                               .inter = 768,
                                               .vocab = 4096,
                                               .ctx = 640};
static const struct synth_shape shape_plain = {.hidden = 96,
                                               .layers = 3,
                                               .heads = 6,
                                               .kv_heads = 3,
                                               .head_dim = 32,
                                               .experts = 5,
                                               .topk = 3,
                                               .inter = 40,
                                               .vocab = 301,
                                               .ctx = 300};

static void test_parity(const char *what, const struct synth_shape *shape, const char *quant, bool tied,
                        const char *kv_type) {
    char path[64], text[PARITY_TEXT];
    struct executor_driver *driver = NULL;
    struct reference *reference = NULL;
    struct driver_result result = {0};
    struct reference_result expected = {0};
    struct status status = {0};
    struct parity parity;
    uint32_t tokens[PARITY_TOKENS];
    model_write(shape, quant, tied, path);
    for (int i = 0; i < PARITY_TOKENS; i++)
        tokens[i] = random_below((uint32_t)shape->vocab);
    if (driver_open(&executor_cuda, path, "auto", "auto", kv_type, &driver, &status) ||
        driver_forward(driver, tokens, PARITY_TOKENS, 0, &result, &status) ||
        reference_open(path, &reference, &status) ||
        reference_forward(reference, tokens, PARITY_TOKENS, result.experts, &expected, &status)) {
        tap_ok(false, "%s: %s", what, status.message);
    } else {
        parity_measure(reference_config(reference), &expected, &result, &parity);
        bool holds = parity_holds(&parity, text);
        tap_ok(holds, "%s: %s", what, text);
    }
    reference_result_free(&expected);
    reference_close(reference);
    driver_result_free(&result);
    driver_close(driver);
    unlink(path);
}

static void test_invariance(const char *what, const struct synth_shape *shape, const char *quant, bool tied,
                            const char *kv_type, uint32_t steps) {
    struct model *model = model_make(shape, quant, tied);
    struct executor_options options = options_make("auto", 2, "auto");
    options.kv_type = kv_type;
    struct text texts[SEQUENCES];
    struct executor *executor = executor_make(&executor_cuda, model, &options);
    texts_make(texts, model);
    bool done = true, sane = true, sevens = true, whole = true;
    const uint32_t most = executor->info.max_outputs;
    for (int i = 0; i < SEQUENCES; i++) {
        done = run_alone(executor, model, &texts[i], 1, true) && done;
        sane = routes_are_sane(model, &texts[i]) && sane;
        sevens = run_alone(executor, model, &texts[i], 7, false) && sevens;
        whole = run_alone(executor, model, &texts[i], most, false) && whole;
    }
    tap_ok(done, "%s: each text alone, token by token", what);
    tap_ok(sane, "%s: every token has distinct experts, whose weights sum to 1", what);
    tap_ok(sevens, "%s: the same bits in chunks of 7", what);
    tap_ok(whole, "%s: and of %u", what, most);
    tap_ok(run_ragged(executor, model, texts, SEQUENCES, steps), "%s: and in %u ragged batches", what, steps);
    tap_ok(executor->info.memory_used <= 0.95 * (double)executor->info.memory_total,
           "%s: %" PRIu64 " of %" PRIu64 " MiB", what, executor->info.memory_used >> 20,
           executor->info.memory_total >> 20);
    executor->ops->close(executor);
    texts_free(texts);
    model_close(model);
}

/* A prompt in steps of `chunk` rows: the last token's logits, and routes of all tokens as [token][layer][used]. */
static bool prefill(struct executor *executor, const struct model *model, const uint32_t *tokens, uint32_t chunk,
                    float *logits, uint32_t *experts, float *weights) {
    const struct model_config *config = &model->config;
    const size_t routes = (size_t)config->block_count * config->expert_used_count;
    uint32_t blocks[BLOCKS_MAX];
    for (uint32_t i = 0; i < BLOCKS_MAX; i++)
        blocks[i] = i;
    for (uint32_t at = 0; at < MANY_TOKENS; at += chunk) {
        const struct batch_sequence sequence = {
            .position = at, .rows = chunk, .blocks = blocks, .block_count = (at + chunk + 31) / 32};
        const struct batch_output output = {.row = chunk - 1, .logits = true};
        const struct batch batch = {.tokens = tokens + at,
                                    .rows = chunk,
                                    .sequences = &sequence,
                                    .sequence_count = 1,
                                    .outputs = &output,
                                    .output_count = 1,
                                    .routes = true};
        struct batch_result result;
        struct status status = {0};
        if (executor->ops->step(executor, &batch, &result, &status) < 0) {
            tap_note("%s", status.message);
            return false;
        }
        memcpy(logits, result.logits[0], config->vocab_size * sizeof *logits);
        memcpy(experts + at * routes, result.route_experts, chunk * routes * sizeof *experts);
        memcpy(weights + at * routes, result.route_weights, chunk * routes * sizeof *weights);
    }
    return true;
}

/* Steps of so many rows that other kernels take them give the bits of steps of few. */
static void test_many_rows(const char *what, const struct synth_shape *shape, const char *quant, const char *kv_type) {
    struct model *model = model_make(shape, quant, false);
    struct executor_options options = options_make("auto", 2, "auto");
    options.kv_type = kv_type;
    options.step_tokens = MANY_TOKENS;
    struct executor *executor = executor_make(&executor_cuda, model, &options);
    const struct model_config *config = &model->config;
    const size_t vocab = config->vocab_size;
    const size_t routes = (size_t)MANY_TOKENS * config->block_count * config->expert_used_count;
    uint32_t tokens[MANY_TOKENS], *experts = calloc(2 * routes, sizeof *experts);
    float *logits = calloc(2 * vocab, sizeof *logits), *weights = calloc(2 * routes, sizeof *weights);
    for (int i = 0; i < MANY_TOKENS; i++)
        tokens[i] = random_below((uint32_t)vocab);
    const bool done = prefill(executor, model, tokens, MANY_CHUNK, logits, experts, weights) &&
                      prefill(executor, model, tokens, MANY_TOKENS, logits + vocab, experts + routes, weights + routes);
    tap_ok(done && same_bits(logits, logits + vocab, vocab) && same_bits(experts, experts + routes, routes) &&
               same_bits(weights, weights + routes, routes),
           "%s: %d rows a step give the bits of %d", what, MANY_TOKENS, MANY_CHUNK);
    executor->ops->close(executor);
    free(experts);
    free(logits);
    free(weights);
    model_close(model);
}

/* Sequences with more history than a step has room for get the same tokens and log-probabilities as others. */
static void test_histories(const char *what, const struct synth_shape *shape) {
    enum { LONG = (1 << 20) - 1000, ROWS = 4 };
    struct model *model = model_make(shape, "q4_k_m", false);
    const struct executor_options options = options_make("auto", 2, "auto");
    struct executor *executor = executor_make(&executor_cuda, model, &options);
    const uint32_t vocab = model->config.vocab_size, lengths[ROWS] = {600, LONG, 500, 5};
    uint32_t tokens[ROWS], block = 0, *history = malloc(LONG * sizeof *history);
    struct sampling samplings[ROWS];
    struct batch_output outputs[ROWS];
    struct batch_result result;
    struct status status = {0};
    for (uint32_t i = 0; i < LONG; i++)
        history[i] = i < vocab ? i : random_below(vocab / 2); /* the first has all tokens, so what it gets is penalized */
    for (uint32_t i = 0; i < ROWS; i++) {
        tokens[i] = random_below(vocab);
        samplings[i] = (struct sampling){.temperature = 1, .frequency_penalty = 1e-3f, .seed = i};
        outputs[i] = (struct batch_output){.row = i,
                                           .sampling = &samplings[i],
                                           .history = history,
                                           .history_length = lengths[i],
                                           .prompt_length = 3,
                                           .logprobs = 1 + 2 * i,
                                           .logits = true};
    }
    const struct batch_sequence sequence = {.rows = ROWS, .blocks = &block, .block_count = 1};
    const struct batch batch = {.tokens = tokens,
                                .rows = ROWS,
                                .sequences = &sequence,
                                .sequence_count = 1,
                                .outputs = outputs,
                                .output_count = ROWS};
    bool right = executor->ops->step(executor, &batch, &result, &status) == 0;
    for (uint32_t i = 0; i < ROWS && right; i++)
        right = sampled_right(&outputs[i], result.logits[i], vocab, &result.sampled[i]);
    tap_ok(right, "%s: penalties of histories that are too long for the device%s", what, status.message);
    executor->ops->close(executor);
    free(history);
    model_close(model);
}

/* A profiled step computes what any other does, and has times of all its layers. */
static void test_profile(const char *what, const struct synth_shape *shape) {
    enum { ROWS = 20 };
    struct model *model = model_make(shape, "q4_k_m", false);
    const struct executor_options options = options_make("auto", 2, "auto");
    struct executor *executor = executor_make(&executor_cuda, model, &options);
    const uint32_t vocab = model->config.vocab_size;
    const struct sampling sampling = {.temperature = 1, .top_k = 20};
    uint32_t tokens[ROWS], block = 0, attentions = 0, samples = 0;
    float *logits = malloc(vocab * sizeof *logits);
    bool same = true, sane = true;
    for (uint32_t i = 0; i < ROWS; i++)
        tokens[i] = random_below(vocab);
    for (uint32_t step = 0; step < 6; step++) {
        const uint32_t rows = step < 3 ? ROWS : 1, position = step < 3 ? 0 : ROWS;
        const struct batch_sequence sequence = {
            .position = position, .rows = rows, .blocks = &block, .block_count = 1};
        const struct batch_output output = {.row = rows - 1, .sampling = &sampling, .logprobs = 20, .logits = true};
        const struct batch batch = {.tokens = tokens,
                                    .rows = rows,
                                    .sequences = &sequence,
                                    .sequence_count = 1,
                                    .outputs = &output,
                                    .output_count = 1,
                                    .profile = step % 3 > 0};
        struct batch_result result;
        struct status status = {0};
        if (executor->ops->step(executor, &batch, &result, &status) < 0) {
            tap_note("%s", status.message);
            same = false;
            break;
        }
        if (batch.profile)
            same = same && same_bits(logits, result.logits[0], vocab);
        else
            memcpy(logits, result.logits[0], vocab * sizeof *logits);
        sane = sane && (result.timing_count > 0) == batch.profile;
        for (uint32_t i = 0; i < result.timing_count; i++) {
            const struct executor_timing *timing = &result.timings[i];
            sane = sane && timing->seconds > 0 && timing->seconds < 1;
            attentions += strcmp(timing->operation, "attention") == 0 ? timing->calls : 0;
            samples += strcmp(timing->operation, "sample") == 0 ? timing->calls : 0;
        }
    }
    tap_ok(same, "%s: profiled steps give the same bits", what);
    tap_ok(sane && attentions == 4 * model->config.block_count && samples == 4, "%s: and times of every operation",
           what);
    executor->ops->close(executor);
    free(logits);
    model_close(model);
}

static double cosine(const float *a, const float *b, uint32_t n) {
    double ab = 0, aa = 0, bb = 0;
    for (uint32_t i = 0; i < n; i++) {
        ab += (double)a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
    }
    return ab / sqrt(aa * bb);
}

/* The executors against each other: on a file that is too large for the reference, and with a cache it does not have. */
static void test_alike(const char *path, const char *kv_type) {
    const struct executor_ops *const ops[2] = {&executor_cpu, &executor_cuda};
    struct driver_result results[2] = {0};
    struct status status = {0};
    struct model *model = NULL;
    uint32_t tokens[PARITY_TOKENS];
    double worst = 1, sum = 0;
    bool done = model_open(path, &model, &status) == 0;
    for (int i = 0; i < PARITY_TOKENS && done; i++)
        tokens[i] = random_below(model->config.vocab_size);
    for (int i = 0; i < 2 && done; i++) {
        struct executor_driver *driver = NULL;
        done = driver_open(ops[i], path, "auto", "off", kv_type, &driver, &status) == 0 &&
               driver_forward(driver, tokens, PARITY_TOKENS, 0, &results[i], &status) == 0;
        driver_close(driver);
    }
    for (int t = 0; t < PARITY_TOKENS && done; t++) {
        const size_t at = (size_t)t * model->config.vocab_size;
        const double c = cosine(results[0].logits + at, results[1].logits + at, model->config.vocab_size);
        worst = c >= worst ? worst : c; /* a NaN is the worst */
        sum += c;
    }
    tap_ok(done && worst >= 0.99 && sum / PARITY_TOKENS >= 0.999,
           "%s, cache in %s: cosine to the CPU's logits %.5f, mean %.6f %s", path, kv_type, worst, sum / PARITY_TOKENS,
           status.message);
    driver_result_free(&results[0]);
    driver_result_free(&results[1]);
    model_close(model);
}

int main(void) {
    if (!executor_cuda.answers()) {
        printf("1..0 # SKIP no CUDA device\n");
        return EXIT_SUCCESS;
    }
    log_setup("cuda_executor_test", LOG_WARN, LOG_TEXT);
    random_begin();
    if (getenv("MOED_TEST_MODEL")) {
        test_alike(getenv("MOED_TEST_MODEL"), "f16");
        test_alike(getenv("MOED_TEST_MODEL"), "q8_0");
        return tap_done();
    }
    test_histories("tiny", &shape_tiny);
    test_profile("tiny", &shape_tiny);
    static const char *const kv_types[] = {"f16", "q8_0"};
    for (int i = 0; i < 2; i++) {
        const char *kv_type = kv_types[i];
        tap_note("KV cache in %s", kv_type);
        test_parity("tiny q4_k_m", &shape_tiny, "q4_k_m", false, kv_type);
        test_parity("tiny q5_k", &shape_tiny, "q5_k", true, kv_type);
        test_parity("tiny q6_k", &shape_tiny, "q6_k", false, kv_type);
        test_parity("tiny mixed", &shape_tiny, "mixed", true, kv_type);
        test_parity("plain q8_0", &shape_plain, "q8_0", false, kv_type);
        test_parity("plain f16", &shape_plain, "f16", true, kv_type);
        test_parity("plain bf16", &shape_plain, "bf16", false, kv_type);
        test_parity("plain f32", &shape_plain, "f32", true, kv_type);
        test_parity("layer q4_k_m", &shape_layer, "q4_k_m", false, kv_type);
        test_invariance("tiny q4_k_m", &shape_tiny, "q4_k_m", false, kv_type, STEPS_RAGGED);
        test_invariance("tiny mixed", &shape_tiny, "mixed", true, kv_type, STEPS_RAGGED / 4);
        test_invariance("plain mixed", &shape_plain, "mixed", false, kv_type, STEPS_RAGGED / 4);
        test_invariance("layer q4_k_m", &shape_layer, "q4_k_m", false, kv_type, STEPS_RAGGED / 4);
        test_many_rows("layer q4_k_m", &shape_layer, "q4_k_m", kv_type);
        test_many_rows("layer mixed", &shape_layer, "mixed", kv_type);
    }
    char path[64];
    model_write(&shape_layer, "q4_k_m", false, path);
    test_alike(path, "q8_0");
    unlink(path);
    return tap_done();
}
