#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/gguf_internal.h"

enum {
    KEY_BYTES_MAX = 65535, /* of the specification, both */
    TENSOR_NAME_BYTES_MAX = 64,
    ENTRY_BYTES_MIN = 8 + 1 + 4 + 1,           /* a key of one byte, the type, a value of one byte */
    TENSOR_BYTES_MIN = 8 + 1 + 4 + 8 + 4 + 8,  /* a name of one byte, one dimension, its size, type, offset */
    DEFAULT_ALIGNMENT = 32,
    SHOWN_MAX = 80, /* bytes of a key that an error shows */
};

uint32_t gguf_load_u32(const unsigned char *bytes) {
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

uint64_t gguf_load_u64(const unsigned char *bytes) {
    return gguf_load_u32(bytes) | (uint64_t)gguf_load_u32(bytes + 4) << 32;
}

/* Goes through the file's front part. Everything is read with take(), which is where the bounds are checked. */
struct cursor {
    const unsigned char *bytes;
    uint64_t size, at; /* at <= size */
    struct status *status;
};

static uint64_t remaining(const struct cursor *cursor) {
    return cursor->size - cursor->at;
}

static const unsigned char *take(struct cursor *cursor, uint64_t length, const char *what) {
    if (length > remaining(cursor)) {
        status_set(cursor->status, STATUS_INVALID_ARGUMENT,
                   "%s at offset %" PRIu64 ": found %" PRIu64 " bytes before the file's end, expected %" PRIu64, what,
                   cursor->at, remaining(cursor), length);
        return NULL;
    }
    const unsigned char *bytes = cursor->bytes + cursor->at;
    cursor->at += length;
    return bytes;
}

static int take_u32(struct cursor *cursor, const char *what, uint32_t *out) {
    const unsigned char *bytes = take(cursor, 4, what);
    if (!bytes)
        return -1;
    *out = gguf_load_u32(bytes);
    return 0;
}

static int take_u64(struct cursor *cursor, const char *what, uint64_t *out) {
    const unsigned char *bytes = take(cursor, 8, what);
    if (!bytes)
        return -1;
    *out = gguf_load_u64(bytes);
    return 0;
}

static int take_string(struct cursor *cursor, const char *what, struct gguf_string *out) {
    uint64_t length;
    if (take_u64(cursor, what, &length))
        return -1;
    out->bytes = (const char *)take(cursor, length, what);
    out->length = length;
    return out->bytes ? 0 : -1;
}

/* A string that names something: not empty, not too long, and printable ASCII, as it will stand in messages. */
static int take_name(struct cursor *cursor, const char *what, uint64_t max, struct gguf_string *out) {
    uint64_t at = cursor->at;
    if (take_string(cursor, what, out))
        return -1;
    if (out->length < 1 || out->length > max)
        return status_set(cursor->status, STATUS_INVALID_ARGUMENT,
                          "%s at offset %" PRIu64 ": found a length of %zu bytes, expected 1 to %" PRIu64, what, at,
                          out->length, max);
    for (size_t i = 0; i < out->length; i++) {
        unsigned char c = (unsigned char)out->bytes[i];
        if (c < ' ' || c > '~')
            return status_set(cursor->status, STATUS_INVALID_ARGUMENT,
                              "%s at offset %" PRIu64 ": found the character %u, expected printable ASCII", what, at,
                              c);
    }
    return 0;
}

/* ---- metadata */

/* Bytes of one value; 0 for strings and arrays, which have no fixed size, and for unknown types. */
static unsigned value_bytes(uint32_t type) {
    static const unsigned char bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof bytes ? bytes[type] : 0;
}

/* Goes past `count` values of a scalar type or of strings. */
static int take_values(struct cursor *cursor, uint32_t type, uint64_t count) {
    unsigned size = type == GGUF_STRING ? 8 : value_bytes(type); /* a string is at least its length */
    if (count > remaining(cursor) / size)
        return status_set(cursor->status, STATUS_INVALID_ARGUMENT,
                          "found %s[%" PRIu64 "] at offset %" PRIu64
                          ", expected no more than fits in the %" PRIu64 " bytes before the file's end",
                          gguf_type_name(type), count, cursor->at, remaining(cursor));
    if (type == GGUF_STRING) {
        struct gguf_string string;
        for (uint64_t i = 0; i < count; i++)
            if (take_string(cursor, "a string", &string))
                return -1;
        return 0;
    }
    const unsigned char *values = take(cursor, count * size, "a value");
    for (uint64_t i = 0; type == GGUF_BOOL && i < count; i++)
        if (values[i] > 1)
            return status_set(cursor->status, STATUS_INVALID_ARGUMENT,
                              "found the bool %u at offset %" PRIu64 ", expected 0 or 1", values[i],
                              (uint64_t)(values + i - cursor->bytes));
    return 0;
}

static int take_entry(struct cursor *cursor, struct gguf_entry *entry) {
    if (take_name(cursor, "a key", KEY_BYTES_MAX, &entry->key))
        return -1;
    if (take_u32(cursor, "the type", &entry->type))
        goto fail;
    uint32_t type = entry->type;
    uint64_t count = 1;
    if (type == GGUF_ARRAY) {
        if (take_u32(cursor, "the array's type", &type) || take_u64(cursor, "the array's length", &count))
            goto fail;
        entry->element = type;
        entry->count = count;
    }
    if (type != GGUF_STRING && value_bytes(type) == 0) {
        status_set(cursor->status, STATUS_INVALID_ARGUMENT, "found %s type %" PRIu32 ", expected %s",
                   entry->type == GGUF_ARRAY ? "array element" : "value", type,
                   type == GGUF_ARRAY ? "no arrays within arrays" : "0 to 12");
        goto fail;
    }
    entry->value = cursor->bytes + cursor->at;
    if (take_values(cursor, type, count))
        goto fail;
    return 0;
fail:
    return status_prefix(cursor->status, "key %.*s",
                         (int)(entry->key.length < SHOWN_MAX ? entry->key.length : SHOWN_MAX), entry->key.bytes);
}

static int compare_strings(struct gguf_string a, struct gguf_string b) {
    int order = memcmp(a.bytes, b.bytes, a.length < b.length ? a.length : b.length);
    return order ? order : (a.length > b.length) - (a.length < b.length);
}

static int compare_entries(const void *a, const void *b) {
    return compare_strings(((const struct gguf_entry *)a)->key, ((const struct gguf_entry *)b)->key);
}

const struct gguf_entry *gguf_entry_find(const struct gguf *gguf, const char *key) {
    struct gguf_entry wanted = {.key = {key, strlen(key)}};
    return gguf->entry_count
               ? bsearch(&wanted, gguf->entries, gguf->entry_count, sizeof *gguf->entries, compare_entries)
               : NULL;
}

static int parse_metadata(struct gguf *gguf, struct cursor *cursor, uint64_t count) {
    struct status *status = cursor->status;
    if (count > remaining(cursor) / ENTRY_BYTES_MIN)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "metadata count (offset 16): found %" PRIu64 ", expected at most %" PRIu64
                          " in a file of %" PRIu64 " bytes",
                          count, remaining(cursor) / ENTRY_BYTES_MIN, gguf->size);
    gguf->entries = calloc(count ? count : 1, sizeof *gguf->entries);
    if (!gguf->entries)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %" PRIu64 " metadata entries", count);
    for (; gguf->entry_count < count; gguf->entry_count++)
        if (take_entry(cursor, &gguf->entries[gguf->entry_count]))
            return status_prefix(status, "metadata entry %zu", gguf->entry_count);

    qsort(gguf->entries, gguf->entry_count, sizeof *gguf->entries, compare_entries);
    for (size_t i = 1; i < gguf->entry_count; i++) {
        struct gguf_string key = gguf->entries[i].key;
        if (compare_strings(gguf->entries[i - 1].key, key) == 0)
            return status_set(status, STATUS_INVALID_ARGUMENT, "key %.*s: found twice, expected once",
                              (int)(key.length < SHOWN_MAX ? key.length : SHOWN_MAX), key.bytes);
    }
    return 0;
}

