#ifndef MOED_WORKER_KV_CACHE_H
#define MOED_WORKER_KV_CACHE_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Which blocks of the executor's paged KV cache belong to which sequence. The cache's memory is the executor's; here
 * are block ids alone. Callers only reserve and release whole tables, so how a block comes to be in a table (fresh, or
 * one day shared) is this file's matter.
 */
struct kv_cache;

/* The blocks of one sequence, in order of position. Zeroed: empty. */
struct kv_table {
    uint32_t *blocks;
    uint32_t count, capacity;
};

/* All `blocks` of `block_tokens` positions each are free. NULL: no memory. */
struct kv_cache *kv_cache_create(uint32_t blocks, uint32_t block_tokens);
void kv_cache_destroy(struct kv_cache *cache);

uint32_t kv_cache_total(const struct kv_cache *cache);
uint32_t kv_cache_free(const struct kv_cache *cache);
/* How many blocks hold this many positions. */
uint32_t kv_cache_blocks_for(const struct kv_cache *cache, uint32_t positions);

/* Makes the table cover positions 0 .. positions - 1. False: too few blocks are free, and nothing has changed. */
bool kv_cache_reserve(struct kv_cache *cache, struct kv_table *table, uint32_t positions);
/* Gives all blocks back and frees the table's own memory; it may be used again. */
void kv_cache_release(struct kv_cache *cache, struct kv_table *table);

#endif
