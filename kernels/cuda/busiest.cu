/* How unevenly a step's experts are chosen, see cuda_busiest in cuda.h. One block a layer. */
#include "kernels/cuda/launch.cuh"

namespace {

constexpr int THREADS = 512;

__global__ void __launch_bounds__(THREADS) busiest_kernel(const uint32_t *chosen, size_t stride, uint32_t assignments,
                                                          uint32_t *busiest) {
    __shared__ uint32_t counts[CUDA_EXPERTS_MAX], most;
    launch_dependents();
    for (uint32_t i = threadIdx.x; i < CUDA_EXPERTS_MAX; i += THREADS)
        counts[i] = 0;
    if (threadIdx.x == 0)
        most = 0;
    wait_for_predecessor();
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < assignments; i += THREADS)
        atomicAdd(&counts[chosen[blockIdx.x * stride + i]], 1);
    __syncthreads();
    uint32_t own = 0;
    for (uint32_t i = threadIdx.x; i < CUDA_EXPERTS_MAX; i += THREADS)
        own = max(own, counts[i]);
    own = __reduce_max_sync(0xffffffffu, own);
    if (threadIdx.x % 32 == 0)
        atomicMax(&most, own);
    __syncthreads();
    if (threadIdx.x == 0)
        busiest[blockIdx.x] = most;
}

} // namespace

cudaError_t cuda_busiest(const uint32_t *chosen, uint32_t layers, size_t stride, uint32_t assignments, uint32_t *busiest,
                         cudaStream_t stream) {
    return launch(busiest_kernel, dim3(layers), dim3(THREADS), 0, stream, chosen, stride, assignments, busiest);
}
