#include "config.h" /* _GNU_SOURCE: madvise */

#include "common/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/gguf_internal.h"

static int open_failed(const char *path, struct status *status) {
    int error = errno;
    enum status_code code = error == ENOENT || error == ENOTDIR ? STATUS_NOT_FOUND
                            : error == EACCES || error == EPERM ? STATUS_PERMISSION_DENIED
                                                                : STATUS_UNAVAILABLE;
    return status_set(status, code, "%s: %s", path, strerror(error));
}

/* Maps a whole file; the descriptor is not needed afterwards. */
static int map_file(const char *path, const unsigned char **bytes, uint64_t *size, struct status *status) {
    int result = -1;
    struct stat about;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not make us wait for its writer */
    if (fd < 0 || fstat(fd, &about)) {
        open_failed(path, status);
        goto out;
    }
    if (!S_ISREG(about.st_mode) || about.st_size == 0) {
        status_set(status, STATUS_INVALID_ARGUMENT, "%s: found %s, expected a GGUF file", path,
                   S_ISDIR(about.st_mode)   ? "a directory"
                   : S_ISREG(about.st_mode) ? "an empty file"
                                            : "something that is no regular file");
        goto out;
    }
    void *map = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        open_failed(path, status);
        goto out;
    }
    *bytes = map;
    *size = (uint64_t)about.st_size;
    result = 0;
out:
    if (fd >= 0)
        close(fd);
    return result;
}

static struct gguf *gguf_create(const char *path) {
    struct gguf *gguf = calloc(1, sizeof *gguf);
    if (gguf && !(gguf->path = strdup(path))) {
        free(gguf);
        gguf = NULL;
    }
    return gguf;
}

static int parse_or_close(struct gguf *gguf, struct gguf **out, struct status *status) {
    if (gguf_parse(gguf, status)) {
        gguf_close(gguf);
        return -1;
    }
    *out = gguf;
    return 0;
}

int gguf_open(const char *path, struct gguf **out, struct status *status) {
    *out = NULL;
    struct gguf *gguf = gguf_create(path);
    if (!gguf)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "%s: no memory", path);
    if (map_file(path, &gguf->bytes, &gguf->size, status)) {
        gguf_close(gguf);
        return -1;
    }
    gguf->mapped = true;
    return parse_or_close(gguf, out, status);
}

int gguf_open_memory(const void *bytes, size_t size, const char *name, struct gguf **out, struct status *status) {
    *out = NULL;
    struct gguf *gguf = gguf_create(name);
    if (!gguf)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "%s: no memory", name);
    gguf->bytes = bytes;
    gguf->size = size;
    return parse_or_close(gguf, out, status);
}

void gguf_close(struct gguf *gguf) {
    if (!gguf)
        return;
    for (size_t i = 0; i < gguf->tensor_count; i++)
        free((char *)gguf->tensors[i].name);
    free(gguf->tensors);
    free(gguf->by_name);
    free(gguf->entries);
    if (gguf->mapped)
        munmap((void *)gguf->bytes, gguf->size);
    free(gguf->path);
    free(gguf);
}

const char *gguf_path(const struct gguf *gguf) {
    return gguf->path;
}

uint64_t gguf_file_bytes(const struct gguf *gguf) {
    return gguf->size;
}

void gguf_release(const struct gguf *gguf, const void *data, uint64_t bytes) {
    if (!gguf->mapped) /* memory of the caller's would be lost, not read again */
        return;
    /* Whole pages only: what shares one with the range stays. */
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), from = (uint64_t)((const unsigned char *)data - gguf->bytes);
    uint64_t first = (from + page - 1) / page * page, end = (from + bytes) / page * page;
    if (first < end)
        madvise((unsigned char *)gguf->bytes + first, end - first, MADV_DONTNEED);
}

/* ---- metadata */

bool gguf_has(const struct gguf *gguf, const char *key) {
    return gguf_entry_find(gguf, key) != NULL;
}

