/*
 * Sampling, see cuda_sample in cuda.h: penalties, and a list of the tokens that the filters may leave, by bounds that are
 * easily had: CUDA_SAMPLE_PARTS blocks a row, whose parts are runs of token ids, and so are their lists. draw.cu does the
 * rest. Both are compiled without contraction, as kernels/sampling.h wants.
 */
#include "kernels/cuda/rank.cuh"

namespace {

constexpr int THREADS = RANKS_THREADS, WARPS = THREADS / 32, PARTS = CUDA_SAMPLE_PARTS, RANKS = CUDA_SAMPLE_RANKS;
constexpr int PENALTY_THREADS = 1024, BATCH = 8;
constexpr uint32_t SEEN = 1u << 31; /* in a count: the token occurs in the history */

static_assert(RANKS == THREADS, "a thread a rank");
static_assert(CUDA_SAMPLE_VOCAB_MAX == 32 * 32 * RANKS, "a lane notes in one word which tokens it lists");

/* One block a row: counts the history's tokens, and changes each one's logit where it is met first. */
__global__ void __launch_bounds__(PENALTY_THREADS) penalties_kernel(const struct cuda_sample s) {
    launch_dependents();
    wait_for_predecessor();
    const struct cuda_draw draw = s.draws[blockIdx.x];
    const uint32_t *history = s.history + draw.history;
    float *values = s.logits + (uint64_t)draw.row * s.vocab;
    uint32_t *counts = s.list + (uint64_t)draw.row * s.vocab;
    for (uint32_t i = threadIdx.x; i < draw.history_length; i += PENALTY_THREADS) {
        counts[history[i]] = SEEN;
        s.plain[draw.history + i] = values[history[i]];
    }
    __syncthreads();
    for (uint32_t i = draw.prompt_length + threadIdx.x; i < draw.history_length; i += PENALTY_THREADS)
        atomicAdd(&counts[history[i]], 1);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < draw.history_length; i += PENALTY_THREADS) {
        const uint32_t token = history[i], count = atomicExch(&counts[token], 0);
        if (count & SEEN)
            values[token] = sampling_penalized(values[token], count & ~SEEN, draw.repetition_penalty,
                                               draw.presence_penalty, draw.frequency_penalty);
    }
}

/*
 * Lists a part's tokens that may be left. With top-k those not below the top_k-th of the warps' greatest values, as there
 * are that many; else those not too light, with the part's mass: for top-p of all tokens, else of those listed.
 */
__global__ void __launch_bounds__(THREADS) list_kernel(const struct cuda_sample s) {
    __shared__ unsigned long long warps[WARPS], masses[WARPS];
    __shared__ uint32_t counts[WARPS];
    launch_dependents();
    wait_for_predecessor();
    const struct cuda_draw draw = s.draws[blockIdx.y];
    if (!(draw.temperature > 0))
        return;
    const float *values = s.logits + (uint64_t)draw.row * s.vocab;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t own_rank = s.ranks[draw.row * RANKS + threadIdx.x];
    const float greatest = ranked_value(block_greatest(own_rank, warps));
    const bool by_key = limits_count(draw, s.vocab), by_mass = !by_key && limits_mass(draw);
    uint32_t bound = 0; /* its higher half is enough */
    for (int bit = 31; by_key && draw.top_k <= RANKS && bit >= 16; bit--) {
        const uint32_t higher = bound | 1u << bit;
        if (__syncthreads_count((uint32_t)(own_rank >> 32) >= higher) >= (int)draw.top_k)
            bound = higher;
    }
    float least = 1.0f / (float)(1ll << SAMPLING_MASS_BITS);
    least = fmaxf(least, by_mass ? sampling_least_weight(draw.top_p, 1, s.vocab) : draw.min_p);

    const uint32_t share = share_of_warp(s.vocab), first = (blockIdx.x * WARPS + warp) * share;
    const uint32_t end = min(first + share, s.vocab);
    uint32_t listed = 0; /* bit i: token first + 32 i + lane */
    unsigned long long mass = 0;
    for (uint32_t step = 0; first + 32 * step < end; step += BATCH) {
        const uint32_t i = first + 32 * step + lane;
        float value[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            value[j] = i + 32 * j < end ? values[i + 32 * j] : -INFINITY;
        if (by_key) {
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                listed |= (uint32_t)(sampling_key(value[j]) >= bound && i + 32 * j < end) << (step + j);
        } else {
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const float weight = sampling_weight(value[j], greatest, draw.temperature);
                listed |= (uint32_t)(weight >= least) << (step + j);
                mass += by_mass || weight >= least ? sampling_mass(weight) : 0;
            }
        }
    }
    const uint32_t own = __reduce_add_sync(0xffffffffu, __popc(listed));
    mass = warp_sum(mass);
    if (lane == 0) {
        counts[warp] = own;
        masses[warp] = mass;
    }
    __syncthreads();
    uint32_t at = blockIdx.x * WARPS * share, count = 0;
    mass = 0;
    for (uint32_t w = 0; w < WARPS; w++) {
        at += w < warp ? counts[w] : 0;
        count += counts[w];
        mass += masses[w];
    }
    if (threadIdx.x == 0)
        s.parts[draw.row * PARTS + blockIdx.x] = {mass, count};
    uint32_t *list = s.list + (uint64_t)draw.row * s.vocab;
    for (uint32_t i = first + lane; own > 0 && i - lane < end; i += 32, listed >>= 1) {
        const uint32_t mask = __ballot_sync(0xffffffffu, listed & 1);
        if (listed & 1)
            list[at + __popc(mask & ((1u << lane) - 1))] = i;
        at += __popc(mask);
    }
}

} // namespace

cudaError_t cuda_sample(const struct cuda_sample *s, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (s->penalized > 0) {
        error = launch(penalties_kernel, dim3(s->penalized), dim3(PENALTY_THREADS), 0, stream, *s);
        error = error ? error : launch_ranks(s->logits, s->vocab, s->draws, s->penalized, s->ranks, stream);
    }
    error = error ? error : launch(list_kernel, dim3(PARTS, s->count), dim3(THREADS), 0, stream, *s);
    return error ? error : launch_draws(s, stream);
}
