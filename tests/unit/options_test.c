#include "config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/options.h"

static bool flag;
static const char *listen_on, *backend;
static uint64_t threads, bytes;
static double fraction, bias;
static struct option_list peers;

static const char *const backends[] = {"auto", "cpu", "cuda", NULL};
static const struct option table[] = {
    {.name = "quiet", .type = OPTION_FLAG, .value = &flag, .help = "Say less."},
    {.name = "listen", .type = OPTION_STRING, .value = &listen_on, .argument = "ADDR:PORT", .help = "Where to listen."},
    {.name = "threads", .type = OPTION_UINT, .value = &threads, .argument = "N", .min = 1, .max = 64,
     .help = "Number of threads, which is explained at great length so that the text has to go on in the next line."},
    {.name = "max-bytes", .type = OPTION_UINT, .value = &bytes, .argument = "N", .help = "Limit."},
    {.name = "fraction", .type = OPTION_REAL, .value = &fraction, .argument = "F", .real_max = 1, .help = "Share."},
    {.name = "bias", .type = OPTION_REAL, .value = &bias, .argument = "F", .real_min = -2, .real_max = 2,
     .help = "Bias."},
    {.name = "backend", .type = OPTION_CHOICE, .value = &backend, .argument = "NAME", .choices = backends,
     .help = "Which."},
    {.name = "peer", .type = OPTION_LIST, .value = &peers, .argument = "ZMQ[,ZMQ...]", .help = "Peers."},
    {.name = NULL},
};
static const struct option_set set = {"moed-test", "[OPTION]... FILE", "Tests options.", "See also: nothing.", table};

static struct status status;
static int operands;
static char *arguments[16];

/* Parses the words behind the program's name, from fresh defaults. */
#define parse(...) parse_words((const char *const[]){"moed-test", __VA_ARGS__ __VA_OPT__(,) NULL})
static int parse_words(const char *const *words) {
    int count = 0;
    for (; words[count]; count++)
        arguments[count] = (char *)words[count];
    arguments[count] = NULL;
    flag = false;
    listen_on = "127.0.0.1:1";
    backend = "auto";
    threads = 2;
    bytes = 64 << 20;
    fraction = 0.95;
    bias = 0;
    options_free_list(&peers);
    status = (struct status){0};
    operands = -1;
    return options_parse(&set, count, arguments, &operands, &status);
}

static int clear_environment(void **state) {
    static const char *const names[] = {"QUIET", "LISTEN", "THREADS", "MAX_BYTES", "FRACTION", "BIAS", "BACKEND",
                                        "PEER"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char name[32];
        snprintf(name, sizeof name, "MOED_%s", names[i]);
        unsetenv(name);
    }
    return 0;
}

static void assert_refused(const char *part) {
    assert_int_equal(status.code, STATUS_INVALID_ARGUMENT);
    if (!strstr(status.message, part))
        fail_msg("\"%s\" does not tell \"%s\"", status.message, part);
}

static void keeps_defaults(void **state) {
    assert_int_equal(parse(), OPTIONS_RUN);
    assert_int_equal(operands, 0);
    assert_int_equal(threads, 2);
    assert_string_equal(listen_on, "127.0.0.1:1");
    assert_int_equal(peers.count, 0);
}

static void takes_values(void **state) {
    assert_int_equal(parse("--quiet", "--listen", "[::]:9", "--threads=64", "--max-bytes", "3k", "--fraction", ".5",
                           "--bias=-1.5e0", "--backend=cuda"), OPTIONS_RUN);
    assert_true(flag);
    assert_string_equal(listen_on, "[::]:9");
    assert_int_equal(threads, 64);
    assert_int_equal(bytes, 3072);
    assert_true(fraction == 0.5 && bias == -1.5);
    assert_string_equal(backend, "cuda");
}

