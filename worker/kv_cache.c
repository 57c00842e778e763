#include "worker/kv_cache.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX

struct block {
    uint32_t tables;       /* that have it */
    uint32_t next;         /* in its bucket */
    uint32_t older, newer; /* in the list of published blocks that no table has */
    uint64_t name;         /* given when it was published, never twice; 0: it is not */
    uint64_t before;       /* the name of the block before it; 0: it holds the first tokens */
};

struct kv_cache {
    uint32_t total, block_tokens;
    bool share;
    uint32_t *free_blocks; /* a stack of blocks without content: what was used last is taken first */
    uint32_t free_count;
    uint32_t idle_count;   /* published, and in no table */
    struct block *blocks;  /* [total + 1]: the last is the head of the list of idle blocks, newest first */
    uint32_t *tokens;      /* [total][block_tokens], of published blocks */
    uint32_t *buckets, bucket_mask;
    uint64_t names;        /* given so far */
};

struct kv_cache *kv_cache_create(uint32_t blocks, uint32_t block_tokens, bool share) {
    struct kv_cache *cache = calloc(1, sizeof(*cache));
    if (!cache)
        return NULL;
    uint32_t buckets = 1;
    while (share && buckets < blocks && buckets < 1u << 31)
        buckets *= 2;
    cache->total = cache->free_count = blocks;
    cache->block_tokens = block_tokens;
    cache->share = share;
    cache->bucket_mask = buckets - 1;
    cache->free_blocks = malloc(((size_t)blocks + 1) * sizeof(*cache->free_blocks));
    cache->blocks = calloc((size_t)blocks + 1, sizeof(*cache->blocks));
    cache->tokens = share ? malloc(((size_t)blocks * block_tokens + 1) * sizeof(*cache->tokens)) : NULL;
    cache->buckets = malloc(buckets * sizeof(*cache->buckets));
    if (!cache->free_blocks || !cache->blocks || (share && !cache->tokens) || !cache->buckets) {
        kv_cache_destroy(cache);
        return NULL;
    }
    for (uint32_t i = 0; i < blocks; i++)
        cache->free_blocks[i] = blocks - 1 - i;
    for (uint32_t i = 0; i < buckets; i++)
        cache->buckets[i] = NONE;
    cache->blocks[blocks].older = cache->blocks[blocks].newer = blocks;
    return cache;
}

void kv_cache_destroy(struct kv_cache *cache) {
    if (!cache)
        return;
    free(cache->free_blocks);
    free(cache->blocks);
    free(cache->tokens);
    free(cache->buckets);
    free(cache);
}

uint32_t kv_cache_total(const struct kv_cache *cache) {
    return cache->total;
}

uint32_t kv_cache_free(const struct kv_cache *cache) {
    return cache->free_count + cache->idle_count;
}

uint32_t kv_cache_blocks_for(const struct kv_cache *cache, uint32_t positions) {
    return positions / cache->block_tokens + (positions % cache->block_tokens != 0);
}

/* ---- published blocks by what they hold */

static uint32_t *bucket_of(const struct kv_cache *cache, uint64_t before, const uint32_t *tokens) {
    uint64_t hash = before;
    for (uint32_t i = 0; i < cache->block_tokens; i++) {
        hash = (hash ^ tokens[i]) * UINT64_C(0x9E3779B97F4A7C15);
        hash ^= hash >> 29;
    }
    return &cache->buckets[hash & cache->bucket_mask];
}

static uint32_t *tokens_of(const struct kv_cache *cache, uint32_t block) {
    return cache->tokens + (size_t)block * cache->block_tokens;
}

static uint32_t find(const struct kv_cache *cache, uint64_t before, const uint32_t *tokens) {
    uint32_t block = *bucket_of(cache, before, tokens);
    while (block != NONE && (cache->blocks[block].before != before ||
                             memcmp(tokens_of(cache, block), tokens, cache->block_tokens * sizeof(*tokens)) != 0))
        block = cache->blocks[block].next;
    return block;
}

static void name_block(struct kv_cache *cache, uint32_t block, uint64_t before, const uint32_t *tokens) {
    uint32_t *bucket = bucket_of(cache, before, tokens);
    memcpy(tokens_of(cache, block), tokens, cache->block_tokens * sizeof(*tokens));
    cache->blocks[block].name = ++cache->names;
    cache->blocks[block].before = before;
    cache->blocks[block].next = *bucket;
    *bucket = block;
}

