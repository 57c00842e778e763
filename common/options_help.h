#ifndef MOED_COMMON_OPTIONS_HELP_H
#define MOED_COMMON_OPTIONS_HELP_H

#include "common/options.h"

/* The parts of common/options.c that print. Not for others. */

/* Writes what --help shows to standard output. */
void options_print_help(const struct option_set *set);

/* The environment twin of an option: "worker-endpoint" gives "MOED_WORKER_ENDPOINT". */
void options_variable_name(const char *option, char *out, size_t size);

#endif
