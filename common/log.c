#include "common/log.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/utf8.h"

/*
 * A line is built in a buffer on the stack. LINE_TAIL bytes are kept free for what must still follow when it was cut:
 * a closing quote, the field that says so, a closing brace and the newline.
 */
enum { LINE_BYTES = 4096, LINE_TAIL = 16 };

struct line {
    char bytes[LINE_BYTES];
    size_t length;
    bool full; /* something was left out; nothing but the tail may follow */
};

static struct {
    const char *program;
    enum log_level level;
    enum log_format format;
} log_settings = {"moed", LOG_INFO, LOG_TEXT};

void log_setup(const char *program, enum log_level level, enum log_format format) {
    log_settings.program = program;
    log_settings.level = level;
    log_settings.format = format;
}

/* All of it or nothing, so that an escape or a UTF-8 sequence is never cut in two. */
static void line_add(struct line *line, const char *bytes, size_t length) {
    if (line->full || line->length + length > LINE_BYTES - LINE_TAIL) {
        line->full = true;
        return;
    }
    memcpy(line->bytes + line->length, bytes, length);
    line->length += length;
}

static void line_add_text(struct line *line, const char *text) {
    line_add(line, text, strlen(text));
}

static void line_add_tail(struct line *line, const char *text) {
    size_t length = strlen(text);
    memcpy(line->bytes + line->length, text, length);
    line->length += length;
}

static void line_add_quoted(struct line *line, const char *string) {
    line_add_text(line, "\"");
    if (line->full)
        return; /* no opening quote, so no closing one */
    for (const unsigned char *s = (const unsigned char *)string; *s && !line->full;) {
        char escape[8];
        size_t length = utf8_length(s);
        if (*s == '"' || *s == '\\') {
            line_add(line, (char[]){'\\', (char)*s}, 2);
        } else if (*s == '\n') {
            line_add_text(line, "\\n");
        } else if (*s == '\t') {
            line_add_text(line, "\\t");
        } else if (*s < 0x20 || *s == 0x7f) {
            snprintf(escape, sizeof escape, "\\u%04x", *s);
            line_add_text(line, escape);
        } else if (length == 0) {
            line_add_text(line, "\\ufffd");
        } else {
            line_add(line, (const char *)s, length);
        }
        s += length ? length : 1;
    }
    line_add_tail(line, "\"");
}

/* Text that stands without quotes in key=value form: short printable ASCII but for what a reader splits on. */
static bool is_bare(const char *string) {
    size_t length = 0;
    for (; string[length]; length++)
        if (length == 128 || string[length] <= ' ' || string[length] > '~' || strchr("\"=\\", string[length]))
            return false;
    return length > 0;
}

static void line_add_key(struct line *line, const char *key) {
    if (log_settings.format == LOG_JSON) {
        line_add_text(line, line->length > 1 ? ",\"" : "\"");
        line_add_text(line, key);
        line_add_text(line, "\":");
    } else {
        line_add_text(line, " ");
        line_add_text(line, key);
        line_add_text(line, "=");
    }
}

static void line_add_string(struct line *line, const char *string) {
    string = string ? string : "";
    if (log_settings.format == LOG_TEXT && is_bare(string))
        line_add_text(line, string);
    else
        line_add_quoted(line, string);
}

static void line_add_value(struct line *line, const struct log_field *field) {
    char number[32];
    switch (field->type) {
    case LOG_FIELD_UNSIGNED: snprintf(number, sizeof number, "%" PRIu64, field->u); break;
    case LOG_FIELD_SIGNED: snprintf(number, sizeof number, "%" PRId64, field->i); break;
    case LOG_FIELD_REAL:
        if (log_settings.format == LOG_JSON && !isfinite(field->real))
            strcpy(number, "null"); /* JSON has no NaN or infinity */
        else
            snprintf(number, sizeof number, "%.6g", field->real);
        break;
    default: line_add_string(line, field->string); return;
    }
    line_add_text(line, number);
}

/* A field whose key or number does not fit is left out whole; a string is cut. */
static void line_add_field(struct line *line, const struct log_field *field) {
    size_t before = line->length;
    line_add_key(line, field->key);
    size_t start = line->length;
    line_add_value(line, field);
    if (line->full && line->length < start + 2)
        line->length = before;
}

static void format_time(char out[32]) {
    struct timespec now;
    struct tm utc;
    char second[24];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(second, sizeof second, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(out, 32, "%s.%03ldZ", second, now.tv_nsec / 1000000);
}

void log_event(enum log_level level, const char *event, const struct log_field *fields) {
    static const char *const level_names[] = {"error", "warn", "info", "debug"};
    if (level > log_settings.level)
        return;
    struct line line;
    line.length = 0;
    line.full = false;
    char time[32];
    format_time(time);

    if (log_settings.format == LOG_JSON) {
        line_add_text(&line, "{");
        line_add_field(&line, &LOG_STR("time", time));
        line_add_field(&line, &LOG_STR("level", level_names[level]));
        line_add_field(&line, &LOG_STR("program", log_settings.program));
        line_add_field(&line, &LOG_STR("event", event));
    } else {
        char head[256];
        snprintf(head, sizeof head, "%s %s %s %s", time, level_names[level], log_settings.program, event);
        line_add_text(&line, head);
    }
    for (const struct log_field *field = fields; field->type != LOG_FIELD_END && !line.full; field++)
        line_add_field(&line, field);
    bool json = log_settings.format == LOG_JSON;
    if (line.full)
        line_add_tail(&line, json ? ",\"cut\":true" : " cut=true");
    line_add_tail(&line, json ? "}\n" : "\n");

    /* A log that cannot be written is no reason to stop serving. */
    while (write(STDERR_FILENO, line.bytes, line.length) < 0 && errno == EINTR)
        ;
}
