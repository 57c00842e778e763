#ifndef MOED_COMMON_GGUF_H
#define MOED_COMMON_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * A bounds-checked reader of GGUF files, versions 2 and 3, little-endian
 * (format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The file is mapped read-only and stays so until
 * gguf_close; strings and tensor data point into the mapping. Nothing in it is trusted: every length is checked against
 * the file's size before it is used, and no allocation is larger than a small multiple of the file itself.
 * Errors name the file, the offset or tensor, what was found and what was expected.
 */
struct gguf;

/* Value types of the metadata. */
enum gguf_type {
    GGUF_U8 = 0, GGUF_I8 = 1, GGUF_U16 = 2, GGUF_I16 = 3, GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6,
    GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9, GGUF_U64 = 10, GGUF_I64 = 11, GGUF_F64 = 12,
};

struct gguf_string {
    const char *bytes; /* not terminated */
    size_t length;
};

struct gguf_tensor {
    const char *name;    /* terminated copy, owned by the reader */
    uint32_t type;       /* enum quant_type of kernels/quant.h, or a type moed does not know */
    uint32_t dimensions; /* 1 to 4 */
    uint64_t shape[4];   /* fastest first, as GGUF has it: {columns, rows, experts}; unused ones are 1 */
    uint64_t offset;     /* in the file */
    uint64_t bytes;      /* of its data; 0 for a type whose size is not known */
    const void *data;    /* in the mapping; NULL for a type whose size is not known */
};

/* Opens and indexes a file. On success *out is to be freed with gguf_close. */
int gguf_open(const char *path, struct gguf **out, struct status *status);
/* The same over memory the caller keeps alive; `name` stands in errors. For tests and fuzzing. */
int gguf_open_memory(const void *bytes, size_t size, const char *name, struct gguf **out, struct status *status);
void gguf_close(struct gguf *gguf);

const char *gguf_path(const struct gguf *gguf);
uint64_t gguf_file_bytes(const struct gguf *gguf);

/* Tells the kernel that these bytes of tensor data will not be read soon, so that it may take their pages back. They
 * stay what they are: a later read brings them from the file. */
void gguf_release(const struct gguf *gguf, const void *data, uint64_t bytes);

/* Metadata. A missing key or another type is an error; integers of any width are taken where the value fits. */
bool gguf_has(const struct gguf *gguf, const char *key);
int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t *out, struct status *status);
int gguf_get_f32(const struct gguf *gguf, const char *key, float *out, struct status *status);
int gguf_get_bool(const struct gguf *gguf, const char *key, bool *out, struct status *status);
int gguf_get_string(const struct gguf *gguf, const char *key, struct gguf_string *out, struct status *status);

/* An array's element type and length; GGUF_ARRAY elements are refused at open. */
int gguf_get_array(const struct gguf *gguf, const char *key, enum gguf_type *type, uint64_t *count,
                   struct status *status);
/* Copies all strings of an array into out[count]; they point into the mapping. */
int gguf_get_strings(const struct gguf *gguf, const char *key, struct gguf_string *out, uint64_t count,
                     struct status *status);

size_t gguf_tensor_count(const struct gguf *gguf);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t index);
const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name); /* NULL: not there */

/* "Q4_K"; "unknown" for a number no version of the format has. common names no other folder, so it keeps its own table
 * of all tensor types and their sizes; a test holds it against kernels/quant.h. */
const char *gguf_tensor_type_name(uint32_t type);

/*
 * 16 hexadecimal digits that identify a model: a hash of all metadata and tensor descriptions and of samples of every
 * tensor's data (the whole of small ones), so that it costs milliseconds and two quantizations of a model differ.
 */
void gguf_fingerprint(const struct gguf *gguf, char out[17]);

#endif
