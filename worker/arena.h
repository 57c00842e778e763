#ifndef MOED_WORKER_ARENA_H
#define MOED_WORKER_ARENA_H

#include <stddef.h>

/* Hands out parts of one allocation, host or device memory; with no memory behind it, it only adds up. */
struct arena {
    unsigned char *memory;
    size_t used, alignment; /* alignment of every part */
};

static inline void *arena_take(struct arena *arena, size_t count, size_t size) {
    void *part = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (count * size + arena->alignment - 1) / arena->alignment * arena->alignment;
    return part;
}

#endif
