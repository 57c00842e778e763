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

static void test_model(const char *what, const struct synth_shape *shape, const char *quant, bool tied) {
    struct model *model = model_make(shape, quant, tied);
    struct text texts[SEQUENCES];
    texts_make(texts, model);

    struct executor_options options = options_make("auto", 1, "on");
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

int main(void) {
    log_setup("executor_test", LOG_WARN, LOG_TEXT);
    random_begin();
    test_model("q4_k_m", &shape_tiny, "q4_k_m", false);
    test_model("mixed", &shape_tiny, "mixed", true);
    test_model("odd", &shape_odd, "mixed", false);
    test_model("odd f32", &shape_odd, "f32", true);
    return tap_done();
}
