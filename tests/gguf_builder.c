#include "tests/gguf_builder.h"

#include <stdlib.h>
#include <string.h>

#include "common/gguf.h"

void builder_free(struct gguf_builder *builder) {
    free(builder->bytes);
    *builder = (struct gguf_builder){0};
}

void builder_bytes(struct gguf_builder *builder, const void *bytes, size_t length) {
    while (builder->length + length > builder->capacity || !builder->bytes) {
        builder->capacity = builder->capacity ? 2 * builder->capacity : 256;
        builder->bytes = realloc(builder->bytes, builder->capacity);
        if (!builder->bytes)
            abort();
    }
    if (bytes && length)
        memcpy(builder->bytes + builder->length, bytes, length);
    else
        memset(builder->bytes + builder->length, 0, length);
    builder->length += length;
}

void builder_u32(struct gguf_builder *builder, uint32_t value) {
    builder_bytes(builder, &value, sizeof value);
}

void builder_u64(struct gguf_builder *builder, uint64_t value) {
    builder_bytes(builder, &value, sizeof value);
}

void builder_string(struct gguf_builder *builder, const char *string) {
    builder_u64(builder, strlen(string));
    builder_bytes(builder, string, strlen(string));
}

void builder_zeros(struct gguf_builder *builder, size_t count) {
    builder_bytes(builder, NULL, count);
}

void builder_pad(struct gguf_builder *builder, size_t alignment) {
    while (builder->length % alignment)
        builder_zeros(builder, 1);
}

void builder_header(struct gguf_builder *builder, uint32_t version, uint64_t tensors, uint64_t entries) {
    builder_bytes(builder, "GGUF", 4);
    builder_u32(builder, version);
    builder_u64(builder, tensors);
    builder_u64(builder, entries);
}

void builder_key(struct gguf_builder *builder, const char *key, uint32_t type) {
    builder_string(builder, key);
    builder_u32(builder, type);
}

void builder_array(struct gguf_builder *builder, const char *key, uint32_t element, uint64_t count) {
    builder_key(builder, key, GGUF_ARRAY);
    builder_u32(builder, element);
    builder_u64(builder, count);
}

void builder_key_u32(struct gguf_builder *builder, const char *key, uint32_t value) {
    builder_key(builder, key, GGUF_U32);
    builder_u32(builder, value);
}

void builder_key_string(struct gguf_builder *builder, const char *key, const char *value) {
    builder_key(builder, key, GGUF_STRING);
    builder_string(builder, value);
}

void builder_tensor(struct gguf_builder *builder, const char *name, uint32_t dimensions, const uint64_t *shape,
                    uint32_t type, uint64_t offset) {
    builder_string(builder, name);
    builder_u32(builder, dimensions);
    for (uint32_t i = 0; i < dimensions; i++)
        builder_u64(builder, shape[i]);
    builder_u32(builder, type);
    builder_u64(builder, offset);
}

void builder_sample(struct gguf_builder *builder, uint32_t version) {
    double f64 = -2.5;
    float f32 = 0.5f;
    builder_header(builder, version, 4, 18);
    builder_key_string(builder, "general.architecture", "qwen3moe");
    builder_key_u32(builder, "general.alignment", 64);
    builder_key(builder, "a.u8", GGUF_U8);
    builder_bytes(builder, "\xff", 1);
    builder_key(builder, "a.i8", GGUF_I8);
    builder_bytes(builder, "\xff", 1);
    builder_key(builder, "a.u16", GGUF_U16);
    builder_bytes(builder, "\x01\x80", 2);
    builder_key(builder, "a.i16", GGUF_I16);
    builder_bytes(builder, "\xfe\x7f", 2);
    builder_key(builder, "a.i32", GGUF_I32);
    builder_u32(builder, (uint32_t)-7);
    builder_key(builder, "a.f32", GGUF_F32);
    builder_bytes(builder, &f32, sizeof f32);
    builder_key(builder, "a.yes", GGUF_BOOL);
    builder_bytes(builder, "\1", 1);
    builder_key(builder, "a.u64", GGUF_U64);
    builder_u64(builder, UINT64_C(1) << 32);
    builder_key(builder, "a.i64", GGUF_I64);
    builder_u64(builder, 12);
    builder_key(builder, "a.f64", GGUF_F64);
    builder_bytes(builder, &f64, sizeof f64);
    builder_key_string(builder, "a.empty", "");
    builder_array(builder, "b.strings", GGUF_STRING, 3);
    builder_string(builder, "one");
    builder_string(builder, "");
    builder_string(builder, "three");
    builder_array(builder, "b.u32", GGUF_U32, 2);
    builder_u32(builder, 8);
    builder_u32(builder, 9);
    builder_array(builder, "b.bools", GGUF_BOOL, 3);
    builder_bytes(builder, "\0\1\1", 3);
    builder_array(builder, "b.none", GGUF_STRING, 0);
    builder_array(builder, "b.f64", GGUF_F64, 1);
    builder_bytes(builder, &f64, sizeof f64);

    builder_tensor(builder, "norm.weight", 1, (const uint64_t[]){4}, 0, 0);                  /* F32: 16 bytes */
    builder_tensor(builder, "experts.weight", 3, (const uint64_t[]){256, 2, 3}, 12, 64);     /* Q4_K: 864 */
    builder_tensor(builder, "future.weight", 2, (const uint64_t[]){7, 2}, 1000, 960);        /* of no known size */
    builder_tensor(builder, "last.weight", 4, (const uint64_t[]){32, 1, 1, 2}, 8, 1024);     /* Q8_0: 68 */
    builder_pad(builder, 64);
    size_t data = builder->length;
    builder_zeros(builder, 1024 + 68);
    for (size_t i = data; i < builder->length; i++)
        builder->bytes[i] = (unsigned char)(i * 37);
}
