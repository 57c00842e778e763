#ifndef MOED_CLIENT_LOAD_TRACE_H
#define MOED_CLIENT_LOAD_TRACE_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * A trace: requests as somebody once had them. One JSON object a line; blank lines are passed over:
 *     {"arrival": 1.5, "prompt_tokens": 512, "output_tokens": 64, "shared_prefix": 128, "prefix_id": 7}
 * arrival: seconds, counted from the first line's, never falling. The last two may be left out (0): so many leading
 * tokens are those of all requests with the same prefix_id.
 */
struct load_trace_entry {
    double arrival_s; /* 0 for the first */
    uint32_t prompt_tokens, output_tokens, shared_prefix;
    uint32_t line; /* from 1 */
    uint64_t prefix_id;
};

struct load_trace {
    struct load_trace_entry *entries;
    size_t count; /* at least 1 */
};

enum {
    TRACE_LINE_MAX = 4096,       /* bytes */
    TRACE_ENTRIES_MAX = 1 << 24, /* 512 MiB */
    TRACE_LENGTH_MAX = 1 << 24,  /* tokens */
};
#define TRACE_ARRIVAL_MAX 1e10 /* seconds: Unix times fit */

/* Reads a file; "-" is standard input. Errors name the file, the line, the field, what it held and what is allowed. To
 * be freed in any case. */
int load_trace_read(struct load_trace *trace, const char *path, struct status *status);
void load_trace_free(struct load_trace *trace);

#endif
