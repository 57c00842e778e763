#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "client/tokens.h"

static void parses_any_separators(void **state) {
    struct token_list list = {0};
    struct status status = {0};
    assert_int_equal(token_list_add_text(&list, "text", " 1,2\t3\r\n, 4294967295 0007,", &status), 0);
    assert_int_equal(list.count, 1);
    const uint32_t expected[] = {1, 2, 3, 4294967295, 7};
    assert_int_equal(list.sequences[0].count, 5);
    assert_memory_equal(list.sequences[0].ids, expected, sizeof expected);
    assert_int_equal(list.tokens, 5);
    token_list_free(&list);
    assert_null(list.sequences);
}

static void semicolons_separate_sequences(void **state) {
    struct token_list list = {0};
    struct status status = {0};
    assert_int_equal(token_list_add_text(&list, "text", "1 2;3\n;\n4,5 6", &status), 0);
    assert_int_equal(list.count, 3);
    assert_int_equal(list.sequences[0].count, 2);
    assert_int_equal(list.sequences[1].count, 1);
    assert_int_equal(list.sequences[2].count, 3);
    assert_int_equal(list.sequences[2].ids[2], 6);
    token_list_free(&list);
}

static void errors_tell_source_line_and_column(void **state) {
    static const struct {
        const char *text, *error;
    } cases[] = {
        {"", "text:1:1: the end without a token id"},
        {" \n\n ", "text:3:2: the end without a token id"},
        {"1 2\n3 x4", "text:2:3: 'x'"},
        {"1;;2", "text:1:3: ';' without a token id before it"},
        {"1;", "text:1:3: the end without a token id"},
        {"-1", "text:1:1: '-'"},
        {"1.5", "text:1:2: '.'"},
        {"4294967296", "text:1:10: a number over 4294967295"},
        {"99999999999999999999999999999", "text:1:10: a number over 4294967295"},
        {"1 \x80", "text:1:3: byte 0x80"},
        {"0x10", "text:1:2: 'x'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct token_list list = {0};
        struct status status = {0};
        assert_int_equal(token_list_add_text(&list, "text", cases[i].text, &status), -1);
        assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
        assert_memory_equal(status.message, cases[i].error, strlen(cases[i].error));
        assert_non_null(strstr(status.message, "expected token ids (0 to 4294967295)"));
        token_list_free(&list);
    }
}

static void reads_files(void **state) {
    char path[] = "client_tokens_test.XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *file = fdopen(fd, "w");
    for (unsigned i = 0; i < 100000; i++)
        fprintf(file, "%u\n", i * 42943u);
    assert_int_equal(fclose(file), 0);

    struct token_list list = {0};
    struct status status = {0};
    assert_int_equal(token_list_add_file(&list, path, &status), 0);
    unlink(path);
    assert_int_equal(list.count, 1);
    assert_int_equal(list.sequences[0].count, 100000);
    for (unsigned i = 0; i < 100000; i++)
        assert_int_equal(list.sequences[0].ids[i], i * 42943u);
    token_list_free(&list);

    assert_int_equal(token_list_add_file(&list, "/nonexistent/tokens", &status), -1);
    assert_string_equal(status.message, "/nonexistent/tokens: No such file or directory");
    assert_int_equal(token_list_add_file(&list, "/", &status), -1);
    assert_string_equal(status.message, "/: Is a directory");
    assert_int_equal(token_list_add_file(&list, "/dev/zero", &status), -1);
    assert_memory_equal(status.message, "/dev/zero:1:1: byte 0x00", 24);
    token_list_free(&list);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parses_any_separators),
        cmocka_unit_test(semicolons_separate_sequences),
        cmocka_unit_test(errors_tell_source_line_and_column),
        cmocka_unit_test(reads_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
