/* moed-synth's library: the same bytes everywhere, errors that leave nothing behind, weights that behave. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/gguf.h"
#include "tests/reference/reference.h"
#include "tests/synth/synth.h"
#include "tests/tap.h"

static char directory[] = "/tmp/moed-synth-test-XXXXXX", path[64];

static struct synth_options tiny(const char *quant) {
    struct synth_options options = {.path = path, .quant = quant, .seed = 1, .rope_freq_base = 1e6};
    synth_preset("tiny", &options.shape);
    return options;
}

/* FNV-1a of the file's bytes; 0 where there is none. */
static uint64_t checksum(void) {
    FILE *file = fopen(path, "rb");
    uint64_t hash = 0xCBF29CE484222325u;
    if (!file) return 0;
    for (int c; (c = fgetc(file)) != EOF;) hash = (hash ^ (unsigned)c) * 0x100000001B3u;
    fclose(file);
    return hash;
}

static void check_bytes(void) {
    static const struct {
        const char *quant;
        uint64_t checksum;
    } expected[] = {
        {"q4_k_m", 0xC0496D6933A689FA}, {"q4_k", 0x499097FE6F25F10E}, {"q5_k", 0xE179E28AEADAE3A0},
        {"q6_k", 0x37B10947E8858300}, {"q8_0", 0xDE19F32B7ADD5D28}, {"f16", 0xAE1CA3D4890E0E36},
        {"bf16", 0x58A47FBA14BAB96C}, {"f32", 0x2935464ADFBB6F9C}, {"mixed", 0xCB24E4656004A230},
    };
    struct status status = {0};
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        struct synth_options options = tiny(expected[i].quant);
        options.threads = 1 + (uint32_t)i % 3;
        bool written = synth_write(&options, NULL, &status) == 0;
        uint64_t found = checksum();
        tap_ok(written && found == expected[i].checksum, "%s: the bytes of every machine (%016" PRIx64 ") %s",
               expected[i].quant, found, status.message);
    }
    struct synth_options options = tiny("q4_k_m");
    uint64_t first, other;
    options.shape.vocab = 30000; /* several pieces */
    options.threads = 1;
    first = synth_write(&options, NULL, &status) ? 1 : checksum();
    options.threads = 7;
    other = synth_write(&options, NULL, &status) ? 2 : checksum();
    tap_ok(first == other, "one thread and seven write the same");
    options.seed = 2;
    other = synth_write(&options, NULL, &status) ? first : checksum();
    tap_ok(first != other, "another seed, other bytes");
}

static uint32_t tensor_type(const struct gguf *gguf, const char *name) {
    const struct gguf_tensor *tensor = gguf_tensor_find(gguf, name);
    return tensor ? tensor->type : UINT32_MAX;
}

static void check_types(void) {
    enum { F32 = 0, F16 = 1, Q8_0 = 8, Q4_K = 12, Q6_K = 14 };
    struct synth_options options = tiny("q4_k_m");
    struct status status = {0};
    struct gguf *gguf = NULL;
    options.shape.layers = 16;
    options.shape.inter = 96;
    options.shape.head_dim = 10; /* 40 columns of attn_output */
    if (synth_write(&options, NULL, &status) || gguf_open(path, &gguf, &status)) {
        tap_ok(false, "%s", status.message);
        return;
    }
    /* More bits in the first and last eighth and in every third layer between. */
    bool rule = true;
    for (unsigned layer = 0; layer < 16; layer++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%u.attn_v.weight", layer);
        bool more = layer < 2 || layer >= 14 || (layer - 2) % 3 == 2;
        rule &= tensor_type(gguf, name) == (more ? Q6_K : Q4_K);
    }
    tap_ok(rule && tensor_type(gguf, "output.weight") == Q6_K && tensor_type(gguf, "token_embd.weight") == Q4_K,
           "Q4_K_M: where Q6_K is");
    tap_ok(tensor_type(gguf, "blk.0.ffn_down_exps.weight") == Q8_0 &&
               tensor_type(gguf, "blk.0.attn_output.weight") == F16,
           "rows that are no whole number of blocks: Q8_0, then F16");
    tap_ok(tensor_type(gguf, "blk.0.ffn_gate_inp.weight") == F32 &&
               tensor_type(gguf, "blk.0.attn_q_norm.weight") == F32,
           "router and norms: F32");
    gguf_close(gguf);
}

