#ifndef MOED_GATEWAY_REQUEST_TABLE_H
#define MOED_GATEWAY_REQUEST_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "gateway/fleet.h"

/* The requests in flight, by the gateway's number for them and by their caller's name. The fleet thread's own. */
struct request_table;

struct request_table *request_table_create(void);
void request_table_destroy(struct request_table *table);

/* Gives a request its number (never 0) and takes it in. */
void request_table_add(struct request_table *table, struct fleet_request *request);
/* Takes it out; its number becomes 0. */
void request_table_remove(struct request_table *table, struct fleet_request *request);

struct fleet_request *request_table_find(const struct request_table *table, uint64_t id);
struct fleet_request *request_table_find_name(const struct request_table *table, const char *name);

/* Any request on this worker, or any at all with NULL; NULL: none. */
struct fleet_request *request_table_any(const struct request_table *table, const struct worker *worker);
size_t request_table_count(const struct request_table *table);

#endif