/* "u32", or "array of string" */
static void entry_type_name(const struct gguf_entry *entry, char out[32]) {
    bool array = entry->type == GGUF_ARRAY;
    snprintf(out, 32, "%s%s", array ? "array of " : "", gguf_type_name(array ? entry->element : entry->type));
}

static int refuse_type(const struct gguf *gguf, const char *key, const struct gguf_entry *entry, const char *expected,
                       struct status *status) {
    char type[32];
    entry_type_name(entry, type);
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s: key %s (offset %" PRIu64 "): found type %s, expected %s",
                      gguf->path, key, (uint64_t)(entry->value - gguf->bytes), type, expected);
}

static const struct gguf_entry *entry_get(const struct gguf *gguf, const char *key, struct status *status) {
    const struct gguf_entry *entry = gguf_entry_find(gguf, key);
    if (!entry)
        status_set(status, STATUS_NOT_FOUND, "%s: key %s: not found", gguf->path, key);
    return entry;
}

/* An integer of any type, as a signed number with one bit more than 64. */
static bool load_integer(const struct gguf_entry *entry, bool *negative, uint64_t *magnitude) {
    const unsigned char *bytes = entry->value;
    int64_t value;
    *negative = false;
    switch (entry->type) {
    case GGUF_U8: *magnitude = bytes[0]; return true;
    case GGUF_U16: *magnitude = bytes[0] | (unsigned)bytes[1] << 8; return true;
    case GGUF_U32: *magnitude = gguf_load_u32(bytes); return true;
    case GGUF_U64: *magnitude = gguf_load_u64(bytes); return true;
    case GGUF_I8: value = (int8_t)bytes[0]; break;
    case GGUF_I16: value = (int16_t)(bytes[0] | (unsigned)bytes[1] << 8); break;
    case GGUF_I32: value = (int32_t)gguf_load_u32(bytes); break;
    case GGUF_I64: value = (int64_t)gguf_load_u64(bytes); break;
    default: return false;
    }
    *negative = value < 0;
    *magnitude = value < 0 ? -(uint64_t)value : (uint64_t)value;
    return true;
}

int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t *out, struct status *status) {
    const struct gguf_entry *entry = entry_get(gguf, key, status);
    bool negative;
    uint64_t magnitude;
    if (!entry)
        return -1;
    if (!load_integer(entry, &negative, &magnitude))
        return refuse_type(gguf, key, entry, "an integer", status);
    if (negative || magnitude > UINT32_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "%s: key %s (offset %" PRIu64 "): found %s%" PRIu64 ", expected 0 to %" PRIu32, gguf->path,
                          key, (uint64_t)(entry->value - gguf->bytes), negative ? "-" : "", magnitude, UINT32_MAX);
    *out = (uint32_t)magnitude;
    return 0;
}

int gguf_get_f32(const struct gguf *gguf, const char *key, float *out, struct status *status) {
    const struct gguf_entry *entry = entry_get(gguf, key, status);
    if (!entry)
        return -1;
    if (entry->type == GGUF_F32) {
        uint32_t bits = gguf_load_u32(entry->value);
        memcpy(out, &bits, sizeof *out);
    } else if (entry->type == GGUF_F64) {
        uint64_t bits = gguf_load_u64(entry->value);
        double value;
        memcpy(&value, &bits, sizeof value);
        if (isfinite(value) && fabs(value) > FLT_MAX) /* the conversion would be undefined */
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s: key %s: found %g, expected at most %g", gguf->path,
                              key,
                              value, FLT_MAX);
        *out = (float)value;
    } else {
        return refuse_type(gguf, key, entry, "f32 or f64", status);
    }
    return 0;
}

int gguf_get_bool(const struct gguf *gguf, const char *key, bool *out, struct status *status) {
    const struct gguf_entry *entry = entry_get(gguf, key, status);
    if (!entry)
        return -1;
    if (entry->type != GGUF_BOOL)
        return refuse_type(gguf, key, entry, "bool", status);
    *out = *entry->value != 0;
    return 0;
}

/* The string at `at`, which take_values has checked; returns the address behind it. */
static const unsigned char *load_string(const unsigned char *at, struct gguf_string *out) {
    out->length = gguf_load_u64(at);
    out->bytes = (const char *)at + 8;
    return at + 8 + out->length;
}

