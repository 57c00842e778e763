#include <stdlib.h>
#include <string.h>

#include "common/gguf.h"
#include "tests/fuzz/fuzz.h"
#include "worker/model.h"

const char fuzz_seeds[] = "tests/fuzz/seeds/gguf";

enum { STRINGS_MAX = 64 };

/* Keeps the compiler from leaving reads out. */
static volatile unsigned char sink;

static void read_key(const struct gguf *gguf, const char *key) {
    struct gguf_string string, strings[STRINGS_MAX];
    enum gguf_type type;
    uint64_t count;
    uint32_t u;
    float f;
    bool b;
    gguf_get_bool(gguf, key, &b, NULL);
    gguf_get_u32(gguf, key, &u, NULL);
    gguf_get_f32(gguf, key, &f, NULL);
    if (gguf_get_string(gguf, key, &string, NULL) == 0 && string.length)
        sink = (unsigned char)string.bytes[string.length - 1];
    if (gguf_get_array(gguf, key, &type, &count, NULL) == 0 && count <= STRINGS_MAX &&
        gguf_get_strings(gguf, key, strings, count, NULL) == 0)
        for (uint64_t i = 0; i < count; i++)
            if (strings[i].length)
                sink = (unsigned char)strings[i].bytes[strings[i].length - 1];
}

/* Every function of the reader, the ends of every tensor, then the model on top. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const keys[] = {"general.architecture", "general.alignment", "tokenizer.ggml.tokens", "a.i8",
                                       "a.f64", "a.yes", "b.strings", "b.u32", "missing"};
    struct status status = {0};
    struct gguf *gguf;
    struct model *model;
    unsigned char *bytes = malloc(size ? size : 1); /* aligned as a mapping is, with an end that the sanitizer sees */
    if (size)
        memcpy(bytes, data, size);
    if (gguf_open_memory(bytes, size, "file", &gguf, &status)) {
        if (status.code == STATUS_OK || !status.message[0])
            abort();
        free(bytes);
        return 0;
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        read_key(gguf, keys[i]);
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        if (gguf_tensor_find(gguf, tensor->name) != tensor)
            abort();
        if (tensor->bytes) {
            const unsigned char *weights = tensor->data;
            sink = weights[0];
            sink = weights[tensor->bytes - 1];
        }
    }
    char fingerprint[17];
    gguf_fingerprint(gguf, fingerprint);
    if (model_bind(gguf, &model, &status) == 0)
        model_close(model);
    else if (status.code == STATUS_OK || !status.message[0])
        abort();
    free(bytes);
    return 0;
}
