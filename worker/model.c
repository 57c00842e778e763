#include "worker/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARCHITECTURE "qwen3moe"

/* What no file of the architecture comes near; keeps every product of two below 2^32 and rows below 2^31 bytes. */
enum {
    BLOCKS_MAX = 512,
    LENGTH_MAX = 65536, /* of embeddings and of an expert's hidden layer */
    HEADS_MAX = 4096,
    HEAD_DIM_MAX = 512,
    EXPERTS_MAX = 1024,
    VOCAB_MAX = 1 << 24,
    CONTEXT_MAX = 1 << 24,
};

__attribute__((format(printf, 3, 4))) static int fail(const struct gguf *gguf, struct status *status,
                                                      const char *format, ...) {
    char message[sizeof status->message];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s: %s", gguf_path(gguf), message);
}

static int get_u32(const struct gguf *gguf, const char *key, uint32_t low, uint32_t high, uint32_t *out,
                   struct status *status) {
    if (gguf_get_u32(gguf, key, out, status)) return -1;
    if (*out >= low && *out <= high) return 0;
    return fail(gguf, status, "key %s is %" PRIu32 ", expected %" PRIu32 " to %" PRIu32, key, *out, low, high);
}

static int get_f32(const struct gguf *gguf, const char *key, float low, float high, float *out, struct status *status) {
    if (gguf_get_f32(gguf, key, out, status)) return -1;
    if (*out >= low && *out <= high) return 0;
    return fail(gguf, status, "key %s is %g, expected %g to %g", key, (double)*out, (double)low, (double)high);
}

/* A key that may be absent, but where it is there has one value that moed computes with. */
static int expect_u32(const struct gguf *gguf, const char *key, uint32_t expected, struct status *status) {
    uint32_t found = expected;
    if (gguf_has(gguf, key) && gguf_get_u32(gguf, key, &found, status)) return -1;
    if (found == expected) return 0;
    return fail(gguf, status, "key %s is %" PRIu32 ", expected %" PRIu32, key, found, expected);
}

static int expect_f32(const struct gguf *gguf, const char *key, float expected, struct status *status) {
    float found = expected;
    if (gguf_has(gguf, key) && gguf_get_f32(gguf, key, &found, status)) return -1;
    if (found == expected) return 0;
    return fail(gguf, status, "key %s is %g, expected %g", key, (double)found, (double)expected);
}

static int expect_true(const struct gguf *gguf, const char *key, struct status *status) {
    bool found = true;
    if (gguf_has(gguf, key) && gguf_get_bool(gguf, key, &found, status)) return -1;
    return found ? 0 : fail(gguf, status, "key %s is false, expected true", key);
}

static bool string_is(struct gguf_string string, const char *expected) {
    return string.length == strlen(expected) && memcmp(string.bytes, expected, string.length) == 0;
}

static int expect_string(const struct gguf *gguf, const char *key, const char *expected, struct status *status) {
    struct gguf_string found;
    if (gguf_get_string(gguf, key, &found, status)) return -1;
    if (string_is(found, expected)) return 0;
    return fail(gguf, status, "key %s is \"%.*s\", expected \"%s\"", key,
                (int)(found.length < 64 ? found.length : 64), found.bytes, expected);
}

/* Only printable ASCII is taken over, as the name goes into logs and messages. */
static void read_name(const struct gguf *gguf, struct model_config *config) {
    const char *path = gguf_path(gguf), *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    struct gguf_string name = {base, strlen(base)};
    if (gguf_has(gguf, "general.name")) gguf_get_string(gguf, "general.name", &name, NULL);
    size_t length = name.length < sizeof config->name - 1 ? name.length : sizeof config->name - 1;
    for (size_t i = 0; i < length; i++)
        config->name[i] = name.bytes[i] >= ' ' && name.bytes[i] <= '~' ? name.bytes[i] : '?';
    config->name[length] = '\0';
}

