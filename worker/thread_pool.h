#ifndef MOED_WORKER_THREAD_POOL_H
#define MOED_WORKER_THREAD_POOL_H

#include <stdint.h>

#include "common/status.h"

/*
 * Threads that share out independent items. The caller is thread 0 and works too, so a pool of one has no threads of
 * its own. Between runs the threads spin for some ten microseconds and then sleep: an idle pool costs nothing.
 */
struct thread_pool;

/* Does items first .. end - 1; `thread` is below thread_pool_size and no other call has it at the same time. */
typedef void thread_pool_function(void *context, uint32_t first, uint32_t end, uint32_t thread);

/* threads 0: one per processor of the affinity mask. *out is to be freed with thread_pool_destroy. */
int thread_pool_create(uint32_t threads, struct thread_pool **out, struct status *status);
void thread_pool_destroy(struct thread_pool *pool);
uint32_t thread_pool_size(const struct thread_pool *pool);

/*
 * Runs all of items 0 .. items - 1 and returns when they are done. Runs of consecutive items go to whichever thread
 * asks next, long ones first and single items at the end, so that memory is streamed and the threads finish together.
 * Only one thread may call it, and not from inside an item.
 */
void thread_pool_run(struct thread_pool *pool, thread_pool_function *function, void *context, uint32_t items);

#endif
