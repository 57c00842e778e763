/*
 * Log-probabilities, see cuda_logprobs in cuda.h. What is summed are integers, and the rest is kernels/sampling.h without
 * contraction: the bits are those of worker/sampler.c.
 */
#include "kernels/cuda/rank.cuh"

namespace {

constexpr int THREADS = RANKS_THREADS, WARPS = THREADS / 32, PARTS = CUDA_SAMPLE_PARTS, RANKS = CUDA_SAMPLE_RANKS;
constexpr int SHARE_MAX = CUDA_SAMPLE_VOCAB_MAX / RANKS, AGAIN_MAX = CUDA_LOGPROBS_MAX * SHARE_MAX / THREADS;
static_assert(RANKS == THREADS && SHARE_MAX % 32 == 0, "a thread a rank");
static_assert(PARTS == 32 && CUDA_LOGPROBS_MAX <= 32, "a lane a part, and a token");

struct lists {
    uint32_t share_count, count;
    uint32_t shares[CUDA_LOGPROBS_MAX];
    unsigned long long ranks[CUDA_LOGPROBS_MAX * AGAIN_MAX];
};

/* What as many threads of the block as `count` reach with ranks of their own; 1 where fewer have any. */
__device__ __forceinline__ unsigned long long reached_by(uint32_t count, unsigned long long own) {
    unsigned long long bound = 0;
    for (int bit = 63; bit >= 0; bit--) {
        const unsigned long long higher = bound | 1ull << bit;
        const int reached = __syncthreads_count(own >= higher);
        if (reached >= (int)count)
            bound = higher;
        if (reached == (int)count)
            break;
    }
    return max(bound, 1ull);
}

/*
 * The `count` greatest of a row, with their logits. `own`: the greatest rank of the thread's share of the row. They lie
 * in the `count` shares with the greatest of these; and when those shares are dealt to all threads again, with as many
 * threads. What is left is few enough to compare all with all, however the logits lie.
 */
__device__ __forceinline__ void list_greatest(const float *values, uint32_t vocab, unsigned long long own,
                                              uint32_t count, struct cuda_alternatives *out, struct lists *lists) {
    if (threadIdx.x == 0)
        lists->share_count = lists->count = 0;
    if (own >= reached_by(count, own))
        lists->shares[atomicAdd(&lists->share_count, 1)] = threadIdx.x;
    __syncthreads();
    const uint32_t length = share_of_warp(vocab), end = lists->share_count * length;
    const auto rank_of = [&](uint32_t i) {
        const uint32_t id = 32 * (lists->shares[i / length] + i % length / 32 * RANKS) + i % 32;
        return id < vocab ? rank(values[id], id) : 0;
    };
    own = 0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < end; i += THREADS)
        own = max(own, rank_of(i));
    const unsigned long long bound = reached_by(count, own);
    for (uint32_t i = threadIdx.x; own >= bound && i < end; i += THREADS) {
        const unsigned long long each = rank_of(i);
        if (each >= bound)
            lists->ranks[atomicAdd(&lists->count, 1)] = each;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < lists->count; i += THREADS) {
        const unsigned long long each = lists->ranks[i];
        uint32_t place = 0;
        for (uint32_t j = 0; j < lists->count; j++)
            place += lists->ranks[j] > each;
        if (place < count) {
            const uint32_t id = UINT32_MAX - (uint32_t)each;
            out->ids[place] = id;
            out->logprobs[place] = values[id];
        }
    }
}

/* Block 0 of a row lists its greatest logits, the others sum its mass. */
__global__ void __launch_bounds__(THREADS) begin_kernel(const struct cuda_logprobs p) {
    __shared__ unsigned long long warps[WARPS];
    __shared__ struct lists lists;
    launch_dependents();
    wait_for_predecessor();
    const struct cuda_asked asked = p.asked[blockIdx.y];
    const float *values = p.logits + (uint64_t)asked.row * p.vocab;
    const uint32_t warp = threadIdx.x / 32;
    const unsigned long long own = p.ranks[asked.row * RANKS + threadIdx.x], best = block_greatest(own, warps);
    if (best == NOT_FINITE)
        return;
    if (blockIdx.x == 0) {
        list_greatest(values, p.vocab, own, asked.count, p.out + blockIdx.y, &lists);
        return;
    }
    const uint32_t part = blockIdx.x - 1;
    const float greatest = ranked_value(best);
    unsigned long long mass = 0;
#pragma unroll 8
    for (uint32_t i = part * THREADS + threadIdx.x; i < p.vocab; i += THREADS * PARTS)
        mass += sampling_mass(sampling_weight(values[i], greatest, 1));
    mass = warp_sum(mass);
    if (threadIdx.x % 32 == 0)
        warps[warp] = mass;
    __syncthreads();
    if (warp == 0) {
        mass = warp_sum(threadIdx.x < WARPS ? warps[threadIdx.x] : 0);
        if (threadIdx.x == 0)
            p.masses[blockIdx.y * PARTS + part] = mass;
    }
}

/* One block a row: what penalties have changed is found by its token in the history. */
__global__ void __launch_bounds__(THREADS) end_kernel(const struct cuda_logprobs p) {
    __shared__ uint32_t found; /* one behind a place in the history */
    launch_dependents();
    wait_for_predecessor();
    const struct cuda_asked asked = p.asked[blockIdx.x];
    const uint32_t token = p.ids[asked.row], lane = threadIdx.x;
    if (token == UINT32_MAX)
        return; /* the logits are not finite */
    if (threadIdx.x == 0)
        found = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < asked.history_length; i += THREADS)
        if (p.history[asked.history + i] == token)
            atomicMax(&found, i + 1);
    __syncthreads();
    if (lane >= 32)
        return;
    struct cuda_alternatives *out = p.out + blockIdx.x;
    const double log_mass = sampling_log_mass(warp_sum((unsigned long long)p.masses[blockIdx.x * PARTS + lane]));
    const float value = lane < asked.count ? out->logprobs[lane] : 0;
    const float greatest = __shfl_sync(0xffffffffu, value, 0);
    if (lane < asked.count)
        out->logprobs[lane] = sampling_logprob(value, greatest, log_mass);
    if (lane == 0)
        out->logprob = sampling_logprob(found ? p.plain[asked.history + found - 1]
                                              : p.logits[(uint64_t)asked.row * p.vocab + token],
                                        greatest, log_mass);
}

} // namespace

cudaError_t cuda_logprobs_begin(const struct cuda_logprobs *p, cudaStream_t stream) {
    return launch(begin_kernel, dim3(1 + PARTS, p->count), dim3(THREADS), 0, stream, *p);
}

cudaError_t cuda_logprobs_end(const struct cuda_logprobs *p, cudaStream_t stream) {
    return launch(end_kernel, dim3(p->count), dim3(THREADS), 0, stream, *p);
}
