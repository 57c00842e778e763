/* worker/sampler.c against a reference that sorts in double precision, and its guarantees. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/sampling.h"
#include "tests/tap.h"
#include "worker/philox.h"
#include "worker/sampler.h"

static uint64_t random_state;

static uint32_t random_u32(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) ^ (uint32_t)(random_state >> 20);
}

static uint32_t random_below(uint32_t n) { return random_u32() % n; }
static float random_real(void) { return (float)(random_u32() >> 8) * 0x1p-24f; }

static float *random_logits(uint32_t vocab, float spread, bool ties) {
    float *logits = malloc(vocab * sizeof(*logits));
    for (uint32_t i = 0; i < vocab; i++) {
        float value = (random_real() + random_real() + random_real() + random_real() - 2.0f) * spread;
        logits[i] = ties ? rintf(value) : value;
    }
    return logits;
}

static struct sampled sample(const float *logits, uint32_t vocab, const struct sampling *sampling,
                             const uint32_t *history, uint32_t length, uint32_t prompt, uint32_t logprobs) {
    struct sampled out;
    void *scratch = malloc(sampler_scratch_bytes(vocab)); /* of the exact size, for AddressSanitizer */
    sampler_sample(logits, vocab, sampling, history, length, prompt, logprobs, scratch, &out);
    free(scratch);
    return out;
}

/* ---- the reference */

struct entry {
    double value, probability;
    uint32_t id;
};

static int entry_compare(const void *a, const void *b) {
    const struct entry *left = a, *right = b;
    if (left->value != right->value)
        return left->value > right->value ? -1 : 1;
    return left->id < right->id ? -1 : 1;
}

static struct entry *reference_sorted(const float *logits, uint32_t vocab, const struct sampling *sampling,
                                      const uint32_t *history, uint32_t length, uint32_t prompt) {
    struct entry *entries = malloc(vocab * sizeof(*entries));
    for (uint32_t id = 0; id < vocab; id++) {
        double value = logits[id];
        uint32_t seen = 0, generated = 0;
        for (uint32_t i = 0; i < length; i++) {
            seen += history[i] == id;
            generated += history[i] == id && i >= prompt;
        }
        if (seen && sampling->repetition_penalty > 0)
            value = value > 0 ? value / sampling->repetition_penalty : value * sampling->repetition_penalty;
        if (generated)
            value -= sampling->presence_penalty + (double)generated * sampling->frequency_penalty;
        entries[id] = (struct entry){.value = (float)value, .id = id};
    }
    qsort(entries, vocab, sizeof(*entries), entry_compare);
    return entries;
}

/*
 * How many of the sorted entries top-k, top-p and min-p leave; their probabilities are filled in. `slack` moves the
 * limits of top-p and min-p, because the sampler's weights are floats.
 */
static uint32_t reference_filter(struct entry *entries, uint32_t vocab, const struct sampling *sampling, double slack) {
    uint32_t count = sampling->top_k && sampling->top_k < vocab ? sampling->top_k : vocab;
    double total = 0;
    for (uint32_t i = 0; i < count; i++)
        total += entries[i].probability = exp((entries[i].value - entries[0].value) / sampling->temperature);
    if (sampling->top_p > 0 && sampling->top_p < 1) {
        double mass = 0, limit = (sampling->top_p + slack) * total;
        uint32_t kept = 0;
        while (kept < count && mass < limit)
            mass += entries[kept++].probability;
        count = kept ? kept : 1;
    }
    uint32_t kept = 0;
    while (kept < count && entries[kept].probability >= sampling->min_p - slack)
        kept++;
    return kept ? kept : 1;
}

/* ---- tests */