/* ---- tensors */

/* Sets tensor->bytes from type and shape, or leaves it 0 for a type whose size is not known. */
static int tensor_measure(struct gguf_tensor *tensor, struct status *status) {
    const struct gguf_tensor_format *format = gguf_tensor_format(tensor->type);
    uint64_t weights = 1;
    for (uint32_t i = 0; i < tensor->dimensions; i++) {
        if (tensor->shape[i] == 0)
            return status_set(status, STATUS_INVALID_ARGUMENT,
                              "found dimension %" PRIu32 " of size 0, expected 1 or more", i);
        if (__builtin_mul_overflow(weights, tensor->shape[i], &weights))
            weights = UINT64_MAX; /* stays there or overflows again: no other dimension is 0 */
    }
    if (weights > INT64_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "found a shape of 2^63 weights or more, expected fewer");
    if (!format || !format->block_weights)
        return 0;
    if (tensor->shape[0] % format->block_weights)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "found rows of %" PRIu64 " weights, expected a multiple of the %" PRIu32 " in a block of %s",
                          tensor->shape[0], format->block_weights, format->name);
    if (__builtin_mul_overflow(weights / format->block_weights, format->block_bytes, &tensor->bytes))
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "found a shape of %" PRIu64 " weights, expected fewer than 2^64 bytes", weights);
    return 0;
}

