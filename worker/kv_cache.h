#ifndef MOED_WORKER_KV_CACHE_H
#define MOED_WORKER_KV_CACHE_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Which blocks of the executor's paged KV cache belong to which sequences, and which hold prefixes that may be used
 * again. The cache's memory is the executor's; here are block ids and the tokens whose keys and values they hold.
 *
 * A block that is full and computed is published: it can be found by its tokens and the published block before it, so
 * a chain of blocks stands for one prefix alone, whatever hashes collide. Sequences that match it share it; nobody
 * writes it any more. When the last of them lets go it stays, until blocks run out: then the least recently used goes,
 * and always a chain's end before what precedes it.
 */
struct kv_cache;

/* The blocks of one sequence, in order of position. Zeroed: empty. */
struct kv_table {
    uint32_t *blocks;
    uint32_t count, capacity;
    uint32_t published; /* so many leading blocks are */
};

/* All `blocks` of `block_tokens` positions each are free. `share`: whether blocks are published. NULL: no memory. */
struct kv_cache *kv_cache_create(uint32_t blocks, uint32_t block_tokens, bool share);
void kv_cache_destroy(struct kv_cache *cache);

uint32_t kv_cache_total(const struct kv_cache *cache);
/* Blocks that no table has, whether they hold a prefix or not. */
uint32_t kv_cache_free(const struct kv_cache *cache);
/* How many blocks hold this many positions. */
uint32_t kv_cache_blocks_for(const struct kv_cache *cache, uint32_t positions);

/*
 * Gives an empty table the published blocks of a prefix of tokens[0 .. count), as many as there are. Returns how many
 * positions they hold.
 */
uint32_t kv_cache_match(struct kv_cache *cache, struct kv_table *table, const uint32_t *tokens, uint32_t count);
/* Makes the table cover positions 0 .. positions - 1. False: too few blocks are free, and nothing has changed. */
bool kv_cache_reserve(struct kv_cache *cache, struct kv_table *table, uint32_t positions);
/*
 * The executor has computed tokens[0 .. computed): publishes the table's full blocks. Where another table's block with
 * the same prefix came first, the table takes that one; results are batch-invariant, so both hold the same bits.
 */
void kv_cache_publish(struct kv_cache *cache, struct kv_table *table, const uint32_t *tokens, uint32_t computed);
/* Lets go of all blocks and frees the table's own memory; it may be used again. */
void kv_cache_release(struct kv_cache *cache, struct kv_table *table);

#endif