static int read_shape(const struct gguf *gguf, struct model_config *config, struct status *status) {
    const struct {
        const char *key;
        uint32_t *out, low, high;
    } keys[] = {
        {ARCHITECTURE ".block_count", &config->block_count, 1, BLOCKS_MAX},
        {ARCHITECTURE ".context_length", &config->context_length, 1, CONTEXT_MAX},
        {ARCHITECTURE ".embedding_length", &config->embedding_length, 1, LENGTH_MAX},
        {ARCHITECTURE ".attention.head_count", &config->head_count, 1, HEADS_MAX},
        {ARCHITECTURE ".attention.head_count_kv", &config->head_count_kv, 1, HEADS_MAX},
        {ARCHITECTURE ".attention.key_length", &config->head_dim, 2, HEAD_DIM_MAX},
        {ARCHITECTURE ".expert_count", &config->expert_count, 1, EXPERTS_MAX},
        {ARCHITECTURE ".expert_used_count", &config->expert_used_count, 1, EXPERTS_MAX},
        {ARCHITECTURE ".expert_feed_forward_length", &config->expert_feed_forward_length, 1, LENGTH_MAX},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (get_u32(gguf, keys[i].key, keys[i].low, keys[i].high, keys[i].out, status)) return -1;
    if (get_f32(gguf, ARCHITECTURE ".attention.layer_norm_rms_epsilon", 1e-12f, 1e-1f, &config->rms_epsilon, status) ||
        get_f32(gguf, ARCHITECTURE ".rope.freq_base", 1, 1e12f, &config->rope_freq_base, status))
        return -1;

    if (config->head_count % config->head_count_kv)
        return fail(gguf, status,
                    "key " ARCHITECTURE ".attention.head_count is %" PRIu32
                    ", expected a multiple of head_count_kv, %" PRIu32,
                    config->head_count, config->head_count_kv);
    if (config->head_dim % 2)
        return fail(gguf, status, "key " ARCHITECTURE ".attention.key_length is %" PRIu32 ", expected an even number",
                    config->head_dim);
    if (config->expert_used_count > config->expert_count)
        return fail(gguf, status,
                    "key " ARCHITECTURE ".expert_used_count is %" PRIu32 ", expected at most expert_count, %" PRIu32,
                    config->expert_used_count, config->expert_count);
    return 0;
}

/* Keys that would ask for another computation than this one are refused, not passed over. */
static int refuse_variants(const struct gguf *gguf, const struct model_config *config, struct status *status) {
    const struct {
        const char *key;
        uint32_t expected;
    } fixed[] = {
        {ARCHITECTURE ".attention.value_length", config->head_dim},
        {ARCHITECTURE ".rope.dimension_count", config->head_dim},
        {ARCHITECTURE ".attention.sliding_window", 0},
        {ARCHITECTURE ".expert_shared_count", 0},
        {ARCHITECTURE ".leading_dense_block_count", 0},
        {ARCHITECTURE ".expert_gating_func", 1}, /* softmax */
    };
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++)
        if (expect_u32(gguf, fixed[i].key, fixed[i].expected, status)) return -1;
    if (gguf_has(gguf, ARCHITECTURE ".rope.scaling.type") &&
        expect_string(gguf, ARCHITECTURE ".rope.scaling.type", "none", status))
        return -1;
    /* The factor alone, from before there were types, means linear scaling. */
    if (!gguf_has(gguf, ARCHITECTURE ".rope.scaling.type") &&
        expect_f32(gguf, ARCHITECTURE ".rope.scaling.factor", 1, status))
        return -1;
    if (expect_f32(gguf, ARCHITECTURE ".rope.scale_linear", 1, status)) return -1;
    if (expect_f32(gguf, ARCHITECTURE ".expert_weights_scale", 1, status)) return -1;
    if (expect_true(gguf, ARCHITECTURE ".expert_weights_norm", status)) return -1;
    return expect_true(gguf, ARCHITECTURE ".attention.causal", status);
}

/* The embedding matrix says how many tokens there are; whatever else counts them must agree. */
static int read_vocabulary(const struct gguf *gguf, struct model_config *config, struct status *status) {
    const struct gguf_tensor *embeddings = gguf_tensor_find(gguf, "token_embd.weight");
    if (!embeddings) return fail(gguf, status, "tensor token_embd.weight: missing");
    if (embeddings->shape[1] < 1 || embeddings->shape[1] > VOCAB_MAX)
        return fail(gguf, status, "tensor token_embd.weight: %" PRIu64 " rows, expected 1 to %d", embeddings->shape[1],
                    VOCAB_MAX);
    config->vocab_size = (uint32_t)embeddings->shape[1];
    if (expect_u32(gguf, ARCHITECTURE ".vocab_size", config->vocab_size, status)) return -1;
    if (gguf_has(gguf, "tokenizer.ggml.tokens")) {
        enum gguf_type type;
        uint64_t count;
        if (gguf_get_array(gguf, "tokenizer.ggml.tokens", &type, &count, status)) return -1;
        if (count != config->vocab_size)
            return fail(gguf, status, "key tokenizer.ggml.tokens has %" PRIu64 " tokens, expected %" PRIu32
                        " as rows of token_embd.weight", count, config->vocab_size);
    }
    config->eos_token_id = MODEL_EOS_NONE;
    if (!gguf_has(gguf, "tokenizer.ggml.eos_token_id")) return 0;
    return get_u32(gguf, "tokenizer.ggml.eos_token_id", 0, config->vocab_size - 1, &config->eos_token_id, status);
}