/* tensor->offset is relative to the tensor data until place_tensors. */
static int take_tensor(struct cursor *cursor, struct gguf_tensor *tensor) {
    struct status *status = cursor->status;
    uint64_t at = cursor->at;
    struct gguf_string name;
    if (take_name(cursor, "a tensor's name", TENSOR_NAME_BYTES_MAX, &name))
        return -1;
    tensor->name = strndup(name.bytes, name.length);
    if (!tensor->name)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for a tensor's name");

    if (take_u32(cursor, "the number of dimensions", &tensor->dimensions))
        goto fail;
    if (tensor->dimensions < 1 || tensor->dimensions > 4) {
        status_set(status, STATUS_INVALID_ARGUMENT, "found %" PRIu32 " dimensions, expected 1 to 4",
                   tensor->dimensions);
        goto fail;
    }
    for (uint32_t i = 0; i < 4; i++) {
        tensor->shape[i] = 1;
        if (i < tensor->dimensions && take_u64(cursor, "the shape", &tensor->shape[i]))
            goto fail;
    }
    if (take_u32(cursor, "the type", &tensor->type) || take_u64(cursor, "the data's offset", &tensor->offset) ||
        tensor_measure(tensor, status))
        goto fail;
    return 0;
fail:
    return status_prefix(status, "tensor %s (offset %" PRIu64 ")", tensor->name, at);
}

/* Turns offsets into those of the file and sets the data pointers. */
static int place_tensors(struct gguf *gguf, uint64_t alignment, struct status *status) {
    uint64_t space = gguf->size > gguf->data_offset ? gguf->size - gguf->data_offset : 0;
    for (size_t i = 0; i < gguf->tensor_count; i++) {
        struct gguf_tensor *tensor = &gguf->tensors[i];
        if (tensor->offset % alignment)
            return status_set(status, STATUS_INVALID_ARGUMENT,
                              "tensor %s: found its data at %" PRIu64 " from offset %" PRIu64
                              ", expected a multiple of the alignment %" PRIu64,
                              tensor->name, tensor->offset, gguf->data_offset, alignment);
        if (tensor->offset >= space || tensor->bytes > space - tensor->offset)
            return status_set(status, STATUS_INVALID_ARGUMENT,
                              "tensor %s: found %" PRIu64 " bytes of data at %" PRIu64 " from offset %" PRIu64
                              ", expected them to end with the file at %" PRIu64,
                              tensor->name, tensor->bytes, tensor->offset, gguf->data_offset, gguf->size);
        tensor->offset += gguf->data_offset;
        tensor->data = tensor->bytes ? gguf->bytes + tensor->offset : NULL;
    }
    return 0;
}

