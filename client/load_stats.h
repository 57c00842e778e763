#ifndef MOED_CLIENT_LOAD_STATS_H
#define MOED_CLIENT_LOAD_STATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * Durations in nanoseconds, counted in buckets: each power of two has 128 of them, so a percentile is within 0.4 % of
 * the exact one. Count, sum and maximum are exact. 58 KiB, however many there are.
 */
enum { HISTOGRAM_SUB_BITS = 7, HISTOGRAM_BUCKETS = (65 - HISTOGRAM_SUB_BITS) << HISTOGRAM_SUB_BITS };

struct histogram {
    uint64_t count, max;
    double sum;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *histogram, uint64_t value);
/* The smallest value that a share (0 to 1) of all values does not exceed; 0 if there are none. */
uint64_t histogram_quantile(const struct histogram *histogram, double share);

/* One request from its start to its end. Times are nanoseconds since the run began. */
struct load_sample {
    uint64_t index;
    bool warmup;     /* not counted */
    bool unfinished; /* cancelled by the client, because it was interrupted */
    uint64_t intended_ns, started_ns, ended_ns;
    uint64_t first_ns, last_ns; /* the first and last message with tokens; 0: none came */
    uint64_t gap_max_ns;        /* between two such messages */
    uint32_t prompt_tokens, asked_tokens;
    uint64_t tokens, first_tokens; /* that came, and with the first message */
    uint32_t cached_tokens, resumptions;
    struct status status; /* of the call */
};

/* Counted from the intended start. */
static inline uint64_t sample_ttft_ns(const struct load_sample *sample) {
    return sample->first_ns - sample->intended_ns;
}

static inline uint64_t sample_e2e_ns(const struct load_sample *sample) {
    return sample->ended_ns - sample->intended_ns;
}

/* Time per output token behind the first message; false: nothing came behind it. */
bool sample_tpot_ns(const struct load_sample *sample, uint64_t *out);
/* Ended well, with the tokens asked for. */
bool sample_succeeded(const struct load_sample *sample);

/* What a run has to tell. Zeroed, then the limits set. Plain data; 300 KiB. */
struct load_stats {
    uint64_t slo_ttft_ns, slo_itl_ns;     /* 0: no limit */
    struct histogram ttft, tpot, e2e;     /* of the requests that succeeded */
    struct histogram itl;                 /* gaps between messages with tokens, of all requests, as they come */
    struct histogram delay;               /* from the intended to the real start */
    uint64_t succeeded, unfinished, good; /* good: succeeded within the limits */
    uint64_t errors[STATUS_CODES];        /* [STATUS_OK]: ended well with fewer or more tokens than asked for */
    struct status first_error;
    uint64_t warmup;
    uint64_t tokens_in, tokens_out;       /* prompts that had a first token; tokens that came */
    uint64_t messages;                    /* with tokens */
    uint64_t prompt_tokens, cached_tokens; /* of the requests that succeeded */
    uint64_t resumptions;
    uint64_t begin_ns, end_ns;            /* the first counted request's intended start, the last one's end */
};

/* A gap between messages of a counted request. */
void load_stats_add_gap(struct load_stats *stats, uint64_t gap_ns);
/* A request that ended; counts those of the warm-up alone. */
void load_stats_add(struct load_stats *stats, const struct load_sample *sample);

struct load_summary {
    uint64_t count;
    double mean_ms, p50_ms, p90_ms, p95_ms, p99_ms, max_ms; /* 0 where count is */
};

/* The figures of a run, small enough to keep for each point of a sweep. */
struct load_figures {
    double load; /* streams, or requests a second */
    struct load_summary ttft, itl, tpot, e2e, delay;
    uint64_t succeeded, failed, unfinished, good, warmup;
    uint64_t errors[STATUS_CODES];
    struct status first_error;
    double seconds;                                       /* from begin to end */
    double requests_per_s, tokens_in_per_s, tokens_out_per_s; /* requests: that succeeded */
    bool limited;                                         /* there are limits: */
    double good_share, good_per_s;                        /* of the requests that ended, by whatever way */
    uint64_t tokens_in, tokens_out, messages, prompt_tokens, cached_tokens, resumptions;
};

void load_figures_compute(const struct load_stats *stats, double load, struct load_figures *out);

#endif
