/* The executor against the float64 reference on fresh random models of odd shapes: the contract's rows, for every
 * instruction set this processor has, with a KV cache of either type, whole and in chunks. MOED_TEST_SEED repeats a run. */
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"
#include "tests/kernels/parity.h"
#include "tests/synth/synth.h"
#include "tests/tap.h"

enum { MODELS = 10, TOKENS_MAX = 60 };

static uint64_t state;

static uint32_t draw(uint32_t low, uint32_t high) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + (uint32_t)((state >> 33) % (high - low + 1));
}

/* Shapes that divide by as little as the formats allow. Model 0 has the K formats' wide rows, so that each is met. */
static void draw_options(unsigned number, struct synth_options *options) {
    uint32_t wide = number % 3 == 0, kv_heads = draw(1, 3), experts = draw(3, 20);
    uint32_t quants = 0;
    while (synth_quants[quants]) quants++;
    options->quant = number == 0 ? "mixed" : synth_quants[draw(0, quants - 1)];
    options->seed = state;
    options->tied = draw(0, 2) == 0;
    options->rope_freq_base = draw(0, 1) ? 1e4 : 1e6;
    options->shape = (struct synth_shape){
        .hidden = wide ? 256 * draw(1, 2) : 32 * draw(2, 9),
        .layers = draw(1, 4),
        .heads = kv_heads * draw(1, 5),
        .kv_heads = kv_heads,
        .head_dim = 32 * draw(1, 4),
        .experts = experts,
        .topk = draw(1, experts < 6 ? experts : 6),
        .inter = wide ? 256 : 32 * draw(1, 9),
        .vocab = draw(259, 700),
        .ctx = 128,
    };
}

struct run {
    const char *isa, *repack, *kv_type;
    uint32_t chunk;
    struct driver_result result;
    struct status status;
};

static void run_executor(const char *path, const uint32_t *tokens, uint32_t count, struct run *run) {
    struct executor_driver *driver = NULL;
    run->repack = draw(0, 1) ? "on" : "off";
    run->chunk = draw(0, 1) ? draw(1, 20) : 0;
    if (driver_open(&executor_cpu, path, run->isa, run->repack, run->kv_type, &driver, &run->status) == 0)
        driver_forward(driver, tokens, count, run->chunk, &run->result, &run->status);
    driver_close(driver);
}

static void check_run(const struct run *run, const char *name, uint32_t count, const struct reference *reference,
                      const struct reference_result *expected) {
    struct parity parity;
    char text[PARITY_TEXT];
    if (run->status.code == STATUS_FAILED_PRECONDITION) { /* not on this processor */
        tap_skip("%s: %s", name, run->status.message);
    } else if (run->status.code) {
        tap_ok(false, "%s %s: %s", name, run->isa, run->status.message);
    } else {
        parity_measure(reference_config(reference), expected, &run->result, &parity);
        bool holds = parity_holds(&parity, text);
        tap_ok(holds, "%s %s, repack %s, cache in %s, %" PRIu32 " tokens in chunks of %" PRIu32 ": %s", name, run->isa,
               run->repack, run->kv_type, count, run->chunk, text);
    }
}

/* Every instruction set and the reference, which follows plain C at near-ties: the others choose the same experts. */
static void check_model(const char *path, const char *name, const uint32_t *tokens, uint32_t count) {
    struct run runs[] = {{.isa = "c"}, {.isa = "avx2"}, {.isa = "avx512"}};
    const size_t run_count = sizeof runs / sizeof runs[0];
    struct reference *reference = NULL;
    struct reference_result expected = {0};
    struct status status = {0};
    const char *kv_type = draw(0, 1) ? "q8_0" : "f16";
    for (size_t i = 0; i < run_count; i++) {
        runs[i].kv_type = kv_type;
        run_executor(path, tokens, count, &runs[i]);
    }
    if (reference_open(path, &reference, &status) ||
        reference_forward(reference, tokens, count, runs[0].result.experts, &expected, &status))
        tap_ok(false, "%s: %s", name, status.message);
    for (size_t i = 0; i < run_count; i++) {
        if (!status.code) check_run(&runs[i], name, count, reference, &expected);
        driver_result_free(&runs[i].result);
    }
    reference_result_free(&expected);
    reference_close(reference);
}

int main(void) {
    const char *given = getenv("MOED_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : clock_random_u64();
    char directory[] = "/tmp/moed-parity-test-XXXXXX", path[64];
    if (!mkdtemp(directory)) return EXIT_FAILURE;
    snprintf(path, sizeof path, "%s/m.gguf", directory);
    log_setup("parity_test", LOG_WARN, LOG_TEXT);
    tap_note("MOED_TEST_SEED=%" PRIu64, seed);
    state = seed;

    for (unsigned i = 0; i < MODELS; i++) {
        struct synth_options options = {.path = path};
        struct status status = {0};
        uint32_t tokens[TOKENS_MAX], count;
        char name[200];
        draw_options(i, &options);
        const struct synth_shape *s = &options.shape;
        snprintf(name, sizeof name,
                 "%s%s hidden %" PRIu64 " layers %" PRIu64 " heads %" PRIu64 "/%" PRIu64 " of %" PRIu64
                 " experts %" PRIu64 "/%" PRIu64 " inter %" PRIu64 " vocab %" PRIu64,
                 options.quant, options.tied ? " tied" : "", s->hidden, s->layers, s->heads, s->kv_heads, s->head_dim,
                 s->topk, s->experts, s->inter, s->vocab);
        count = draw(1, TOKENS_MAX);
        for (uint32_t t = 0; t < count; t++) tokens[t] = draw(0, (uint32_t)s->vocab - 1);
        if (synth_write(&options, NULL, &status)) tap_ok(false, "%s: %s", name, status.message);
        else check_model(path, name, tokens, count);
        unlink(path);
    }
    rmdir(directory);
    return tap_done();
}
