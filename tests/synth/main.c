#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/options.h"
#include "tests/synth/synth.h"

/* moed-synth: a synthetic model file from the command line. */

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    interrupted = number;
}

/* One line that is written over on a terminal, a line every few seconds elsewhere. */
struct line {
    bool terminal, quiet;
    uint64_t began, last;
};

static int report(void *context, uint64_t done, uint64_t total) {
    const uint64_t terminal_ns = 100000000, other_ns = 5000000000;
    struct line *line = context;
    uint64_t now = clock_now_ns();
    bool end = done == total && !interrupted;
    if (line->quiet) return interrupted;
    if (!end && now - line->last < (line->terminal ? terminal_ns : other_ns)) return interrupted;
    line->last = now;
    double seconds = (double)(now - line->began) / 1e9, gib = 1024.0 * 1024 * 1024;
    fprintf(stderr, "%s%5.1f %%  %.2f of %.2f GiB  %.2f GB/s%s", line->terminal ? "\r" : "",
            100.0 * (double)done / (double)total, (double)done / gib, (double)total / gib,
            (double)done / 1e9 / (seconds > 0 ? seconds : 1e-9), line->terminal && !end ? "" : "\n");
    return interrupted;
}

int main(int argc, char **argv) {
    struct status status = {0};
    struct synth_shape given = {0};
    const char *preset = "tiny", *quant = "q4_k_m";
    uint64_t seed = 1, threads = 0;
    double rope_freq_base = 1e6;
    bool tied = false, quiet = false;
    const struct option options[] = {
        {"preset", OPTION_CHOICE, &preset, "NAME", "The shape to begin with.", .choices = synth_presets},
        {"quant", OPTION_CHOICE, &quant, "FORMAT", "Format of the matrices; mixed: all of them.",
         .choices = synth_quants},
        {"seed", OPTION_UINT, &seed, "N", "Of the random weights.", .min = 0},
        {"hidden", OPTION_UINT, &given.hidden, "N",
         "Embedding length instead of the preset's (0: the preset's, here and below).", .min = 0},
        {"layers", OPTION_UINT, &given.layers, "N", "Blocks.", .min = 0},
        {"heads", OPTION_UINT, &given.heads, "N", "Query heads.", .min = 0},
        {"kv-heads", OPTION_UINT, &given.kv_heads, "N", "Key and value heads.", .min = 0},
        {"head-dim", OPTION_UINT, &given.head_dim, "N", "Length of a head.", .min = 0},
        {"experts", OPTION_UINT, &given.experts, "N", "Experts of a layer.", .min = 0},
        {"topk", OPTION_UINT, &given.topk, "N", "Experts a token uses.", .min = 0},
        {"inter", OPTION_UINT, &given.inter, "N", "Length of an expert's hidden layer.", .min = 0},
        {"vocab", OPTION_UINT, &given.vocab, "N", "Tokens, 259 at least.", .min = 0},
        {"ctx", OPTION_UINT, &given.ctx, "N", "Context length.", .min = 0},
        {"rope-freq-base", OPTION_REAL, &rope_freq_base, "X", "Base of the rotary positions.",
         .real_min = 1, .real_max = 1e12},
        {"tied", OPTION_FLAG, &tied, NULL, "Use the token embeddings as output head.", .min = 0},
        {"threads", OPTION_UINT, &threads, "N", "Writing threads; 0: one per processor, at most 8.", .max = 64},
        {"quiet", OPTION_FLAG, &quiet, NULL, "No progress line.", .min = 0},
        {0},
    };
    const struct option_set set = {
        .program = "moed-synth",
        .synopsis = "[OPTION]... OUT.gguf",
        .summary = "Writes a qwen3moe GGUF file with seeded random weights.",
        .options = options,
    };
    int operands;
    int parsed = options_parse(&set, argc, argv, &operands, &status);
    if (parsed == OPTIONS_EXIT) return EXIT_SUCCESS;
    if (parsed == OPTIONS_RUN && operands != 1)
        parsed = status_set(&status, STATUS_INVALID_ARGUMENT, "one file name is expected, %d were given", operands);
    if (parsed < 0) {
        fprintf(stderr, "moed-synth: %s\n", status.message);
        return EXIT_FAILURE;
    }

    char name[64];
    snprintf(name, sizeof name, "synthetic-%s-%s-seed%" PRIu64, preset, quant, seed);
    struct synth_options synth = {
        .path = argv[1], .name = name, .quant = quant, .seed = seed, .rope_freq_base = rope_freq_base, .tied = tied,
        .threads = (uint32_t)threads,
    };
    synth_preset(preset, &synth.shape);
    const struct { uint64_t *shape, given; } overrides[] = {
        {&synth.shape.hidden, given.hidden},     {&synth.shape.layers, given.layers},
        {&synth.shape.heads, given.heads},       {&synth.shape.kv_heads, given.kv_heads},
        {&synth.shape.head_dim, given.head_dim}, {&synth.shape.experts, given.experts},
        {&synth.shape.topk, given.topk},         {&synth.shape.inter, given.inter},
        {&synth.shape.vocab, given.vocab},       {&synth.shape.ctx, given.ctx},
    };
    for (size_t i = 0; i < sizeof overrides / sizeof overrides[0]; i++)
        if (overrides[i].given) *overrides[i].shape = overrides[i].given;

    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    struct line line = {.terminal = isatty(STDERR_FILENO), .quiet = quiet, .began = clock_now_ns()};
    line.last = line.began;
    struct synth_progress progress = {report, &line};
    if (synth_write(&synth, &progress, &status)) {
        fprintf(stderr, "%smoed-synth: %s\n", line.terminal ? "\n" : "", status.message);
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
