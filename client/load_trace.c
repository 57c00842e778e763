#include "client/load_trace.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where the reader is, for errors. */
struct place {
    const char *source;
    uint32_t line;
};

/* What stood there, in ASCII without control characters: it goes to terminals. */
static void show(const json_t *value, char *out, size_t size) {
    char *text = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII) : NULL;
    if ((size_t)snprintf(out, size, "%s", text ? text : "nothing") >= size)
        memcpy(out + size - 4, "...", 4);
    free(text);
}

static int field_error(const struct place *place, const char *name, const json_t *value, const char *allowed,
                       struct status *status) {
    char found[64];
    show(value, found, sizeof found);
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s:%" PRIu32 ": %s: %s; %s is allowed", place->source,
                      place->line, name, found, allowed);
}

static int unknown_field(const struct place *place, const char *name, struct status *status) {
    char found[64];
    json_t *string = json_string(name);
    show(string, found, sizeof found);
    json_decref(string);
    return status_set(status, STATUS_INVALID_ARGUMENT,
                      "%s:%" PRIu32 ": field %s; arrival, prompt_tokens, output_tokens, shared_prefix and prefix_id "
                      "are allowed",
                      place->source, place->line, found);
}

static int syntax_error(const struct place *place, const json_error_t *error, struct status *status) {
    char text[JSON_ERROR_TEXT_LENGTH];
    snprintf(text, sizeof text, "%s", error->text);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < 0x20 || (unsigned char)*c > 0x7e)
            *c = '?';
    return status_set(status, STATUS_INVALID_ARGUMENT, "%s:%" PRIu32 ":%d: %s; a JSON object is allowed",
                      place->source, place->line, error->column, text);
}

static int read_whole(const struct place *place, const json_t *object, const char *name, bool required, uint64_t min,
                      uint64_t max, uint64_t *out, struct status *status) {
    const json_t *value = json_object_get(object, name);
    *out = 0;
    if (!value && !required)
        return 0;
    if (json_is_integer(value) && json_integer_value(value) >= (json_int_t)min &&
        json_integer_value(value) <= (json_int_t)max) {
        *out = (uint64_t)json_integer_value(value);
        return 0;
    }
    char allowed[80];
    snprintf(allowed, sizeof allowed, "a whole number from %" PRIu64 " to %" PRIu64, min, max);
    return field_error(place, name, value, allowed, status);
}

static int read_entry(const struct place *place, const json_t *object, double previous_s,
                      struct load_trace_entry *out, struct status *status) {
    static const char *const names[] = {"arrival", "prompt_tokens", "output_tokens", "shared_prefix", "prefix_id"};
    enum { NAMES = sizeof names / sizeof *names };
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)object, name, value) {
        size_t i = 0;
        while (i < NAMES && strcmp(name, names[i]) != 0)
            i++;
        if (i == NAMES)
            return unknown_field(place, name, status);
    }

    const json_t *arrival = json_object_get(object, "arrival");
    out->arrival_s = json_number_value(arrival);
    if (!json_is_number(arrival) || !(out->arrival_s >= previous_s) || out->arrival_s > TRACE_ARRIVAL_MAX) {
        char allowed[128];
        snprintf(allowed, sizeof allowed, "a number of seconds from %.15g, the line before's, to %g", previous_s,
                 TRACE_ARRIVAL_MAX);
        return field_error(place, "arrival", arrival, allowed, status);
    }
    uint64_t prompt, output, shared;
    if (read_whole(place, object, "prompt_tokens", true, 1, TRACE_LENGTH_MAX, &prompt, status) < 0 ||
        read_whole(place, object, "output_tokens", true, 1, TRACE_LENGTH_MAX, &output, status) < 0 ||
        read_whole(place, object, "shared_prefix", false, 0, prompt, &shared, status) < 0 ||
        read_whole(place, object, "prefix_id", false, 0, INT64_MAX, &out->prefix_id, status) < 0)
        return -1;
    out->prompt_tokens = (uint32_t)prompt;
    out->output_tokens = (uint32_t)output;
    out->shared_prefix = (uint32_t)shared;
    out->line = place->line;
    return 0;
}

