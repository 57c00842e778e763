#include <stdlib.h>
#include <string.h>

#include "common/gguf.h"
#include "tests/synth/plan.h"

/* The beginning of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 3. */

struct buffer {
    unsigned char *bytes;
    size_t length, capacity;
    bool failed; /* out of memory: what follows is dropped */
};

static void put(struct buffer *buffer, const void *bytes, size_t length) {
    if (buffer->capacity - buffer->length < length && !buffer->failed) {
        size_t capacity = (buffer->capacity + length) * 2;
        unsigned char *grown = realloc(buffer->bytes, capacity);
        buffer->failed = !grown;
        if (grown) {
            buffer->bytes = grown;
            buffer->capacity = capacity;
        }
    }
    if (buffer->failed) return;
    memcpy(buffer->bytes + buffer->length, bytes, length);
    buffer->length += length;
}

static void put_integer(struct buffer *buffer, uint64_t value, unsigned bytes) {
    unsigned char little_endian[8];
    for (unsigned i = 0; i < bytes; i++) little_endian[i] = (unsigned char)(value >> 8 * i);
    put(buffer, little_endian, bytes);
}

static void put_string(struct buffer *buffer, const char *string) {
    put_integer(buffer, strlen(string), 8);
    put(buffer, string, strlen(string));
}

/* The metadata section: a count of pairs that is filled in when they have been written. */
struct metadata {
    struct buffer *buffer;
    uint64_t pairs;
};

static struct buffer *put_key(struct metadata *metadata, const char *key, enum gguf_type type) {
    metadata->pairs++;
    put_string(metadata->buffer, key);
    put_integer(metadata->buffer, type, 4);
    return metadata->buffer;
}

static void meta_string(struct metadata *metadata, const char *key, const char *value) {
    put_string(put_key(metadata, key, GGUF_STRING), value);
}

static void meta_u32(struct metadata *metadata, const char *key, uint64_t value) {
    put_integer(put_key(metadata, key, GGUF_U32), value, 4);
}

static void meta_f32(struct metadata *metadata, const char *key, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_integer(put_key(metadata, key, GGUF_F32), bits, 4);
}

static void meta_bool(struct metadata *metadata, const char *key, bool value) {
    put_integer(put_key(metadata, key, GGUF_BOOL), value, 1);
}

static void meta_array(struct metadata *metadata, const char *key, enum gguf_type type, uint64_t count) {
    put_integer(put_key(metadata, key, GGUF_ARRAY), type, 4);
    put_integer(metadata->buffer, count, 8);
}

/*
 * The vocabulary: the 256 bytes as GPT-2's byte-level BPE writes them, then every string of letters in breadth-first
 * order, each the merge of an earlier token and a letter, and three special tokens at the end.
 */
static const char letters[] = " etaoinshrdlucmfwygpbvkxqjz";
enum { BYTES = 256, LETTERS = sizeof letters - 1, SPECIALS = 3, TOKEN_MAX = 64 };
static const char *const specials[SPECIALS] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};

/* A byte's character: itself where it is printable Latin-1, else the next one from U+0100 on. */
static size_t byte_token(unsigned byte, char *out) {
    unsigned code = BYTES;
    for (unsigned b = 0; b <= byte; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 255 && b != 173);
        if (b == byte && printable) code = b;
        else if (b < byte && !printable) code++;
    }
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    out[0] = (char)(0xC0 | code >> 6);
    out[1] = (char)(0x80 | (code & 0x3F));
    return 2;
}

/* The n-th string of letters: those of one letter come first. Its last letter is n % LETTERS. */
static size_t letters_token(uint64_t n, char *out) {
    size_t length = n < LETTERS ? 0 : letters_token(n / LETTERS - 1, out);
    return length + byte_token((unsigned char)letters[n % LETTERS], out + length);
}

