/* Binding a model: what a good file gives, and every key, type and shape that is refused, with its one line. */
#include "config.h" /* memmem */

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/synth/synth.h"
#include "tests/tap.h"
#include "worker/model.h"

/* A model file in memory that tests change; `original` is how it was written. */
static unsigned char *original;
static size_t original_size;

struct edited {
    unsigned char *bytes;
    size_t size;
};

static int load(const struct synth_options *options) {
    struct status status = {0};
    struct stat about;
    int file = -1, result = -1;
    if (synth_write(options, NULL, &status)) goto out;
    file = open(options->path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &about)) goto out;
    original_size = (size_t)about.st_size;
    original = malloc(original_size);
    if (!original || read(file, original, original_size) != (ssize_t)original_size) goto out;
    result = 0;
out:
    if (file >= 0) close(file);
    unlink(options->path);
    return result;
}

static struct edited copy(void) {
    struct edited file = {malloc(original_size), original_size};
    memcpy(file.bytes, original, original_size);
    return file;
}

/* The address behind a key or tensor name: its length as u64, then its bytes. */
static unsigned char *behind(const struct edited *file, const char *name) {
    uint64_t length = strlen(name);
    unsigned char needle[128];
    memcpy(needle, &length, 8);
    memcpy(needle + 8, name, length);
    unsigned char *found = memmem(file->bytes, file->size, needle, 8 + length);
    if (!found) {
        printf("Bail out! no %s in the file\n", name);
        exit(EXIT_FAILURE);
    }
    return found + 8 + length;
}

static void put_u32(unsigned char *at, uint32_t value) {
    memcpy(at, &value, sizeof value);
}

static void set_u32(const struct edited *file, const char *key, uint32_t value) {
    put_u32(behind(file, key) + 4, value);
}

static void set_f32(const struct edited *file, const char *key, float value) {
    memcpy(behind(file, key) + 4, &value, sizeof value);
}

static void rename_entry(const struct edited *file, const char *name, const char *same_length) {
    memcpy(behind(file, name) - strlen(name), same_length, strlen(name));
}

static void set_tensor_type(const struct edited *file, const char *name, uint32_t type) {
    unsigned char *at = behind(file, name);
    put_u32(at + 4 + 8 * *at, type);
}

static void set_tensor_dimension(const struct edited *file, const char *name, int dimension, uint64_t length) {
    memcpy(behind(file, name) + 4 + 8 * dimension, &length, sizeof length);
}

/* Puts a pair before the others, and one that fills up to the alignment, so that the data stays where it may be. */
static void add_key(struct edited *file, const char *key, enum gguf_type type, const void *value, size_t size) {
    unsigned char pairs[512];
    size_t length = 0;
    uint64_t n = strlen(key), count;
    const char filler[] = "test.filler";
    memcpy(pairs, &n, 8);
    memcpy(pairs + 8, key, n);
    put_u32(pairs + 8 + n, type);
    memcpy(pairs + 12 + n, value, size);
    length = 12 + n + size;
    n = sizeof filler - 1;
    memcpy(pairs + length, &n, 8);
    memcpy(pairs + length + 8, filler, n);
    put_u32(pairs + length + 8 + n, GGUF_STRING);
    length += 12 + n;
    n = -(length + 8) % 32;
    memcpy(pairs + length, &n, 8);
    memset(pairs + length + 8, 'x', n);
    length += 8 + n;

    file->bytes = realloc(file->bytes, file->size + length);
    memmove(file->bytes + 24 + length, file->bytes + 24, file->size - 24);
    memcpy(file->bytes + 24, pairs, length);
    file->size += length;
    memcpy(&count, file->bytes + 16, 8);
    count += 2;
    memcpy(file->bytes + 16, &count, 8);
}

static void add_string(struct edited *file, const char *key, const char *string) {
    unsigned char value[64];
    uint64_t length = strlen(string);
    memcpy(value, &length, 8);
    memcpy(value + 8, string, length);
    add_key(file, key, GGUF_STRING, value, 8 + length);
}

static int bind(const struct edited *file, struct model **model, struct status *status) {
    struct gguf *gguf;
    *status = (struct status){0};
    *model = NULL;
    if (gguf_open_memory(file->bytes, file->size, "m.gguf", &gguf, status)) return -1;
    return model_bind(gguf, model, status);
}

/* The edited file must be refused with exactly this message. */
static void refused(struct edited file, const char *message) {
    struct model *model;
    struct status status;
    int result = bind(&file, &model, &status);
    bool good = result < 0 && strcmp(status.message, message) == 0;
    if (!tap_ok(good, "refused: %s", message)) tap_note("was: %d, %s", result, status.message);
    model_close(model);
    free(file.bytes);
}

