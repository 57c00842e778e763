#ifndef MOED_COMMON_METRICS_H
#define MOED_COMMON_METRICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * Counters, gauges and histograms, and the text in which Prometheus reads them
 * (https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4).
 *
 * Metrics are plain structs of relaxed atomics, zeroed to begin with, that their owner embeds. Any thread may add to
 * them or read them: nothing locks, nothing allocates. Counters and histograms hold integers, in units that their text
 * divides by, so that a sum neither rounds nor becomes a NaN.
 */
struct metric_counter {
    _Atomic uint64_t count;
};

struct metric_gauge {
    _Atomic double value;
};

enum { METRIC_BOUNDS_MAX = 20 };

struct metric_buckets {
    const uint64_t *bounds; /* [count], rising; a bucket holds what is not over its bound */
    uint32_t count;         /* at most METRIC_BOUNDS_MAX */
    double unit;            /* what counts as 1 in the text: 1e9 for nanoseconds that are shown as seconds */
};

struct metric_histogram {
    const struct metric_buckets *buckets;
    _Atomic uint64_t counts[METRIC_BOUNDS_MAX + 1]; /* of each bucket alone; the one behind the last bound is +Inf's */
    _Atomic uint64_t sum;
};

static inline void metric_add(struct metric_counter *counter, uint64_t amount) {
    atomic_fetch_add_explicit(&counter->count, amount, memory_order_relaxed);
}

/* For what is counted elsewhere. Never less than it was. */
static inline void metric_counter_set(struct metric_counter *counter, uint64_t count) {
    atomic_store_explicit(&counter->count, count, memory_order_relaxed);
}

static inline uint64_t metric_count(const struct metric_counter *counter) {
    return atomic_load_explicit(&counter->count, memory_order_relaxed);
}

static inline void metric_set(struct metric_gauge *gauge, double value) {
    atomic_store_explicit(&gauge->value, value, memory_order_relaxed);
}

static inline double metric_value(const struct metric_gauge *gauge) {
    return atomic_load_explicit(&gauge->value, memory_order_relaxed);
}

void metric_observe(struct metric_histogram *histogram, uint64_t value);

/* Bounds that suit what moed measures: a step and a token's gap; a whole request; rows; ratios in thousandths. */
extern const struct metric_buckets metric_buckets_step, metric_buckets_request, metric_buckets_rows,
    metric_buckets_ratio;

/* ---- text */

enum { METRIC_NAME_MAX = 128, METRIC_PREFIX_MAX = 64 };

enum metric_type { METRIC_COUNTER, METRIC_GAUGE, METRIC_HISTOGRAM };

/* The page in the making, zeroed to begin with. Freed with metrics_text_free. */
struct metrics_text {
    char *bytes; /* [length], not terminated */
    size_t length, capacity;
    bool failed; /* no memory: it is not whole */
    char name[METRIC_NAME_MAX + 1]; /* of the family in hand */
};

struct metric_label {
    const char *name, *value; /* the value may be anything: it is escaped, and what is no UTF-8 becomes U+FFFD */
};

/* The labels of one sample: METRIC_LABELS({"method", path}, {"code", code}). */
#define METRIC_LABELS(...) ((const struct metric_label[]){__VA_ARGS__ __VA_OPT__(,) {0}})

/* Begins a family: its HELP and TYPE. The samples of its name follow, until the next family. */
void metrics_text_family(struct metrics_text *text, enum metric_type type, const char *prefix, const char *name,
                         const char *help);
/* A counter's or gauge's sample. A value that is no finite number is left out. */
void metrics_text_sample(struct metrics_text *text, const struct metric_label *labels, double value);
/* Buckets, sum and count. They agree with each other, whatever is added meanwhile. */
void metrics_text_histogram(struct metrics_text *text, const struct metric_label *labels,
                            const struct metric_histogram *histogram);
void metrics_text_free(struct metrics_text *text);

/* Whether names behind this prefix are legal: letters, digits, '_' and ':', no digit first. 0, or -1 with a status. */
int metrics_check_prefix(const char *prefix, struct status *status);

#endif
