#include "worker/kv_cache.h"

#include <assert.h>
#include <stdlib.h>

struct kv_cache {
    uint32_t total, block_tokens;
    uint32_t free_count;
    uint32_t free_blocks[]; /* a stack: what was used last is taken first */
};

struct kv_cache *kv_cache_create(uint32_t blocks, uint32_t block_tokens) {
    struct kv_cache *cache = malloc(sizeof(*cache) + (size_t)blocks * sizeof(cache->free_blocks[0]));
    if (!cache)
        return NULL;
    cache->total = cache->free_count = blocks;
    cache->block_tokens = block_tokens;
    for (uint32_t i = 0; i < blocks; i++)
        cache->free_blocks[i] = blocks - 1 - i;
    return cache;
}

void kv_cache_destroy(struct kv_cache *cache) {
    free(cache);
}

uint32_t kv_cache_total(const struct kv_cache *cache) {
    return cache->total;
}

uint32_t kv_cache_free(const struct kv_cache *cache) {
    return cache->free_count;
}

uint32_t kv_cache_blocks_for(const struct kv_cache *cache, uint32_t positions) {
    return positions / cache->block_tokens + (positions % cache->block_tokens != 0);
}

bool kv_cache_reserve(struct kv_cache *cache, struct kv_table *table, uint32_t positions) {
    uint32_t wanted = kv_cache_blocks_for(cache, positions);
    if (wanted <= table->count)
        return true;
    if (wanted - table->count > cache->free_count)
        return false;
    if (wanted > table->capacity) {
        uint32_t capacity = wanted + wanted / 2 + 4;
        uint32_t *blocks = realloc(table->blocks, capacity * sizeof(*blocks));
        if (!blocks)
            return false;
        table->blocks = blocks;
        table->capacity = capacity;
    }
    while (table->count < wanted)
        table->blocks[table->count++] = cache->free_blocks[--cache->free_count];
    return true;
}

void kv_cache_release(struct kv_cache *cache, struct kv_table *table) {
    assert(table->count <= cache->total - cache->free_count);
    while (table->count > 0)
        cache->free_blocks[cache->free_count++] = table->blocks[--table->count];
    free(table->blocks);
    *table = (struct kv_table){0};
}
