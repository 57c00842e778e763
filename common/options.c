#include "config.h"

#include "common/options.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/options_help.h"

/* Where a value came from, for errors: "option --threads" or "variable MOED_THREADS". */
struct source {
    const char *kind;
    char name[64];
};

void options_variable_name(const char *option, char *out, size_t size) {
    snprintf(out, size, "MOED_%s", option);
    for (char *c = out; *c; c++)
        *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
}

static int refuse(const struct source *source, const char *value, const char *allowed, struct status *status) {
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s %s: \"%.200s\" is not %s", source->kind, source->name, value,
                      allowed);
}

static int set_flag(const struct option *option, const struct source *source, const char *value,
                    struct status *status) {
    bool yes = strcmp(value, "true") == 0;
    if (!yes && strcmp(value, "false") != 0)
        return refuse(source, value, "true or false", status);
    *(bool *)option->value = yes;
    return 0;
}

static int set_uint(const struct option *option, const struct source *source, const char *value,
                    struct status *status) {
    static const char suffixes[] = "kMGT";
    uint64_t max = option->max ? option->max : UINT64_MAX;
    char allowed[128];
    char *end = (char *)value;
    bool fits = isdigit((unsigned char)*value); /* strtoull would take blanks and a sign */

    snprintf(allowed, sizeof allowed, "a whole number from %" PRIu64 " to %" PRIu64 " (k, M, G, T: powers of 1024)",
             option->min, max);
    errno = 0;
    uint64_t number = fits ? strtoull(value, &end, 10) : 0;
    fits = fits && errno == 0;
    const char *suffix = *end ? strchr(suffixes, *end) : NULL;
    if (suffix) {
        uint64_t factor = (uint64_t)1 << (10 * (suffix - suffixes + 1));
        fits = fits && !__builtin_mul_overflow(number, factor, &number);
        end++;
    }
    if (!fits || *end || number < option->min || number > max)
        return refuse(source, value, allowed, status);
    *(uint64_t *)option->value = number;
    return 0;
}

static int set_real(const struct option *option, const struct source *source, const char *value,
                    struct status *status) {
    char allowed[96];
    char *end = (char *)value;
    const char *digits = value + (*value == '-');

    snprintf(allowed, sizeof allowed, "a number from %g to %g", option->real_min, option->real_max);
    /* strtod would take blanks, hexadecimal, "inf" and "nan", too. */
    bool decimal = (isdigit((unsigned char)digits[0]) || digits[0] == '.') && !strpbrk(digits, "xX");
    double number = decimal ? strtod(value, &end) : NAN;
    if (!decimal || *end || !isfinite(number) || number < option->real_min || number > option->real_max)
        return refuse(source, value, allowed, status);
    *(double *)option->value = number;
    return 0;
}

static int set_choice(const struct option *option, const struct source *source, const char *value,
                      struct status *status) {
    char allowed[256] = "one of";
    for (const char *const *choice = option->choices; *choice; choice++) {
        if (strcmp(value, *choice) == 0) {
            *(const char **)option->value = *choice;
            return 0;
        }
        size_t length = strlen(allowed);
        snprintf(allowed + length, sizeof allowed - length, "%s %s", choice == option->choices ? "" : ",", *choice);
    }
    return refuse(source, value, allowed, status);
}

/* Adds the comma-separated items of `value`. */
static int set_list(const struct option *option, const struct source *source, const char *value,
                    struct status *status) {
    struct option_list *list = option->value;
    for (const char *item = value;; item++) {
        size_t length = strcspn(item, ",");
        if (length == 0)
            return refuse(source, value, "a list without empty items", status);
        const char **items = realloc(list->items, (list->count + 1) * sizeof *items);
        char *copy = items ? strndup(item, length) : NULL;
        if (items)
            list->items = items;
        if (!copy)
            return status_set(status, STATUS_RESOURCE_EXHAUSTED, "%s %s: no memory", source->kind, source->name);
        list->items[list->count++] = copy;
        item += length;
        if (!*item)
            return 0;
    }
}

void options_free_list(struct option_list *list) {
    for (size_t i = 0; i < list->count; i++)
        free((char *)list->items[i]);
    free(list->items);
    *list = (struct option_list){0};
}