/* Every merge joins two earlier tokens to a token, in the order of the tokens: what a BPE needs. */
static void check_vocabulary(void) {
    struct synth_options options = tiny("q8_0");
    struct status status = {0};
    struct gguf *gguf = NULL;
    enum { VOCAB = 3000, MERGES = VOCAB - 256 - 3 };
    static struct gguf_string tokens[VOCAB], merges[MERGES];
    options.shape.vocab = VOCAB;
    bool good = synth_write(&options, NULL, &status) == 0 && gguf_open(path, &gguf, &status) == 0 &&
                gguf_get_strings(gguf, "tokenizer.ggml.tokens", tokens, VOCAB, &status) == 0 &&
                gguf_get_strings(gguf, "tokenizer.ggml.merges", merges, MERGES, &status) == 0;
    for (unsigned i = 0; i < MERGES && good; i++) {
        const struct gguf_string token = tokens[256 + i], merge = merges[i];
        const char *space = memchr(merge.bytes, ' ', merge.length);
        size_t first = space ? (size_t)(space - merge.bytes) : 0;
        good = space && merge.length == token.length + 1 && memcmp(merge.bytes, token.bytes, first) == 0 &&
               memcmp(space + 1, token.bytes + first, token.length - first) == 0;
        bool known = false; /* the part before the space */
        for (unsigned k = 0; k < 256 + i && good && !known; k++)
            known = tokens[k].length == first && memcmp(tokens[k].bytes, merge.bytes, first) == 0;
        good = good && known;
    }
    tap_ok(good, "the vocabulary is a byte-level BPE %s", status.message);
    tap_ok(good && tokens[VOCAB - 1].length == 10 && memcmp(tokens[VOCAB - 1].bytes, "<|im_end|>", 10) == 0,
           "special tokens are the last ones");
    gguf_close(gguf);
}

static void refused(struct synth_options options, const char *message) {
    struct status status = {0};
    int result = synth_write(&options, NULL, &status);
    if (!tap_ok(result < 0 && strstr(status.message, message), "refused: %s", message))
        tap_note("was: %d, %s", result, status.message);
}

static int stop(void *context, uint64_t done, uint64_t total) {
    ++*(int *)context;
    return done <= total;
}

static bool directory_is_empty_but_for_one(void) {
    return unlink(path) == 0 && rmdir(directory) == 0 && mkdir(directory, 0700) == 0;
}

static void check_errors(void) {
    struct synth_options options;
    options = tiny("q4_k"), options.shape.heads = 3;
    refused(options, "heads is 3, not a multiple of kv_heads, 2");
    options = tiny("q4_k"), options.shape.head_dim = 63;
    refused(options, "head_dim is 63, not even");
    options = tiny("q4_k"), options.shape.topk = 9;
    refused(options, "topk is 9, allowed are 1 to 8");
    options = tiny("q4_k"), options.shape.vocab = 258;
    refused(options, "vocab is 258, allowed are 259 to 16777216");
    options = tiny("q4_k"), options.shape.layers = 0;
    refused(options, "layers is 0, allowed are 1 to 1024");
    options = tiny("q4_k"), options.rope_freq_base = NAN;
    refused(options, "rope_freq_base is nan, allowed are 1 to 1e12");
    options = tiny("q9");
    refused(options, "unknown quantization \"q9\"");
    options = tiny("q4_k"), options.path = "/nonexistent/m.gguf";
    refused(options, "No such file or directory");
    options = tiny("q4_k"), options.path = directory; /* exists, and is no file */
    refused(options, directory);

    /* An older file stays as it was when a newer one is not finished, and no other file is left. */
    struct status status = {0};
    options = tiny("q4_k");
    bool written = synth_write(&options, NULL, &status) == 0;
    uint64_t before = checksum();
    int calls = 0;
    struct synth_progress progress = {stop, &calls};
    options.seed = 2;
    options.shape.vocab = 1 << 18;
    bool stopped = synth_write(&options, &progress, &status) < 0 && status.code == STATUS_CANCELLED;
    tap_ok(written && stopped && calls == 1, "stopped by the report: %s", status.message);
    tap_ok(checksum() == before && directory_is_empty_but_for_one(), "the older file is as it was, and alone");
}

