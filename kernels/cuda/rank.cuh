#ifndef MOED_KERNELS_CUDA_RANK_CUH
#define MOED_KERNELS_CUDA_RANK_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/sampling.h"

/* What the kernels share that take the greatest logit of a row, list what may be drawn, and draw. */

constexpr int RANKS_THREADS = CUDA_SAMPLE_RANKS / CUDA_SAMPLE_PARTS * 32; /* of one of a row's CUDA_SAMPLE_PARTS blocks */
constexpr unsigned long long NOT_FINITE = ~0ull;                         /* above every rank */

/* Rises with the value, and at equal values falls with the index. */
static __device__ __forceinline__ unsigned long long rank(float value, uint32_t index) {
    if (!(fabsf(value) <= FLT_MAX))
        return NOT_FINITE;
    return (unsigned long long)sampling_key(value) << 32 | (UINT32_MAX - index);
}

static __device__ __forceinline__ float ranked_value(unsigned long long rank) {
    const uint32_t key = (uint32_t)(rank >> 32);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

static __device__ __forceinline__ unsigned long long warp_greatest(unsigned long long best) {
    return warp_reduce(best, [](unsigned long long a, unsigned long long b) { return max(a, b); });
}

static __device__ __forceinline__ unsigned long long warp_sum(unsigned long long sum) {
    return warp_reduce(sum, [](unsigned long long a, unsigned long long b) { return a + b; });
}

/* The greatest of what each thread of a block of up to 32 warps has. */
static __device__ __forceinline__ unsigned long long block_greatest(unsigned long long best, unsigned long long *warps) {
    best = warp_greatest(best);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_greatest(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0);
    __syncthreads();
    return best;
}

/*
 * The greatest rank of each warp's share of a row: ranks[row][CUDA_SAMPLE_RANKS]; shares take 32 tokens each in turn. Of
 * rows 0 .. rows - 1 or, with draws, of those that as many draws name.
 */
cudaError_t launch_ranks(const float *logits, uint32_t vocab, const struct cuda_draw *draws, uint32_t rows,
                         uint64_t *ranks, cudaStream_t stream);

/* Tokens of a warp's share of a part's list: a multiple of 32, for aligned loads. Of launch_ranks' shares the largest. */
static __device__ __forceinline__ uint32_t share_of_warp(uint32_t vocab) {
    return (vocab + CUDA_SAMPLE_RANKS * 32 - 1) / (CUDA_SAMPLE_RANKS * 32) * 32;
}

static __device__ __forceinline__ bool limits_count(const struct cuda_draw &draw, uint32_t vocab) {
    return draw.top_k > 0 && draw.top_k < vocab;
}

static __device__ __forceinline__ bool limits_mass(const struct cuda_draw &draw) {
    return draw.top_p > 0 && draw.top_p < 1;
}

/* The tokens of the draws from the lists of cuda_sample. */
cudaError_t launch_draws(const struct cuda_sample *arguments, cudaStream_t stream);

#endif