static struct model *accepted(struct edited *file, const char *what) {
    struct model *model;
    struct status status;
    if (!tap_ok(bind(file, &model, &status) == 0, "accepted: %s", what)) tap_note("was: %s", status.message);
    return model;
}

static void test_good(void) {
    struct edited file = copy();
    struct model *model = accepted(&file, "the file as written");
    if (!model) return;
    const struct model_config *c = &model->config;
    tap_ok(strcmp(c->name, "unit test") == 0 && strcmp(c->architecture, "qwen3moe") == 0, "name and architecture");
    tap_ok(strlen(c->fingerprint) == 16, "fingerprint");
    tap_ok(c->vocab_size == 300 && c->context_length == 512 && c->block_count == 2 && c->embedding_length == 256,
           "sizes of the model");
    tap_ok(c->head_count == 6 && c->head_count_kv == 3 && c->head_dim == 64, "heads");
    tap_ok(c->expert_count == 5 && c->expert_used_count == 2 && c->expert_feed_forward_length == 288, "experts");
    tap_ok(c->rms_epsilon == 1e-6f && c->rope_freq_base == 1e6f && c->eos_token_id == 299, "epsilon, base, EOS");

    const struct model_matrix *down = &model->layers[1].ffn_down_exps, *v = &model->layers[1].attn_v;
    tap_ok(down->columns == 288 && down->rows == 256 && down->experts == 5 && down->type == QUANT_Q8_0 &&
               down->row_bytes == 288 / 32 * 34 && strcmp(down->name, "blk.1.ffn_down_exps.weight") == 0,
           "a matrix of experts");
    tap_ok(v->columns == 256 && v->rows == 192 && v->experts == 1 && v->type == QUANT_Q6_K && v->row_bytes == 210,
           "a matrix");
    tap_ok(!model->tied && model->output.data != model->token_embd.data && model->output.rows == 300,
           "a head of its own");
    tap_ok(model->layers[0].attn_norm[0] >= 0.6f && model->layers[0].attn_norm[255] < 1.4f &&
               model->layers[1].attn_k_norm[63] >= 1.0f && model->output_norm[255] < 1.4f,
           "norms");

    uint64_t bytes = 0;
    for (size_t i = 0; i < gguf_tensor_count(model->gguf); i++) bytes += gguf_tensor_at(model->gguf, i)->bytes;
    tap_ok(c->tensor_bytes == bytes, "tensor_bytes counts every tensor");
    model_close(model);
    free(file.bytes);
}

static void test_keys(void) {
    struct edited file;
#define REFUSED_KEY(key, value, message) \
    file = copy(), set_u32(&file, key, value), refused(file, "m.gguf: key " key " is " message)
    REFUSED_KEY("qwen3moe.block_count", 0, "0, expected 1 to 512");
    REFUSED_KEY("qwen3moe.block_count", 4000000000u, "4000000000, expected 1 to 512");
    REFUSED_KEY("qwen3moe.context_length", 0, "0, expected 1 to 16777216");
    REFUSED_KEY("qwen3moe.embedding_length", 0, "0, expected 1 to 65536");
    REFUSED_KEY("qwen3moe.attention.head_count", 0, "0, expected 1 to 4096");
    REFUSED_KEY("qwen3moe.attention.head_count", 7, "7, expected a multiple of head_count_kv, 3");
    REFUSED_KEY("qwen3moe.attention.head_count_kv", 0, "0, expected 1 to 4096");
    REFUSED_KEY("qwen3moe.attention.key_length", 63, "63, expected an even number");
    REFUSED_KEY("qwen3moe.attention.key_length", 514, "514, expected 2 to 512");
    REFUSED_KEY("qwen3moe.attention.value_length", 32, "32, expected 64");
    REFUSED_KEY("qwen3moe.expert_count", 1025, "1025, expected 1 to 1024");
    REFUSED_KEY("qwen3moe.expert_used_count", 6, "6, expected at most expert_count, 5");
    REFUSED_KEY("qwen3moe.expert_used_count", 0, "0, expected 1 to 1024");
    REFUSED_KEY("qwen3moe.expert_feed_forward_length", 0, "0, expected 1 to 65536");
    REFUSED_KEY("qwen3moe.vocab_size", 301, "301, expected 300");
    REFUSED_KEY("tokenizer.ggml.eos_token_id", 300, "300, expected 0 to 299");
#undef REFUSED_KEY
    file = copy(), set_f32(&file, "qwen3moe.rope.freq_base", 0);
    refused(file, "m.gguf: key qwen3moe.rope.freq_base is 0, expected 1 to 1e+12");
    file = copy(), set_f32(&file, "qwen3moe.attention.layer_norm_rms_epsilon", __builtin_nanf(""));
    refused(file, "m.gguf: key qwen3moe.attention.layer_norm_rms_epsilon is nan, expected 1e-12 to 0.1");
    file = copy(), rename_entry(&file, "qwen3moe.expert_count", "qwen3moe.expert_cxxnt");
    refused(file, "m.gguf: key qwen3moe.expert_count: not found");

    file = copy(), memcpy(behind(&file, "general.architecture") + 12, "qwen2moe", 8);
    refused(file, "m.gguf: key general.architecture is \"qwen2moe\", expected \"qwen3moe\"");
    file = copy(), rename_entry(&file, "tokenizer.ggml.eos_token_id", "tokenizer.ggml.xos_token_id");
    struct model *model = accepted(&file, "no end of sequence");
    tap_ok(model && model->config.eos_token_id == (uint32_t)MODEL_EOS_NONE, "MODEL_EOS_NONE");
    model_close(model);
    free(file.bytes);
    file = copy(), memcpy(behind(&file, "general.name") + 12, "\x1b[1m\xff", 5);
    model = accepted(&file, "a name with control characters");
    tap_ok(model && strcmp(model->config.name, "?[1m?test") == 0, "they are replaced");
    model_close(model);
    free(file.bytes);
}

