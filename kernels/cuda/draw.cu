/*
 * Draws tokens from the lists of sample.cu as worker/sampler.c does: one block a row, a warp a part of its list. What the
 * filters leave is always all keys above one, and of the tokens with that key itself the lower ids, so that a filter is a
 * pair (key, id) and no list is ever moved.
 */
#include "kernels/cuda/rank.cuh"

namespace {

constexpr int PARTS = CUDA_SAMPLE_PARTS, RANKS = CUDA_SAMPLE_RANKS, DRAW_THREADS = 32 * PARTS;
constexpr int RADIX_BITS = 11, BUCKETS = 1 << RADIX_BITS, BATCH = 4, FEW = 256;

static_assert(PARTS == 32 && BUCKETS == 2 * DRAW_THREADS, "a lane a part, two buckets a thread");
static_assert(RANKS <= DRAW_THREADS && FEW <= DRAW_THREADS, "a thread each");

/* What a warp of draw_kernel knows: its row, and what the filters so far keep. */
struct row {
    const float *values;
    const uint32_t *list; /* of the row */
    uint32_t begin, count; /* the warp's part of the list */
    float greatest, temperature, min_p;
    uint32_t key, last; /* kept: keys above `key`, and of `key` itself ids up to `last` */
};

struct scratch {
    uint32_t low[BUCKETS], high[BUCKETS]; /* two halves of a sum: the device adds no 64 bits at once in shared memory */
    unsigned long long warps[32], left;
    uint32_t begin, count, found;
    bool whole;
};

/* What of a token is summed: its count or its mass; TIED only of those with the last key; DRAWN what is heavy enough. */
enum measure { COUNT, MASS, COUNT_TIED, MASS_TIED, DRAWN };

template <measure MEASURE>
__device__ __forceinline__ unsigned long long measure_of(const struct row &r, uint32_t id, float value) {
    const uint32_t key = sampling_key(value);
    if (key < r.key || (key == r.key && id > r.last))
        return 0;
    if ((MEASURE == COUNT_TIED || MEASURE == MASS_TIED) && key != r.key)
        return 0;
    if (MEASURE == COUNT || MEASURE == COUNT_TIED)
        return 1;
    const float weight = sampling_weight(value, r.greatest, r.temperature);
    return MEASURE == DRAWN && !(weight >= r.min_p) ? 0 : sampling_mass(weight);
}

/* Calls visit(id, value) for the lane's share of list[begin .. begin + count), with many loads on their way at once. */
template <class VISIT>
__device__ __forceinline__ void visit_list(const struct row &r, uint32_t begin, uint32_t count, VISIT visit) {
    for (uint32_t i = threadIdx.x % 32; i < count; i += 32 * BATCH) {
        uint32_t ids[BATCH];
        float values[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            ids[j] = r.list[begin + min(i + 32 * j, count - 1)];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            values[j] = r.values[ids[j]];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            if (i + 32 * j < count)
                visit(ids[j], values[j]);
    }
}

/* The warp's sum over list[begin .. begin + count). */
template <measure MEASURE>
__device__ __forceinline__ unsigned long long sum_of(const struct row &r, uint32_t begin, uint32_t count) {
    unsigned long long sum = 0;
    visit_list(r, begin, count, [&](uint32_t id, float value) { sum += measure_of<MEASURE>(r, id, value); });
    return warp_sum(sum);
}

/* From each warp's own sum that of all, and that of the warps below. */
__device__ __forceinline__ unsigned long long join(unsigned long long own, unsigned long long *below,
                                                   struct scratch *scratch) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0)
        scratch->warps[warp] = own;
    __syncthreads();
    const unsigned long long each = scratch->warps[lane];
    __syncthreads();
    *below = warp_sum(lane < warp ? each : 0);
    return warp_sum(each);
}

/*
 * The first id whose measure, with those of all lower ids, exceeds `target`, which is less than the sum of all; `own` is
 * the warp's part of it. The part that has it is cut into pieces, one a warp, and the piece that has it read by one warp.
 */
