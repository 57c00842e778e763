#include "tests/synth/plan.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/quant.h"

const char *const synth_presets[] = {"tiny", "small", "layer", "30b-a3b", NULL};
/* hidden, layers, heads, kv_heads, head_dim, experts, topk, inter, vocab, ctx */
static const struct synth_shape preset_shapes[] = {
    {256, 2, 4, 2, 64, 8, 2, 256, 512, 512},
    {512, 3, 8, 2, 128, 16, 4, 256, 1000, 2048},
    {2048, 2, 32, 4, 128, 128, 8, 768, 4096, 4096},
    {2048, 48, 32, 4, 128, 128, 8, 768, 151936, 40960},
};

const char *const synth_quants[] = {"q4_k_m", "q4_k", "q5_k", "q6_k", "q8_0", "f16", "bf16", "f32", "mixed", NULL};
/* file_type: LLAMA_FTYPE_* of llama.h. */
static const struct {
    uint32_t type;
    int file_type;
} quants[] = {
    {QUANT_Q4_K, 15}, {QUANT_Q4_K, 14}, {QUANT_Q5_K, 16}, {QUANT_Q6_K, 18}, {QUANT_Q8_0, 7},
    {QUANT_F16, 1}, {QUANT_BF16, 32}, {QUANT_F32, 0}, {QUANT_Q4_K, -1},
};

static int name_index(const char *const *names, const char *name) {
    for (int i = 0; names[i]; i++)
        if (strcmp(names[i], name) == 0) return i;
    return -1;
}

bool synth_preset(const char *name, struct synth_shape *shape) {
    int index = name_index(synth_presets, name);
    if (index >= 0) *shape = preset_shapes[index];
    return index >= 0;
}

int plan_file_type(const char *quant) {
    return quants[name_index(synth_quants, quant)].file_type;
}

static int check_range(const char *what, uint64_t value, uint64_t low, uint64_t high, struct status *status) {
    if (value >= low && value <= high) return 0;
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s is %" PRIu64 ", allowed are %" PRIu64 " to %" PRIu64, what,
                      value, low, high);
}

static int check_options(const struct synth_options *options, struct status *status) {
    const struct synth_shape *s = &options->shape;
    const struct {
        const char *what;
        uint64_t value, low, high;
    } ranges[] = {
        {"hidden", s->hidden, 2, 1 << 16},     {"layers", s->layers, 1, 1024},    {"heads", s->heads, 1, 4096},
        {"kv_heads", s->kv_heads, 1, 4096},    {"head_dim", s->head_dim, 2, 512}, {"experts", s->experts, 1, 1024},
        {"topk", s->topk, 1, s->experts},      {"inter", s->inter, 1, 1 << 16},
        {"vocab", s->vocab, 256 + 3, 1 << 24}, /* every byte and three special tokens */
        {"ctx", s->ctx, 1, 1 << 30},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++)
        if (check_range(ranges[i].what, ranges[i].value, ranges[i].low, ranges[i].high, status)) return -1;
    if (s->heads % s->kv_heads)
        return status_set(status, STATUS_INVALID_ARGUMENT, "heads is %" PRIu64 ", not a multiple of kv_heads, %" PRIu64,
                          s->heads, s->kv_heads);
    if (s->head_dim % 2)
        return status_set(status, STATUS_INVALID_ARGUMENT, "head_dim is %" PRIu64 ", not even", s->head_dim);
    if (!(options->rope_freq_base >= 1 && options->rope_freq_base <= 1e12))
        return status_set(status, STATUS_INVALID_ARGUMENT, "rope_freq_base is %g, allowed are 1 to 1e12",
                          options->rope_freq_base);
    if (name_index(synth_quants, options->quant) < 0)
        return status_set(status, STATUS_INVALID_ARGUMENT, "unknown quantization \"%s\"", options->quant);
    return 0;
}

/* The layers in which Q4_K_M spends more bits on attn_v and ffn_down (llama.cpp's use_more_bits). */
static bool more_bits(uint64_t layer, uint64_t layers) {
    return layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
}

static uint32_t choose_type(const char *quant, const char *tensor, uint64_t layer, uint64_t layers, uint64_t columns,
                            uint32_t index) {
    static const uint32_t mix[] = {QUANT_Q4_K, QUANT_Q5_K, QUANT_Q6_K, QUANT_Q8_0, QUANT_F16, QUANT_BF16, QUANT_F32};
    if (strstr(tensor, "norm.weight") || strstr(tensor, "ffn_gate_inp")) return QUANT_F32;
    uint32_t type = quants[name_index(synth_quants, quant)].type;
    if (strcmp(quant, "mixed") == 0) type = mix[index % (sizeof mix / sizeof mix[0])];
    if (strcmp(quant, "q4_k_m") == 0 &&
        (strcmp(tensor, "output.weight") == 0 ||
         ((strstr(tensor, "attn_v") || strstr(tensor, "ffn_down_exps")) && more_bits(layer, layers))))
        type = QUANT_Q6_K;
    if (columns % quant_format(type)->block_weights) type = columns % 32 ? QUANT_F16 : QUANT_Q8_0;
    return type;
}

