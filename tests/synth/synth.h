#ifndef MOED_TESTS_SYNTH_SYNTH_H
#define MOED_TESTS_SYNTH_SYNTH_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

/*
 * Writes qwen3moe GGUF files of any shape with seeded random weights. The weights are drawn in their quantized form, so
 * that a file of the real Qwen3-30B-A3B shape takes seconds and a few MiB of memory. The same options give the same
 * bytes on every machine, whatever the number of threads.
 */
struct synth_shape {
    uint64_t hidden, layers, heads, kv_heads, head_dim, experts, topk, inter, vocab, ctx;
};

struct synth_options {
    const char *path;     /* written as PATH.tmp.PID and renamed when complete */
    const char *name;     /* general.name of the file; NULL: "synthetic" */
    struct synth_shape shape;
    const char *quant;    /* one of synth_quants */
    uint64_t seed;
    double rope_freq_base;
    bool tied;            /* no output.weight: the head is token_embd */
    uint32_t threads;     /* 0: one per processor, at most 8 */
};

/* Called by the calling thread, some times a second and once at the end. Anything but 0 stops the writing. */
struct synth_progress {
    int (*report)(void *context, uint64_t bytes_done, uint64_t bytes_total);
    void *context;
};

/* NULL-terminated: "q4_k_m", "q4_k", ... A matrix whose rows are no whole number of the format's blocks is written as
 * Q8_0, or as F16 where they are no multiple of 32 either. */
extern const char *const synth_quants[];
/* NULL-terminated: "tiny", "small", "layer", "30b-a3b". */
extern const char *const synth_presets[];

/* False for an unknown name. */
bool synth_preset(const char *name, struct synth_shape *shape);

/* `progress` may be NULL. On failure nothing is left behind, and an older file of that name is as it was. */
int synth_write(const struct synth_options *options, const struct synth_progress *progress, struct status *status);

#endif
