#include "config.h" /* MAP_ANONYMOUS, madvise */

#include "tests/bench/machine.h"

#include <string.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/clock.h"

enum { READ_BYTES = 512 << 20 /* much more than the caches */, PIECE = 1 << 20, RUNS = 5, ROUNDS = 1 << 20, CHAINS = 16, AHEAD = 4096 };

void *bench_allocate(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

void bench_free(void *memory, size_t bytes) {
    if (memory != NULL)
        munmap(memory, bytes);
}

struct reading {
    uint8_t *memory;
    uint64_t sums[64]; /* by thread, so that the loads are not in vain */
};

static void fill(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct reading *reading = context;
    memset(reading->memory + (size_t)first * PIECE, 1, (size_t)(end - first) * PIECE);
}

static void read_pieces(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct reading *reading = context;
    const uint64_t *p = (const uint64_t *)(reading->memory + (size_t)first * PIECE);
    const uint64_t *limit = (const uint64_t *)(reading->memory + (size_t)end * PIECE);
    uint64_t sum[8] = {0};
    for (; p < limit; p += 8) {
        __builtin_prefetch((const char *)p + AHEAD);
        for (int i = 0; i < 8; i++)
            sum[i] += p[i];
    }
    for (int i = 0; i < 8; i++)
        reading->sums[thread % 64] += sum[i];
}

/* Each returns the multiply-adds it did. Independent chains hide the latency; operands stay in registers. */
typedef double multiply_add(int32_t *sink);

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) static double multiply_add_avx512(int32_t *sink) {
    __m512i sum[CHAINS], w = _mm512_set1_epi8(3), x = _mm512_set1_epi8((char)*sink);
    for (int c = 0; c < CHAINS; c++)
        sum[c] = _mm512_setzero_si512();
    for (int i = 0; i < ROUNDS; i++) {
        _Pragma("GCC unroll 16") for (int c = 0; c < CHAINS; c++)
            sum[c] = _mm512_dpbusd_epi32(sum[c], w, x);
        __asm__ volatile("" : "+v"(w));
    }
    for (int c = 0; c < CHAINS; c++)
        *sink += _mm512_reduce_add_epi32(sum[c]);
    return 64.0 * CHAINS * ROUNDS;
}

__attribute__((target("avx2"))) static double multiply_add_avx2(int32_t *sink) {
    __m256i sum[CHAINS / 2], w = _mm256_set1_epi8(3), x = _mm256_set1_epi8((char)*sink), ones = _mm256_set1_epi16(1);
    for (int c = 0; c < CHAINS / 2; c++)
        sum[c] = _mm256_setzero_si256();
    for (int i = 0; i < ROUNDS; i++) {
        _Pragma("GCC unroll 16") for (int c = 0; c < CHAINS / 2; c++) {
            __m256i pairs = _mm256_maddubs_epi16(w, x);
            __asm__ volatile("" : "+x"(pairs));
            sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(pairs, ones));
        }
    }
    int32_t lanes[8];
    for (int c = 0; c < CHAINS / 2; c++) {
        _mm256_storeu_si256((__m256i *)lanes, sum[c]);
        *sink += lanes[0];
    }
    return 32.0 * (CHAINS / 2) * ROUNDS;
}
#endif

/* What a compiler makes of it for any processor. */
static double multiply_add_c(int32_t *sink) {
    int8_t w[64], x[64];
    memset(w, 3, sizeof w);
    memset(x, *sink, sizeof x);
    int32_t sum[16] = {0};
    for (int i = 0; i < ROUNDS / 16; i++) {
        __asm__ volatile("" : : "r"(w), "r"(x) : "memory");
        for (int r = 0; r < 16; r++)
            for (int j = 0; j < 4; j++)
                sum[r] += w[4 * r + j] * x[4 * r + j];
    }
    for (int r = 0; r < 16; r++)
        *sink += sum[r];
    return 64.0 * (ROUNDS / 16);
}

struct multiplying {
    multiply_add *function;
    double done[64];
    int32_t sinks[64];
};

static void multiply(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct multiplying *m = context;
    for (; first < end; first++)
        m->done[first % 64] = m->function(&m->sinks[first % 64]);
}

static double measure_multiply_add(struct thread_pool *pool, enum cpu_isa isa) {
    struct multiplying m = {.function = multiply_add_c};
    double best = 0;
#if defined(__x86_64__)
    if (isa == CPU_ISA_AVX2)
        m.function = multiply_add_avx2;
    if (isa == CPU_ISA_AVX512)
        m.function = multiply_add_avx512;
#endif
    uint32_t items = thread_pool_size(pool);
    for (int run = 0; run < RUNS; run++) {
        uint64_t began = clock_now_ns();
        thread_pool_run(pool, multiply, &m, items);
        double seconds = (double)(clock_now_ns() - began) / 1e9;
        double rate = m.done[0] * items / seconds;
        best = rate > best ? rate : best;
    }
    return best;
}

int machine_measure_read(struct thread_pool *pool, double *rate, struct status *status) {
    const uint32_t pieces = READ_BYTES / PIECE;
    struct reading reading = {.memory = bench_allocate(READ_BYTES)};
    *rate = 0;
    if (reading.memory == NULL)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %d bytes to read", READ_BYTES);
    thread_pool_run(pool, fill, &reading, pieces);
    /* All of them, not the best: what it is compared with is what was reached in the mean, beside the same neighbours. */
    uint64_t began = clock_now_ns();
    for (int run = 0; run < RUNS; run++)
        thread_pool_run(pool, read_pieces, &reading, pieces);
    *rate = (double)RUNS * READ_BYTES / ((double)(clock_now_ns() - began) / 1e9);
    bench_free(reading.memory, READ_BYTES);
    return 0;
}

int machine_measure(struct thread_pool *pool, enum cpu_isa isa, struct machine *machine, struct status *status) {
    /* Reading comes first: by its end the system has given each thread a processor, which takes it a while. */
    if (machine_measure_read(pool, &machine->read, status) < 0)
        return -1;
    machine->multiply_add = measure_multiply_add(pool, isa);
    return 0;
}