/* Writes the model and runs the reference over random tokens. */
static int run(struct synth_options *options, uint32_t count, struct reference_config *config,
               struct reference_result *result) {
    struct reference *reference = NULL;
    struct status status = {0};
    uint32_t *tokens = malloc(count * sizeof *tokens);
    uint64_t state = options->seed;
    for (uint32_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        tokens[i] = (uint32_t)((state >> 33) % options->shape.vocab);
    }
    int failed = synth_write(options, NULL, &status) || reference_open(path, &reference, &status) ||
                 reference_forward(reference, tokens, count, NULL, result, &status);
    if (failed) tap_note("%s", status.message);
    else *config = *reference_config(reference);
    reference_close(reference);
    free(tokens);
    return failed ? -1 : 0;
}

static void check_experts(void) {
    struct synth_options options = tiny("q4_k_m");
    struct reference_config c;
    struct reference_result result;
    uint32_t least = UINT32_MAX, most = 0;
    synth_preset("small", &options.shape);
    if (run(&options, 160, &c, &result)) {
        tap_ok(false, "experts");
        return;
    }
    for (uint32_t layer = 0; layer < c.layers; layer++) {
        for (uint32_t e = 0; e < c.experts; e++) {
            uint32_t uses = 0;
            for (uint32_t t = 0; t < result.tokens; t++)
                for (uint32_t k = 0; k < c.topk; k++)
                    uses += result.experts[((size_t)t * c.layers + layer) * c.topk + k] == e;
            least = uses < least ? uses : least;
            most = uses > most ? uses : most;
        }
    }
    uint32_t even = result.tokens * c.topk / c.experts;
    tap_ok(least >= even / 2 && most <= 2 * even, "experts are used %" PRIu32 " to %" PRIu32 " times, %" PRIu32
           " would be even", least, most, even);
    reference_result_free(&result);
}

static void check_depth(bool tied) {
    struct synth_options options = tiny("q8_0");
    struct reference_config c;
    struct reference_result result;
    options.shape = (struct synth_shape){.hidden = 128, .layers = 48, .heads = 4, .kv_heads = 2, .head_dim = 64,
                                         .experts = 16, .topk = 4, .inter = 64, .vocab = 400, .ctx = 512};
    options.tied = tied;
    if (run(&options, 32, &c, &result)) {
        tap_ok(false, "depth");
        return;
    }
    double squares = 0, first = result.residual[0], last = result.residual[c.layers - 1];
    size_t logits = (size_t)result.tokens * c.vocab;
    for (size_t i = 0; i < logits; i++) squares += result.logits[i] * result.logits[i];
    double deviation = sqrt(squares / (double)logits);
    tap_ok(first > 0.1 && last > first && last < 10 && deviation > 0.3 && deviation < 3,
           "48 layers%s: the residual grows from %.2f to %.2f, logits deviate by %.2f", tied ? ", tied" : "", first,
           last, deviation);
    reference_result_free(&result);
}

int main(void) {
    if (!mkdtemp(directory)) return EXIT_FAILURE;
    snprintf(path, sizeof path, "%s/m.gguf", directory);
    check_bytes();
    check_types();
    check_vocabulary();
    check_errors();
    check_experts();
    check_depth(false);
    check_depth(true);
    unlink(path);
    rmdir(directory);
    return tap_done();
}
