#include "config.h"

#include "tests/bench/machine.h"

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#include <string.h>

enum { RUNS = 10 };
static const size_t bytes = (size_t)1 << 30; /* much more than the caches */

/* Bytes per second of the best of some copies; 0 with *error set where one fails. */
static double copy_rate(void *to, const void *from, enum cudaMemcpyKind kind, cudaError_t *error) {
    cudaEvent_t began = NULL, ended = NULL;
    double best = 0;
    *error = *error ? *error : cudaEventCreate(&began);
    *error = *error ? *error : cudaEventCreate(&ended);
    for (int run = 0; run < RUNS && *error == cudaSuccess; run++) {
        float ms = 0;
        *error = cudaEventRecord(began, NULL);
        *error = *error ? *error : cudaMemcpyAsync(to, from, bytes, kind, NULL);
        *error = *error ? *error : cudaEventRecord(ended, NULL);
        *error = *error ? *error : cudaEventSynchronize(ended);
        *error = *error ? *error : cudaEventElapsedTime(&ms, began, ended);
        double rate = ms > 0 ? (double)bytes / (ms / 1e3) : 0;
        best = rate > best ? rate : best;
    }
    if (began)
        cudaEventDestroy(began);
    if (ended)
        cudaEventDestroy(ended);
    return best;
}

int machine_measure_device(uint32_t device, struct machine *machine, struct status *status) {
    void *from = NULL, *to = NULL, *host = NULL;
    *machine = (struct machine){0};
    cudaError_t error = cudaSetDevice((int)device);
    error = error ? error : cudaMalloc(&from, bytes);
    error = error ? error : cudaMalloc(&to, bytes);
    error = error ? error : cudaMemset(from, 1, bytes);
    error = error ? error : cudaHostAlloc(&host, bytes, cudaHostAllocDefault);
    machine->read = 2 * copy_rate(to, from, cudaMemcpyDeviceToDevice, &error);
    if (error == cudaSuccess)
        memset(host, 1, bytes);
    machine->upload = copy_rate(to, host, cudaMemcpyHostToDevice, &error);
    cudaFree(from);
    cudaFree(to);
    cudaFreeHost(host);
    return error == cudaSuccess
               ? 0
               : status_set(status, STATUS_FAILED_PRECONDITION, "device %u: %s", device, cudaGetErrorString(error));
}
#else
int machine_measure_device(uint32_t device, struct machine *machine, struct status *status) {
    return status_set(status, STATUS_FAILED_PRECONDITION, "device %u: this build has no CUDA", device);
}
#endif
