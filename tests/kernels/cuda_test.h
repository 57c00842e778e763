#ifndef MOED_TESTS_KERNELS_CUDA_TEST_H
#define MOED_TESTS_KERNELS_CUDA_TEST_H

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/kernels/quant_blocks.h"
#include "tests/tap.h"

/* What the tests of the CUDA kernels share. Without a device a test is skipped as a whole, with a plan that says so:
 * exit status 77 is an error to Automake's TAP driver. */

#define CUDA_CHECK(call)                                                                                               \
    do {                                                                                                               \
        cudaError_t error_ = (call);                                                                                   \
        if (error_ != cudaSuccess) {                                                                                   \
            printf("Bail out! %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                \
            exit(EXIT_FAILURE);                                                                                        \
        }                                                                                                              \
    } while (0)

static inline void cuda_test_begin(struct random *random) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("1..0 # SKIP no CUDA device\n");
        exit(EXIT_SUCCESS);
    }
    const char *given = getenv("MOED_TEST_SEED");
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    random->state = given ? strtoull(given, NULL, 0) : (uint64_t)now.tv_nsec * 2654435761u + (uint64_t)now.tv_sec;
    tap_note("MOED_TEST_SEED=%llu", (unsigned long long)random->state);
}

/* Device memory of `bytes`, a copy of `from` or, where that is NULL, all ones: NaN as a float of either size. */
static inline void *cuda_test_buffer(const void *from, size_t bytes) {
    void *device;
    CUDA_CHECK(cudaMalloc(&device, bytes ? bytes : 1));
    if (from)
        CUDA_CHECK(cudaMemcpy(device, from, bytes, cudaMemcpyHostToDevice));
    else
        CUDA_CHECK(cudaMemset(device, 0xff, bytes));
    return device;
}

static inline void cuda_test_fetch(void *to, const void *device, size_t bytes) {
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(to, device, bytes, cudaMemcpyDeviceToHost));
}

/* The order of cuda_activation's interleaved rows, in place; n is a multiple of 32. */
static inline void cuda_test_interleave(uint16_t *halves, size_t n) {
    for (uint16_t *group = halves; group < halves + n; group += 32) {
        uint16_t before[32];
        memcpy(before, group, sizeof before);
        for (int t = 0; t < 4; t++)
            for (int k = 0; k < 4; k++)
                memcpy(group + 2 * (4 * k + t), before + 2 * (4 * t + k), 2 * sizeof *group);
    }
}

#endif