static void test_variants(void) {
    struct edited file;
    const float two = 2, one = 1;
    const uint32_t number = 1;
    const bool no = false, yes = true;
    file = copy(), add_string(&file, "qwen3moe.rope.scaling.type", "yarn");
    refused(file, "m.gguf: key qwen3moe.rope.scaling.type is \"yarn\", expected \"none\"");
    file = copy(), add_key(&file, "qwen3moe.rope.scaling.factor", GGUF_F32, &two, 4);
    refused(file, "m.gguf: key qwen3moe.rope.scaling.factor is 2, expected 1");
    file = copy(), add_key(&file, "qwen3moe.expert_shared_count", GGUF_U32, &number, 4);
    refused(file, "m.gguf: key qwen3moe.expert_shared_count is 1, expected 0");
    file = copy(), add_key(&file, "qwen3moe.attention.sliding_window", GGUF_U32, &number, 4);
    refused(file, "m.gguf: key qwen3moe.attention.sliding_window is 1, expected 0");
    file = copy(), add_key(&file, "qwen3moe.rope.dimension_count", GGUF_U32, &number, 4);
    refused(file, "m.gguf: key qwen3moe.rope.dimension_count is 1, expected 64");
    file = copy(), add_key(&file, "qwen3moe.expert_weights_scale", GGUF_F32, &two, 4);
    refused(file, "m.gguf: key qwen3moe.expert_weights_scale is 2, expected 1");
    file = copy(), add_key(&file, "qwen3moe.expert_weights_norm", GGUF_BOOL, &no, 1);
    refused(file, "m.gguf: key qwen3moe.expert_weights_norm is false, expected true");
    file = copy(), add_key(&file, "qwen3moe.attention.causal", GGUF_BOOL, &no, 1);
    refused(file, "m.gguf: key qwen3moe.attention.causal is false, expected true");

    file = copy();
    add_string(&file, "qwen3moe.rope.scaling.type", "none");
    model_close(accepted(&file, "rope scaling none"));
    free(file.bytes);
    file = copy();
    add_key(&file, "qwen3moe.expert_weights_norm", GGUF_BOOL, &yes, 1);
    model_close(accepted(&file, "normalized routing weights"));
    free(file.bytes);
    file = copy();
    add_key(&file, "qwen3moe.expert_weights_scale", GGUF_F32, &one, 4);
    model_close(accepted(&file, "routing weights times 1"));
    free(file.bytes);
}

