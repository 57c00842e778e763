#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/clock.h"
#include "common/gguf.h"
#include "kernels/quant.h"
#include "tests/gguf_builder.h"

static struct status status;

static struct gguf *open_good(const struct gguf_builder *builder) {
    struct gguf *gguf;
    status = (struct status){0};
    if (gguf_open_memory(builder->bytes, builder->length, "file", &gguf, &status))
        fail_msg("%s", status.message);
    return gguf;
}

/* Opens a copy that ends where the bytes end, so that the sanitizers see one read too many. Calls every accessor. */
static int try_all(const unsigned char *bytes, size_t length) {
    static const char *const keys[] = {"general.architecture", "general.alignment", "a.i8", "a.f32", "a.f64",
                                       "b.strings", "b.u32", "b.none", "missing"};
    unsigned char *copy = malloc(length ? length : 1);
    if (length)
        memcpy(copy, bytes, length);
    struct gguf *gguf;
    status = (struct status){0};
    int result = gguf_open_memory(copy, length, "file", &gguf, &status);
    assert_int_equal(gguf == NULL, result != 0);
    assert_int_equal(status.code == STATUS_OK, result == 0);
    if (result) {
        assert_memory_equal(status.message, "file: ", 6);
        assert_null(strchr(status.message, '\n'));
        free(copy);
        return result;
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        uint32_t u;
        float f;
        struct gguf_string string, strings[8];
        enum gguf_type type;
        uint64_t count;
        gguf_get_u32(gguf, keys[i], &u, &status);
        gguf_get_f32(gguf, keys[i], &f, &status);
        if (gguf_get_string(gguf, keys[i], &string, &status) == 0 && string.length)
            assert_true((const unsigned char *)string.bytes + string.length <= copy + length);
        if (gguf_get_array(gguf, keys[i], &type, &count, &status) == 0 && count <= 8 &&
            gguf_get_strings(gguf, keys[i], strings, count, &status) == 0 && count)
            assert_true((const unsigned char *)strings[count - 1].bytes + strings[count - 1].length <= copy + length);
    }
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        assert_ptr_equal(gguf_tensor_find(gguf, tensor->name), tensor);
        assert_int_equal(tensor->data == NULL, tensor->bytes == 0);
        if (tensor->data) {
            assert_ptr_equal(tensor->data, copy + tensor->offset);
            assert_true(tensor->offset + tensor->bytes <= length);
        }
    }
    char fingerprint[17];
    gguf_fingerprint(gguf, fingerprint);
    gguf_close(gguf);
    free(copy);
    return 0;
}

/* ---- good files */

static void assert_string_is(struct gguf_string string, const char *expected) {
    assert_int_equal(string.length, strlen(expected));
    assert_memory_equal(string.bytes, expected, string.length);
}

static void reads_metadata(void **state) {
    for (uint32_t version = 2; version <= 3; version++) {
        struct gguf_builder builder = {0};
        builder_sample(&builder, version);
        struct gguf *gguf = open_good(&builder);
        struct gguf_string string, strings[3];
        uint32_t u;
        float f;
        enum gguf_type type;
        uint64_t count;
        assert_string_equal(gguf_path(gguf), "file");
        assert_int_equal(gguf_file_bytes(gguf), builder.length);
        assert_int_equal(gguf_get_string(gguf, "general.architecture", &string, &status), 0);
        assert_string_is(string, "qwen3moe");
        assert_int_equal(gguf_get_string(gguf, "a.empty", &string, &status), 0);
        assert_string_is(string, "");
        assert_int_equal(gguf_get_u32(gguf, "a.u8", &u, &status), 0);
        assert_int_equal(u, 255);
        assert_int_equal(gguf_get_u32(gguf, "a.u16", &u, &status), 0);
        assert_int_equal(u, 0x8001);
        assert_int_equal(gguf_get_u32(gguf, "a.i16", &u, &status), 0);
        assert_int_equal(u, 0x7ffe);
        assert_int_equal(gguf_get_u32(gguf, "a.i64", &u, &status), 0);
        assert_int_equal(u, 12);
        assert_int_equal(gguf_get_f32(gguf, "a.f32", &f, &status), 0);
        assert_true(f == 0.5f);
        assert_int_equal(gguf_get_f32(gguf, "a.f64", &f, &status), 0);
        assert_true(f == -2.5f);
        assert_int_equal(gguf_get_array(gguf, "b.strings", &type, &count, &status), 0);
        assert_int_equal(type, GGUF_STRING);
        assert_int_equal(count, 3);
        assert_int_equal(gguf_get_strings(gguf, "b.strings", strings, 3, &status), 0);
        assert_string_is(strings[0], "one");
        assert_string_is(strings[1], "");
        assert_string_is(strings[2], "three");
        bool yes = false;
        assert_int_equal(gguf_get_bool(gguf, "a.yes", &yes, &status), 0);
        assert_true(yes);
        assert_true(gguf_has(gguf, "a.yes"));
        assert_false(gguf_has(gguf, "a.no"));
        assert_false(gguf_has(gguf, ""));
        gguf_close(gguf);
        builder_free(&builder);
    }
}

