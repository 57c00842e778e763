#ifndef MOED_KERNELS_SAMPLING_H
#define MOED_KERNELS_SAMPLING_H

#include <float.h>
#include <stdint.h>
#include <string.h>

/*
 * The arithmetic of sampling, once for the sampler on the CPU and the kernels on the GPU: equal logits give equal tokens
 * and log-probabilities wherever they are sampled. Floats are only added, multiplied, divided and compared, as IEEE 754
 * rounds them, in the order written (contraction is off in both compilers); what is summed over tokens are integers, so
 * that no sum has an order.
 */
#ifdef __CUDACC__
#define SAMPLING_FUNCTION static __host__ __device__ __forceinline__
#else
#define SAMPLING_FUNCTION static inline
#endif

/* Integers of the same order as the floats; -0 and 0 are one. */
SAMPLING_FUNCTION uint32_t sampling_key(float value) {
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, sizeof(bits));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* (value - greatest) / temperature, cut off where e to it is nothing. */
SAMPLING_FUNCTION float sampling_exponent(float value, float greatest, float temperature) {
    float scaled = (value - greatest) / temperature;
    return scaled > -88.0f ? scaled : -88.0f;
}

/* e^x for -88 <= x <= 0, to about 2e-7 of it; 0 where that is below float's normal range. */
SAMPLING_FUNCTION float sampling_power(float x) {
    const float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f; /* ln2_high has 9 bits */
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    float shifted = x * log2_e + shift;
    float n = shifted - shift;
    float r = (x - n * ln2_high) - n * ln2_low; /* |r| <= ln(2) / 2 */
    float power = 1.0f / 720.0f, scale;
    power = power * r + 1.0f / 120.0f;
    power = power * r + 1.0f / 24.0f;
    power = power * r + 1.0f / 6.0f;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits << 23) + 0x3F800000u; /* 2^n, and 0 for 2^-127; high bits fall off the top */
    memcpy(&scale, &bits, sizeof(scale));
    return power * scale;
}

/* A token's weight: 1 for the likeliest. It falls with the value, but for an error in the last bits. */
SAMPLING_FUNCTION float sampling_weight(float value, float greatest, float temperature) {
    return sampling_power(sampling_exponent(value, greatest, temperature));
}

/* A weight in units of 2^-40, to be summed over a vocabulary of less than 2^24 tokens. */
enum { SAMPLING_MASS_BITS = 40 };

SAMPLING_FUNCTION uint64_t sampling_mass(float weight) {
    return (uint64_t)(int64_t)(weight * (float)(1ll << SAMPLING_MASS_BITS));
}

/* What the likeliest tokens' mass must reach for top-p. */
SAMPLING_FUNCTION uint64_t sampling_share(float p, uint64_t total) {
    uint64_t share = (uint64_t)(int64_t)((double)p * (double)(int64_t)total);
    return share > 0 ? share : 1;
}

/*
 * What is lighter than this may be left out of top-p's choice among `count` tokens, of which the likeliest weighs 1 and all
 * at least `total`: all that is no heavier weighs less than 1 - p together, with half of that to spare for roundings.
 */
SAMPLING_FUNCTION float sampling_least_weight(float p, float total, uint32_t count) {
    return 0.5f * (1.0f - p) * total / (float)count;
}

/* Where in [0, total) a draw falls. */
SAMPLING_FUNCTION uint64_t sampling_target(uint64_t random, uint64_t total) {
    return (uint64_t)((unsigned __int128)random * total >> 64);
}

/* The natural logarithm of x >= 1: x = m 2^e with m near 1, and ln m = 2 artanh((m - 1) / (m + 1)). */
SAMPLING_FUNCTION double sampling_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    int64_t exponent = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFFu) | 0x3FF0000000000000u;
    double m;
    memcpy(&m, &bits, sizeof(m));
    if (m > 1.4142135623730951) {
        m *= 0.5;
        exponent++;
    }
    double s = (m - 1.0) / (m + 1.0), square = s * s, series = 0.0;
    for (int k = 19; k >= 1; k -= 2)
        series = series * square + 1.0 / k;
    return (double)exponent * 0.6931471805599453 + 2.0 * s * series;
}

/* The logarithm of the mass of all tokens at temperature 1, of which the likeliest weighs 1. */
SAMPLING_FUNCTION double sampling_log_mass(uint64_t mass) {
    return sampling_log((double)mass / (double)(1ll << SAMPLING_MASS_BITS));
}

/* A token's log-probability. */
SAMPLING_FUNCTION float sampling_logprob(float logit, float greatest, double log_mass) {
    return (float)(((double)logit - greatest) - log_mass);
}

/*
 * The logit of a token that occurs in the history, `count` times behind the prompt: the repetition penalty as in CTRL
 * (Keskar et al. 2019), presence and frequency as in the OpenAI API.
 */
SAMPLING_FUNCTION float sampling_penalized(float logit, uint32_t count, float repetition, float presence,
                                           float frequency) {
    double value = logit;
    if (repetition > 0)
        value = value > 0 ? value / repetition : value * repetition;
    if (count > 0)
        value -= (double)presence + (double)count * frequency;
    return (float)(value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : value);
}

#endif
