#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/log.h"

/* Standard error is a file while a test runs; captured() returns what was written since the last call. */
static FILE *capture;
static int saved_stderr;
static char output[1 << 20];

static int begin(void **state) {
    capture = tmpfile();
    saved_stderr = dup(STDERR_FILENO);
    return capture && saved_stderr >= 0 && dup2(fileno(capture), STDERR_FILENO) >= 0 ? 0 : -1;
}

static int end(void **state) {
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    return fclose(capture);
}

static const char *captured(void) {
    ssize_t n = pread(fileno(capture), output, sizeof output - 1, 0);
    assert_true(n >= 0);
    output[n] = '\0';
    assert_int_equal(ftruncate(fileno(capture), 0), 0);
    assert_int_equal(lseek(fileno(capture), 0, SEEK_SET), 0);
    return output;
}

/* What stands behind "2026-11-23T18:00:00.000Z ", which is checked for its form. */
static const char *behind_time(const char *line) {
    static const char form[] = "dddd-dd-ddTdd:dd:dd.dddZ ";
    for (size_t i = 0; i < sizeof form - 1; i++)
        if (form[i] == 'd')
            assert_in_range(line[i], '0', '9');
        else
            assert_int_equal(line[i], form[i]);
    return line + sizeof form - 1;
}

static void writes_key_value(void **state) {
    log_setup("moed-test", LOG_INFO, LOG_TEXT);
    log_info("worker_ready", LOG_STR("worker", "a:1"), LOG_UINT("kv_blocks", UINT64_MAX), LOG_INT("delta", -5),
             LOG_REAL("load", 0.25));
    assert_string_equal(behind_time(captured()),
                        "info moed-test worker_ready worker=a:1 kv_blocks=18446744073709551615 delta=-5 load=0.25\n");
    log_error("stopped");
    assert_string_equal(behind_time(captured()), "error moed-test stopped\n");
}

static void quotes_what_needs_it(void **state) {
    log_setup("moed-test", LOG_INFO, LOG_TEXT);
    log_info("e", LOG_STR("a", ""), LOG_STR("b", NULL), LOG_STR("c", "x y"), LOG_STR("d", "k=v"),
             LOG_STR("e", "say \"hi\"\\"), LOG_STR("f", "a\nb\tc\x01\x7f"));
    assert_string_equal(behind_time(captured()),
                        "info moed-test e a=\"\" b=\"\" c=\"x y\" d=\"k=v\" e=\"say \\\"hi\\\"\\\\\" "
                        "f=\"a\\nb\\tc\\u0001\\u007f\"\n");
}

static void keeps_utf8_and_replaces_the_rest(void **state) {
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"\xc3\xa4", "\xc3\xa4"},
        {"\xe2\x82\xac", "\xe2\x82\xac"},
        {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"},
        {"\xf4\x8f\xbf\xbf", "\xf4\x8f\xbf\xbf"},
        {"\xc3", "\\ufffd"},                                 /* cut short */
        {"\xe2\x82z", "\\ufffd\\ufffdz"},
        {"\xc0\x80", "\\ufffd\\ufffd"},                      /* overlong */
        {"\xe0\x80\x80", "\\ufffd\\ufffd\\ufffd"},
        {"\xf0\x80\x80\x80", "\\ufffd\\ufffd\\ufffd\\ufffd"},
        {"\xed\xa0\x80", "\\ufffd\\ufffd\\ufffd"},           /* a surrogate */
        {"\xf4\x90\x80\x80", "\\ufffd\\ufffd\\ufffd\\ufffd"}, /* past U+10FFFF */
        {"\xff", "\\ufffd"},
    };
    log_setup("t", LOG_INFO, LOG_TEXT);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char expected[64];
        log_info("e", LOG_STR("s", cases[i].in));
        snprintf(expected, sizeof expected, "info t e s=\"%s\"\n", cases[i].out);
        assert_string_equal(behind_time(captured()), expected);
    }
}

