#include "gateway/request_table.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"

enum { BUCKETS = 4096 }; /* a power of two; chains stay short for as many requests as admission lets in */

struct request_table {
    struct fleet_request *by_id[BUCKETS], *by_name[BUCKETS];
    size_t count;
    uint64_t last_id, salt;
};

struct request_table *request_table_create(void) {
    struct request_table *table = calloc(1, sizeof *table);
    if (table)
        table->salt = clock_random_u64();
    return table;
}

void request_table_destroy(struct request_table *table) {
    free(table);
}

/* FNV-1a from a random start: callers choose the names, and must not be able to choose the chains. */
static size_t name_bucket(const struct request_table *table, const char *name) {
    uint64_t hash = 0xcbf29ce484222325u ^ table->salt;
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return (hash ^ hash >> 32) % BUCKETS;
}

void request_table_add(struct request_table *table, struct fleet_request *request) {
    request->id = ++table->last_id;
    struct fleet_request **by_id = &table->by_id[request->id % BUCKETS];
    struct fleet_request **by_name = &table->by_name[name_bucket(table, request->request_id)];
    request->next_by_id = *by_id;
    request->next_by_name = *by_name;
    *by_id = *by_name = request;
    table->count++;
}

void request_table_remove(struct request_table *table, struct fleet_request *request) {
    struct fleet_request **link = &table->by_id[request->id % BUCKETS];
    while (*link != request)
        link = &(*link)->next_by_id;
    *link = request->next_by_id;
    link = &table->by_name[name_bucket(table, request->request_id)];
    while (*link != request)
        link = &(*link)->next_by_name;
    *link = request->next_by_name;
    request->id = 0;
    table->count--;
}

struct fleet_request *request_table_find(const struct request_table *table, uint64_t id) {
    struct fleet_request *request = table->by_id[id % BUCKETS];
    while (request && request->id != id)
        request = request->next_by_id;
    return request;
}

struct fleet_request *request_table_find_name(const struct request_table *table, const char *name) {
    struct fleet_request *request = table->by_name[name_bucket(table, name)];
    while (request && strcmp(request->request_id, name) != 0)
        request = request->next_by_name;
    return request;
}

struct fleet_request *request_table_any(const struct request_table *table, const struct worker *worker) {
    for (size_t b = 0; b < BUCKETS; b++)
        for (struct fleet_request *request = table->by_id[b]; request; request = request->next_by_id)
            if (!worker || request->worker == worker)
                return request;
    return NULL;
}

size_t request_table_count(const struct request_table *table) {
    return table->count;
}
