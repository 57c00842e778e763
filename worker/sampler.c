#include "worker/sampler.h"

#include <stdbool.h>
#include <string.h>

#include "kernels/sampling.h"
#include "worker/philox.h"

/*
 * Equal inputs give equal outputs on every machine, and those of the GPU (kernels/sampling.h). exp and log are written out
 * because libm's differ in the last bit from one version, or one processor's variant, to the next.
 */

/* The tokens still in the running, in rising order of id; filters shorten all three arrays together. */
struct candidates {
    float *values;  /* logits after penalties */
    float *weights; /* e^((value - greatest) / temperature) */
    uint32_t *ids;
    uint32_t count;
};

enum { MAX_LANES = 16, STRIP = 64, RADIX_BITS = 11 };

size_t sampler_scratch_bytes(uint32_t vocab_size) {
    return (size_t)vocab_size * (sizeof(float) + sizeof(float) + sizeof(uint32_t));
}

/* weights[i] = e^((values[i] - greatest) / temperature), in strips of a fixed length: compilers make vectors of these. */
static void exponentiate(const float *values, uint32_t count, float greatest, float temperature, float *weights) {
    for (uint32_t start = 0; start < count; start += STRIP) {
        uint32_t length = count - start < STRIP ? count - start : STRIP;
        float x[STRIP] = {0}, powers[STRIP];
        for (uint32_t i = 0; i < length; i++)
            x[i] = sampling_exponent(values[start + i], greatest, temperature);
        for (uint32_t i = 0; i < STRIP; i++)
            powers[i] = sampling_power(x[i]);
        memcpy(weights + start, powers, length * sizeof(*powers));
    }
}

static uint64_t total_mass(const float *weights, uint32_t count) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++)
        total += sampling_mass(weights[i]);
    return total;
}

static float greatest_of(const float *values, uint32_t count) {
    float lanes[MAX_LANES];
    for (uint32_t j = 0; j < MAX_LANES; j++)
        lanes[j] = values[0];
    uint32_t i = 0;
    for (; i + MAX_LANES <= count; i += MAX_LANES)
        for (uint32_t j = 0; j < MAX_LANES; j++)
            lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
    for (; i < count; i++)
        lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
    for (uint32_t j = 1; j < MAX_LANES; j++)
        lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    return lanes[0];
}

/* The first index of the greatest value: the stretch that has it by vectors, then within the stretch. */
static uint32_t greatest_index(const float *values, uint32_t count) {
    enum { STRETCH = 1024 };
    uint32_t best = 0;
    float greatest = values[0];
    for (uint32_t start = 0; start < count; start += STRETCH) {
        uint32_t length = count - start < STRETCH ? count - start : STRETCH;
        float value = greatest_of(values + start, length);
        if (value > greatest) {
            greatest = value;
            best = start;
        }
    }
    while (values[best] < greatest)
        best++;
    return best;
}

static void apply_penalties(float *values, uint32_t vocab_size, const struct sampling *sampling,
                            const uint32_t *history, uint32_t history_length, uint32_t prompt_length,
                            uint32_t *counts) {
    enum { SEEN = 1u << 31 }; /* in counts: the token occurs in the history */
    memset(counts, 0, vocab_size * sizeof(*counts));
    for (uint32_t i = 0; i < history_length; i++)
        counts[history[i]] = (counts[history[i]] | SEEN) + (i >= prompt_length);
    for (uint32_t i = 0; i < history_length; i++) {
        uint32_t token = history[i], count = counts[token] & ~(uint32_t)SEEN;
        if (!(counts[token] & SEEN))
            continue; /* done at an earlier occurrence */
        counts[token] = 0;
        values[token] = sampling_penalized(values[token], count, sampling->repetition_penalty,
                                           sampling->presence_penalty, sampling->frequency_penalty);
    }
}

static inline void keep(struct candidates *candidates, uint32_t from, uint32_t to) {
    candidates->values[to] = candidates->values[from];
    candidates->weights[to] = candidates->weights[from];
    candidates->ids[to] = candidates->ids[from];
}

/*
 * Keeps the fewest of the greatest values whose measure reaches `limit`: how many they are (top-k) or their mass (top-p). A
 * radix selection of the least value kept, 11 bits of the key at a time: three passes and no sort.
 */
static void keep_greatest(struct candidates *candidates, bool by_mass, uint64_t limit) {
    uint64_t above = 0; /* measure of all keys greater than what `key` can still become */
    uint32_t key = 0, known = 0;
    for (int shift = 32 - RADIX_BITS, width = RADIX_BITS; width > 0;) {
        uint64_t buckets[1 << RADIX_BITS] = {0};
        for (uint32_t i = 0; i < candidates->count; i++) {
            uint32_t candidate = sampling_key(candidates->values[i]);
            if ((candidate & known) == key)
                buckets[candidate >> shift & ((1u << width) - 1)] +=
                    by_mass ? sampling_mass(candidates->weights[i]) : 1;
        }
        uint32_t bucket = (1u << width) - 1;
        while (bucket > 0 && above + buckets[bucket] < limit)
            above += buckets[bucket--];
        key |= bucket << shift;
        known |= ((1u << width) - 1) << shift;
        width = shift < RADIX_BITS ? shift : RADIX_BITS;
        shift -= width;
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < candidates->count; i++) {
        uint32_t candidate = sampling_key(candidates->values[i]);
        if (candidate < key || (candidate == key && above >= limit))
            continue;
        if (candidate == key)
            above += by_mass ? sampling_mass(candidates->weights[i]) : 1;
        keep(candidates, i, kept++);
    }
    candidates->count = kept;
}

