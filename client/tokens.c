#include "client/tokens.h"

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Reads character by character, so that a file of any length needs no buffer. */
struct reader {
    struct token_list *list;
    const char *source;
    unsigned long line, column; /* of the character at hand, from 1 */
    bool number;                /* within a number */
    uint64_t value;
    struct tokens *sequence; /* that takes the next token; NULL: it has to be added */
};

static int reader_error(const struct reader *reader, struct status *status, const char *found) {
    return status_set(status, STATUS_INVALID_ARGUMENT,
                      "%s:%lu:%lu: %s, expected token ids (0 to 4294967295) with white space or commas between them",
                      reader->source, reader->line, reader->column, found);
}

static int add_sequence(struct reader *reader, struct status *status) {
    struct token_list *list = reader->list;
    struct tokens *sequences = realloc(list->sequences, (list->count + 1) * sizeof *sequences);
    if (!sequences)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    list->sequences = sequences;
    reader->sequence = &sequences[list->count++];
    *reader->sequence = (struct tokens){0};
    return 0;
}

static int add_token(struct reader *reader, struct status *status) {
    if (reader->list->tokens == TOKENS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "%s:%lu: more than %d token ids", reader->source,
                          reader->line, TOKENS_MAX);
    if (!reader->sequence && add_sequence(reader, status) < 0)
        return -1;
    struct tokens *tokens = reader->sequence;
    if (tokens->count == tokens->capacity) {
        size_t capacity = tokens->capacity ? 2 * tokens->capacity : 64;
        uint32_t *ids = realloc(tokens->ids, capacity * sizeof *ids);
        if (!ids)
            return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        tokens->ids = ids;
        tokens->capacity = capacity;
    }
    tokens->ids[tokens->count++] = (uint32_t)reader->value;
    reader->list->tokens++;
    return 0;
}

/* Takes one character, or EOF. */
static int reader_take(struct reader *reader, int c, struct status *status) {
    reader->column++;
    if (c >= '0' && c <= '9') {
        reader->value = (reader->number ? reader->value * 10 : 0) + (uint64_t)(c - '0');
        reader->number = true;
        if (reader->value > UINT32_MAX)
            return reader_error(reader, status, "a number over 4294967295");
        return 0;
    }
    if (reader->number && add_token(reader, status) < 0)
        return -1;
    reader->number = false;
    switch (c) {
    case '\n':
        reader->line++;
        reader->column = 0;
        return 0;
    case ' ':
    case '\t':
    case '\r':
    case ',':
        return 0;
    case ';':
    case EOF:
        if (!reader->sequence)
            return reader_error(reader, status,
                                c == EOF ? "the end without a token id" : "';' without a token id before it");
        reader->sequence = NULL;
        return 0;
    }
    char found[32];
    snprintf(found, sizeof found, isprint(c) ? "'%c'" : "byte 0x%02x", c);
    return reader_error(reader, status, found);
}

int token_list_add_text(struct token_list *list, const char *source, const char *text, struct status *status) {
    struct reader reader = {.list = list, .source = source, .line = 1};
    for (const char *c = text; *c; c++)
        if (reader_take(&reader, (unsigned char)*c, status) < 0)
            return -1;
    return reader_take(&reader, EOF, status);
}

int token_list_add_file(struct token_list *list, const char *path, struct status *status) {
    bool standard = strcmp(path, "-") == 0;
    struct reader reader = {.list = list, .source = standard ? "standard input" : path, .line = 1};
    FILE *file = standard ? stdin : fopen(path, "re");
    if (!file)
        return status_set(status, STATUS_NOT_FOUND, "%s: %s", path, strerror(errno));
    int result, c;
    do {
        c = getc(file);
        if (c == EOF && ferror(file))
            result = status_set(status, STATUS_UNKNOWN, "%s: %s", reader.source, strerror(errno));
        else
            result = reader_take(&reader, c, status);
    } while (result == 0 && c != EOF);
    if (!standard)
        fclose(file);
    return result;
}

void token_list_free(struct token_list *list) {
    for (size_t i = 0; i < list->count; i++)
        free(list->sequences[i].ids);
    free(list->sequences);
    *list = (struct token_list){0};
}