template <measure MEASURE>
__device__ uint32_t pick(const struct row &r, unsigned long long own, unsigned long long below,
                         unsigned long long target, struct scratch *scratch) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        scratch->count = 0;
        scratch->found = 0;
    }
    __syncthreads();
    if (lane == 0 && below <= target && target - below < own) {
        scratch->begin = r.begin;
        scratch->count = r.count;
        scratch->left = target - below;
    }
    __syncthreads();
    const uint32_t piece = (scratch->count + PARTS - 1) / PARTS, from = min(warp * piece, scratch->count);
    const uint32_t begin = scratch->begin + from, count = min(piece, scratch->count - from);
    own = sum_of<MEASURE>(r, begin, count);
    join(own, &below, scratch);
    target = scratch->left;
    if (below <= target && target - below < own)
        for (uint32_t i = 0; i < count; i += 32) {
            const uint32_t id = i + lane < count ? r.list[begin + i + lane] : 0;
            const unsigned long long each = i + lane < count ? measure_of<MEASURE>(r, id, r.values[id]) : 0;
            const unsigned long long upto = below + warp_scan(each, lane);
            const uint32_t beyond = __ballot_sync(0xffffffffu, upto > target);
            if (beyond) {
                if (lane == __ffs(beyond) - 1)
                    scratch->found = id;
                break;
            }
            below = __shfl_sync(0xffffffffu, upto, 31);
        }
    __syncthreads();
    return scratch->found;
}

/* Narrows what is kept to the fewest of the greatest values whose measure reaches `limit`: 11 bits of the key at a time. */
template <measure MEASURE, measure TIED>
__device__ void keep_greatest(struct row *r, unsigned long long limit, struct scratch *scratch) {
    const uint32_t i = threadIdx.x, top = BUCKETS - 1 - 2 * i; /* a thread's buckets are top and top - 1 */
    uint32_t key = 0, known = 0;
    unsigned long long above = 0; /* measure of all keys greater than what `key` can still become */
    bool whole = false;           /* the limit is reached by all tokens of the key and by no fewer */
    for (int shift = 32 - RADIX_BITS, width = RADIX_BITS; width > 0;) {
        scratch->low[top] = scratch->low[top - 1] = scratch->high[top] = scratch->high[top - 1] = 0;
        if (i == 0) {
            scratch->found = 0; /* the bucket */
            scratch->left = above;
            scratch->whole = false;
        }
        __syncthreads();
        visit_list(*r, r->begin, r->count, [&](uint32_t id, float value) {
            const uint32_t candidate = sampling_key(value);
            if ((candidate & known) != key)
                return;
            const unsigned long long measure = measure_of<MEASURE>(*r, id, value);
            const uint32_t bucket = candidate >> shift & ((1u << width) - 1), low = (uint32_t)measure;
            const uint32_t before = atomicAdd(&scratch->low[bucket], low);
            const uint32_t high = (uint32_t)(measure >> 32) + (before + low < before);
            if (high)
                atomicAdd(&scratch->high[bucket], high);
        });
        __syncthreads();
        unsigned long long sums[2], below;
        for (int j = 0; j < 2; j++)
            sums[j] = (unsigned long long)scratch->high[top - j] << 32 | scratch->low[top - j];
        const unsigned long long scan = warp_scan(sums[0] + sums[1], i % 32);
        join(__shfl_sync(0xffffffffu, scan, 31), &below, scratch);
        unsigned long long before = above + below + scan - sums[0] - sums[1];
        for (int j = 0; j < 2; before += sums[j++])
            if (before < limit && limit - before <= sums[j]) {
                scratch->found = top - j;
                scratch->left = before;
                scratch->whole = before + sums[j] == limit;
            }
        __syncthreads();
        key |= scratch->found << shift;
        known |= ((1u << width) - 1) << shift;
        above = scratch->left;
        whole = scratch->whole;
        width = shift < RADIX_BITS ? shift : RADIX_BITS;
        shift -= width;
        __syncthreads();
    }
    if (key != r->key)
        r->last = UINT32_MAX;
    r->key = key;
    if (whole)
        return;
    unsigned long long below;
    const unsigned long long own = sum_of<TIED>(*r, r->begin, r->count);
    join(own, &below, scratch);
    r->last = pick<TIED>(*r, own, below, limit - above - 1, scratch);
}

/* A short list, all of it in shared memory: a thread a token, in rising order of id. */
struct few {
    unsigned long long masses[FEW];
    float weights[FEW];
    uint32_t keys[FEW], ids[FEW];
};