static int compare_offsets(const void *a, const void *b) {
    const struct gguf_tensor *x = *(const struct gguf_tensor *const *)a, *y = *(const struct gguf_tensor *const *)b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static int compare_names(const void *a, const void *b) {
    const struct gguf_tensor *x = *(const struct gguf_tensor *const *)a, *y = *(const struct gguf_tensor *const *)b;
    return strcmp(x->name, y->name);
}

/* Checks that no two tensors share bytes or a name, and leaves by_name sorted by name. */
static int index_tensors(struct gguf *gguf, struct status *status) {
    for (size_t i = 0; i < gguf->tensor_count; i++)
        gguf->by_name[i] = &gguf->tensors[i];
    qsort(gguf->by_name, gguf->tensor_count, sizeof *gguf->by_name, compare_offsets);
    for (size_t i = 1; i < gguf->tensor_count; i++) {
        const struct gguf_tensor *before = gguf->by_name[i - 1], *tensor = gguf->by_name[i];
        uint64_t end = before->offset + (before->bytes ? before->bytes : 1); /* of unknown size: more than nothing */
        if (end > tensor->offset)
            return status_set(status, STATUS_INVALID_ARGUMENT,
                              "tensor %s (offset %" PRIu64
                              "): found within the data of %s, expected behind its end at %" PRIu64,
                              tensor->name, tensor->offset, before->name, end);
    }
    qsort(gguf->by_name, gguf->tensor_count, sizeof *gguf->by_name, compare_names);
    for (size_t i = 1; i < gguf->tensor_count; i++)
        if (strcmp(gguf->by_name[i - 1]->name, gguf->by_name[i]->name) == 0)
            return status_set(status, STATUS_INVALID_ARGUMENT, "tensor %s: found twice, expected once",
                              gguf->by_name[i]->name);
    return 0;
}

static int parse_tensors(struct gguf *gguf, struct cursor *cursor, uint64_t count, uint64_t alignment) {
    struct status *status = cursor->status;
    if (count > remaining(cursor) / TENSOR_BYTES_MIN)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "tensor count (offset 8): found %" PRIu64 ", expected at most %" PRIu64
                          " in the %" PRIu64 " bytes behind the metadata",
                          count, remaining(cursor) / TENSOR_BYTES_MIN, remaining(cursor));
    gguf->tensors = calloc(count ? count : 1, sizeof *gguf->tensors);
    gguf->by_name = calloc(count ? count : 1, sizeof *gguf->by_name);
    if (!gguf->tensors || !gguf->by_name)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %" PRIu64 " tensors", count);
    while (gguf->tensor_count < count)
        if (take_tensor(cursor, &gguf->tensors[gguf->tensor_count++])) /* counted first: its name is to be freed */
            return -1;
    gguf->data_offset = cursor->at + (alignment - cursor->at % alignment) % alignment;
    return place_tensors(gguf, alignment, status) || index_tensors(gguf, status) ? -1 : 0;
}

/* ---- file */

static int take_header(struct cursor *cursor, uint64_t *tensors, uint64_t *entries) {
    struct status *status = cursor->status;
    uint32_t version;
    const unsigned char *magic = take(cursor, 4, "the magic");
    if (!magic)
        return -1;
    if (memcmp(magic, "GGUF", 4) != 0)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "magic (offset 0): found %02x %02x %02x %02x, expected \"GGUF\"",
                          magic[0], magic[1], magic[2], magic[3]);
    if (take_u32(cursor, "the version", &version))
        return -1;
    uint32_t swapped = __builtin_bswap32(version);
    if (swapped >= 1 && swapped <= 3)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "version (offset 4): found %" PRIu32 " in big-endian order, expected a little-endian file",
                          swapped);
    if (version != 2 && version != 3)
        return status_set(status, STATUS_INVALID_ARGUMENT, "version (offset 4): found %" PRIu32 ", expected 2 or 3",
                          version);
    return take_u64(cursor, "the tensor count", tensors) || take_u64(cursor, "the metadata count", entries) ? -1 : 0;
}

int gguf_parse(struct gguf *gguf, struct status *status) {
    struct cursor cursor = {.bytes = gguf->bytes, .size = gguf->size, .status = status};
    uint64_t tensors, entries;
    uint32_t alignment = DEFAULT_ALIGNMENT;
    if (take_header(&cursor, &tensors, &entries) || parse_metadata(gguf, &cursor, entries))
        return status_prefix(status, "%s", gguf->path);
    if (gguf_has(gguf, "general.alignment") && gguf_get_u32(gguf, "general.alignment", &alignment, status))
        return -1; /* names the file already */
    if (alignment < 8 || (alignment & (alignment - 1)))
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "%s: key general.alignment: found %" PRIu32 ", expected a power of two from 8 on", gguf->path,
                          alignment);
    if (parse_tensors(gguf, &cursor, tensors, alignment))
        return status_prefix(status, "%s", gguf->path);
    return 0;
}