static int read_config(const struct gguf *gguf, struct model_config *config, struct status *status) {
    if (expect_string(gguf, "general.architecture", ARCHITECTURE, status)) return -1;
    memcpy(config->architecture, ARCHITECTURE, sizeof ARCHITECTURE);
    read_name(gguf, config);
    if (read_shape(gguf, config, status)) return -1;
    if (refuse_variants(gguf, config, status)) return -1;
    if (read_vocabulary(gguf, config, status)) return -1;
    gguf_fingerprint(gguf, config->fingerprint);
    return 0;
}

static void print_shape(const uint64_t shape[4], char *out, size_t size) {
    uint32_t dimensions = shape[3] != 1 ? 4 : shape[2] != 1 ? 3 : shape[1] != 1 ? 2 : 1;
    size_t length = 0;
    for (uint32_t i = 0; i < dimensions && length < size; i++)
        length += (size_t)snprintf(out + length, size - length, "%s%" PRIu64, i ? ", " : "", shape[i]);
}

/* What is to be in the file under a name, and where it goes. */
struct tensor_slot {
    const char *name; /* "attn_q" of blk.N.attn_q.weight */
    uint32_t columns, rows, experts;
    struct model_matrix *matrix; /* or */
    const float **vector;
    bool f32_only;
};

static int bind_tensor(struct model *model, const char *name, const struct tensor_slot *slot, struct status *status) {
    const struct gguf *gguf = model->gguf;
    const struct gguf_tensor *tensor = gguf_tensor_find(gguf, name);
    if (!tensor) return fail(gguf, status, "tensor %s: missing", name);

    const uint64_t expected[4] = {slot->columns, slot->rows, slot->experts, 1};
    if (memcmp(tensor->shape, expected, sizeof expected) != 0) {
        char found_text[96], expected_text[96];
        print_shape(tensor->shape, found_text, sizeof found_text);
        print_shape(expected, expected_text, sizeof expected_text);
        return fail(gguf, status, "tensor %s: shape [%s], expected [%s]", name, found_text, expected_text);
    }
    const struct quant_format *format = quant_format(tensor->type);
    bool f32_only = slot->f32_only || slot->vector;
    if (!format || !tensor->data || (f32_only && tensor->type != QUANT_F32))
        return fail(gguf, status, "tensor %s: type %s (%" PRIu32 "), expected %s", name,
                    gguf_tensor_type_name(tensor->type), tensor->type,
                    f32_only ? "F32" : "F32, F16, BF16, Q8_0, Q4_K, Q5_K or Q6_K");
    if (slot->columns % format->block_weights)
        return fail(gguf, status, "tensor %s: rows of %" PRIu32 " weights, expected a multiple of %" PRIu32 " for %s",
                    name, slot->columns, format->block_weights, format->name);
    if ((uintptr_t)tensor->data % _Alignof(float))
        return fail(gguf, status, "tensor %s: data at byte %" PRIu64 ", expected a multiple of %zu", name,
                    tensor->offset, _Alignof(float));

    model->config.tensor_bytes += tensor->bytes;
    if (slot->vector) {
        *slot->vector = tensor->data;
        return 0;
    }
    *slot->matrix = (struct model_matrix){
        .type = (enum quant_type)tensor->type,
        .columns = slot->columns,
        .rows = slot->rows,
        .experts = slot->experts,
        .data = tensor->data,
        .row_bytes = (uint64_t)slot->columns / format->block_weights * format->block_bytes,
        .name = tensor->name,
    };
    return 0;
}

enum { LAYER_TENSORS = 12, TENSOR_NAME_MAX = 64 };

static void layer_slots(struct model *model, uint32_t index, struct tensor_slot slots[LAYER_TENSORS]) {
    const struct model_config *c = &model->config;
    struct model_layer *layer = &model->layers[index];
    const uint32_t hidden = c->embedding_length, inter = c->expert_feed_forward_length, experts = c->expert_count;
    const uint32_t q = c->head_count * c->head_dim, kv = c->head_count_kv * c->head_dim;
    const struct tensor_slot filled[LAYER_TENSORS] = {
        {"attn_norm", hidden, 1, 1, .vector = &layer->attn_norm},
        {"attn_q", hidden, q, 1, .matrix = &layer->attn_q},
        {"attn_k", hidden, kv, 1, .matrix = &layer->attn_k},
        {"attn_v", hidden, kv, 1, .matrix = &layer->attn_v},
        {"attn_q_norm", c->head_dim, 1, 1, .vector = &layer->attn_q_norm},
        {"attn_k_norm", c->head_dim, 1, 1, .vector = &layer->attn_k_norm},
        {"attn_output", q, hidden, 1, .matrix = &layer->attn_output},
        {"ffn_norm", hidden, 1, 1, .vector = &layer->ffn_norm},
        {"ffn_gate_inp", hidden, experts, 1, .matrix = &layer->ffn_gate_inp, .f32_only = true},
        {"ffn_gate_exps", hidden, inter, experts, .matrix = &layer->ffn_gate_exps},
        {"ffn_up_exps", hidden, inter, experts, .matrix = &layer->ffn_up_exps},
        {"ffn_down_exps", inter, hidden, experts, .matrix = &layer->ffn_down_exps},
    };
    memcpy(slots, filled, sizeof filled);
}

