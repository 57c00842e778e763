/* The thread pool: every item exactly once, for any size and count, with threads asleep and awake; idle when idle. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "common/clock.h"
#include "tests/tap.h"
#include "worker/thread_pool.h"

enum { ITEMS_MAX = 5000, THREADS = 4 };

struct count {
    struct thread_pool *pool;
    unsigned char done[ITEMS_MAX]; /* not atomic: an item done twice is a race that TSan sees too */
    atomic_uint busy[THREADS];
    atomic_uint wrong;
};

static void count_items(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct count *count = context;
    if (thread >= thread_pool_size(count->pool) || atomic_fetch_add(&count->busy[thread], 1) != 0)
        atomic_fetch_add(&count->wrong, 1);
    for (uint32_t i = first; i < end; i++)
        count->done[i]++;
    atomic_fetch_sub(&count->busy[thread], 1);
}

static bool run_counts(struct thread_pool *pool, struct count *count, uint32_t items) {
    memset(count->done, 0, sizeof count->done);
    thread_pool_run(pool, count_items, count, items);
    for (uint32_t i = 0; i < ITEMS_MAX; i++)
        if (count->done[i] != (i < items))
            return false;
    return atomic_load(&count->wrong) == 0;
}

static void sleep_ms(long ms) {
    nanosleep(&(struct timespec){.tv_nsec = ms * 1000000}, NULL);
}

static double cpu_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

int main(void) {
    struct count count;
    for (uint32_t threads = 1; threads <= THREADS; threads++) {
        struct status status = {0};
        struct thread_pool *pool;
        if (!tap_ok(thread_pool_create(threads, &pool, &status) == 0, "a pool of %u: %s", threads, status.message))
            return tap_done();
        memset(&count, 0, sizeof count);
        count.pool = pool;

        bool once = thread_pool_size(pool) == threads;
        for (uint32_t items = 0; items < 200; items++)
            once = run_counts(pool, &count, items) && once;
        for (int i = 0; i < 300; i++)
            once = run_counts(pool, &count, (uint32_t)(rand() % ITEMS_MAX)) && once;
        tap_ok(once, "%u threads do every item exactly once", threads);

        bool awake = true;
        for (int i = 0; i < 20; i++) {
            sleep_ms(i % 3); /* around and beyond the time after which threads sleep */
            awake = run_counts(pool, &count, 1000) && awake;
        }
        tap_ok(awake, "%u threads wake up", threads);

        sleep_ms(5);
        double before = cpu_seconds();
        sleep_ms(200);
        double used = cpu_seconds() - before;
        tap_ok(used < 0.02, "%u idle threads use no processor (%.1f ms of 200)", threads, used * 1e3);
        thread_pool_destroy(pool);
    }

    struct status status = {0};
    struct thread_pool *pool;
    tap_ok(thread_pool_create(0, &pool, &status) == 0 && thread_pool_size(pool) >= 1,
           "0: as many as there are processors");
    thread_pool_destroy(pool);
    tap_ok(thread_pool_create(100000, &pool, &status) < 0 && !pool && strstr(status.message, "100000"),
           "too many are refused: %s", status.message);
    thread_pool_destroy(NULL);
    return tap_done();
}
