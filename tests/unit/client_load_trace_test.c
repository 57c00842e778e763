#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "client/load_trace.h"

static char path[64];

static int setup(void **state) {
    snprintf(path, sizeof path, "client_load_trace_test.XXXXXX");
    int fd = mkstemp(path);
    return fd < 0 ? -1 : close(fd);
}

static int teardown(void **state) {
    return unlink(path);
}

static int read_bytes(struct load_trace *trace, const char *bytes, size_t size, struct status *status) {
    FILE *file = fopen(path, "we");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
    return load_trace_read(trace, path, status);
}

static void reads_a_trace(void **state) {
    static const char text[] =
        "{\"arrival\": 100, \"prompt_tokens\": 512, \"output_tokens\": 64, \"shared_prefix\": 128, \"prefix_id\": 7}\n"
        "\n  \t\r\n"
        "{\"output_tokens\":1,\"prompt_tokens\":16777216,\"arrival\":100.25}\r\n"
        "{\"arrival\": 100.25, \"prompt_tokens\": 2, \"output_tokens\": 3, \"shared_prefix\": 2}";
    struct load_trace trace;
    struct status status = {0};
    assert_int_equal(read_bytes(&trace, text, sizeof text - 1, &status), 0);
    const struct load_trace_entry expected[] = {
        {0, 512, 64, 128, 1, 7}, {0.25, 16777216, 1, 0, 4, 0}, {0.25, 2, 3, 2, 5, 0}};
    assert_int_equal(trace.count, 3);
    for (size_t i = 0; i < 3; i++) {
        const struct load_trace_entry *entry = &trace.entries[i];
        assert_true(entry->arrival_s == expected[i].arrival_s);
        assert_int_equal(entry->prompt_tokens, expected[i].prompt_tokens);
        assert_int_equal(entry->output_tokens, expected[i].output_tokens);
        assert_int_equal(entry->shared_prefix, expected[i].shared_prefix);
        assert_int_equal(entry->line, expected[i].line);
        assert_int_equal(entry->prefix_id, expected[i].prefix_id);
    }
    load_trace_free(&trace);
}

static void reads_many_lines(void **state) {
    enum { COUNT = 5000, LINE = 70 };
    char *text = malloc(COUNT * LINE);
    size_t size = 0;
    assert_non_null(text);
    for (unsigned i = 0; i < COUNT; i++)
        size += (size_t)snprintf(text + size, LINE, "{\"arrival\":%u.5,\"prompt_tokens\":%u,\"output_tokens\":9}\n", i,
                                 i + 1);
    struct load_trace trace;
    struct status status = {0};
    assert_int_equal(read_bytes(&trace, text, size, &status), 0);
    assert_int_equal(trace.count, COUNT);
    for (unsigned i = 0; i < COUNT; i++)
        assert_true(trace.entries[i].arrival_s == i && trace.entries[i].prompt_tokens == i + 1);
    load_trace_free(&trace);
    free(text);
}

#define FIELDS "{\"arrival\": 1, \"prompt_tokens\": 5, \"output_tokens\": 6"
#define GOOD FIELDS "}\n"

