/* Greedy sampling: the first greatest logit of each row, see cuda_greatest in cuda.h. Blocks, then a warp. */
#include "kernels/cuda/launch.cuh"

namespace {

constexpr int THREADS = 512;
constexpr unsigned long long NOT_FINITE = ~0ull; /* above every rank */

/* Rises with the value, and at equal values falls with the index. */
__device__ __forceinline__ unsigned long long rank(float value, uint32_t index) {
    value += 0.0f; /* -0 is 0 */
    if (!(fabsf(value) <= 3.4028235e38f))
        return NOT_FINITE;
    const uint32_t bits = __float_as_uint(value);
    const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (unsigned long long)key << 32 | (UINT32_MAX - index);
}

__device__ __forceinline__ unsigned long long warp_greatest(unsigned long long best) {
    for (int offset = 16; offset; offset /= 2)
        best = max(best, __shfl_xor_sync(0xffffffffu, best, offset));
    return best;
}

__global__ void __launch_bounds__(THREADS) parts_kernel(const float *logits, uint32_t vocab, uint64_t *partial) {
    __shared__ unsigned long long warps[THREADS / 32];
    launch_dependents();
    wait_for_predecessor();
    const float *row = logits + (uint64_t)blockIdx.y * vocab;
    unsigned long long best = 0;
#pragma unroll 8
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < vocab; i += THREADS * CUDA_GREATEST_PARTS)
        best = max(best, rank(row[i], i));
    best = warp_greatest(best);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    for (int i = 1; i < THREADS / 32; i++)
        best = max(best, warps[i]);
    partial[blockIdx.y * CUDA_GREATEST_PARTS + blockIdx.x] = best;
}

__global__ void __launch_bounds__(32) greatest_kernel(const uint64_t *partial, uint32_t *ids) {
    static_assert(CUDA_GREATEST_PARTS == 32, "one lane a part");
    launch_dependents();
    wait_for_predecessor();
    const unsigned long long best = warp_greatest(partial[blockIdx.x * CUDA_GREATEST_PARTS + threadIdx.x]);
    if (threadIdx.x == 0)
        ids[blockIdx.x] = best == NOT_FINITE ? UINT32_MAX : UINT32_MAX - (uint32_t)best;
}

} // namespace

cudaError_t cuda_greatest(const float *logits, uint32_t vocab, uint32_t rows, uint64_t *partial, uint32_t *ids,
                          cudaStream_t stream) {
    cudaError_t error = launch(parts_kernel, dim3(CUDA_GREATEST_PARTS, rows), dim3(THREADS), 0, stream, logits, vocab,
                               partial);
    return error ? error : launch(greatest_kernel, dim3(rows), dim3(32), 0, stream, (const uint64_t *)partial, ids);
}