static void refuses_wrong_requests(void **state) {
    struct gguf_builder builder = {0};
    builder_sample(&builder, 3);
    struct gguf *gguf = open_good(&builder);
    struct gguf_string string, strings[3];
    uint32_t u;
    float f;
    bool yes;
    enum gguf_type type;
    uint64_t count;
#define assert_error(call, part) \
    assert_int_equal(call, -1); \
    if (!strstr(status.message, part)) \
        fail_msg("\"%s\" does not tell \"%s\"", status.message, part)
    assert_error(gguf_get_u32(gguf, "nope", &u, &status), "file: key nope: not found");
    assert_int_equal(status.code, STATUS_NOT_FOUND);
    assert_error(gguf_get_u32(gguf, "a.i8", &u, &status), "found -1, expected 0 to 4294967295");
    assert_error(gguf_get_u32(gguf, "a.i32", &u, &status), "found -7, expected 0 to");
    assert_error(gguf_get_u32(gguf, "a.u64", &u, &status), "found 4294967296, expected 0 to");
    assert_error(gguf_get_u32(gguf, "a.f32", &u, &status), "found type f32, expected an integer");
    assert_error(gguf_get_u32(gguf, "a.yes", &u, &status), "found type bool, expected an integer");
    assert_error(gguf_get_bool(gguf, "a.u8", &yes, &status), "found type u8, expected bool");
    assert_error(gguf_get_f32(gguf, "a.u8", &f, &status), "found type u8, expected f32 or f64");
    assert_error(gguf_get_string(gguf, "b.strings", &string, &status), "found type array of string, expected string");
    assert_error(gguf_get_array(gguf, "a.empty", &type, &count, &status), "found type string, expected an array");
    assert_error(gguf_get_strings(gguf, "b.u32", strings, 2, &status),
                 "found type array of u32, expected array of string");
    assert_error(gguf_get_strings(gguf, "b.strings", strings, 2, &status), "found 3 strings, expected 2");
#undef assert_error
    gguf_close(gguf);
    builder_free(&builder);
}

static void reads_tensors(void **state) {
    struct gguf_builder builder = {0};
    builder_sample(&builder, 3);
    struct gguf *gguf = open_good(&builder);
    size_t data = builder.length - 1092;
    assert_int_equal(gguf_tensor_count(gguf), 4);
    const struct gguf_tensor *experts = gguf_tensor_find(gguf, "experts.weight");
    assert_ptr_equal(experts, gguf_tensor_at(gguf, 1));
    assert_int_equal(experts->type, QUANT_Q4_K);
    assert_int_equal(experts->dimensions, 3);
    assert_int_equal(experts->shape[0], 256);
    assert_int_equal(experts->shape[2], 3);
    assert_int_equal(experts->shape[3], 1);
    assert_int_equal(experts->bytes, 864);
    assert_int_equal(experts->offset, data + 64);
    assert_ptr_equal(experts->data, builder.bytes + data + 64);
    const struct gguf_tensor *future = gguf_tensor_find(gguf, "future.weight");
    assert_string_equal(gguf_tensor_type_name(future->type), "unknown");
    assert_int_equal(future->bytes, 0);
    assert_null(future->data);
    assert_null(gguf_tensor_find(gguf, "norm"));
    assert_null(gguf_tensor_find(gguf, "norm.weight2"));
    assert_null(gguf_tensor_find(gguf, ""));
    gguf_close(gguf);
    builder_free(&builder);
}