static void writes_json(void **state) {
    log_setup("moed-test", LOG_INFO, LOG_JSON);
    log_warn("refused", LOG_STR("reason", "a \"b\"\n"), LOG_UINT("n", 3), LOG_REAL("nan", NAN),
             LOG_REAL("inf", INFINITY), LOG_STR("none", NULL));
    const char *line = captured();
    assert_memory_equal(line, "{\"time\":\"", 9);
    assert_memory_equal(line + 9 + 24, "\",", 2);
    assert_string_equal(line + 9 + 26,
                        "\"level\":\"warn\",\"program\":\"moed-test\",\"event\":\"refused\","
                        "\"reason\":\"a \\\"b\\\"\\n\",\"n\":3,\"nan\":null,\"inf\":null,\"none\":\"\"}\n");
}

static void leaves_out_lower_levels(void **state) {
    log_setup("t", LOG_WARN, LOG_TEXT);
    log_info("quiet");
    log_debug("quiet");
    assert_string_equal(captured(), "");
    log_warn("loud");
    assert_string_equal(behind_time(captured()), "warn t loud\n");
}

/* Around every length at which something else is cut: the value, its quote, the next key, the next number. */
static void cuts_long_lines(void **state) {
    char text[5000];
    for (int format = LOG_TEXT; format <= LOG_JSON; format++) {
        log_setup("t", LOG_INFO, (enum log_format)format);
        for (size_t length = 3900; length < sizeof text; length++) {
            memset(text, 'x', length);
            text[length] = '\0';
            text[length - 1] = '"'; /* an escape that must not be cut in two */
            log_info("e", LOG_STR("s", text), LOG_UINT("number", 123456789), LOG_STR("last", "z"));
            const char *line = captured();
            size_t n = strlen(line);
            bool cut = strstr(line, format == LOG_JSON ? ",\"cut\":true}\n" : " cut=true\n") != NULL;
            assert_true(n <= 4096);
            assert_int_equal(line[n - 1], '\n');
            assert_ptr_equal(strchr(line, '\n'), line + n - 1);
            assert_int_equal(cut, strstr(line, format == LOG_JSON ? "\"last\":\"z\"" : " last=z") == NULL);
            if (cut)
                assert_true(n > 4096 - 64);
            if (strstr(line, "number"))
                assert_non_null(strstr(line, "123456789"));
            unsigned quotes = 0; /* unescaped ones come in pairs */
            for (size_t i = 0; i < n; i++)
                if (line[i] == '\\')
                    i++;
                else
                    quotes += line[i] == '"';
            assert_int_equal(quotes % 2, 0);
        }
    }
}

/* A long value is cut even where it needs no quotes, so that its beginning is there. */
static void cuts_long_values(void **state) {
    char text[5000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    log_setup("t", LOG_INFO, LOG_TEXT);
    log_info("e", LOG_STR("s", text));
    assert_memory_equal(behind_time(captured()), "info t e s=\"xxxxxxxx", 20);
}

enum { THREADS = 4, LINES = 500 };

static void *write_lines(void *argument) {
    for (int i = 0; i < LINES; i++)
        log_info("line", LOG_STR("pad", "0123456789012345678901234567890123456789"), LOG_INT("i", i));
    return NULL;
}

static void keeps_lines_of_threads_apart(void **state) {
    pthread_t threads[THREADS];
    log_setup("t", LOG_INFO, LOG_TEXT);
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, write_lines, NULL), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    int lines = 0;
    for (char *save, *line = strtok_r((char *)captured(), "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        assert_memory_equal(behind_time(line), "info t line pad=0123456789012345678901234567890123456789 i=", 58);
        lines++;
    }
    assert_int_equal(lines, THREADS * LINES);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(writes_key_value),
        cmocka_unit_test(quotes_what_needs_it),
        cmocka_unit_test(keeps_utf8_and_replaces_the_rest),
        cmocka_unit_test(writes_json),
        cmocka_unit_test(leaves_out_lower_levels),
        cmocka_unit_test(cuts_long_lines),
        cmocka_unit_test(cuts_long_values),
        cmocka_unit_test(keeps_lines_of_threads_apart),
    };
    return cmocka_run_group_tests_name("log", tests, begin, end);
}
