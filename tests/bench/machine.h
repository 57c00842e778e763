#ifndef MOED_TESTS_BENCH_MACHINE_H
#define MOED_TESTS_BENCH_MACHINE_H

#include <stddef.h>

#include "kernels/cpu/cpu.h"
#include "worker/thread_pool.h"

/* What the machine can do, measured with all threads of the pool. */
struct machine {
    double read;        /* bytes per second from memory: large, in order, huge pages */
    double upload;       /* bytes per second from pinned memory to a GPU; 0: none */
    double multiply_add; /* int8 multiply-adds per second, from registers, with what the instruction set has for it */
};

int machine_measure(struct thread_pool *pool, enum cpu_isa isa, struct machine *machine, struct status *status);
/* The first of them alone. */
int machine_measure_read(struct thread_pool *pool, double *rate, struct status *status);

/*
 * What a GPU's memory does in a large copy on the device, bytes read and written counted, and in one from the host:
 * *machine's read and upload. multiply_add becomes 0, unknown. Fails in builds without CUDA.
 */
int machine_measure_device(uint32_t device, struct machine *machine, struct status *status);

/* Zeroed memory in huge pages where the system gives them; NULL: none. Freed with bench_free. */
void *bench_allocate(size_t bytes);
void bench_free(void *memory, size_t bytes);

#endif