static void finds_data_behind_aligned_descriptions(void **state) {
    struct gguf_builder builder = {0};
    builder_header(&builder, 3, 1, 0);
    builder_tensor(&builder, "8 bytes.", 1, (const uint64_t[]){4}, QUANT_F32, 0);
    assert_int_equal(builder.length % 32, 0); /* no padding */
    builder_zeros(&builder, 16);
    struct gguf *gguf = open_good(&builder);
    assert_int_equal(gguf_tensor_at(gguf, 0)->offset, builder.length - 16);
    gguf_close(gguf);
    builder_free(&builder);
}

static void takes_an_empty_file_of_the_format(void **state) {
    struct gguf_builder builder = {0};
    builder_header(&builder, 3, 0, 0);
    struct gguf *gguf = open_good(&builder);
    assert_int_equal(gguf_tensor_count(gguf), 0);
    assert_null(gguf_tensor_find(gguf, "x"));
    assert_false(gguf_has(gguf, "x"));
    char fingerprint[17];
    gguf_fingerprint(gguf, fingerprint);
    assert_int_equal(strlen(fingerprint), 16);
    gguf_close(gguf);
    builder_free(&builder);
}

static void finds_many_names(void **state) {
    enum { COUNT = 3000 };
    struct gguf_builder builder = {0};
    char name[32];
    builder_header(&builder, 3, COUNT, COUNT);
    for (unsigned i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "key.%u", i * 2654435761u % 100003);
        builder_key_u32(&builder, name, i);
    }
    for (unsigned i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "blk.%u.w", i * 40503u % 65537);
        builder_tensor(&builder, name, 1, (const uint64_t[]){1}, QUANT_F32, 32 * i);
    }
    builder_pad(&builder, 32);
    builder_zeros(&builder, 32 * COUNT);
    struct gguf *gguf = open_good(&builder);
    for (unsigned i = 0; i < COUNT; i++) {
        uint32_t value;
        snprintf(name, sizeof name, "key.%u", i * 2654435761u % 100003);
        assert_int_equal(gguf_get_u32(gguf, name, &value, &status), 0);
        assert_int_equal(value, i);
        snprintf(name, sizeof name, "blk.%u.w", i * 40503u % 65537);
        assert_ptr_equal(gguf_tensor_find(gguf, name), gguf_tensor_at(gguf, i));
    }
    gguf_close(gguf);
    builder_free(&builder);
}

static void knows_the_formats_of_the_kernels(void **state) {
    unsigned known = 0;
    for (uint32_t type = 0; type < 64; type++) {
        const struct quant_format *format = quant_format(type);
        if (!format)
            continue;
        known++;
        assert_string_equal(gguf_tensor_type_name(type), format->name);
        struct gguf_builder builder = {0};
        builder_header(&builder, 3, 1, 0);
        builder_tensor(&builder, "w", 2, (const uint64_t[]){3 * format->block_weights, 5}, type, 0);
        builder_pad(&builder, 32);
        builder_zeros(&builder, 15 * format->block_bytes);
        struct gguf *gguf = open_good(&builder);
        assert_int_equal(gguf_tensor_at(gguf, 0)->bytes, 15 * format->block_bytes);
        gguf_close(gguf);
        assert_int_equal(try_all(builder.bytes, builder.length - 1), -1);
        builder_free(&builder);
    }
    assert_int_equal(known, 7);
    assert_string_equal(gguf_tensor_type_name(23), "IQ4_XS");
    assert_string_equal(gguf_tensor_type_name(39), "MXFP4");
    assert_string_equal(gguf_tensor_type_name(43), "unknown");
    assert_string_equal(gguf_tensor_type_name(UINT32_MAX), "unknown");
}

static void fingerprints_content(void **state) {
    struct gguf_builder builder = {0};
    char first[17], other[17];
    builder_sample(&builder, 3);
    struct gguf *gguf = open_good(&builder);
    gguf_fingerprint(gguf, first);
    assert_int_equal(strspn(first, "0123456789abcdef"), 16);
    /* Small tensors count whole; only what no tensor and no description covers does not. */
    size_t data = builder.length - 1092;
    for (size_t at = 24; at < builder.length; at += 5) {
        if (at >= data + 16 && at < data + 64)
            continue; /* padding */
        if (at >= data + 928 && at < data + 1024)
            continue; /* padding and a tensor of unknown size */
        builder.bytes[at] ^= 1; /* behind the reader's back: it has indexed the file already */
        gguf_fingerprint(gguf, other);
        assert_string_not_equal(first, other);
        builder.bytes[at] ^= 1;
    }
    gguf_fingerprint(gguf, other);
    assert_string_equal(first, other);
    gguf_close(gguf);
    builder_free(&builder);
}

