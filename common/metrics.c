#include "common/metrics.h"

#include <ctype.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"

enum { PAGE_BYTES = 16 << 10 };

#define US(n) ((uint64_t)(n) * 1000)
#define MS(n) ((uint64_t)(n) * 1000000)
#define BUCKETS(array, per_unit) {.bounds = (array), .count = sizeof (array) / sizeof *(array), .unit = (per_unit)}

static const uint64_t step_bounds[] = {US(500), MS(1),  MS(2),  MS(3),   MS(4),   MS(6),    MS(8),    MS(10),    MS(15),
                                       MS(20),  MS(30), MS(50), MS(100), MS(200), MS(500),  MS(1000), MS(2000),
                                       MS(5000), MS(10000), MS(60000)};
static const uint64_t request_bounds[] = {MS(1),    MS(2),     MS(5),     MS(10),    MS(20),     MS(50),    MS(100),
                                          MS(200),  MS(500),   MS(1000),  MS(2000),  MS(5000),   MS(10000), MS(20000),
                                          MS(30000), MS(60000), MS(120000), MS(300000), MS(600000), MS(1800000)};
static const uint64_t row_bounds[] = {1,   2,   4,    8,    16,   32,   64,    128,  256,
                                      512, 1024, 2048, 4096, 8192, 16384, 32768, 65536};
static const uint64_t ratio_bounds[] = {1000, 1100, 1250, 1500,  2000,  2500,  3000,  4000,
                                        6000, 8000, 12000, 16000, 24000, 32000, 64000, 128000};

const struct metric_buckets metric_buckets_step = BUCKETS(step_bounds, 1e9);
const struct metric_buckets metric_buckets_request = BUCKETS(request_bounds, 1e9);
const struct metric_buckets metric_buckets_rows = BUCKETS(row_bounds, 1);
const struct metric_buckets metric_buckets_ratio = BUCKETS(ratio_bounds, 1e3);

void metric_observe(struct metric_histogram *histogram, uint64_t value) {
    const struct metric_buckets *buckets = histogram->buckets;
    uint32_t i = 0;
    while (i < buckets->count && value > buckets->bounds[i])
        i++;
    atomic_fetch_add_explicit(&histogram->sum, value, memory_order_relaxed);
    atomic_fetch_add_explicit(&histogram->counts[i], 1, memory_order_relaxed);
}

/* ---- text */

static void add_bytes(struct metrics_text *text, const char *bytes, size_t length) {
    if (length > text->capacity - text->length && !text->failed) {
        size_t capacity = text->capacity ? text->capacity : PAGE_BYTES;
        while (length > capacity - text->length)
            capacity *= 2;
        char *grown = realloc(text->bytes, capacity);
        if (grown) {
            text->bytes = grown;
            text->capacity = capacity;
        } else {
            text->failed = true;
        }
    }
    if (text->failed)
        return;
    memcpy(text->bytes + text->length, bytes, length);
    text->length += length;
}

static void add(struct metrics_text *text, const char *string) {
    add_bytes(text, string, strlen(string));
}

/* Backslashes and line feeds are escaped, in label values quotes, too. */
static void add_escaped(struct metrics_text *text, const char *string, bool quoted) {
    for (const unsigned char *s = (const unsigned char *)string; *s;) {
        size_t length = utf8_length(s);
        if (*s == '\\')
            add(text, "\\\\");
        else if (*s == '\n')
            add(text, "\\n");
        else if (*s == '"' && quoted)
            add(text, "\\\"");
        else if (length == 0)
            add(text, "\xef\xbf\xbd"); /* U+FFFD */
        else
            add_bytes(text, (const char *)s, length);
        s += length ? length : 1;
    }
}

/* Whole numbers in full: they are counters mostly, and exact up to 2^53. */
static void format_value(char *out, size_t size, double value) {
    const char *format = value == floor(value) && fabs(value) < 0x1p53 ? "%.0f" : "%.15g";
    snprintf(out, size, format, value + 0.0); /* -0 becomes 0 */
}

/* name_suffix{labels,le="bound"} value; a NULL bound: no such label. */
static void add_sample(struct metrics_text *text, const char *suffix, const struct metric_label *labels,
                       const char *bound, double value) {
    char number[32];
    bool first = true;
    add(text, text->name);
    add(text, suffix);
    for (; labels->name; labels++, first = false) {
        add(text, first ? "{" : ",");
        add(text, labels->name);
        add(text, "=\"");
        add_escaped(text, labels->value, true);
        add(text, "\"");
    }
    if (bound) {
        add(text, first ? "{le=\"" : ",le=\"");
        add(text, bound);
        add(text, "\"");
        first = false;
    }
    format_value(number, sizeof number, value);
    add(text, first ? " " : "} ");
    add(text, number);
    add(text, "\n");
}

void metrics_text_family(struct metrics_text *text, enum metric_type type, const char *prefix, const char *name,
                         const char *help) {
    static const char *const types[] = {"counter", "gauge", "histogram"}; /* as enum metric_type */
    snprintf(text->name, sizeof text->name, "%s%s", prefix, name);
    add(text, "# HELP ");
    add(text, text->name);
    add(text, " ");
    add_escaped(text, help, false);
    add(text, "\n# TYPE ");
    add(text, text->name);
    add(text, " ");
    add(text, types[type]);
    add(text, "\n");
}

void metrics_text_sample(struct metrics_text *text, const struct metric_label *labels, double value) {
    if (isfinite(value))
        add_sample(text, "", labels, NULL, value);
}

void metrics_text_histogram(struct metrics_text *text, const struct metric_label *labels,
                            const struct metric_histogram *histogram) {
    const struct metric_buckets *buckets = histogram->buckets;
    uint64_t sum = atomic_load_explicit(&histogram->sum, memory_order_relaxed), below = 0;
    char bound[32];
    for (uint32_t i = 0; i <= buckets->count; i++) {
        below += atomic_load_explicit(&histogram->counts[i], memory_order_relaxed);
        if (i < buckets->count)
            snprintf(bound, sizeof bound, "%.15g", (double)buckets->bounds[i] / buckets->unit);
        add_sample(text, "_bucket", labels, i < buckets->count ? bound : "+Inf", (double)below);
    }
    /* The count is that of the buckets just read, and none of its own, so that it is +Inf's at any time. */
    add_sample(text, "_sum", labels, NULL, (double)sum / buckets->unit);
    add_sample(text, "_count", labels, NULL, (double)below);
}

void metrics_text_free(struct metrics_text *text) {
    free(text->bytes);
    *text = (struct metrics_text){0};
}

int metrics_check_prefix(const char *prefix, struct status *status) {
    size_t length = strlen(prefix);
    bool legal = length <= METRIC_PREFIX_MAX && !isdigit((unsigned char)prefix[0]);
    for (size_t i = 0; i < length && legal; i++)
        legal = strchr("_:", prefix[i]) || (prefix[i] >= '0' && prefix[i] <= '9') ||
                (prefix[i] >= 'A' && prefix[i] <= 'Z') || (prefix[i] >= 'a' && prefix[i] <= 'z');
    return legal ? 0
                 : status_set(status, STATUS_INVALID_ARGUMENT,
                              "option --metrics-prefix: \"%.80s\"; at most %d letters, digits, '_' and ':', the "
                              "first of them no digit, are allowed",
                              prefix, METRIC_PREFIX_MAX);
}
