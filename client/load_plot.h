#ifndef MOED_CLIENT_LOAD_PLOT_H
#define MOED_CLIENT_LOAD_PLOT_H

#include <stddef.h>
#include <stdio.h>

#include "client/load_stats.h"

/*
 * Draws a sweep as SVG, three charts over the load (logarithmic, in rising order): time to first token and time
 * between tokens, p50 and p99 each, and tokens a second. `load_name` labels the load ("streams"), `title` stands above;
 * any text. Needs at least one run, with loads above 0. Errors are the stream's: see ferror.
 */
void load_plot(FILE *out, const char *title, const char *load_name, const struct load_figures *figures, size_t count);

#endif