static void layer_tensor_name(uint32_t index, const struct tensor_slot *slot, char name[TENSOR_NAME_MAX]) {
    snprintf(name, TENSOR_NAME_MAX, "blk.%" PRIu32 ".%s.weight", index, slot->name);
}

static int bind_layer(struct model *model, uint32_t index, struct status *status) {
    struct tensor_slot slots[LAYER_TENSORS];
    char name[TENSOR_NAME_MAX];
    layer_slots(model, index, slots);
    for (uint32_t i = 0; i < LAYER_TENSORS; i++) {
        layer_tensor_name(index, &slots[i], name);
        if (bind_tensor(model, name, &slots[i], status)) return -1;
    }
    return 0;
}

/* Whether a name of the file is one of those that were bound. */
static bool tensor_is_known(struct model *model, const char *name) {
    if (strcmp(name, "token_embd.weight") == 0 || strcmp(name, "output_norm.weight") == 0 ||
        strcmp(name, "output.weight") == 0)
        return true;
    uint32_t index;
    if (sscanf(name, "blk.%9" SCNu32, &index) != 1 || index >= model->config.block_count) return false;
    struct tensor_slot slots[LAYER_TENSORS];
    char known[TENSOR_NAME_MAX];
    layer_slots(model, index, slots);
    for (uint32_t i = 0; i < LAYER_TENSORS; i++) {
        layer_tensor_name(index, &slots[i], known);
        if (strcmp(name, known) == 0) return true;
    }
    return false;
}

static int bind_tensors(struct model *model, struct status *status) {
    const struct model_config *c = &model->config;
    const uint32_t hidden = c->embedding_length;
    const struct tensor_slot embeddings = {"token_embd", hidden, c->vocab_size, 1, .matrix = &model->token_embd};
    const struct tensor_slot norm = {"output_norm", hidden, 1, 1, .vector = &model->output_norm};
    const struct tensor_slot head = {"output", hidden, c->vocab_size, 1, .matrix = &model->output};

    if (bind_tensor(model, "token_embd.weight", &embeddings, status)) return -1;
    for (uint32_t i = 0; i < c->block_count; i++)
        if (bind_layer(model, i, status)) return -1;
    if (bind_tensor(model, "output_norm.weight", &norm, status)) return -1;
    model->tied = !gguf_tensor_find(model->gguf, "output.weight");
    if (model->tied) model->output = model->token_embd;
    else if (bind_tensor(model, "output.weight", &head, status)) return -1;

    /* A bias or a layer too many means a model that moed would run wrongly. */
    for (size_t i = 0; i < gguf_tensor_count(model->gguf); i++) {
        const char *name = gguf_tensor_at(model->gguf, i)->name;
        if (!tensor_is_known(model, name))
            return fail(model->gguf, status,
                        "tensor %.200s: not part of a " ARCHITECTURE " model of %" PRIu32 " blocks", name,
                        c->block_count);
    }
    return 0;
}

int model_bind(struct gguf *gguf, struct model **out, struct status *status) {
    struct model *model = calloc(1, sizeof *model);
    if (!model) {
        gguf_close(gguf);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    }
    model->gguf = gguf;
    if (read_config(gguf, &model->config, status)) goto fail;
    model->layers = calloc(model->config.block_count, sizeof *model->layers);
    if (!model->layers) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto fail;
    }
    if (bind_tensors(model, status)) goto fail;
    *out = model;
    return 0;
fail:
    model_close(model);
    return -1;
}

int model_open(const char *path, struct model **out, struct status *status) {
    struct gguf *gguf;
    if (gguf_open(path, &gguf, status)) return -1;
    return model_bind(gguf, out, status);
}

void model_close(struct model *model) {
    if (!model) return;
    gguf_close(model->gguf);
    free(model->layers);
    free(model);
}