static void fingerprints_samples_of_large_tensors(void **state) {
    struct gguf_builder builder = {0};
    char first[17], other[17];
    builder_header(&builder, 3, 1, 0);
    builder_tensor(&builder, "w", 1, (const uint64_t[]){25000}, QUANT_F32, 0);
    builder_pad(&builder, 32);
    builder_zeros(&builder, 100000);
    memset(builder.bytes + builder.length - 100000, 'x', 100000);
    struct gguf *gguf = open_good(&builder);
    gguf_fingerprint(gguf, first);
    const size_t sampled[] = {builder.length - 1, builder.length - 100000};
    for (size_t i = 0; i < 2; i++) {
        builder.bytes[sampled[i]]++;
        gguf_fingerprint(gguf, other);
        assert_string_not_equal(first, other);
        builder.bytes[sampled[i]]--;
    }
    gguf_close(gguf);
    builder_free(&builder);
}

static void releases_no_memory_of_the_caller(void **state) {
    enum { SIZE = 1 << 20, ALIGNMENT = 1 << 16 }; /* of any page */
    struct gguf_builder builder = {0};
    builder_header(&builder, 3, 1, 0);
    builder_tensor(&builder, "w", 1, (const uint64_t[]){SIZE / 8}, QUANT_F32, 0);
    unsigned char *bytes = aligned_alloc(ALIGNMENT, SIZE);
    memset(bytes, 'x', SIZE);
    memcpy(bytes, builder.bytes, builder.length);
    struct gguf *gguf;
    assert_int_equal(gguf_open_memory(bytes, SIZE, "file", &gguf, &status), 0);
    const struct gguf_tensor *tensor = gguf_tensor_at(gguf, 0);
    gguf_release(gguf, tensor->data, tensor->bytes);
    for (size_t i = 0; i < tensor->bytes; i++)
        assert_int_equal(((const unsigned char *)tensor->data)[i], 'x');
    gguf_close(gguf);
    free(bytes);
    builder_free(&builder);
}

/* ---- bad files */

static void bad_magic(struct gguf_builder *b) {
    builder_bytes(b, "GGML\3\0\0\0", 8);
    builder_zeros(b, 16);
}

static void ggml_version_1(struct gguf_builder *b) {
    builder_header(b, 1, 0, 0);
}

static void big_endian(struct gguf_builder *b) {
    builder_header(b, 3 << 24, 0, 0);
}

static void too_many_entries(struct gguf_builder *b) {
    builder_header(b, 3, 0, UINT64_MAX);
    builder_zeros(b, 14);
}

static void too_many_tensors(struct gguf_builder *b) {
    builder_header(b, 3, UINT64_C(1) << 60, 0);
    builder_zeros(b, 40);
}

static void long_key(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_u64(b, UINT64_MAX);
    builder_zeros(b, 32);
}

static void empty_key(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key_u32(b, "", 1);
}

static void huge_key(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_u64(b, 65536);
    builder_zeros(b, 70000);
}

static void control_key(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key_u32(b, "a\nb", 1);
}

static void unknown_value_type(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key(b, "k", 13);
    builder_zeros(b, 8);
}

static void nested_array(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_array(b, "k", GGUF_ARRAY, 1);
    builder_zeros(b, 16);
}

static void unknown_element_type(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_array(b, "k", 77, 1);
    builder_zeros(b, 16);
}

static void long_array(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_array(b, "k", GGUF_U64, UINT64_C(1) << 61); /* 2^64 bytes: 0 if the product wrapped */
    builder_zeros(b, 16);
}

static void long_string_array(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_array(b, "k", GGUF_STRING, 3);
    builder_zeros(b, 23);
}

static void long_string_in_array(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_array(b, "k", GGUF_STRING, 2);
    builder_string(b, "x");
    builder_u64(b, UINT64_MAX - 4);
    builder_zeros(b, 4);
}

static void bool_of_two(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key(b, "k", GGUF_BOOL);
    builder_bytes(b, "\2", 1);
}

static void bool_of_two_in_array(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_array(b, "k", GGUF_BOOL, 3);
    builder_bytes(b, "\1\0\377", 3);
}