static void takes_suffixes(void **state) {
    assert_int_equal(parse("--max-bytes=5M"), OPTIONS_RUN);
    assert_int_equal(bytes, UINT64_C(5) << 20);
    assert_int_equal(parse("--max-bytes=2G"), OPTIONS_RUN);
    assert_int_equal(bytes, UINT64_C(2) << 30);
    assert_int_equal(parse("--max-bytes=16777215T"), OPTIONS_RUN);
    assert_int_equal(bytes, UINT64_C(16777215) << 40);
    assert_int_equal(parse("--max-bytes=18446744073709551615"), OPTIONS_RUN);
    assert_int_equal(bytes, UINT64_MAX);
}

static void takes_flags_both_ways(void **state) {
    assert_int_equal(parse("--quiet", "--no-quiet"), OPTIONS_RUN);
    assert_false(flag);
    assert_int_equal(parse("--no-quiet", "--quiet=true"), OPTIONS_RUN);
    assert_true(flag);
    assert_int_equal(parse("--quiet=false"), OPTIONS_RUN);
    assert_false(flag);
}

static void gathers_lists(void **state) {
    assert_int_equal(parse("--peer", "a,b", "--peer=c"), OPTIONS_RUN);
    assert_int_equal(peers.count, 3);
    assert_string_equal(peers.items[0], "a");
    assert_string_equal(peers.items[1], "b");
    assert_string_equal(peers.items[2], "c");
}

static void moves_operands_to_the_front(void **state) {
    assert_int_equal(parse("one", "--quiet", "-", "--threads", "3", "two", "--", "--listen", "-x"), OPTIONS_RUN);
    assert_int_equal(operands, 5);
    static const char *const expected[] = {"one", "-", "two", "--listen", "-x"};
    for (int i = 0; i < operands; i++)
        assert_string_equal(arguments[i + 1], expected[i]);
    assert_int_equal(parse("--", "--", "--help"), OPTIONS_RUN);
    assert_int_equal(operands, 2);
    assert_string_equal(arguments[1], "--");
    assert_string_equal(arguments[2], "--help");
}

static void reads_the_environment(void **state) {
    setenv("MOED_THREADS", "7", 1);
    setenv("MOED_QUIET", "true", 1);
    setenv("MOED_MAX_BYTES", "1M", 1);
    setenv("MOED_PEER", "x,y", 1);
    assert_int_equal(parse("--max-bytes=1"), OPTIONS_RUN);
    assert_int_equal(threads, 7);
    assert_true(flag);
    assert_int_equal(bytes, 1); /* the command line wins */
    assert_int_equal(peers.count, 2);
    assert_int_equal(parse("--peer=z"), OPTIONS_RUN);
    assert_int_equal(peers.count, 1);
}

static void refuses_bad_variables(void **state) {
    setenv("MOED_THREADS", "65", 1);
    assert_int_equal(parse(), -1);
    assert_refused("variable MOED_THREADS: \"65\" is not a whole number from 1 to 64");
    setenv("MOED_THREADS", "", 1);
    assert_int_equal(parse(), -1);
    assert_refused("variable MOED_THREADS: the value is empty");
}