static void put_vocabulary(struct metadata *metadata, uint64_t vocab) {
    struct buffer *buffer = metadata->buffer;
    uint64_t merges = vocab - BYTES - SPECIALS;
    char token[TOKEN_MAX];

    meta_array(metadata, "tokenizer.ggml.tokens", GGUF_STRING, vocab);
    for (unsigned b = 0; b < BYTES; b++) {
        token[byte_token(b, token)] = '\0';
        put_string(buffer, token);
    }
    for (uint64_t i = 0; i < merges; i++) {
        token[letters_token(LETTERS + i, token)] = '\0';
        put_string(buffer, token);
    }
    for (unsigned i = 0; i < SPECIALS; i++) put_string(buffer, specials[i]);

    const uint32_t normal = 1, control = 3;
    meta_array(metadata, "tokenizer.ggml.token_type", GGUF_I32, vocab);
    for (uint64_t i = 0; i < vocab; i++) put_integer(buffer, i < vocab - SPECIALS ? normal : control, 4);

    meta_array(metadata, "tokenizer.ggml.merges", GGUF_STRING, merges);
    for (uint64_t i = 0; i < merges; i++) {
        size_t length = letters_token(i / LETTERS, token);
        token[length++] = ' ';
        length += byte_token((unsigned char)letters[i % LETTERS], token + length);
        token[length] = '\0';
        put_string(buffer, token);
    }
}

static void put_metadata(struct metadata *metadata, const struct synth_options *options) {
    const struct synth_shape *s = &options->shape;
    meta_string(metadata, "general.architecture", "qwen3moe");
    meta_string(metadata, "general.type", "model");
    meta_string(metadata, "general.name", options->name ? options->name : "synthetic");
    if (plan_file_type(options->quant) >= 0)
        meta_u32(metadata, "general.file_type", (uint64_t)plan_file_type(options->quant));
    meta_u32(metadata, "general.quantization_version", 2);
    meta_u32(metadata, "general.alignment", PLAN_ALIGNMENT);
    meta_u32(metadata, "qwen3moe.block_count", s->layers);
    meta_u32(metadata, "qwen3moe.context_length", s->ctx);
    meta_u32(metadata, "qwen3moe.embedding_length", s->hidden);
    meta_u32(metadata, "qwen3moe.feed_forward_length", s->inter * s->topk);
    meta_u32(metadata, "qwen3moe.attention.head_count", s->heads);
    meta_u32(metadata, "qwen3moe.attention.head_count_kv", s->kv_heads);
    meta_u32(metadata, "qwen3moe.attention.key_length", s->head_dim);
    meta_u32(metadata, "qwen3moe.attention.value_length", s->head_dim);
    meta_f32(metadata, "qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f);
    meta_f32(metadata, "qwen3moe.rope.freq_base", (float)options->rope_freq_base);
    meta_u32(metadata, "qwen3moe.expert_count", s->experts);
    meta_u32(metadata, "qwen3moe.expert_used_count", s->topk);
    meta_u32(metadata, "qwen3moe.expert_feed_forward_length", s->inter);
    meta_u32(metadata, "qwen3moe.vocab_size", s->vocab);
    meta_string(metadata, "tokenizer.ggml.model", "gpt2");
    meta_string(metadata, "tokenizer.ggml.pre", "qwen2");
    put_vocabulary(metadata, s->vocab);
    meta_u32(metadata, "tokenizer.ggml.bos_token_id", s->vocab - 3);
    meta_u32(metadata, "tokenizer.ggml.eos_token_id", s->vocab - 1);
    meta_u32(metadata, "tokenizer.ggml.padding_token_id", s->vocab - 3);
    meta_bool(metadata, "tokenizer.ggml.add_bos_token", false);
}

int header_make(const struct synth_options *options, const struct plan *plan, unsigned char **out, uint64_t *bytes,
                struct status *status) {
    struct buffer body = {0}, file = {0};
    struct metadata metadata = {.buffer = &body};
    put_metadata(&metadata, options);
    for (uint32_t i = 0; i < plan->count; i++) {
        const struct plan_tensor *tensor = &plan->tensors[i];
        put_string(&body, tensor->name);
        put_integer(&body, tensor->dimensions, 4);
        for (uint32_t d = 0; d < tensor->dimensions; d++) put_integer(&body, tensor->shape[d], 8);
        put_integer(&body, tensor->type, 4);
        put_integer(&body, tensor->offset, 8);
    }
    put(&file, "GGUF", 4);
    put_integer(&file, 3, 4);
    put_integer(&file, plan->count, 8);
    put_integer(&file, metadata.pairs, 8);
    if (!body.failed) put(&file, body.bytes, body.length);
    static const unsigned char zeros[PLAN_ALIGNMENT];
    put(&file, zeros, -file.length % PLAN_ALIGNMENT);

    bool failed = body.failed || file.failed;
    free(body.bytes);
    if (failed) {
        free(file.bytes);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    }
    *out = file.bytes;
    *bytes = file.length;
    return 0;
}
