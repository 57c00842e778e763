#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/load_plot.h"

static char *plot(const char *title, const struct load_figures *figures, size_t count) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    load_plot(out, title, "streams & more", figures, count);
    assert_int_equal(fclose(out), 0);
    assert_int_equal(strlen(text), size);
    return text;
}

/* One element's tag behind its '<'; what stands behind the '>'. Attributes are name="value", without markup. */
static const char *check_tag(const char *at, bool *closed) {
    while (isalnum((unsigned char)*at))
        at++;
    while (*at == ' ') {
        at++;
        assert_true(isalpha((unsigned char)*at));
        while (isalnum((unsigned char)*at) || *at == '-')
            at++;
        assert_memory_equal(at, "=\"", 2);
        at += 2;
        at += strcspn(at, "\"<&");
        assert_int_equal(*at++, '"');
    }
    *closed = *at == '/';
    at += *closed;
    assert_int_equal(*at, '>');
    return at + 1;
}

/* Fails unless the text is well-formed, as far as SVG of this kind can be ill-formed. */
static void check_xml(const char *text) {
    const char *open[8];
    size_t depth = 0, roots = 0;
    for (const char *at = text; *at;) {
        assert_true(*at == '\n' || (*at >= ' ' && *at <= '~'));
        if (at[0] == '<' && at[1] == '/') {
            assert_true(depth > 0);
            size_t length = strcspn(at + 2, ">");
            assert_memory_equal(at + 2, open[--depth], length);
            assert_false(isalnum((unsigned char)open[depth][length]));
            at += length + 3;
        } else if (*at == '<') {
            bool closed;
            roots += depth == 0;
            assert_true(depth < sizeof open / sizeof *open && isalpha((unsigned char)at[1]));
            open[depth] = at + 1;
            at = check_tag(at + 1, &closed);
            depth += !closed;
        } else if (*at == '&') {
            assert_true(!strncmp(at, "&lt;", 4) || !strncmp(at, "&gt;", 4) || !strncmp(at, "&amp;", 5));
            at++;
        } else {
            assert_true(depth > 0 || *at == '\n');
            at++;
        }
    }
    assert_true(depth == 0 && roots == 1);
    assert_null(strstr(text, "nan"));
    assert_null(strstr(text, "inf"));
}

static size_t occurrences(const char *text, const char *part) {
    size_t count = 0;
    for (const char *at = text; (at = strstr(at, part)); at++)
        count++;
    return count;
}

static void draws_every_run(void **state) {
    struct load_figures figures[7] = {0};
    for (size_t i = 0; i < 7; i++) {
        figures[i].load = 1u << i;
        figures[i].ttft.p50_ms = (double)i + 1;
        figures[i].ttft.p99_ms = 40.0 * (double)(i + 1);
        figures[i].itl.p50_ms = 0.001;
        figures[i].itl.p99_ms = 0.002;
        figures[i].tokens_out_per_s = 1e6 * (double)i;
    }
    char *text = plot("a model", figures, 7);
    check_xml(text);
    assert_int_equal(occurrences(text, "<polyline "), 5);
    assert_int_equal(occurrences(text, "<circle "), 5 * 7);
    assert_int_equal(occurrences(text, ">streams &amp; more</text>"), 3);
    assert_int_equal(occurrences(text, ">p50</text>"), 2);
    assert_int_equal(occurrences(text, ">p99</text>"), 2);
    assert_int_equal(occurrences(text, ">64</text>"), 3); /* each axis to its end */
    assert_int_equal(occurrences(text, ">300</text>"), 1);
    /* The p99 of 40 to 280 ms, up to 300, on 270 pixels that end at 346; from 68 to 338. */
    assert_non_null(strstr(text, "points=\"68.0,310.0 113.0,274.0 158.0,238.0 203.0,202.0 248.0,166.0 293.0,130.0 "
                                 "338.0,94.0\""));
    free(text);
}

static void order_of_the_runs_does_not_matter(void **state) {
    struct load_figures rising[3] = {{.load = 0.5}, {.load = 3}, {.load = 100}};
    for (size_t i = 0; i < 3; i++)
        rising[i].ttft.p99_ms = (double)(5 - i);
    struct load_figures mixed[3] = {rising[2], rising[0], rising[1]};
    char *a = plot("t", rising, 3), *b = plot("t", mixed, 3);
    check_xml(a);
    assert_string_equal(a, b);
    free(a);
    free(b);
}

static void takes_any_text_and_figures(void **state) {
    struct load_figures same[2] = {{.load = 8}, {.load = 8}}, one = {.load = 1e6};
    one.ttft.p99_ms = 1e12;
    one.tokens_out_per_s = 1e-12;
    char *text = plot("</svg><script>&\"'\x01\x1f\xff", same, 2);
    check_xml(text);
    assert_non_null(strstr(text, ">&lt;/svg&gt;&lt;script&gt;&amp;\"'?" "?" "?" "</text>"));
    free(text);
    text = plot("", &one, 1);
    check_xml(text);
    free(text);
}

static void crowded_labels_are_left_out(void **state) {
    struct load_figures figures[100] = {0};
    for (size_t i = 0; i < 100; i++)
        figures[i].load = (double)(1000 + i);
    char *text = plot("t", figures, 100);
    check_xml(text);
    assert_int_equal(occurrences(text, ">1000</text>"), 3);
    assert_int_equal(occurrences(text, ">1001</text>"), 0);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(draws_every_run),
        cmocka_unit_test(order_of_the_runs_does_not_matter),
        cmocka_unit_test(takes_any_text_and_figures),
        cmocka_unit_test(crowded_labels_are_left_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
