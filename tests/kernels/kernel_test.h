#ifndef MOED_TESTS_KERNELS_KERNEL_TEST_H
#define MOED_TESTS_KERNELS_KERNEL_TEST_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu/cpu.h"
#include "tests/tap.h"

/* What the tests of the CPU kernels share: seeded numbers, the instruction sets of this machine, comparisons. */

static uint64_t random_state;

/* A fresh seed, or MOED_TEST_SEED to repeat a run. */
static inline void random_begin(void) {
    const char *given = getenv("MOED_TEST_SEED");
    random_state = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL) * 2654435761u;
    tap_note("MOED_TEST_SEED=%llu", (unsigned long long)random_state);
}

static inline uint64_t random_u64(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static inline uint32_t random_below(uint32_t n) {
    return (uint32_t)((random_u64() >> 32) * n >> 32);
}

/* About normal, variance 1. */
static inline float random_float(void) {
    float sum = 0;
    for (int i = 0; i < 6; i++)
        sum += (float)(random_u64() >> 40) * 0x1p-24f - 0.5f;
    return sum * 1.41421356f;
}

static inline void random_floats(float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = random_float();
}

/* The kernels this machine can run, plain C first. Returns how many. */
static inline int kernels_here(const struct cpu_kernels *kernels[3]) {
    int count = 0;
    for (int isa = CPU_ISA_C; isa <= CPU_ISA_AVX512; isa++) {
        const struct cpu_kernels *best = cpu_kernels_select((enum cpu_isa)isa);
        if (best->isa == (enum cpu_isa)isa)
            kernels[count++] = best;
    }
    return count;
}

/* The same bits; all NaNs count as one, because which one an operation passes on is up to the processor. */
static inline bool same_floats(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i])))
            return false;
    return true;
}

static inline void *test_memory(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == NULL)
        abort();
    return memory;
}

#endif
