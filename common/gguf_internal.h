#ifndef MOED_COMMON_GGUF_INTERNAL_H
#define MOED_COMMON_GGUF_INTERNAL_H

#include "common/gguf.h"

/* What gguf_parse.c fills in and gguf.c reads. Not for others. */

struct gguf_entry {
    struct gguf_string key;
    uint32_t type;              /* enum gguf_type */
    uint32_t element;           /* of an array */
    uint64_t count;             /* of an array */
    const unsigned char *value; /* the first byte of the value, for an array of its first element; checked to its end */
};

struct gguf {
    char *path;
    const unsigned char *bytes;
    uint64_t size;
    bool mapped;
    uint64_t data_offset; /* where metadata and tensor descriptions have ended and the padding, too */
    struct gguf_entry *entries; /* sorted by key */
    size_t entry_count;
    struct gguf_tensor *tensors;          /* as in the file */
    const struct gguf_tensor **by_name;   /* sorted */
    size_t tensor_count;
};

struct gguf_tensor_format {
    const char *name;
    uint32_t block_weights, block_bytes; /* 0: no file has had this type since it was removed from the format */
};

/* Indexes gguf->bytes. On failure gguf is to be freed with gguf_close all the same. */
int gguf_parse(struct gguf *gguf, struct status *status);

const struct gguf_entry *gguf_entry_find(const struct gguf *gguf, const char *key);
/* NULL for a number no version of the format has. */
const struct gguf_tensor_format *gguf_tensor_format(uint32_t type);
const char *gguf_type_name(uint32_t type);

/* Little-endian numbers at any address. */
uint32_t gguf_load_u32(const unsigned char *bytes);
uint64_t gguf_load_u64(const unsigned char *bytes);

#endif
