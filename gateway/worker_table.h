#ifndef MOED_GATEWAY_WORKER_TABLE_H
#define MOED_GATEWAY_WORKER_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "common/wire.h"
#include "worker.pb-c.h"

/* The workers a gateway knows: who they are, how they do, and which one a request is placed on. One thread's own. */
struct worker_table;

struct worker {
    struct wire_identity peer;
    char id[128];
    uint64_t incarnation;
    char backend[32], device[128];
    Moed__V1__Worker__State state;
    uint32_t context_length;
    uint32_t kv_blocks_total;
    uint64_t memory_total_bytes;
    Moed__Worker__V1__Heartbeat beat; /* the last one; of strings and submessages it has none */
    uint64_t seen_ns;                 /* when it was last heard of */

    /*
     * Load is counted in rows still to be computed: prompt tokens to prefill, and one for each sequence that generates.
     * What this gateway has placed is known exactly at any time; a heartbeat tells about the rest (other gateways'
     * work), which is what it reports beyond our own.
     */
    uint64_t own_load, foreign_load;
    uint32_t requests;  /* of this gateway */
    uint64_t placed_at; /* rising with each placement, so that equals take turns */
};

/* The model all workers serve. */
struct model_facts {
    char name[128], architecture[64], fingerprint[65];
    uint32_t vocab_size, context_length, block_count, embedding_length, expert_count, expert_used_count, eos_token_id;
    uint64_t tensor_bytes;
    uint64_t generation; /* changes with the model; 0: there is none */
};

struct worker_table *worker_table_create(void);
void worker_table_destroy(struct worker_table *table);

/*
 * Takes a worker in after its Hello, or takes it in again, when *back is set: the same incarnation, which has dropped
 * its work. NULL with FAILED_PRECONDITION where its model is not that of the others, INVALID_ARGUMENT, ALREADY_EXISTS
 * where another living worker has its name (*rival is that one), or RESOURCE_EXHAUSTED.
 */
struct worker *worker_table_hello(struct worker_table *table, const struct wire_identity *peer,
                                  const Moed__Worker__V1__Hello *hello, uint64_t now_ns, bool *back,
                                  struct worker **rival, struct status *status);

/* The living worker behind a peer; NULL: none. */
struct worker *worker_table_find(struct worker_table *table, const struct wire_identity *peer);

/* Notes a heartbeat. false: its state is none a worker may have. */
bool worker_beat(struct worker *worker, const Moed__Worker__V1__Heartbeat *beat, uint64_t now_ns);

/* The least loaded READY worker for a sequence of so many tokens; NULL: none. */
struct worker *worker_table_place(struct worker_table *table, uint64_t sequence_tokens);
void worker_placed(struct worker_table *table, struct worker *worker, uint64_t load);

/* Counts a worker as lost. It stays in the table for a while, to be seen and to come back. */
void worker_lose(struct worker *worker);
void worker_table_remove(struct worker_table *table, struct worker *worker);
/* Removes workers lost since before `since_ns`. */
void worker_table_expire(struct worker_table *table, uint64_t since_ns);

const char *worker_state_name(Moed__V1__Worker__State state); /* "READY" */

size_t worker_table_count(const struct worker_table *table);
struct worker *worker_table_at(struct worker_table *table, size_t index);
size_t worker_table_ready(const struct worker_table *table);
/* The longest sequence any READY worker takes. */
uint32_t worker_table_context_length(const struct worker_table *table);
const struct model_facts *worker_table_model(const struct worker_table *table);

#endif