/* The bytes of a line without its end; -1: too long, or the file cannot be read. *end: there is no further one. */
static int read_line(FILE *file, const struct place *place, char *line, bool *end, struct status *status) {
    int length = 0, c;
    while ((c = getc(file)) != EOF && c != '\n') {
        if (length == TRACE_LINE_MAX)
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s:%" PRIu32 ": a line of more than %d bytes",
                              place->source, place->line, TRACE_LINE_MAX);
        if (c == '\0') /* which jansson passes over behind a number */
            return status_set(status, STATUS_INVALID_ARGUMENT, "%s:%" PRIu32 ":%d: byte 0x00; text is allowed",
                              place->source, place->line, length + 1);
        line[length++] = (char)c;
    }
    *end = c == EOF;
    if (ferror(file))
        return status_set(status, STATUS_UNKNOWN, "%s: %s", place->source, strerror(errno));
    return length;
}

static bool is_blank(const char *line, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (line[i] != ' ' && line[i] != '\t' && line[i] != '\r')
            return false;
    return true;
}

static int add_line(struct load_trace *trace, size_t *capacity, const struct place *place, const char *line,
                    size_t length, double previous_s, struct status *status) {
    json_error_t error;
    json_t *object = json_loadb(line, length, JSON_REJECT_DUPLICATES, &error);
    int result = -1;
    if (!object) {
        syntax_error(place, &error, status);
    } else if (!json_is_object(object)) {
        field_error(place, "the line", object, "a JSON object", status);
    } else if (trace->count == TRACE_ENTRIES_MAX) {
        status_set(status, STATUS_INVALID_ARGUMENT, "%s:%" PRIu32 ": more than %d requests", place->source,
                   place->line, TRACE_ENTRIES_MAX);
    } else {
        if (trace->count == *capacity) {
            *capacity = *capacity ? 2 * *capacity : 1024;
            struct load_trace_entry *entries = realloc(trace->entries, *capacity * sizeof *entries);
            if (!entries) {
                status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
                goto out;
            }
            trace->entries = entries;
        }
        result = read_entry(place, object, previous_s, &trace->entries[trace->count], status);
        trace->count += result == 0;
    }
out:
    json_decref(object);
    return result;
}

int load_trace_read(struct load_trace *trace, const char *path, struct status *status) {
    bool standard = strcmp(path, "-") == 0, end = false;
    struct place place = {.source = standard ? "standard input" : path};
    char line[TRACE_LINE_MAX];
    size_t capacity = 0;
    int result = -1;
    *trace = (struct load_trace){0};
    FILE *file = standard ? stdin : fopen(path, "re");
    if (!file)
        return status_set(status, STATUS_NOT_FOUND, "%s: %s", path, strerror(errno));
    while (!end) {
        place.line++;
        int length = read_line(file, &place, line, &end, status);
        if (length < 0)
            goto out;
        double previous_s = trace->count ? trace->entries[trace->count - 1].arrival_s : 0;
        if (!is_blank(line, (size_t)length) &&
            add_line(trace, &capacity, &place, line, (size_t)length, previous_s, status) < 0)
            goto out;
    }
    if (trace->count == 0) {
        status_set(status, STATUS_INVALID_ARGUMENT, "%s: no request in it", place.source);
        goto out;
    }
    double first_s = trace->entries[0].arrival_s;
    for (size_t i = 0; i < trace->count; i++)
        trace->entries[i].arrival_s -= first_s;
    result = 0;
out:
    if (!standard)
        fclose(file);
    return result;
}

void load_trace_free(struct load_trace *trace) {
    free(trace->entries);
    *trace = (struct load_trace){0};
}
