#include "common/options_help.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { HELP_WIDTH = 100, HELP_COLUMN_MAX = 32, HELP_INDENT = 2 };

/* Prints words from `column` on, wrapped; returns the column behind the last one. */
static int print_wrapped(const char *text, int indent, int column) {
    while (*text) {
        int length = (int)strcspn(text, " ");
        if (column > indent && column + 1 + length > HELP_WIDTH) {
            printf("\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            putchar(' ');
            column++;
        }
        printf("%.*s", length, text);
        column += length;
        text += length;
        text += strspn(text, " ");
    }
    return column;
}

static int option_label(const struct option *option, char *out, size_t size) {
    bool argument = option->type != OPTION_FLAG && option->argument;
    return snprintf(out, size, "--%s%s%s", option->name, argument ? " " : "", argument ? option->argument : "");
}

/* The default as the user would type it; an empty string where there is none. Sizes are shown with their suffix. */
static void option_default(const struct option *option, char *out, size_t size) {
    out[0] = '\0';
    if (option->type == OPTION_FLAG) {
        snprintf(out, size, "%s", *(const bool *)option->value ? "true" : "false");
    } else if (option->type == OPTION_UINT) {
        static const char *const suffixes[] = {"", "k", "M", "G", "T"};
        uint64_t number = *(const uint64_t *)option->value;
        size_t suffix = 0;
        if (number >= 1 << 20)
            for (; suffix < 4 && number % 1024 == 0; suffix++)
                number /= 1024;
        snprintf(out, size, "%" PRIu64 "%s", number, suffixes[suffix]);
    } else if (option->type == OPTION_REAL) {
        snprintf(out, size, "%g", *(const double *)option->value);
    } else if (option->type != OPTION_LIST && *(const char *const *)option->value) {
        snprintf(out, size, "%s", *(const char *const *)option->value);
    }
}

static void print_option(const struct option *option, int column) {
    char label[128], value[128], variable[64], tail[256];
    int width = HELP_INDENT + option_label(option, label, sizeof label);
    printf("%*s%s", HELP_INDENT, "", label);
    if (width + 2 > column)
        printf("\n%*s", column, "");
    else
        printf("%*s", column - width, "");
    int at = print_wrapped(option->help, column, column);

    option_default(option, value, sizeof value);
    options_variable_name(option->name, variable, sizeof variable);
    if (value[0])
        snprintf(tail, sizeof tail, "[default: %s] [%s]", value, variable);
    else
        snprintf(tail, sizeof tail, "[%s]", variable);
    print_wrapped(tail, column, at);
    putchar('\n');
}

void options_print_help(const struct option_set *set) {
    static const struct option own[] = {
        {.name = "help", .help = "Print this and exit."},
        {.name = "version", .help = "Print the version and exit."},
    };
    int column = 0;
    for (const struct option *option = set->options; option->name; option++) {
        char label[128];
        int width = HELP_INDENT + option_label(option, label, sizeof label) + 2;
        if (width > column && width <= HELP_COLUMN_MAX)
            column = width;
    }
    if (column < 13) /* "  --version  " */
        column = 13;

    printf("Usage: %s %s\n", set->program, set->synopsis);
    print_wrapped(set->summary, 0, 0);
    printf("\n\nOptions, each with its twin in the environment:\n");
    for (const struct option *option = set->options; option->name; option++)
        print_option(option, column);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        printf("%*s--%s%*s%s\n", HELP_INDENT, "", own[i].name, column - HELP_INDENT - 2 - (int)strlen(own[i].name), "",
               own[i].help);
    if (set->footer)
        printf("\n%s\n", set->footer);
}
