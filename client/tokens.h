#ifndef MOED_CLIENT_TOKENS_H
#define MOED_CLIENT_TOKENS_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/*
 * Token ids as people and scripts write them: decimal numbers below 2^32 with white space or commas between them, and a
 * semicolon between sequences.
 */
struct tokens {
    uint32_t *ids;
    size_t count, capacity;
};

enum { TOKENS_MAX = 1 << 24 }; /* of all sequences together, so that no input fills the memory */

struct token_list {
    struct tokens *sequences; /* none is empty */
    size_t count;
    size_t tokens; /* of all sequences */
};

/* Adds the sequences of a text. Errors name the source, the line and column, what stood there and what may. On
 * failure too the list is to be freed. */
int token_list_add_text(struct token_list *list, const char *source, const char *text, struct status *status);
/* The same for a file; "-" is standard input. */
int token_list_add_file(struct token_list *list, const char *path, struct status *status);
void token_list_free(struct token_list *list);

#endif