static void key_twice(struct gguf_builder *b) {
    builder_header(b, 3, 0, 3);
    builder_key_u32(b, "k", 1);
    builder_key_u32(b, "ka", 1);
    builder_key_u32(b, "k", 2);
}

static void alignment_no_power(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key_u32(b, "general.alignment", 48);
}

static void alignment_zero(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key_u32(b, "general.alignment", 0);
}

static void alignment_small(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key_u32(b, "general.alignment", 4);
}

static void alignment_string(struct gguf_builder *b) {
    builder_header(b, 3, 0, 1);
    builder_key_string(b, "general.alignment", "32");
}

/* One F32 tensor of these dimensions, at this offset, with 64 bytes of data. */
static void one_tensor(struct gguf_builder *b, const char *name, uint32_t dimensions, const uint64_t *shape,
                       uint32_t type, uint64_t offset) {
    builder_header(b, 3, 1, 0);
    builder_tensor(b, name, dimensions, shape, type, offset);
    builder_pad(b, 32);
    builder_zeros(b, 64);
}

static const uint64_t four[4] = {4, 1, 1, 1};

static void long_tensor_name(struct gguf_builder *b) {
    one_tensor(b, "12345678901234567890123456789012345678901234567890123456789012345", 1, four, QUANT_F32, 0);
}

static void empty_tensor_name(struct gguf_builder *b) {
    one_tensor(b, "", 1, four, QUANT_F32, 0);
}

static void latin_tensor_name(struct gguf_builder *b) {
    one_tensor(b, "w\xe4ght", 1, four, QUANT_F32, 0);
}

static void no_dimensions(struct gguf_builder *b) {
    one_tensor(b, "w", 0, four, QUANT_F32, 0);
}

static void five_dimensions(struct gguf_builder *b) {
    one_tensor(b, "w", 5, (const uint64_t[]){1, 1, 1, 1, 1}, QUANT_F32, 0);
}

static void dimension_zero(struct gguf_builder *b) {
    one_tensor(b, "w", 2, (const uint64_t[]){4, 0}, QUANT_F32, 0);
}

static void shape_overflow(struct gguf_builder *b) {
    one_tensor(b, "w", 4, (const uint64_t[]){UINT64_C(1) << 32, UINT64_C(1) << 32, 1, 1}, QUANT_F32, 0);
}

static void shape_overflow_then_more(struct gguf_builder *b) { /* 2^64 + 2^63 ... wraps to something small */
    one_tensor(b, "w", 4, (const uint64_t[]){3, UINT64_C(1) << 63, 2, 5}, 1000, 0);
}

static void bytes_overflow(struct gguf_builder *b) {
    one_tensor(b, "w", 1, (const uint64_t[]){UINT64_C(1) << 62}, QUANT_F32, 0);
}

static void partial_block(struct gguf_builder *b) {
    one_tensor(b, "w", 2, (const uint64_t[]){128, 2}, QUANT_Q4_K, 0);
}

static void unaligned_offset(struct gguf_builder *b) {
    one_tensor(b, "w", 1, four, QUANT_F32, 16);
}

static void offset_outside(struct gguf_builder *b) {
    one_tensor(b, "w", 1, four, QUANT_F32, 64);
}

static void offset_wraps(struct gguf_builder *b) {
    one_tensor(b, "w", 1, four, QUANT_F32, UINT64_MAX - 31);
}

static void data_outside(struct gguf_builder *b) {
    one_tensor(b, "w", 1, (const uint64_t[]){9}, QUANT_F32, 32);
}

static void unknown_outside(struct gguf_builder *b) {
    one_tensor(b, "w", 1, four, 1000, 64);
}

static void no_data_at_all(struct gguf_builder *b) {
    builder_header(b, 3, 1, 0);
    builder_tensor(b, "a-name-so-long-that-the-data-would-begin-behind-the-end", 1, four, QUANT_F32, 0);
}

static void two_tensors(struct gguf_builder *b, const char *first, const char *second, uint32_t type, uint64_t offset) {
    builder_header(b, 3, 2, 0);
    builder_tensor(b, first, 1, (const uint64_t[]){9}, type, 0); /* 36 bytes of F32 */
    builder_tensor(b, second, 1, four, QUANT_F32, offset);
    builder_pad(b, 32);
    builder_zeros(b, 128);
}