int gguf_get_string(const struct gguf *gguf, const char *key, struct gguf_string *out, struct status *status) {
    const struct gguf_entry *entry = entry_get(gguf, key, status);
    if (!entry)
        return -1;
    if (entry->type != GGUF_STRING)
        return refuse_type(gguf, key, entry, "string", status);
    load_string(entry->value, out);
    return 0;
}

int gguf_get_array(const struct gguf *gguf, const char *key, enum gguf_type *type, uint64_t *count,
                   struct status *status) {
    const struct gguf_entry *entry = entry_get(gguf, key, status);
    if (!entry)
        return -1;
    if (entry->type != GGUF_ARRAY)
        return refuse_type(gguf, key, entry, "an array", status);
    *type = (enum gguf_type)entry->element;
    *count = entry->count;
    return 0;
}

int gguf_get_strings(const struct gguf *gguf, const char *key, struct gguf_string *out, uint64_t count,
                     struct status *status) {
    const struct gguf_entry *entry = entry_get(gguf, key, status);
    if (!entry)
        return -1;
    if (entry->type != GGUF_ARRAY || entry->element != GGUF_STRING)
        return refuse_type(gguf, key, entry, "array of string", status);
    if (entry->count != count)
        return status_set(status, STATUS_INVALID_ARGUMENT, "%s: key %s: found %" PRIu64 " strings, expected %" PRIu64,
                          gguf->path, key, entry->count, count);
    const unsigned char *at = entry->value;
    for (uint64_t i = 0; i < count; i++)
        at = load_string(at, &out[i]);
    return 0;
}

/* ---- tensors */

size_t gguf_tensor_count(const struct gguf *gguf) {
    return gguf->tensor_count;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t index) {
    return &gguf->tensors[index];
}

static int compare_name(const void *name, const void *element) {
    return strcmp(name, (*(const struct gguf_tensor *const *)element)->name);
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name) {
    if (gguf->tensor_count == 0)
        return NULL;
    const struct gguf_tensor **found =
        bsearch(name, gguf->by_name, gguf->tensor_count, sizeof *gguf->by_name, compare_name);
    return found ? *found : NULL;
}

/* ---- fingerprint */

enum { FINGERPRINT_WHOLE_BYTES = 16384, FINGERPRINT_SAMPLES = 4, FINGERPRINT_SAMPLE_BYTES = 1024 };

/* One round for each eight bytes: a multiplication by an odd constant and a shift, both of which lose nothing. */
static uint64_t fingerprint_add(uint64_t hash, const unsigned char *bytes, uint64_t length) {
    for (uint64_t i = 0; i < length; i += 8) {
        unsigned char word[8] = {0};
        memcpy(word, bytes + i, length - i < 8 ? length - i : 8);
        hash = (hash ^ gguf_load_u64(word)) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 29;
    }
    return hash;
}

void gguf_fingerprint(const struct gguf *gguf, char out[17]) {
    uint64_t front = gguf->data_offset < gguf->size ? gguf->data_offset : gguf->size;
    uint64_t hash = fingerprint_add(gguf->size, gguf->bytes, front);
    for (size_t i = 0; i < gguf->tensor_count; i++) {
        const struct gguf_tensor *tensor = &gguf->tensors[i];
        if (tensor->bytes <= FINGERPRINT_WHOLE_BYTES) {
            hash = fingerprint_add(hash, tensor->data, tensor->bytes);
            continue;
        }
        for (unsigned sample = 0; sample < FINGERPRINT_SAMPLES; sample++) {
            /* Evenly spread; the last one ends with the tensor. */
            uint64_t at = (tensor->bytes - FINGERPRINT_SAMPLE_BYTES) / (FINGERPRINT_SAMPLES - 1) * sample;
            hash = fingerprint_add(hash, (const unsigned char *)tensor->data + at, FINGERPRINT_SAMPLE_BYTES);
        }
    }
    snprintf(out, 17, "%016" PRIx64, hash);
}
