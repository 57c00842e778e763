/* Greedy sampling: the first greatest logit of each row, see cuda_greatest in cuda.h. Blocks, then a warp. */
#include "kernels/cuda/rank.cuh"

namespace {

constexpr int PARTS = CUDA_SAMPLE_PARTS, THREADS = RANKS_THREADS, WARPS = THREADS / 32, RANKS = CUDA_SAMPLE_RANKS;
static_assert(PARTS == 32, "a lane a part");

__global__ void __launch_bounds__(THREADS) ranks_kernel(const float *logits, uint32_t vocab,
                                                        const struct cuda_draw *draws, uint64_t *ranks) {
    launch_dependents();
    wait_for_predecessor();
    const uint32_t row = draws ? draws[blockIdx.y].row : blockIdx.y;
    const float *values = logits + (uint64_t)row * vocab;
    unsigned long long best = 0;
#pragma unroll 8
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < vocab; i += THREADS * PARTS)
        best = max(best, rank(values[i], i));
    best = warp_greatest(best);
    if (threadIdx.x % 32 == 0)
        ranks[row * RANKS + blockIdx.x * WARPS + threadIdx.x / 32] = best;
}

__global__ void __launch_bounds__(32) greatest_kernel(const uint64_t *ranks, uint32_t *ids) {
    launch_dependents();
    wait_for_predecessor();
    unsigned long long best = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        best = max(best, (unsigned long long)ranks[blockIdx.x * RANKS + i * PARTS + threadIdx.x]);
    best = warp_greatest(best);
    if (threadIdx.x == 0)
        ids[blockIdx.x] = best == NOT_FINITE ? UINT32_MAX : UINT32_MAX - (uint32_t)best;
}

} // namespace

cudaError_t launch_ranks(const float *logits, uint32_t vocab, const struct cuda_draw *draws, uint32_t rows,
                         uint64_t *ranks, cudaStream_t stream) {
    return launch(ranks_kernel, dim3(PARTS, rows), dim3(THREADS), 0, stream, logits, vocab, draws, ranks);
}

cudaError_t cuda_greatest(const float *logits, uint32_t vocab, uint32_t rows, uint64_t *ranks, uint32_t *ids,
                          cudaStream_t stream) {
    cudaError_t error = launch_ranks(logits, vocab, NULL, rows, ranks, stream);
    return error ? error : launch(greatest_kernel, dim3(rows), dim3(32), 0, stream, (const uint64_t *)ranks, ids);
}
