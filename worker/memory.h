#ifndef MOED_WORKER_MEMORY_H
#define MOED_WORKER_MEMORY_H

#include <stddef.h>

/*
 * Zeroed memory from malloc for the small objects of messages and book-keeping. A process that cannot have a few
 * hundred bytes cannot even say so to its peers: it aborts, and the gateway ends its requests with UNAVAILABLE. What a
 * peer's numbers make large is allocated with malloc and its failure answered.
 */
void *memory_allocate(size_t count, size_t size);

char *memory_copy_string(const char *string);

#endif