static int option_set(const struct option *option, const struct source *source, const char *value,
                      struct status *status) {
    if (!*value)
        return status_set(status, STATUS_INVALID_ARGUMENT, "%s %s: the value is empty; %s is wanted", source->kind,
                          source->name, option->argument ? option->argument : "true or false");
    switch (option->type) {
    case OPTION_FLAG: return set_flag(option, source, value, status);
    case OPTION_UINT: return set_uint(option, source, value, status);
    case OPTION_REAL: return set_real(option, source, value, status);
    case OPTION_CHOICE: return set_choice(option, source, value, status);
    case OPTION_LIST: return set_list(option, source, value, status);
    case OPTION_STRING: *(const char **)option->value = value; return 0;
    }
    return status_set(status, STATUS_INTERNAL, "option --%s has no type", option->name);
}

static const struct option *option_find(const struct option *options, const char *name, size_t length) {
    for (const struct option *option = options; option->name; option++)
        if (strlen(option->name) == length && memcmp(option->name, name, length) == 0)
            return option;
    return NULL;
}

/*
 * Takes the option at argv[*at] and moves *at to its last argument. `given` marks the options seen so far: a second
 * --name adds to a list, and takes the place of any other value.
 */
static int parse_argument(const struct option_set *set, int argc, char **argv, int *at, bool *given,
                          struct status *status) {
    const char *name = argv[*at] + 2;
    size_t length = strcspn(name, "=");
    const char *value = name[length] ? name + length + 1 : NULL;
    const struct option *option = strncmp(argv[*at], "--", 2) == 0 ? option_find(set->options, name, length) : NULL;

    if (!option && !value && strncmp(argv[*at], "--no-", 5) == 0) {
        option = option_find(set->options, name + 3, length - 3);
        if (option && option->type != OPTION_FLAG)
            option = NULL;
        value = "false";
    }
    if (!option)
        return status_set(status, STATUS_INVALID_ARGUMENT, "option %.200s is unknown; %s --help lists them all",
                          argv[*at], set->program);
    if (!value && option->type == OPTION_FLAG) {
        value = "true";
    } else if (!value) {
        if (*at + 1 == argc)
            return status_set(status, STATUS_INVALID_ARGUMENT, "option --%s needs a value: %s", option->name,
                              option->argument);
        value = argv[++*at];
    }
    struct source source = {.kind = "option"};
    snprintf(source.name, sizeof source.name, "--%s", option->name);
    if (option->type == OPTION_LIST && !given[option - set->options])
        options_free_list(option->value);
    given[option - set->options] = true;
    return option_set(option, &source, value, status);
}

static int parse_environment(const struct option_set *set, const bool *given, struct status *status) {
    for (const struct option *option = set->options; option->name; option++) {
        struct source source = {.kind = "variable"};
        options_variable_name(option->name, source.name, sizeof source.name);
        const char *value = given[option - set->options] ? NULL : getenv(source.name);
        if (!value)
            continue;
        if (option->type == OPTION_LIST)
            options_free_list(option->value);
        if (option_set(option, &source, value, status))
            return -1;
    }
    return 0;
}

/* Whether --help or --version stands among the arguments. They come first, so that --help shows the defaults. */
static bool is_asked_for(int argc, char **argv, const char *name) {
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], name) == 0)
            return true;
    return false;
}

static int print_and_exit(const struct option_set *set, bool help, struct status *status) {
    if (help)
        options_print_help(set);
    else
        printf("%s %s\n", set->program, PACKAGE_VERSION);
    if (fflush(stdout) || ferror(stdout))
        return status_set(status, STATUS_UNAVAILABLE, "standard output: %s", strerror(errno));
    return OPTIONS_EXIT;
}

int options_parse(const struct option_set *set, int argc, char **argv, int *operands, struct status *status) {
    int result = -1;
    size_t count = 0;
    bool help = is_asked_for(argc, argv, "--help");
    if (help || is_asked_for(argc, argv, "--version"))
        return print_and_exit(set, help, status);

    while (set->options[count].name)
        count++;
    bool *given = calloc(count + 1, sizeof *given);
    if (!given)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu options", count);

    *operands = 0;
    bool only_operands = false;
    for (int i = 1; i < argc; i++) {
        if (!only_operands && strcmp(argv[i], "--") == 0)
            only_operands = true;
        else if (only_operands || argv[i][0] != '-' || !argv[i][1]) /* a lone dash is an operand: standard input */
            argv[++*operands] = argv[i];
        else if (parse_argument(set, argc, argv, &i, given, status))
            goto out;
    }
    if (parse_environment(set, given, status))
        goto out;
    result = OPTIONS_RUN;
out:
    free(given);
    return result;
}
