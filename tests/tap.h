#ifndef MOED_TESTS_TAP_H
#define MOED_TESTS_TAP_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/*
 * A test program's output in the Test Anything Protocol, for tests that must build where cmocka is not: one tap_ok a
 * check that means something on its own, tap_done as the last line of main.
 */
static int tap_count, tap_failed;

__attribute__((format(printf, 2, 3))) static inline bool tap_ok(bool pass, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("%s %d - ", pass ? "ok" : "not ok", ++tap_count);
    vprintf(format, arguments);
    printf("\n");
    fflush(stdout);
    va_end(arguments);
    tap_failed += !pass;
    return pass;
}

__attribute__((format(printf, 1, 2))) static inline void tap_skip(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("ok %d # SKIP ", ++tap_count);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

__attribute__((format(printf, 1, 2))) static inline void tap_note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("# ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

static inline int tap_done(void) {
    printf("1..%d\n", tap_count);
    return tap_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

#endif