/*
 * Deviations for which what comes out of a matrix is about as large as what went in, the normalized activations being
 * about 1. Each block then adds a tenth or so to the residual's variance: the last layer's is a few times the first
 * one's, and every layer's attention and experts are seen in the logits, but one expert taken for another of the same
 * weight changes them little. The router's logits are about 2, so that few experts weigh most; its rows are about
 * equally long, so that none is preferred.
 */
static float deviation(const struct synth_options *options, const char *tensor, uint64_t columns) {
    if (strcmp(tensor, "token_embd.weight") == 0) return options->tied ? 0.05f : 1.0f;
    float gain = 1.0f;
    if (strstr(tensor, "attn_output")) gain = 0.7f;
    if (strstr(tensor, "ffn_gate_inp")) gain = 2.0f;
    if (strstr(tensor, "ffn_down_exps")) gain = 0.5f;
    return gain / sqrtf((float)columns);
}

static void add(const struct synth_options *options, struct plan *plan, const char *name, uint64_t layer,
                uint64_t columns, uint64_t rows, uint64_t experts) {
    struct plan_tensor *tensor = &plan->tensors[plan->count];
    snprintf(tensor->name, sizeof tensor->name, "%s", name);
    tensor->shape[0] = columns;
    tensor->shape[1] = rows ? rows : 1;
    tensor->shape[2] = experts ? experts : 1;
    tensor->dimensions = experts ? 3 : rows ? 2 : 1;
    tensor->type = choose_type(options->quant, name, layer, options->shape.layers, columns, plan->count);
    if (tensor->dimensions == 1) { /* a norm; those of Q and K make attention choose among positions */
        bool head = strstr(name, "attn_q_norm") || strstr(name, "attn_k_norm");
        tensor->low = head ? 0.8f : 0.6f;
        tensor->high = head ? 1.6f : 1.4f;
    } else {
        tensor->std = deviation(options, name, columns);
    }
    const struct quant_format *format = quant_format(tensor->type);
    tensor->blocks = columns / format->block_weights * tensor->shape[1] * tensor->shape[2];
    tensor->bytes = tensor->blocks * format->block_bytes;
    tensor->offset = plan->data_bytes;
    plan->data_bytes += (tensor->bytes + PLAN_ALIGNMENT - 1) / PLAN_ALIGNMENT * PLAN_ALIGNMENT;
    plan->count++;
}

int plan_make(const struct synth_options *options, struct plan *plan, struct status *status) {
    const struct synth_shape *s = &options->shape;
    *plan = (struct plan){0};
    if (check_options(options, status)) return -1;
    const struct {
        const char *name;
        uint64_t columns, rows, experts;
    } layer_tensors[] = {
        {"attn_norm", s->hidden, 0, 0},
        {"attn_q", s->hidden, s->heads * s->head_dim, 0},
        {"attn_k", s->hidden, s->kv_heads * s->head_dim, 0},
        {"attn_v", s->hidden, s->kv_heads * s->head_dim, 0},
        {"attn_q_norm", s->head_dim, 0, 0},
        {"attn_k_norm", s->head_dim, 0, 0},
        {"attn_output", s->heads * s->head_dim, s->hidden, 0},
        {"ffn_norm", s->hidden, 0, 0},
        {"ffn_gate_inp", s->hidden, s->experts, 0},
        {"ffn_gate_exps", s->hidden, s->inter, s->experts},
        {"ffn_up_exps", s->hidden, s->inter, s->experts},
        {"ffn_down_exps", s->inter, s->hidden, s->experts},
    };
    const size_t per_layer = sizeof layer_tensors / sizeof layer_tensors[0];
    plan->tensors = calloc(s->layers * per_layer + 3, sizeof *plan->tensors);
    if (!plan->tensors) return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");

    add(options, plan, "token_embd.weight", 0, s->hidden, s->vocab, 0);
    for (uint64_t layer = 0; layer < s->layers; layer++) {
        for (size_t i = 0; i < per_layer; i++) {
            char name[sizeof plan->tensors->name];
            snprintf(name, sizeof name, "blk.%u.%s.weight", (unsigned)layer, layer_tensors[i].name);
            add(options, plan, name, layer, layer_tensors[i].columns, layer_tensors[i].rows, layer_tensors[i].experts);
        }
    }
    add(options, plan, "output_norm.weight", 0, s->hidden, 0, 0);
    if (!options->tied) add(options, plan, "output.weight", 0, s->hidden, s->vocab, 0);
    return 0;
}

void plan_free(struct plan *plan) {
    free(plan->tensors);
    *plan = (struct plan){0};
}