static void refuses_bad_lines(void **state) {
    static const struct {
        const char *text, *error;
    } cases[] = {
        {"", ": no request in it"},
        {"\n \n", ": no request in it"},
        {GOOD "{", ":2:"}, /* and what jansson says */
        {GOOD "nonsense", ":2:"},
        {"\n\n[1]", ":3: the line: [1]; a JSON object is allowed"},
        {GOOD GOOD "{} {}", ":3:"},
        {"{}", ":1: arrival: nothing; a number of seconds from 0, the line before's, to 1e+10 is allowed"},
        {"{\"arrival\": \"1\", \"prompt_tokens\": 5, \"output_tokens\": 6}", ":1: arrival: \"1\"; a number"},
        {"{\"arrival\": -1, \"prompt_tokens\": 5, \"output_tokens\": 6}", ":1: arrival: -1; a number"},
        {"{\"arrival\": 1e11, \"prompt_tokens\": 5, \"output_tokens\": 6}", ":1: arrival: 1"},
        {"{\"arrival\": 1e999, \"prompt_tokens\": 5, \"output_tokens\": 6}", ":1:"},
        {"{\"arrival\": NaN, \"prompt_tokens\": 5, \"output_tokens\": 6}", ":1:"},
        {GOOD "{\"arrival\": 0.5, \"prompt_tokens\": 5, \"output_tokens\": 6}",
         ":2: arrival: 0.5; a number of seconds from 1, the line before's"},
        {"{\"arrival\": 1, \"output_tokens\": 6}",
         ":1: prompt_tokens: nothing; a whole number from 1 to 16777216 is allowed"},
        {"{\"arrival\": 1, \"prompt_tokens\": 0, \"output_tokens\": 6}", ":1: prompt_tokens: 0; a whole number from 1"},
        {"{\"arrival\": 1, \"prompt_tokens\": 5.0, \"output_tokens\": 6}", ":1: prompt_tokens: 5.0; a whole number"},
        {"{\"arrival\": 1, \"prompt_tokens\": 16777217, \"output_tokens\": 6}", ":1: prompt_tokens: 16777217; a whole"},
        {"{\"arrival\": 1, \"prompt_tokens\": 5, \"output_tokens\": -6}", ":1: output_tokens: -6; a whole number"},
        {"{\"arrival\": 1, \"prompt_tokens\": 5, \"output_tokens\": null}", ":1: output_tokens: null; a whole number"},
        {"{\"arrival\": 1, \"prompt_tokens\": 5, \"output_tokens\": 99999999999999999999}", ":1:"},
        {FIELDS ", \"shared_prefix\": 6}",
         ":1: shared_prefix: 6; a whole number from 0 to 5 is allowed"},
        {FIELDS ", \"prefix_id\": -1}", ":1: prefix_id: -1; a whole"},
        {FIELDS ", \"prefix_id\": \"a\"}", ":1: prefix_id: \"a\"; a"},
        {FIELDS ", \"shared\": 1}",
         ":1: field \"shared\"; arrival, prompt_tokens, output_tokens, shared_prefix and prefix_id are allowed"},
        {"{\"\\u001b[2J\\n\": 1}", ":1: field \"\\u001B[2J\\n\"; arrival"},
        {"{\"arrival\": \"0123456789012345678901234567890123456789012345678901234567890123456789\"}",
         ":1: arrival: \"01234567890123456789012345678901234567890123456789012345678...; a number"},
        {"\x1b[2J", ":1:"},
        {"{\"arrival\": 1, \"prompt_tokens\": 5, \"prompt_tokens\": 5, \"output_tokens\": 6}", ":1:"},
        {"{\"arrival\": 1, \"prompt_tokens\": 5, \"output_tokens\": \"\xff\"}", ":1:"},
        {"{\"arrival\": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}",
         ":1: arrival: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]...; a number"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct load_trace trace;
        struct status status = {0};
        char expected[512];
        snprintf(expected, sizeof expected, "%s%s", path, cases[i].error);
        if (read_bytes(&trace, cases[i].text, strlen(cases[i].text), &status) == 0)
            fail_msg("taken: %s", cases[i].text);
        assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
        for (const char *c = status.message; *c; c++)
            assert_true(*c >= ' ' && *c <= '~');
        if (strncmp(status.message, expected, strlen(expected)) != 0)
            fail_msg("'%s' where this was expected: '%s'", status.message, expected);
        load_trace_free(&trace);
    }
}

static void refuses_bad_bytes(void **state) {
    struct load_trace trace;
    struct status status = {0};
    static const char zero[] = "{\"arrival\": 1, \"prompt_tokens\": 5, \"output_tokens\": 6\0}";
    assert_int_equal(read_bytes(&trace, zero, sizeof zero - 1, &status), -1);
    assert_non_null(strstr(status.message, ":1:54: byte 0x00; text is allowed"));
    load_trace_free(&trace);

    /* The longest line that is taken, blanks behind its object, and one byte more. */
    char line[TRACE_LINE_MAX + 2];
    memset(line, ' ', sizeof line);
    memcpy(line, GOOD, strlen(GOOD) - 1);
    line[TRACE_LINE_MAX] = '\n';
    assert_int_equal(read_bytes(&trace, line, TRACE_LINE_MAX + 1, &status), 0);
    load_trace_free(&trace);
    line[TRACE_LINE_MAX] = ' ';
    assert_int_equal(read_bytes(&trace, line, TRACE_LINE_MAX + 1, &status), -1);
    assert_non_null(strstr(status.message, ":1: a line of more than 4096 bytes"));
    load_trace_free(&trace);

    assert_int_equal(load_trace_read(&trace, "/dev/zero", &status), -1);
    assert_string_equal(status.message, "/dev/zero:1:1: byte 0x00; text is allowed");
    load_trace_free(&trace);
    assert_int_equal(load_trace_read(&trace, "/nonexistent/trace", &status), -1);
    assert_string_equal(status.message, "/nonexistent/trace: No such file or directory");
    load_trace_free(&trace);
    assert_int_equal(load_trace_read(&trace, "/", &status), -1);
    assert_string_equal(status.message, "/: Is a directory");
    load_trace_free(&trace);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_a_trace),
        cmocka_unit_test(reads_many_lines),
        cmocka_unit_test(refuses_bad_lines),
        cmocka_unit_test(refuses_bad_bytes),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
