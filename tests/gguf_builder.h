#ifndef MOED_TESTS_GGUF_BUILDER_H
#define MOED_TESTS_GGUF_BUILDER_H

#include <stddef.h>
#include <stdint.h>

/* Puts GGUF files together in memory, byte by byte, right or wrong as a test wants them. Little-endian hosts only. */
struct gguf_builder {
    unsigned char *bytes; /* freed with builder_free */
    size_t length, capacity;
};

void builder_free(struct gguf_builder *builder);

/* NULL: zeros. */
void builder_bytes(struct gguf_builder *builder, const void *bytes, size_t length);
void builder_u32(struct gguf_builder *builder, uint32_t value);
void builder_u64(struct gguf_builder *builder, uint64_t value);
void builder_string(struct gguf_builder *builder, const char *string);
void builder_zeros(struct gguf_builder *builder, size_t count);
void builder_pad(struct gguf_builder *builder, size_t alignment);

void builder_header(struct gguf_builder *builder, uint32_t version, uint64_t tensors, uint64_t entries);
/* A key and its type; the value is to follow. */
void builder_key(struct gguf_builder *builder, const char *key, uint32_t type);
void builder_array(struct gguf_builder *builder, const char *key, uint32_t element, uint64_t count);
void builder_key_u32(struct gguf_builder *builder, const char *key, uint32_t value);
void builder_key_string(struct gguf_builder *builder, const char *key, const char *value);
/* A tensor's description; `offset` counts from the first tensor's data. */
void builder_tensor(struct gguf_builder *builder, const char *name, uint32_t dimensions, const uint64_t *shape,
                    uint32_t type, uint64_t offset);

/* A small valid file: a value of every type, and tensors of known and unknown types. Its last byte is a tensor's. */
void builder_sample(struct gguf_builder *builder, uint32_t version);

#endif
