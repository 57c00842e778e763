#include <stdlib.h>
#include <string.h>

#include "worker/executor_cuda.h"

/* Times of a step's operations: an event before the first and after each. */
enum { MARKS_OF_LAYER = 16, MARKS_OF_STEP = 16, OPERATIONS_MAX = 32 };

struct cuda_profile {
    uint32_t capacity, count; /* of marks */
    cudaEvent_t *events;
    const char **operations;
    bool capturing; /* marks become nodes of a graph */
    struct cuda_graph graph;
    struct executor_timing timings[OPERATIONS_MAX];
};

void cuda_profile_free(struct cuda_profile *profile) {
    if (!profile)
        return;
    for (uint32_t i = 0; profile->events && i < profile->capacity; i++)
        if (profile->events[i])
            cudaEventDestroy(profile->events[i]);
    if (profile->graph.exec)
        cudaGraphExecDestroy(profile->graph.exec);
    free(profile->events);
    free(profile->operations);
    free(profile);
}

static cudaError_t profile_create(uint32_t layers, struct cuda_profile **out) {
    struct cuda_profile *profile = calloc(1, sizeof *profile);
    if (!profile)
        return cudaErrorMemoryAllocation;
    profile->capacity = layers * MARKS_OF_LAYER + MARKS_OF_STEP;
    profile->events = calloc(profile->capacity, sizeof *profile->events);
    profile->operations = calloc(profile->capacity, sizeof *profile->operations);
    cudaError_t error = profile->events && profile->operations ? cudaSuccess : cudaErrorMemoryAllocation;
    for (uint32_t i = 0; i < profile->capacity && error == cudaSuccess; i++)
        error = cudaEventCreate(&profile->events[i]);
    if (error == cudaSuccess)
        *out = profile;
    else
        cuda_profile_free(profile);
    return error;
}

cudaError_t cuda_mark(struct executor_cuda *cuda, const char *operation) {
    struct cuda_profile *profile = cuda->profile;
    if (!cuda->profiling || profile->count == profile->capacity)
        return cudaSuccess;
    profile->operations[profile->count] = operation;
    return cudaEventRecordWithFlags(profile->events[profile->count++], cuda->stream,
                                    profile->capturing ? cudaEventRecordExternal : cudaEventRecordDefault);
}

cudaError_t cuda_profile_forward(struct executor_cuda *cuda, const struct cuda_shape *shape) {
    cudaError_t error = cuda->profile ? cudaSuccess : profile_create(cuda->model->config.block_count, &cuda->profile);
    if (error != cudaSuccess)
        return error;
    struct cuda_profile *profile = cuda->profile;
    if (profile->graph.exec)
        cudaGraphExecDestroy(profile->graph.exec);
    profile->graph = (struct cuda_graph){.shape = *shape};
    profile->count = 0;
    profile->capturing = cuda->profiling = true;
    error = cuda_graph_capture(cuda, &profile->graph);
    profile->capturing = false;
    error = error ? error : cudaGraphUpload(profile->graph.exec, cuda->stream);
    return error ? error : cudaGraphLaunch(profile->graph.exec, cuda->stream);
}

cudaError_t cuda_profile_read(struct executor_cuda *cuda, const struct executor_timing **timings, uint32_t *count) {
    struct cuda_profile *profile = cuda->profile;
    cuda->profiling = false;
    *timings = profile->timings;
    *count = 0;
    for (uint32_t i = 1; i < profile->count; i++) {
        const char *operation = profile->operations[i];
        float milliseconds = 0;
        cudaError_t error = cudaEventElapsedTime(&milliseconds, profile->events[i - 1], profile->events[i]);
        if (error != cudaSuccess)
            return error;
        uint32_t at = 0;
        while (at < *count && strcmp(profile->timings[at].operation, operation) != 0)
            at++;
        if (at == OPERATIONS_MAX)
            continue;
        if (at == *count)
            profile->timings[(*count)++] = (struct executor_timing){.operation = operation};
        profile->timings[at].calls++;
        profile->timings[at].seconds += milliseconds * 1e-3;
    }
    return cudaSuccess;
}
