/*
 * What a sequence gets is its own, to the bit: alone token by token, in chunks, in ragged batches with others whose
 * blocks lie scattered and change hands, with any number of threads, instruction set and order of weights.
 */
#include "tests/kernels/executor_runs.h"

#include "common/log.h"

static bool isa_here(const char *isa) {
    enum cpu_isa wanted;
    return cpu_isa_parse(isa, &wanted) && cpu_kernels_select(wanted)->isa == wanted;
}

static void test_model(const char *what, const struct synth_shape *shape, const char *quant, bool tied,
                       const char *kv_type) {
    struct model *model = model_make(shape, quant, tied);
    struct text texts[SEQUENCES];
    texts_make(texts, model);

    struct executor_options options = options_make("auto", 1, "on");
    options.kv_type = kv_type;
    struct executor *executor = executor_make(&executor_cpu, model, &options);
    bool done = true, sane = true;
    for (int i = 0; i < SEQUENCES; i++) {
        done = run_alone(executor, model, &texts[i], 1, true) && done;
        sane = routes_are_sane(model, &texts[i]) && sane;
    }
    tap_ok(done, "%s: each text alone, token by token", what);
    tap_ok(sane, "%s: every token has distinct experts, whose weights sum to 1", what);
    executor->ops->close(executor);

    /* Plain C is slow: a few short texts, which have every shape a kernel can tell apart. */
    static const struct {
        const char *isa;
        uint32_t threads;
        const char *repack;
        uint32_t texts, chunk, steps;
    } cases[] = {
        {"c", 2, "off", SHORT, 7, 10},
        {"c", 1, "on", SHORT, 96, 10},
        {"avx2", 3, "off", SHORT, 2, 10},
        {"avx2", 1, "on", SHORT, 96, 10},
        {"avx512", 1, "on", SEQUENCES, 7, 20},
        {"avx512", 3, "off", SEQUENCES, 2, 20},
        {"auto", 2, "auto", SEQUENCES, 96, STEPS},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!isa_here(cases[i].isa)) {
            tap_skip("%s: no %s here", what, cases[i].isa);
            continue;
        }
        options = options_make(cases[i].isa, cases[i].threads, cases[i].repack);
        options.kv_type = kv_type;
        executor = executor_make(&executor_cpu, model, &options);
        bool same = true;
        uint32_t chunk = cases[i].chunk < executor->info.max_outputs ? cases[i].chunk : executor->info.max_outputs;
        for (uint32_t t = 0; t < cases[i].texts; t++)
            same = run_alone(executor, model, &texts[t], chunk, false) && same;
        tap_ok(same, "%s: the same bits with %s, %u threads, repack %s, chunks of %u", what, cases[i].isa,
               cases[i].threads, cases[i].repack, chunk);
        tap_ok(run_ragged(executor, model, texts, cases[i].texts, cases[i].steps), "%s: and in %u ragged batches", what,
               cases[i].steps);
        executor->ops->close(executor);
    }
    texts_free(texts);
    model_close(model);
}

/* A cache in Q8_0 changes logits, and only a little. */
static void test_kv_types(void) {
    struct model *model = model_make(&shape_tiny, "q4_k_m", false);
    struct text texts[2][SEQUENCES];
    static const char *const kv_types[] = {"f16", "q8_0"};
    texts_make(texts[0], model);
    memcpy(texts[1], texts[0], sizeof texts[0]);
    const uint32_t vocab = model->config.vocab_size;
    struct text *last[2] = {&texts[0][SEQUENCES - 1], &texts[1][SEQUENCES - 1]};
    const size_t logits = (size_t)last[0]->length * vocab;
    last[1]->logits = malloc(logits * sizeof(float));
    for (int i = 0; i < 2; i++) {
        struct executor_options options = options_make("auto", 2, "auto");
        options.kv_type = kv_types[i];
        struct executor *executor = executor_make(&executor_cpu, model, &options);
        run_alone(executor, model, last[i], 7, true);
        executor->ops->close(executor);
    }
    double sum = 0; /* the mean: at a near-tie of experts another one may be chosen */
    for (size_t at = 0; at < logits; at += vocab) {
        double ab = 0, aa = 0, bb = 0;
        for (size_t v = at; v < at + vocab; v++) {
            const double a = last[0]->logits[v], b = last[1]->logits[v];
            ab += a * b;
            aa += a * a;
            bb += b * b;
        }
        sum += ab / sqrt(aa * bb);
    }
    const double mean = sum / last[0]->length;
    tap_ok(mean > 0.99 && !same_bits(last[0]->logits, last[1]->logits, logits),
           "caches in f16 and in q8_0: mean cosine of logits %.6f", mean);
    free(last[1]->logits);
    texts_free(texts[0]);
    model_close(model);
}

int main(void) {
    log_setup("executor_test", LOG_WARN, LOG_TEXT);
    random_begin();
    test_model("q4_k_m", &shape_tiny, "q4_k_m", false, "f16");
    test_model("mixed", &shape_tiny, "mixed", true, "f16");
    test_model("odd", &shape_odd, "mixed", false, "f16");
    test_model("odd f32", &shape_odd, "f32", true, "f16");
    test_model("q4_k_m, cache in q8_0", &shape_tiny, "q4_k_m", false, "q8_0");
    test_model("odd, cache in q8_0", &shape_odd, "mixed", false, "q8_0");
    test_kv_types();
    return tap_done();
}
