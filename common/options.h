#ifndef MOED_COMMON_OPTIONS_H
#define MOED_COMMON_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * Table-driven command lines. Every option has a twin in the environment, MOED_ and its name in capitals
 * (--worker-endpoint: MOED_WORKER_ENDPOINT); the command line wins. A value stands behind its option, as --name VALUE
 * or --name=VALUE, and is never empty. --help and --version are added by the parser.
 */
enum option_type {
    OPTION_FLAG,    /* bool *: --name, --name=true|false, --no-name */
    OPTION_STRING,  /* const char ** (borrowed from argv or the environment) */
    OPTION_UINT,    /* uint64_t *, within min..max; suffixes k, M, G, T (powers of 1024) */
    OPTION_REAL,    /* double *, within real_min..real_max */
    OPTION_CHOICE,  /* const char **: one of choices */
    OPTION_LIST,    /* struct option_list *, empty on entry: may be given again, or comma-separated */
};

struct option_list {
    const char **items; /* freed by options_free_list (after a failure, too); the strings in it too */
    size_t count;
};

struct option {
    const char *name; /* without dashes; a NULL name ends the table */
    enum option_type type;
    void *value;          /* holds the default on entry */
    const char *argument; /* "ADDR:PORT", for --help */
    const char *help;     /* one sentence or more; the default and the variable's name are added */
    uint64_t min, max;    /* OPTION_UINT; max 0: no limit */
    double real_min, real_max;
    const char *const *choices; /* NULL-terminated */
};

struct option_set {
    const char *program;  /* "moed-gateway" */
    const char *synopsis; /* "[OPTION]...", the line behind the program's name in --help */
    const char *summary;  /* what it does, for --help */
    const char *footer;   /* printed behind the options; may be NULL */
    const struct option *options;
};

enum options_result {
    OPTIONS_RUN = 0,
    OPTIONS_EXIT = 1, /* --help or --version was printed to standard output */
};

/*
 * Parses argv, then the environment. Operands (and what follows "--") are moved, in order, to argv[1...]; *operands
 * tells how many there are. Returns an options_result, or -1 with a status that names the option or variable, what it
 * held and what is allowed.
 */
int options_parse(const struct option_set *set, int argc, char **argv, int *operands, struct status *status);

void options_free_list(struct option_list *list);

#endif
