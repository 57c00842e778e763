#include "tests/bench/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"

/*
 * matmul_tile on a matrix larger than the caches, all threads: weights packed before, and packed in passing from the
 * order of the file. Rates count the weights' bytes once, however many tokens they are multiplied with.
 */
enum { COLUMNS = 2048, TOKENS = 64, RUNS = 3, BYTES = 192 << 20 };

struct job {
    const struct cpu_kernels *kernels;
    enum quant_type type;
    size_t row_bytes, tile_bytes;
    uint8_t *rows, *tiles; /* the same matrix in both orders */
    uint8_t *scratch;      /* [threads][tile_bytes] */
    uint32_t tile_count, n;
    const void *x[TOKENS];
    float *y; /* [threads][TOKENS][16] */
};

static void run_packed(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct job *job = context;
    float *y[TOKENS];
    for (uint32_t t = 0; t < TOKENS; t++)
        y[t] = job->y + (thread * TOKENS + t) * CPU_TILE_ROWS;
    for (; first < end; first++)
        job->kernels->matmul_tile(job->type, COLUMNS, job->tiles + first * job->tile_bytes, CPU_TILE_ROWS, job->x, y, job->n);
}

static void run_mapped(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct job *job = context;
    float *y[TOKENS];
    uint8_t *tile = job->scratch + thread * job->tile_bytes;
    for (uint32_t t = 0; t < TOKENS; t++)
        y[t] = job->y + (thread * TOKENS + t) * CPU_TILE_ROWS;
    for (; first < end; first++) {
        job->kernels->pack(job->type, COLUMNS, job->rows + first * CPU_TILE_ROWS * job->row_bytes, job->row_bytes,
                           CPU_TILE_ROWS, tile);
        job->kernels->matmul_tile(job->type, COLUMNS, tile, CPU_TILE_ROWS, job->x, y, job->n);
    }
}

static void run_pack(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct job *job = context;
    for (; first < end; first++)
        job->kernels->pack(job->type, COLUMNS, job->rows + first * CPU_TILE_ROWS * job->row_bytes, job->row_bytes,
                           CPU_TILE_ROWS, job->tiles + first * job->tile_bytes);
}

/* Bytes that are valid weights of any format and small: scales of about 2^-7. */
static void fill(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct job *job = context;
    uint64_t state = first + 1;
    for (uint8_t *p = job->rows + first * CPU_TILE_ROWS * job->row_bytes,
                 *limit = job->rows + end * CPU_TILE_ROWS * job->row_bytes; p + 8 <= limit; p += 8) {
        state = state * 6364136223846793005 + 1442695040888963407;
        uint64_t bits = (state ^ state >> 29) & 0x9fff9fff9fff9fff;
        memcpy(p, &bits, sizeof bits);
    }
}

static double seconds(struct thread_pool *pool, thread_pool_function *function, struct job *job) {
    double best = 1e9;
    for (int run = 0; run < RUNS; run++) {
        uint64_t began = clock_now_ns();
        thread_pool_run(pool, function, job, job->tile_count);
        double taken = (double)(clock_now_ns() - began) / 1e9;
        best = taken < best ? taken : best;
    }
    return best;
}