static void refuses_bad_values(void **state) {
    static const struct {
        const char *argument, *part;
    } cases[] = {
        {"--threads=0", "option --threads: \"0\" is not a whole number from 1 to 64"},
        {"--threads=65", "\"65\" is not"},
        {"--threads=-1", "\"-1\" is not"},
        {"--threads=+1", "\"+1\" is not"},
        {"--threads= 1", "\" 1\" is not"},
        {"--threads=1 ", "\"1 \" is not"},
        {"--threads=0x10", "is not"},
        {"--threads=1.5", "is not"},
        {"--threads=", "option --threads: the value is empty; N is wanted"},
        {"--threads", "option --threads needs a value: N"},
        {"--max-bytes=18446744073709551616", "is not"},
        {"--max-bytes=16777216T", "is not"},
        {"--max-bytes=1kk", "is not"},
        {"--max-bytes=k", "is not"},
        {"--max-bytes=1K", "is not"},
        {"--fraction=nan", "option --fraction: \"nan\" is not a number from 0 to 1"},
        {"--fraction=inf", "is not"},
        {"--fraction=-0.1", "is not"},
        {"--fraction=1.01", "is not"},
        {"--fraction=1e999", "is not"},
        {"--fraction=0x1p-1", "is not"},
        {"--fraction=0.5x", "is not"},
        {"--fraction=-", "is not"},
        {"--fraction=.", "is not"},
        {"--bias=-2.5", "from -2 to 2"},
        {"--bias=-nan", "is not"},
        {"--backend=gpu", "option --backend: \"gpu\" is not one of auto, cpu, cuda"},
        {"--quiet=1", "is not true or false"},
        {"--no-quiet=true", "unknown"},
        {"--no-threads", "option --no-threads is unknown"},
        {"--no-", "unknown"},
        {"--listen=", "the value is empty; ADDR:PORT is wanted"},
        {"--peer=a,,b", "without empty items"},
        {"--peer=a,", "without empty items"},
        {"--thread=1", "option --thread=1 is unknown; moed-test --help lists them all"},
        {"--", NULL},
        {"-threads", "option -threads is unknown"},
        {"-1", "option -1 is unknown"},
        {"--=x", "unknown"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(parse(cases[i].argument), cases[i].part ? -1 : OPTIONS_RUN);
        if (cases[i].part)
            assert_refused(cases[i].part);
    }
}

/* What standard output got while options_parse ran. */
static const char *printed(const char *argument) {
    static char text[8192];
    FILE *file = tmpfile();
    assert_non_null(file);
    fflush(stdout);
    int saved = dup(STDOUT_FILENO);
    dup2(fileno(file), STDOUT_FILENO);
    int result = parse("--threads=9", argument);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    assert_int_equal(result, OPTIONS_EXIT);
    ssize_t n = pread(fileno(file), text, sizeof text - 1, 0);
    fclose(file);
    assert_true(n > 0);
    text[n] = '\0';
    return text;
}

static void prints_help(void **state) {
    setenv("MOED_THREADS", "junk", 1); /* must not keep anyone from help */
    const char *help = printed("--help");
    assert_memory_equal(help, "Usage: moed-test [OPTION]... FILE\nTests options.\n", 49);
    for (const struct option *option = table; option->name; option++) {
        char name[64];
        snprintf(name, sizeof name, "  --%s", option->name);
        assert_non_null(strstr(help, name));
    }
    assert_non_null(strstr(help, "[default: 2] [MOED_THREADS]"));
    assert_non_null(strstr(help, "[default: 64M] [MOED_MAX_BYTES]"));
    assert_non_null(strstr(help, "[default: 0.95] [MOED_FRACTION]"));
    assert_non_null(strstr(help, "[default: auto] [MOED_BACKEND]"));
    assert_non_null(strstr(help, "Peers. [MOED_PEER]"));
    assert_non_null(strstr(help, "\nSee also: nothing.\n"));
    for (const char *line = help; *line; line += strcspn(line, "\n") + 1) {
        size_t length = strcspn(line, "\n");
        assert_true(length <= 100);
        assert_true(length == 0 || line[length - 1] != ' ');
    }
}

static void prints_version(void **state) {
    assert_string_equal(printed("--version"), "moed-test " PACKAGE_VERSION "\n");
}

static int free_peers(void **state) {
    options_free_list(&peers);
    return 0;
}

#define options_test(f) cmocka_unit_test_setup_teardown(f, clear_environment, free_peers)

int main(void) {
    const struct CMUnitTest tests[] = {
        options_test(keeps_defaults),     options_test(takes_values),
        options_test(takes_suffixes),     options_test(takes_flags_both_ways),
        options_test(gathers_lists),      options_test(moves_operands_to_the_front),
        options_test(reads_the_environment), options_test(refuses_bad_variables),
        options_test(refuses_bad_values), options_test(prints_help),
        options_test(prints_version),
    };
    return cmocka_run_group_tests_name("options", tests, NULL, NULL);
}