/* Writes the token drawn from few: a filter keeps those of which not enough are greater, and all are compared with all. */
__device__ void draw_few(const struct row &r, const struct cuda_draw &draw, uint32_t first, uint32_t count,
                         unsigned long long own, bool by_count, bool by_mass, uint32_t *out, struct few *few,
                         struct scratch *scratch) {
    const uint32_t i = threadIdx.x, lane = i % 32;
    for (uint32_t j = lane; j < r.count; j += 32) {
        const uint32_t id = r.list[r.begin + j];
        const float value = r.values[id], weight = sampling_weight(value, r.greatest, r.temperature);
        few->ids[first + j] = id;
        few->keys[first + j] = sampling_key(value);
        few->weights[first + j] = weight;
        few->masses[first + j] = sampling_mass(weight);
    }
    __syncthreads();
    uint32_t ahead = 0;
    unsigned long long mass = 0, mass_ahead = 0, below;
    bool kept = i < count;
    if (kept) {
        const uint32_t key = few->keys[i];
        mass = few->masses[i];
        for (uint32_t j = 0; j < count; j++)
            if (few->keys[j] > key || (few->keys[j] == key && j < i)) {
                ahead++;
                mass_ahead += few->masses[j];
            }
        kept = !by_count || ahead < draw.top_k;
    }
    if (by_mass) {
        const unsigned long long total = join(by_count ? warp_sum(kept ? mass : 0) : own, &below, scratch);
        kept = kept && mass_ahead < sampling_share(draw.top_p, total);
    }
    mass = kept && few->weights[i] >= draw.min_p ? mass : 0;
    const unsigned long long scan = warp_scan(mass, lane);
    const unsigned long long total = join(__shfl_sync(0xffffffffu, scan, 31), &below, scratch);
    const unsigned long long target = sampling_target(draw.random, total), upto = below + scan;
    if (upto - mass <= target && target < upto)
        *out = few->ids[i];
}

__global__ void __launch_bounds__(DRAW_THREADS) draw_kernel(const struct cuda_sample s) {
    __shared__ struct scratch scratch;
    __shared__ struct few few;
    launch_dependents();
    wait_for_predecessor();
    const struct cuda_draw draw = s.draws[blockIdx.x];
    uint32_t *out = s.ids + draw.row;
    if (*out == UINT32_MAX)
        return; /* the raw logits are not finite */
    const uint32_t part = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned long long best =
        block_greatest(threadIdx.x < RANKS ? s.ranks[draw.row * RANKS + threadIdx.x] : 0, scratch.warps);
    if (!(draw.temperature > 0)) {
        if (threadIdx.x == 0)
            *out = UINT32_MAX - (uint32_t)best;
        return;
    }
    const struct cuda_part listed = s.parts[draw.row * PARTS + lane];
    const uint32_t upto = (uint32_t)warp_scan(listed.count, lane), count = __shfl_sync(0xffffffffu, upto, 31);
    struct row r = {};
    r.values = s.logits + (uint64_t)draw.row * s.vocab;
    r.list = s.list + (uint64_t)draw.row * s.vocab;
    r.begin = part * (RANKS / PARTS) * share_of_warp(s.vocab);
    r.count = __shfl_sync(0xffffffffu, listed.count, part);
    r.greatest = ranked_value(best);
    r.temperature = draw.temperature;
    r.min_p = draw.min_p;
    r.last = UINT32_MAX;
    unsigned long long own = __shfl_sync(0xffffffffu, listed.mass, part), below;
    const bool by_count = limits_count(draw, s.vocab), by_mass = limits_mass(draw);
    if (count <= FEW) {
        const uint32_t first = __shfl_sync(0xffffffffu, upto, part) - r.count;
        draw_few(r, draw, first, count, own, by_count, by_mass, out, &few, &scratch);
        return;
    }
    if (by_count) {
        keep_greatest<COUNT, COUNT_TIED>(&r, draw.top_k, &scratch);
        own = by_mass ? sum_of<MASS>(r, r.begin, r.count) : 0;
    }
    if (by_mass)
        keep_greatest<MASS, MASS_TIED>(&r, sampling_share(draw.top_p, join(own, &below, &scratch)), &scratch);
    if (by_count || by_mass)
        own = sum_of<DRAWN>(r, r.begin, r.count);
    const unsigned long long total = join(own, &below, &scratch);
    const uint32_t id = pick<DRAWN>(r, own, below, sampling_target(draw.random, total), &scratch);
    if (threadIdx.x == 0)
        *out = id;
}

} // namespace

cudaError_t launch_draws(const struct cuda_sample *s, cudaStream_t stream) {
    return launch(draw_kernel, dim3(s->count), dim3(DRAW_THREADS), 0, stream, *s);
}
