#include "common/clock.h"

#include <sys/random.h>
#include <time.h>

uint64_t clock_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* cannot fail: the clock always exists on Linux */
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t clock_random_u64(void) {
    uint64_t bits;
    ssize_t n;
    /* Eight bytes are never cut short once the kernel's pool is seeded; a signal can interrupt the wait for that. */
    do
        n = getrandom(&bits, sizeof bits, 0);
    while (n != (ssize_t)sizeof bits);
    return bits;
}