static void test_generator(void) {
    /* the known answers of the Random123 distribution, kat_vectors, philox4x32 10 */
    uint32_t zero_key[2] = {0, 0}, zero[4] = {0, 0, 0, 0};
    philox4x32(zero_key, zero);
    const uint32_t zero_answer[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    tap_ok(memcmp(zero, zero_answer, sizeof(zero)) == 0, "philox4x32-10 of zeros");
    uint32_t pi_key[2] = {0xa4093822, 0x299f31d0}, pi[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    philox4x32(pi_key, pi);
    const uint32_t pi_answer[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    tap_ok(memcmp(pi, pi_answer, sizeof(pi)) == 0, "philox4x32-10 of the digits of pi");
}

static void test_greedy(void) {
    const struct sampling greedy = {0};
    bool pass = true;
    for (int round = 0; round < 50; round++) {
        uint32_t vocab = 1 + random_below(3000);
        float *logits = random_logits(vocab, 5, round % 2);
        struct entry *sorted = reference_sorted(logits, vocab, &greedy, NULL, 0, 0);
        pass &= sample(logits, vocab, &greedy, NULL, 0, 0, 0).token == sorted[0].id;
        free(sorted);
        free(logits);
    }
    tap_ok(pass, "greedy takes the greatest logit, ties the lower id");
}

static void test_penalties(void) {
    bool pass = true;
    for (int round = 0; round < 200; round++) {
        uint32_t vocab = 1 + random_below(60), length = random_below(100);
        uint32_t prompt = length ? random_below(length + 1) : 0;
        float *logits = random_logits(vocab, 3, false);
        uint32_t *history = malloc((length + 1) * sizeof(*history));
        for (uint32_t i = 0; i < length; i++)
            history[i] = random_below(vocab);
        struct sampling sampling = {0};
        if (random_below(2))
            sampling.repetition_penalty = 0.5f + 1.5f * random_real();
        if (random_below(2))
            sampling.presence_penalty = 4 * random_real() - 2;
        if (random_below(2))
            sampling.frequency_penalty = 4 * random_real() - 2;
        struct entry *sorted = reference_sorted(logits, vocab, &sampling, history, length, prompt);
        pass &= sample(logits, vocab, &sampling, history, length, prompt, 0).token == sorted[0].id;
        free(sorted);
        free(history);
        free(logits);
    }
    tap_ok(pass, "penalties move the greedy choice as in the reference");

    float logits[3] = {3e38f, 1, -3e38f};
    const uint32_t history[2] = {0, 2};
    const struct sampling extreme = {.temperature = 1, .repetition_penalty = 1e-30f, .frequency_penalty = 3e38f,
                                     .seed = 1};
    tap_ok(sample(logits, 3, &extreme, history, 2, 0, 0).token < 3, "penalties that overflow still give a token");
}

/* Every token drawn must be one that the reference leaves, and all that it leaves must be drawn sooner or later. */
static void test_filters(void) {
    bool inside = true, complete = true;
    for (int round = 0; round < 60; round++) {
        uint32_t vocab = 1 + random_below(400);
        float *logits = random_logits(vocab, 0.2f + 2 * random_real(), random_below(2));
        struct sampling sampling = {.temperature = 0.5f + random_real()};
        if (random_below(2))
            sampling.top_k = 1 + random_below(vocab + 5);
        if (random_below(2))
            sampling.top_p = 0.05f + 0.95f * random_real();
        if (random_below(3) == 0)
            sampling.min_p = random_real();
        struct entry *sorted = reference_sorted(logits, vocab, &sampling, NULL, 0, 0);
        uint32_t most = reference_filter(sorted, vocab, &sampling, 1e-5);
        uint32_t least = reference_filter(sorted, vocab, &sampling, -1e-5);
        uint32_t *hits = calloc(vocab, sizeof(*hits));
        for (uint32_t i = 0; i < 2000; i++) {
            sampling.seed = (uint64_t)round << 32 | i;
            hits[sample(logits, vocab, &sampling, NULL, i, 0, 0).token]++;
        }
        double kept = 0;
        for (uint32_t i = 0; i < least; i++)
            kept += sorted[i].probability;
        for (uint32_t i = 0; i < vocab; i++) {
            inside &= i < most || hits[sorted[i].id] == 0;
            if (i < least && sorted[i].probability / kept > 0.02) /* (1 - 0.02)^2000 < 1e-17 */
                complete &= hits[sorted[i].id] > 0;
        }
        free(hits);
        free(sorted);
        free(logits);
    }
    tap_ok(inside, "top-k, top-p and min-p never let another token through");
    tap_ok(complete, "top-k, top-p and min-p drop no token they should keep");
}

/* The token by the definition: all sorted, nothing left out early, masses summed one by one. */
static uint32_t exact_token(const float *logits, uint32_t vocab, const struct sampling *sampling, uint32_t length) {
    const struct sampling raw = {0};
    struct entry *sorted = reference_sorted(logits, vocab, &raw, NULL, 0, 0);
    const float greatest = (float)sorted[0].value;
    float *weights = calloc(vocab, sizeof(*weights)); /* by id, of what is kept */
    uint32_t kept = sampling->top_k && sampling->top_k < vocab ? sampling->top_k : vocab, id = 0;
    uint64_t total = 0, mass = 0;
    for (uint32_t i = 0; i < kept; i++) {
        weights[sorted[i].id] = sampling_weight((float)sorted[i].value, greatest, sampling->temperature);
        total += sampling_mass(weights[sorted[i].id]);
    }
    if (sampling->top_p > 0 && sampling->top_p < 1)
        for (uint32_t i = 0; i < kept; i++) {
            float *weight = &weights[sorted[i].id];
            uint64_t own = sampling_mass(*weight);
            if (mass >= sampling_share(sampling->top_p, total))
                *weight = 0;
            mass += own;
        }
    total = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        if (weights[i] < sampling->min_p)
            weights[i] = 0;
        total += sampling_mass(weights[i]);
    }
    uint64_t target = sampling_target(sampler_random(sampling, length), total);
    while (sampling_mass(weights[id]) <= target)
        target -= sampling_mass(weights[id++]);
    free(weights);
    free(sorted);
    return id;
}

static void test_exact(void) {
    uint32_t wrong = 0;
    for (uint32_t round = 0; round < 3000; round++) {
        uint32_t vocab = 1 + random_below(round % 50 ? 500 : 20000);
        float *logits = random_logits(vocab, 0.1f + 10 * random_real() * random_real(), round % 3 == 0);
        struct sampling sampling = {.temperature = 0.3f + 1.5f * random_real(), .seed = random_u32()};
        if (random_below(2))
            sampling.top_k = 1 + random_below(random_below(2) ? 50 : vocab);
        if (random_below(3))
            sampling.top_p = random_below(4) ? 0.8f + 0.1999f * random_real() : random_real();
        if (random_below(3) == 0)
            sampling.min_p = random_real() * random_real();
        wrong += sample(logits, vocab, &sampling, NULL, round, 0, 0).token !=
                 exact_token(logits, vocab, &sampling, round);
        free(logits);
    }
    tap_ok(wrong == 0, "every token is that of the definition (%u are not)", wrong);
}

static void test_ties(void) {
    const float logits[8] = {1, 2, 2, -0.0f, 2, 0.0f, 2, 0.0f};
    bool top_k = true, zeros = true, top_p = true;
    for (uint32_t i = 0; i < 500; i++) {
        struct sampling sampling = {.temperature = 1, .top_k = 3, .seed = i};
        uint32_t token = sample(logits, 8, &sampling, NULL, 1, 0, 0).token;
        top_k &= token == 1 || token == 2 || token == 4;
        sampling.top_k = 6;
        zeros &= sample(logits, 8, &sampling, NULL, 1, 0, 0).token != 5;
        sampling = (struct sampling){.temperature = 1e-3f, .top_p = 0.5f, .seed = i};
        top_p &= sample(logits, 8, &sampling, NULL, 1, 0, 0).token <= 2;
    }
    tap_ok(top_k, "top-k keeps the lower ids of equal logits");
    tap_ok(zeros, "-0 and 0 are equal logits");
    tap_ok(top_p, "top-p keeps the lower ids of equal logits");
}

static void test_distribution(void) {
    enum { VOCAB = 20, DRAWS = 40000 };
    float *logits = random_logits(VOCAB, 1, false);
    struct sampling sampling = {.temperature = 0.8f, .seed = random_u32()};
    struct entry *sorted = reference_sorted(logits, VOCAB, &sampling, NULL, 0, 0);
    reference_filter(sorted, VOCAB, &sampling, 0);
    double total = 0, chi_square = 0;
    uint32_t hits[VOCAB] = {0};
    for (uint32_t i = 0; i < DRAWS; i++)
        hits[sample(logits, VOCAB, &sampling, NULL, i, 0, 0).token]++;
    for (int i = 0; i < VOCAB; i++)
        total += sorted[i].probability;
    for (int i = 0; i < VOCAB; i++) {
        double expected = DRAWS * sorted[i].probability / total;
        chi_square += (hits[sorted[i].id] - expected) * (hits[sorted[i].id] - expected) / expected;
    }
    tap_ok(chi_square < 58, "draws follow the softmax (chi-square %.1f; 58 is 1e-5 at 19 degrees)", chi_square);
    free(sorted);
    free(logits);
}

static void test_logprobs(void) {
    double worst = 0;
    bool order = true, same = true;
    for (int round = 0; round < 100; round++) {
        uint32_t vocab = 1 + random_below(5000), wanted = 1 + random_below(SAMPLER_LOGPROBS_MAX + 3);
        float *logits = random_logits(vocab, 10 * random_real(), round % 2);
        struct sampling sampling = {.temperature = 2, .seed = random_u32()};
        struct sampled out = sample(logits, vocab, &sampling, NULL, 0, 0, wanted);
        struct sampling raw = {.temperature = 1};
        struct entry *sorted = reference_sorted(logits, vocab, &raw, NULL, 0, 0);
        double total = 0;
        for (uint32_t i = 0; i < vocab; i++)
            total += exp((double)logits[i] - sorted[0].value);
        uint32_t expected = wanted < SAMPLER_LOGPROBS_MAX ? wanted : SAMPLER_LOGPROBS_MAX;
        order &= out.top_count == (expected < vocab ? expected : vocab);
        for (uint32_t i = 0; i < out.top_count; i++) {
            order &= out.top_ids[i] == sorted[i].id;
            worst = fmax(worst, fabs(out.top_logprobs[i] - (sorted[i].value - sorted[0].value - log(total))));
        }
        worst = fmax(worst, fabs(out.logprob - (logits[out.token] - sorted[0].value - log(total))));
        same &= out.token == sample(logits, vocab, &sampling, NULL, 0, 0, 0).token;
        free(sorted);
        free(logits);
    }
    tap_ok(order, "alternatives come in falling order, ties by id");
    tap_ok(worst < 5e-6, "logprobs are right (worst error %.1e)", worst);
    tap_ok(same, "asking for logprobs changes no token");
}

static void test_extremes(void) {
    enum { VOCAB = 1000 };
    float *logits = random_logits(VOCAB, 4, false);
    const struct sampling greedy = {0}, cold = {.temperature = 1e-45f, .seed = 9};
    tap_ok(sample(logits, VOCAB, &cold, NULL, 0, 0, 0).token == sample(logits, VOCAB, &greedy, NULL, 0, 0, 0).token,
           "a vanishing temperature is greedy");
    uint32_t low = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        const struct sampling hot = {.temperature = 3e38f, .seed = 7};
        low += sample(logits, VOCAB, &hot, NULL, i, 0, 0).token < VOCAB / 2;
    }
    tap_ok(low > 400 && low < 600, "an enormous temperature is uniform");
    const struct sampling one = {.temperature = 1, .min_p = 1, .seed = 3};
    tap_ok(sample(logits, VOCAB, &one, NULL, 0, 0, 0).token == sample(logits, VOCAB, &greedy, NULL, 0, 0, 0).token,
           "min-p 1 leaves the likeliest");
    const float wide[3] = {-3.4e38f, 3.4e38f, 0};
    const struct sampling warm = {.temperature = 1, .top_p = 0.9f, .seed = 3};
    tap_ok(sample(wide, 3, &warm, NULL, 0, 0, 3).token == 1, "logits at both ends of the range");
    free(logits);
}

/* The tokens drawn from a fixed input, as one number: it must be the same on every machine and after every change. */
static void test_pinned(void) {
    enum { VOCAB = 4099 };
    uint64_t kept_state = random_state;
    random_state = 42;
    float *logits = random_logits(VOCAB, 4, false);
    uint32_t history[64];
    for (uint32_t i = 0; i < 64; i++)
        history[i] = random_below(VOCAB);
    uint64_t digest = 14695981039346656037u;
    for (uint32_t i = 0; i < 200; i++) {
        struct sampling sampling = {.temperature = 0.1f + 0.01f * (float)i, .seed = 77};
        if (i % 3 == 0)
            sampling.top_p = 0.9f;
        if (i % 5 == 0)
            sampling.top_k = 40;
        if (i % 7 == 0)
            sampling.repetition_penalty = 1.1f;
        struct sampled out = sample(logits, VOCAB, &sampling, history, i % 64, i % 30, 2);
        uint32_t bits;
        memcpy(&bits, &out.logprob, sizeof(bits));
        digest = ((digest ^ out.token) * 1099511628211u ^ bits) * 1099511628211u;
    }
    tap_ok(digest == 0xf47035ed54293ea1u, "a fixed input gives the pinned tokens and logprobs (%016llx)",
           (unsigned long long)digest);
    random_state = kept_state;
    free(logits);
}

int main(void) {
    const char *seed = getenv("MOED_TEST_SEED");
    random_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL);
    tap_note("MOED_TEST_SEED=%llu", (unsigned long long)random_state);
    test_generator();
    test_greedy();
    test_penalties();
    test_filters();
    test_exact();
    test_ties();
    test_distribution();
    test_logprobs();
    test_extremes();
    test_pinned();
    return tap_done();
}