static void test_tensors(void) {
    struct edited file;
    file = copy(), rename_entry(&file, "blk.1.attn_q.weight", "blk.1.attn_x.weight");
    refused(file, "m.gguf: tensor blk.1.attn_q.weight: missing");
    file = copy(), rename_entry(&file, "token_embd.weight", "token_xxxx.weight");
    refused(file, "m.gguf: tensor token_embd.weight: missing");
    file = copy(), rename_entry(&file, "output_norm.weight", "output_xxxx.weight");
    refused(file, "m.gguf: tensor output_norm.weight: missing");
    file = copy(), rename_entry(&file, "output.weight", "outxxx.weight");
    refused(file, "m.gguf: tensor outxxx.weight: not part of a qwen3moe model of 2 blocks");
    file = copy(), set_u32(&file, "qwen3moe.block_count", 1);
    refused(file, "m.gguf: tensor blk.1.attn_norm.weight: not part of a qwen3moe model of 1 blocks");
    file = copy(), set_u32(&file, "qwen3moe.block_count", 3);
    refused(file, "m.gguf: tensor blk.2.attn_norm.weight: missing");

    file = copy(), set_u32(&file, "qwen3moe.attention.head_count", 3);
    refused(file, "m.gguf: tensor blk.0.attn_q.weight: shape [256, 384], expected [256, 192]");
    file = copy(), set_tensor_dimension(&file, "blk.1.ffn_up_exps.weight", 2, 4);
    refused(file, "m.gguf: tensor blk.1.ffn_up_exps.weight: shape [256, 288, 4], expected [256, 288, 5]");
    file = copy(), set_tensor_dimension(&file, "output.weight", 1, 299);
    refused(file, "m.gguf: tensor output.weight: shape [256, 299], expected [256, 300]");
    file = copy(), set_tensor_dimension(&file, "blk.0.attn_q_norm.weight", 0, 32);
    refused(file, "m.gguf: tensor blk.0.attn_q_norm.weight: shape [32], expected [64]");
    file = copy(), set_tensor_dimension(&file, "token_embd.weight", 1, 299);
    refused(file, "m.gguf: key qwen3moe.vocab_size is 300, expected 299");

    file = copy(), set_tensor_type(&file, "blk.0.attn_q.weight", 10);
    refused(file, "m.gguf: tensor blk.0.attn_q.weight: type Q2_K (10), "
                  "expected F32, F16, BF16, Q8_0, Q4_K, Q5_K or Q6_K");
    file = copy(), set_tensor_type(&file, "blk.0.ffn_gate_inp.weight", QUANT_F16);
    refused(file, "m.gguf: tensor blk.0.ffn_gate_inp.weight: type F16 (1), expected F32");
    file = copy(), set_tensor_type(&file, "blk.1.ffn_norm.weight", QUANT_BF16);
    refused(file, "m.gguf: tensor blk.1.ffn_norm.weight: type BF16 (30), expected F32");
}

/* Single changed bytes before the tensor data: refused or accepted, but nothing worse. */
static void test_mutations(uint64_t seed) {
    struct edited file = copy();
    size_t header = (size_t)(behind(&file, "output.weight") - file.bytes) + 64;
    unsigned refusals = 0, rounds = 3000;
    tap_note("mutation seed %llu", (unsigned long long)seed);
    for (unsigned i = 0; i < rounds; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t at = (size_t)(seed >> 33) % header;
        file.bytes[at] ^= (unsigned char)(1 + (seed >> 24) % 255);
        struct model *model;
        struct status status;
        if (bind(&file, &model, &status)) refusals += strncmp(status.message, "m.gguf: ", 8) == 0;
        else refusals += model->config.vocab_size == 300 && model->layers[1].ffn_down_exps.data;
        model_close(model);
        file.bytes[at] = original[at];
    }
    tap_ok(refusals == rounds, "%u changed bytes are refused with a message or change nothing that is bound", rounds);
    free(file.bytes);
}

int main(void) {
    char directory[] = "/tmp/moed-model-test-XXXXXX", path[64];
    if (!mkdtemp(directory)) return EXIT_FAILURE;
    snprintf(path, sizeof path, "%s/m.gguf", directory);
    struct synth_options options = {
        .path = path, .name = "unit test", .quant = "q4_k_m", .seed = 1, .rope_freq_base = 1e6,
        .shape = {.hidden = 256, .layers = 2, .heads = 6, .kv_heads = 3, .head_dim = 64, .experts = 5, .topk = 2,
                  .inter = 288, .vocab = 300, .ctx = 512},
    };
    bool loaded = tap_ok(load(&options) == 0, "a model is made");
    if (loaded) {
        test_good();
        test_keys();
        test_variants();
        test_tensors();
        test_mutations(20261123);
        free(original);
        options.tied = true;
        struct status status = {0};
        struct model *model = NULL;
        tap_ok(synth_write(&options, NULL, &status) == 0 && model_open(path, &model, &status) == 0 && model->tied &&
                   model->output.data == model->token_embd.data,
               "tied: the head is the embeddings, from a file");
        model_close(model);
        unlink(path);
        tap_ok(model_open(path, &model, &status) < 0 && strstr(status.message, path), "no file: %s", status.message);
    }
    rmdir(directory);
    return tap_done();
}