static void bench_format(struct job *job, struct thread_pool *pool, const struct machine *machine, bool json, bool first) {
    static const uint32_t counts[] = {1, 2, 4, 8, 16, 64};
    const char *name = quant_format(job->type)->name;
    double bytes = (double)job->tile_count * (double)job->tile_bytes;
    double weights = (double)job->tile_count * CPU_TILE_ROWS * COLUMNS;
    double pack = bytes / seconds(pool, run_pack, job);
    if (json)
        printf("%s{\"format\":\"%s\",\"pack\":%.4g,\"runs\":[", first ? "" : ",", name, pack);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        job->n = counts[i];
        double packed = seconds(pool, run_packed, job), mapped = seconds(pool, run_mapped, job);
        if (json) {
            printf("%s{\"n\":%u,\"packed_seconds\":%.6g,\"packed_read\":%.4g,\"packed_multiply_add\":%.4g,"
                   "\"mapped_seconds\":%.6g,\"mapped_read\":%.4g,\"mapped_multiply_add\":%.4g}",
                   i ? "," : "", job->n, packed, bytes / packed, job->n * weights / packed, mapped, bytes / mapped,
                   job->n * weights / mapped);
            continue;
        }
        printf("%-5s %3u | %6.1f GB/s %3.0f %% %7.1f GMAC/s %3.0f %% | %6.1f GB/s %3.0f %% %7.1f GMAC/s %3.0f %%\n", name,
               job->n, bytes / packed / 1e9, 100 * bytes / packed / machine->read, job->n * weights / packed / 1e9,
               100 * job->n * weights / packed / machine->multiply_add, bytes / mapped / 1e9,
               100 * bytes / mapped / machine->read, job->n * weights / mapped / 1e9,
               100 * job->n * weights / mapped / machine->multiply_add);
        fflush(stdout);
    }
    if (json)
        printf("]}");
    else
        printf("%-5s pack | %4.1f GB/s\n", name, pack / 1e9);
}

static int bench_type(const struct bench_options *options, enum quant_type type, struct thread_pool *pool,
                      const struct machine *machine, bool first, struct status *status) {
    const struct quant_format *format = quant_format(type);
    uint32_t threads = thread_pool_size(pool);
    struct job job = {.kernels = cpu_kernels_select(options->isa), .type = type};
    job.row_bytes = (size_t)COLUMNS / format->block_weights * format->block_bytes;
    job.tile_bytes = cpu_tile_bytes(type, COLUMNS);
    job.tile_count = (uint32_t)(BYTES / job.tile_bytes);
    size_t bytes = job.tile_count * job.tile_bytes, activation_bytes = COLUMNS * sizeof(float);
    job.rows = bench_allocate(bytes);
    job.tiles = bench_allocate(bytes);
    job.scratch = aligned_alloc(64, threads * job.tile_bytes);
    job.y = aligned_alloc(64, threads * TOKENS * CPU_TILE_ROWS * sizeof(float));
    uint8_t *x = aligned_alloc(64, TOKENS * activation_bytes);
    int result = 0;
    if (job.rows == NULL || job.tiles == NULL || job.scratch == NULL || job.y == NULL || x == NULL) {
        result = status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %s matrices", format->name);
        goto out;
    }
    for (uint32_t t = 0; t < TOKENS; t++) {
        float values[COLUMNS];
        for (uint32_t i = 0; i < COLUMNS; i++)
            values[i] = (float)((i * 7919 + t * 104729) % 257) / 128 - 1;
        if (cpu_type_is_quantized(type))
            job.kernels->quantize(values, COLUMNS, (struct cpu_activation *)(x + t * activation_bytes));
        else
            memcpy(x + t * activation_bytes, values, sizeof values);
        job.x[t] = x + t * activation_bytes;
    }
    thread_pool_run(pool, fill, &job, job.tile_count);
    bench_format(&job, pool, machine, options->json, first);

out:
    bench_free(job.rows, bytes);
    bench_free(job.tiles, bytes);
    free(job.scratch);
    free(job.y);
    free(x);
    return result;
}

int bench_kernels(const struct bench_options *options, struct thread_pool *pool, const struct machine *machine,
                  struct status *status) {
    static const enum quant_type types[] = {QUANT_Q4_K, QUANT_Q5_K, QUANT_Q6_K, QUANT_Q8_0,
                                            QUANT_F16,  QUANT_BF16, QUANT_F32};
    bool first = true;
    if (options->json)
        printf(",\"columns\":%d,\"formats\":[", COLUMNS);
    else
        printf("\n%d columns; share of the read rate and of the int8 multiply-add rate\n%-9s | %-40s | %s\n", COLUMNS,
               "    tokens", "packed", "packed in passing");
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (*options->format != '\0' && strcmp(options->format, quant_format(types[i])->name) != 0)
            continue;
        if (bench_type(options, types[i], pool, machine, first, status) < 0)
            return -1;
        first = false;
    }
    if (options->json)
        printf("]");
    return 0;
}
