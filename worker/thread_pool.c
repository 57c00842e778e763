#include "config.h" /* _GNU_SOURCE: sched_getaffinity, CPU_COUNT */

#include "worker/thread_pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"

enum {
    CACHE_LINE = 64,
    THREADS_MAX = 1024,
    SPIN_NS = 50000,
    SPIN_PAUSES = 64, /* between two looks at the clock */
    RUN_SHARE = 4,    /* a claim takes this fraction of a thread's even share of what remains */
};

/*
 * A run is open while `remaining` is not 0. A claim lowers it; whoever claimed may read the job, because the caller
 * does not return, let alone post another, before `done` counts the claimed items too. A thread that comes late finds
 * nothing remaining and nobody waits for it.
 */
struct thread_pool {
    alignas(CACHE_LINE) atomic_uint remaining;
    alignas(CACHE_LINE) atomic_uint done;
    alignas(CACHE_LINE) thread_pool_function *function;
    void *context;
    uint32_t items;

    alignas(CACHE_LINE) atomic_uint sleepers;
    atomic_bool caller_sleeps, stop;
    pthread_mutex_t mutex; /* guards only going to sleep and waking up */
    pthread_cond_t work, finished;

    uint32_t size;
    uint32_t started;
    struct thread {
        struct thread_pool *pool;
        uint32_t index;
        pthread_t handle;
    } *threads; /* [size - 1] */
};

static void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Claims and does items until none remain. */
static void work(struct thread_pool *pool, uint32_t thread) {
    unsigned remaining = atomic_load_explicit(&pool->remaining, memory_order_relaxed);
    while (remaining) {
        unsigned n = remaining / (pool->size * RUN_SHARE);
        if (n == 0)
            n = 1;
        if (!atomic_compare_exchange_weak_explicit(&pool->remaining, &remaining, remaining - n, memory_order_acquire,
                                                   memory_order_relaxed))
            continue;
        uint32_t items = pool->items, first = items - remaining;
        pool->function(pool->context, first, first + n, thread);
        /* Sequentially consistent against the caller's flag: one of the two sees the other. */
        if (atomic_fetch_add(&pool->done, n) + n == items && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->mutex);
        }
        remaining = atomic_load_explicit(&pool->remaining, memory_order_relaxed);
    }
}

static void sleep_until_work(struct thread_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!atomic_load(&pool->remaining) && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->work, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *thread_main(void *argument) {
    struct thread *thread = argument;
    struct thread_pool *pool = thread->pool;
    char name[16];
    snprintf(name, sizeof name, "moed-cpu-%u", thread->index);
    pthread_setname_np(pthread_self(), name);

    while (!atomic_load(&pool->stop)) {
        uint64_t until = clock_now_ns() + SPIN_NS;
        unsigned pauses = 0;
        while (!atomic_load_explicit(&pool->remaining, memory_order_relaxed)) {
            if (++pauses % SPIN_PAUSES == 0 && clock_now_ns() >= until) {
                sleep_until_work(pool);
                break;
            }
            spin_pause();
        }
        work(pool, thread->index);
    }
    return NULL;
}

static void wait_until_done(struct thread_pool *pool) {
    uint64_t until = clock_now_ns() + SPIN_NS;
    unsigned pauses = 0;
    while (atomic_load_explicit(&pool->done, memory_order_acquire) != pool->items) {
        if (++pauses % SPIN_PAUSES == 0 && clock_now_ns() >= until) {
            pthread_mutex_lock(&pool->mutex);
            atomic_store(&pool->caller_sleeps, true);
            while (atomic_load(&pool->done) != pool->items)
                pthread_cond_wait(&pool->finished, &pool->mutex);
            atomic_store(&pool->caller_sleeps, false);
            pthread_mutex_unlock(&pool->mutex);
            return;
        }
        spin_pause();
    }
}

void thread_pool_run(struct thread_pool *pool, thread_pool_function *function, void *context, uint32_t items) {
    if (items <= 1 || pool->size == 1) {
        if (items)
            function(context, 0, items, 0);
        return;
    }
    pool->function = function;
    pool->context = context;
    pool->items = items;
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    atomic_store(&pool->remaining, items);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->mutex);
    }
    work(pool, 0);
    wait_until_done(pool);
}

static uint32_t affinity_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1; /* more processors than the set has room for: be modest rather than wrong */
    return (uint32_t)CPU_COUNT(&set);
}

int thread_pool_create(uint32_t threads, struct thread_pool **out, struct status *status) {
    *out = NULL;
    if (threads > THREADS_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "threads: %u, at most %d", threads, THREADS_MAX);
    if (threads == 0)
        threads = affinity_count();

    struct thread_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool);
    struct thread *list = calloc(threads, sizeof *list);
    if (!pool || !list) {
        free(pool);
        free(list);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %u threads", threads);
    }
    memset(pool, 0, sizeof *pool);
    pool->size = threads;
    pool->threads = list;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);

    /* Signals are for the threads of the program, never for these. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (uint32_t i = 0; i + 1 < threads && !error; i++) {
        list[i] = (struct thread){.pool = pool, .index = i + 1};
        error = pthread_create(&list[i].handle, NULL, thread_main, &list[i]);
        pool->started += !error;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "thread %u of %u: %s", pool->started + 1, threads - 1,
                   strerror(error));
        thread_pool_destroy(pool);
        return -1;
    }
    *out = pool;
    return 0;
}

void thread_pool_destroy(struct thread_pool *pool) {
    if (!pool)
        return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (uint32_t i = 0; i < pool->started; i++)
        pthread_join(pool->threads[i].handle, NULL);
    pthread_cond_destroy(&pool->finished);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->threads);
    free(pool);
}

uint32_t thread_pool_size(const struct thread_pool *pool) {
    return pool->size;
}
