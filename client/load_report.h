#ifndef MOED_CLIENT_LOAD_REPORT_H
#define MOED_CLIENT_LOAD_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "client/load_stats.h"

/* What was asked for, as reports tell it. Strings are borrowed. */
struct load_config {
    const char *target, *model;
    bool open_loop;
    const char *arrivals;                      /* of an open loop */
    const char *prompt_tokens, *output_tokens; /* as given */
    const char *trace;                         /* file; NULL: none, and the lengths above hold */
    uint64_t shared_prefix, seed, connections;
    uint64_t requests;      /* UINT64_MAX: no such end */
    uint64_t max_in_flight; /* of an open loop */
    uint64_t warmup;
    double duration_s, timeout_s;      /* 0: none */
    double slo_ttft_ms, slo_itl_ms;    /* 0: no limit */
    bool interrupted;
};

/* Errors of all of these are the stream's: see ferror. */

/* One run, in full. */
void load_print_report(FILE *out, const struct load_config *config, const struct load_figures *figures);

/* A sweep as a table, a row for each run; behind it what failed in a run, if anything. */
void load_print_sweep_header(FILE *out, const struct load_config *config);
void load_print_sweep_row(FILE *out, const struct load_figures *figures);
void load_print_sweep_errors(FILE *out, const struct load_config *config, const struct load_figures *figures);

/* Everything as one line of JSON; what has no value is null. -1: out of memory. */
int load_print_json(FILE *out, const struct load_config *config, const struct load_figures *figures, size_t count);

/* A row for each request; seconds and milliseconds as their names say, empty where there is no value. */
void load_print_csv_header(FILE *out);
void load_print_csv_row(FILE *out, double load, const struct load_sample *sample);

#endif