static void forget(struct kv_cache *cache, uint32_t block) {
    uint32_t *link = bucket_of(cache, cache->blocks[block].before, tokens_of(cache, block));
    while (*link != block)
        link = &cache->blocks[*link].next;
    *link = cache->blocks[block].next;
    cache->blocks[block].name = 0;
}

/* ---- published blocks that no table has, by last use */

static void idle_insert(struct kv_cache *cache, uint32_t block) {
    struct block *blocks = cache->blocks;
    uint32_t head = cache->total, newest = blocks[head].older;
    blocks[block].newer = head;
    blocks[block].older = newest;
    blocks[newest].newer = blocks[head].older = block;
    cache->idle_count++;
}

static void idle_remove(struct kv_cache *cache, uint32_t block) {
    struct block *blocks = cache->blocks;
    blocks[blocks[block].older].newer = blocks[block].newer;
    blocks[blocks[block].newer].older = blocks[block].older;
    cache->idle_count--;
}

/* ---- tables */

static void take(struct kv_cache *cache, uint32_t block) {
    if (cache->blocks[block].tables++ == 0 && cache->blocks[block].name != 0)
        idle_remove(cache, block);
}

static void let_go(struct kv_cache *cache, uint32_t block) {
    assert(cache->blocks[block].tables > 0);
    if (--cache->blocks[block].tables > 0)
        return;
    if (cache->blocks[block].name != 0)
        idle_insert(cache, block);
    else
        cache->free_blocks[cache->free_count++] = block;
}

/* A block without content. There must be a free one. */
static uint32_t take_fresh(struct kv_cache *cache) {
    uint32_t block;
    if (cache->free_count > 0) {
        block = cache->free_blocks[--cache->free_count];
    } else {
        block = cache->blocks[cache->total].newer; /* the ring's other end: the oldest */
        idle_remove(cache, block);
        forget(cache, block);
    }
    cache->blocks[block].tables = 1;
    return block;
}

static bool table_grow(struct kv_table *table, uint32_t count) {
    if (count <= table->capacity)
        return true;
    uint32_t capacity = count + count / 2 + 4;
    uint32_t *blocks = realloc(table->blocks, capacity * sizeof(*blocks));
    if (!blocks)
        return false;
    table->blocks = blocks;
    table->capacity = capacity;
    return true;
}

uint32_t kv_cache_match(struct kv_cache *cache, struct kv_table *table, const uint32_t *tokens, uint32_t count) {
    assert(table->count == 0);
    uint64_t before = 0;
    for (; cache->share && count >= cache->block_tokens; count -= cache->block_tokens, tokens += cache->block_tokens) {
        uint32_t block = find(cache, before, tokens);
        if (block == NONE || !table_grow(table, table->count + 1))
            break;
        take(cache, block);
        table->blocks[table->count++] = block;
        before = cache->blocks[block].name;
    }
    table->published = table->count;
    return table->count * cache->block_tokens;
}

bool kv_cache_reserve(struct kv_cache *cache, struct kv_table *table, uint32_t positions) {
    uint32_t wanted = kv_cache_blocks_for(cache, positions);
    if (wanted <= table->count)
        return true;
    if (wanted - table->count > kv_cache_free(cache) || !table_grow(table, wanted))
        return false;
    while (table->count < wanted)
        table->blocks[table->count++] = take_fresh(cache);
    return true;
}

void kv_cache_publish(struct kv_cache *cache, struct kv_table *table, const uint32_t *tokens, uint32_t computed) {
    if (!cache->share)
        return;
    for (; table->published < computed / cache->block_tokens; table->published++) {
        uint32_t *block = &table->blocks[table->published];
        uint64_t before = table->published ? cache->blocks[block[-1]].name : 0;
        const uint32_t *own = tokens + (size_t)table->published * cache->block_tokens;
        uint32_t other = find(cache, before, own);
        if (other == NONE) {
            name_block(cache, *block, before, own);
            continue;
        }
        take(cache, other);
        let_go(cache, *block);
        *block = other;
    }
}

/* From the end, so that of one chain the end is the oldest. */
void kv_cache_release(struct kv_cache *cache, struct kv_table *table) {
    while (table->count > 0)
        let_go(cache, table->blocks[--table->count]);
    free(table->blocks);
    *table = (struct kv_table){0};
}