static void keep_weights_from(struct candidates *candidates, float least) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < candidates->count; i++)
        if (candidates->weights[i] >= least)
            keep(candidates, i, kept++);
    candidates->count = kept;
}

static void keep_top_p(struct candidates *candidates, float p) {
    uint64_t total = total_mass(candidates->weights, candidates->count);
    float weight = (float)total / (float)(1ll << SAMPLING_MASS_BITS);
    keep_weights_from(candidates, sampling_least_weight(p, weight, candidates->count)); /* few are left to select from */
    keep_greatest(candidates, true, sampling_share(p, total));
}

uint64_t sampler_random(const struct sampling *sampling, uint32_t history_length) {
    const uint32_t key[2] = {(uint32_t)sampling->seed, (uint32_t)(sampling->seed >> 32)};
    uint32_t words[4] = {history_length, 0, 0, 0};
    philox4x32(key, words);
    return (uint64_t)words[0] << 32 | words[1];
}

static uint32_t draw(const struct candidates *candidates, uint64_t random) {
    uint64_t target = sampling_target(random, total_mass(candidates->weights, candidates->count));
    for (uint32_t i = 0; i < candidates->count; i++) {
        uint64_t mass = sampling_mass(candidates->weights[i]);
        if (mass > target)
            return candidates->ids[i];
        target -= mass;
    }
    return candidates->ids[0]; /* never: the likeliest has a mass */
}

bool sampler_penalizes(const struct sampling *sampling) {
    return (sampling->repetition_penalty > 0 && sampling->repetition_penalty != 1) || sampling->presence_penalty != 0 ||
           sampling->frequency_penalty != 0;
}

static uint32_t choose(const float *logits, uint32_t vocab_size, const struct sampling *sampling,
                       const uint32_t *history, uint32_t history_length, uint32_t prompt_length, void *scratch) {
    bool penalties = sampler_penalizes(sampling);
    bool greedy = !(sampling->temperature > 0);
    if (greedy && !penalties)
        return greatest_index(logits, vocab_size);

    struct candidates candidates = {.values = scratch, .count = vocab_size};
    candidates.weights = candidates.values + vocab_size;
    candidates.ids = (uint32_t *)(candidates.weights + vocab_size);
    memcpy(candidates.values, logits, vocab_size * sizeof(*logits));
    if (penalties)
        apply_penalties(candidates.values, vocab_size, sampling, history, history_length, prompt_length,
                        candidates.ids);
    uint32_t best = greatest_index(candidates.values, vocab_size);
    if (greedy)
        return best;

    float greatest = candidates.values[best];
    for (uint32_t i = 0; i < vocab_size; i++)
        candidates.ids[i] = i;
    if (sampling->top_k > 0 && sampling->top_k < vocab_size)
        keep_greatest(&candidates, false, sampling->top_k);
    exponentiate(candidates.values, candidates.count, greatest, sampling->temperature, candidates.weights);
    if (sampling->top_p > 0 && sampling->top_p < 1)
        keep_top_p(&candidates, sampling->top_p);
    if (sampling->min_p > 0)
        keep_weights_from(&candidates, sampling->min_p); /* the likeliest weighs 1 */
    return draw(&candidates, sampler_random(sampling, history_length));
}

static void list_logprobs(const float *logits, uint32_t vocab_size, uint32_t wanted, float *scratch,
                          struct sampled *out) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < vocab_size; i++) {
        if (count == wanted && logits[i] <= logits[out->top_ids[count - 1]])
            continue;
        uint32_t place = count < wanted ? count++ : count - 1;
        for (; place > 0 && logits[i] > logits[out->top_ids[place - 1]]; place--)
            out->top_ids[place] = out->top_ids[place - 1];
        out->top_ids[place] = i;
    }
    float greatest = logits[out->top_ids[0]];
    exponentiate(logits, vocab_size, greatest, 1.0f, scratch);
    double log_mass = sampling_log_mass(total_mass(scratch, vocab_size));
    for (uint32_t i = 0; i < count; i++)
        out->top_logprobs[i] = sampling_logprob(logits[out->top_ids[i]], greatest, log_mass);
    out->top_count = count;
    out->logprob = sampling_logprob(logits[out->token], greatest, log_mass);
}

void sampler_sample(const float *logits, uint32_t vocab_size, const struct sampling *sampling, const uint32_t *history,
                    uint32_t history_length, uint32_t prompt_length, uint32_t logprobs, void *scratch,
                    struct sampled *out) {
    *out = (struct sampled){0};
    out->token = choose(logits, vocab_size, sampling, history, history_length, prompt_length, scratch);
    uint32_t wanted = logprobs < SAMPLER_LOGPROBS_MAX ? logprobs : SAMPLER_LOGPROBS_MAX;
    if (wanted > vocab_size)
        wanted = vocab_size;
    if (wanted > 0)
        list_logprobs(logits, vocab_size, wanted, scratch, out);
}
