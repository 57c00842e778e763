#ifndef MOED_COMMON_LOG_H
#define MOED_COMMON_LOG_H

#include <stdint.h>

/* One line an event on standard error: time, level, event and its fields, as key=value or as JSON. */

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };
enum log_format { LOG_TEXT, LOG_JSON };

enum log_field_type { LOG_FIELD_END, LOG_FIELD_STRING, LOG_FIELD_UNSIGNED, LOG_FIELD_SIGNED, LOG_FIELD_REAL };

struct log_field {
    const char *key;
    enum log_field_type type;
    union {
        const char *string;
        uint64_t u;
        int64_t i;
        double real;
    };
};

#define LOG_STR(k, v) ((struct log_field){.key = (k), .type = LOG_FIELD_STRING, .string = (v)})
#define LOG_UINT(k, v) ((struct log_field){.key = (k), .type = LOG_FIELD_UNSIGNED, .u = (v)})
#define LOG_INT(k, v) ((struct log_field){.key = (k), .type = LOG_FIELD_SIGNED, .i = (v)})
#define LOG_REAL(k, v) ((struct log_field){.key = (k), .type = LOG_FIELD_REAL, .real = (v)})

/* log_info("worker_ready", LOG_STR("worker", id), LOG_UINT("kv_blocks", n)); event names are lower_snake. */
#define log_error(...) log_event_at(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_event_at(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_event_at(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_event_at(LOG_DEBUG, __VA_ARGS__)
#define log_event_at(level, event, ...) \
    log_event((level), (event), (const struct log_field[]){__VA_ARGS__ __VA_OPT__(,) {0}})

/* Set once by main, before there are threads. `program` stands in every line. */
void log_setup(const char *program, enum log_level level, enum log_format format);

/* Writes one line with one write(2), so that lines of threads and processes never mix. Strings are quoted and escaped
 * as needed; a NULL string prints as empty. Cut at 4 KiB. */
void log_event(enum log_level level, const char *event, const struct log_field *fields);

#endif