static void overlap(struct gguf_builder *b) {
    two_tensors(b, "a", "b", QUANT_F32, 32);
}

static void same_place(struct gguf_builder *b) {
    two_tensors(b, "a", "b", 1000, 0);
}

static void name_twice(struct gguf_builder *b) {
    two_tensors(b, "a", "a", QUANT_F32, 64);
}

static void refuses_bad_files(void **state) {
    static const struct {
        void (*build)(struct gguf_builder *builder);
        const char *message;
    } cases[] = {
        {bad_magic, "file: magic (offset 0): found 47 47 4d 4c, expected \"GGUF\""},
        {ggml_version_1, "file: version (offset 4): found 1, expected 2 or 3"},
        {big_endian, "version (offset 4): found 3 in big-endian order, expected a little-endian file"},
        {too_many_entries, "metadata count (offset 16): found 18446744073709551615, expected at most 1 "},
        {too_many_tensors, "tensor count (offset 8): found 1152921504606846976, expected at most 1 "},
        {long_key,
         "metadata entry 0: a key at offset 32: found 32 bytes before the file's end, expected 18446744073709551615"},
        {empty_key, "a key at offset 24: found a length of 0 bytes, expected 1 to 65535"},
        {huge_key, "a key at offset 24: found a length of 65536 bytes"},
        {control_key, "found the character 10, expected printable ASCII"},
        {latin_tensor_name, "found the character 228, expected printable ASCII"},
        {unknown_value_type, "key k: found value type 13, expected 0 to 12"},
        {nested_array, "key k: found array element type 9, expected no arrays within arrays"},
        {unknown_element_type, "key k: found array element type 77, expected 0 to 12"},
        {long_array, "found u64[2305843009213693952] at offset 49, expected no more than fits in the 16 bytes"},
        {long_string_array, "found string[3] at offset"},
        {long_string_in_array, "found 4 bytes before the file's end, expected 18446744073709551611"},
        {bool_of_two, "key k: found the bool 2 at offset 37, expected 0 or 1"},
        {bool_of_two_in_array, "key k: found the bool 255 at offset 51"},
        {key_twice, "file: key k: found twice, expected once"},
        {alignment_no_power, "key general.alignment: found 48, expected a power of two from 8 on"},
        {alignment_zero, "found 0, expected a power of two"},
        {alignment_small, "found 4, expected a power of two"},
        {alignment_string, "key general.alignment (offset 53): found type string, expected an integer"},
        {long_tensor_name, "a tensor's name at offset 24: found a length of 65 bytes, expected 1 to 64"},
        {empty_tensor_name, "found a length of 0 bytes, expected 1 to 64"},
        {no_dimensions, "tensor w (offset 24): found 0 dimensions, expected 1 to 4"},
        {five_dimensions, "found 5 dimensions"},
        {dimension_zero, "tensor w (offset 24): found dimension 1 of size 0, expected 1 or more"},
        {shape_overflow, "tensor w (offset 24): found a shape of 2^63 weights or more"},
        {shape_overflow_then_more, "found a shape of 2^63 weights or more"},
        {bytes_overflow, "found a shape of 4611686018427387904 weights, expected fewer than 2^64 bytes"},
        {partial_block, "found rows of 128 weights, expected a multiple of the 256 in a block of Q4_K"},
        {unaligned_offset, "tensor w: found its data at 16 from offset 64, expected a multiple of the alignment 32"},
        {offset_outside,
         "tensor w: found 16 bytes of data at 64 from offset 64, expected them to end with the file at 128"},
        {offset_wraps, "found 16 bytes of data at 18446744073709551584 from"},
        {data_outside, "found 36 bytes of data at 32 from"},
        {unknown_outside, "found 0 bytes of data at 64 from"},
        {no_data_at_all, "found 16 bytes of data at 0 from"},
        {overlap, "tensor b (offset 128): found within the data of a, expected behind its end at 132"},
        {same_place, "found within the data of"},
        {name_twice, "tensor a: found twice, expected once"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct gguf_builder builder = {0};
        cases[i].build(&builder);
        assert_int_equal(try_all(builder.bytes, builder.length), -1);
        assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
        if (!strstr(status.message, cases[i].message))
            fail_msg("\"%s\" does not tell \"%s\"", status.message, cases[i].message);
        builder_free(&builder);
    }
}

static void refuses_every_truncation(void **state) {
    struct gguf_builder builder = {0};
    builder_sample(&builder, 3);
    assert_int_equal(try_all(builder.bytes, builder.length), 0);
    for (size_t length = 0; length < builder.length; length++)
        assert_int_equal(try_all(builder.bytes, length), -1);
    builder_free(&builder);
}

static void survives_mutation(void **state) {
    struct gguf_builder builder = {0};
    builder_sample(&builder, 3);
    size_t front = builder.length - 1092; /* mutated data would teach nothing */
    unsigned char *mutated = malloc(builder.length);
    uint64_t seed = clock_random_u64();
    unsigned taken = 0;
    printf("# seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < 20000; i++) {
        memcpy(mutated, builder.bytes, builder.length);
        for (unsigned changes = 1 + i % 4; changes; changes--) {
            seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            static const unsigned char extremes[] = {0, 1, 0x7f, 0x80, 0xff};
            unsigned char value = (unsigned char)(seed >> 56);
            mutated[(seed >> 20) % front] = value & 1 ? value : extremes[value / 2 % 5];
        }
        taken += try_all(mutated, builder.length) == 0;
    }
    printf("# %u of 20000 mutations are still files\n", taken);
    assert_in_range(taken, 1, 19999);
    free(mutated);
    builder_free(&builder);
}

/* ---- the file system */

static void assert_not_opened(const char *path, enum status_code code, const char *part) {
    struct gguf *gguf;
    status = (struct status){0};
    assert_int_equal(gguf_open(path, &gguf, &status), -1);
    assert_null(gguf);
    assert_int_equal(status.code, code);
    assert_memory_equal(status.message, path, strlen(path));
    if (!strstr(status.message, part))
        fail_msg("\"%s\" does not tell \"%s\"", status.message, part);
}

static void opens_files(void **state) {
    char directory[] = "/tmp/moed-gguf-XXXXXX", path[64];
    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/file", directory);
    assert_not_opened(path, STATUS_NOT_FOUND, "No such file");
    assert_not_opened(directory, STATUS_INVALID_ARGUMENT, "found a directory, expected a GGUF file");
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_not_opened(path, STATUS_INVALID_ARGUMENT, "no regular file"); /* and does not wait for a writer */
    unlink(path);
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    assert_true(fd >= 0);
    assert_not_opened(path, STATUS_INVALID_ARGUMENT, "found an empty file");

    struct gguf_builder builder = {0};
    builder_sample(&builder, 3);
    assert_int_equal(write(fd, builder.bytes, builder.length), builder.length);
    close(fd);
    struct gguf *gguf, *memory = open_good(&builder);
    assert_int_equal(gguf_open(path, &gguf, &status), 0);
    char mapped[17], built[17];
    gguf_fingerprint(gguf, mapped);
    gguf_fingerprint(memory, built);
    assert_string_equal(mapped, built);
    assert_string_equal(gguf_path(gguf), path);
    gguf_release(gguf, gguf_tensor_at(gguf, 0)->data, gguf_file_bytes(gguf) - gguf_tensor_at(gguf, 0)->offset);
    gguf_release(memory, gguf_tensor_at(memory, 0)->data, gguf_file_bytes(memory) - gguf_tensor_at(memory, 0)->offset);
    gguf_fingerprint(gguf, mapped); /* what was released is read again */
    assert_string_equal(mapped, built);
    gguf_close(memory);
    gguf_close(gguf);
    gguf_close(NULL);
    builder_free(&builder);
    unlink(path);
    rmdir(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_metadata),
        cmocka_unit_test(refuses_wrong_requests),
        cmocka_unit_test(reads_tensors),
        cmocka_unit_test(finds_data_behind_aligned_descriptions),
        cmocka_unit_test(takes_an_empty_file_of_the_format),
        cmocka_unit_test(finds_many_names),
        cmocka_unit_test(knows_the_formats_of_the_kernels),
        cmocka_unit_test(fingerprints_content),
        cmocka_unit_test(fingerprints_samples_of_large_tensors),
        cmocka_unit_test(releases_no_memory_of_the_caller),
        cmocka_unit_test(refuses_bad_files),
        cmocka_unit_test(refuses_every_truncation),
        cmocka_unit_test(survives_mutation),
        cmocka_unit_test(opens_files),
    };
    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
