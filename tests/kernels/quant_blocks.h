#ifndef MOED_TESTS_KERNELS_QUANT_BLOCKS_H
#define MOED_TESTS_KERNELS_QUANT_BLOCKS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/quant.h"

/* Random rows of every format and their weights in double, written from the formats' description and not from the kernels. */

static const enum quant_type quant_types[] = {QUANT_F32,  QUANT_F16,  QUANT_BF16, QUANT_Q8_0,
                                              QUANT_Q4_K, QUANT_Q5_K, QUANT_Q6_K};
enum { QUANT_TYPES = sizeof quant_types / sizeof *quant_types };

struct random {
    uint64_t state;
};

static inline uint64_t random_bits(struct random *random) { /* splitmix64 */
    uint64_t z = random->state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static inline uint32_t random_below(struct random *random, uint32_t limit) {
    return (uint32_t)(random_bits(random) % limit);
}

/* Uniform in [-1, 1). */
static inline float random_float(struct random *random) {
    return (float)((int64_t)random_bits(random) >> 39) / (1 << 24);
}

static inline double double_from_f16(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? ldexp(mantissa, -24)
                                       : ldexp(1024 + mantissa, exponent - 25);
    return h >> 15 ? -magnitude : magnitude;
}

/* A positive half between 2^-14 and 2^-3: what d of a real file may be. */
static inline uint16_t random_d(struct random *random) {
    return (uint16_t)(0x0400 + random_below(random, 0x2c00));
}

/* A row of k weights. Extreme rows have the largest scales and the weights farthest from zero. */
static inline void random_row(struct random *random, enum quant_type type, uint32_t k, bool extreme, uint8_t *row) {
    const struct quant_format *format = quant_format(type);
    size_t bytes = (size_t)k / format->block_weights * format->block_bytes;
    for (size_t i = 0; i < bytes; i++)
        row[i] = extreme ? (uint8_t)(0u - (random_bits(random) & 1)) : (uint8_t)random_bits(random);
    for (uint32_t b = 0; b < k / format->block_weights; b++, row += format->block_bytes) {
        uint16_t d = extreme ? 0x7bff : random_d(random), dmin = extreme ? 0xfbff : random_d(random);
        float value = random_float(random);
        switch (type) {
        case QUANT_F32:
            memcpy(row, &value, 4);
            break;
        case QUANT_F16:
            row[1] = (uint8_t)((row[1] & 0x83) | random_below(random, 16) << 2); /* below 2 */
            break;
        case QUANT_BF16:
            memcpy(row, (uint8_t *)&value + 2, 2);
            break;
        case QUANT_Q8_0:
            if (extreme)
                memset(row + 2, 0x80, 32);
            memcpy(row, &d, 2);
            break;
        case QUANT_Q6_K:
            if (extreme) {
                memset(row, random_below(random, 2) ? 0xff : 0, 192);
                memset(row + 192, random_below(random, 2) ? 0x80 : 0x7f, 16);
            }
            memcpy(row + 208, &d, 2);
            break;
        default:
            memcpy(row, &d, 2);
            memcpy(row + 2, &dmin, 2);
        }
    }
}

/* Weight i of a row, exact. */
static inline double weight_reference(enum quant_type type, const uint8_t *row, uint32_t i) {
    const struct quant_format *format = quant_format(type);
    const uint8_t *block = row + (size_t)(i / format->block_weights) * format->block_bytes;
    uint32_t j = i % format->block_weights, group = j / 32;
    uint16_t d, dmin = 0;
    memcpy(&d, block, 2);
    if (format->block_bytes > 2)
        memcpy(&dmin, block + 2, 2);
    switch (type) {
    case QUANT_F32: {
        float value;
        memcpy(&value, block, 4);
        return value;
    }
    case QUANT_F16:
        return double_from_f16(d);
    case QUANT_BF16: {
        uint32_t bits = (uint32_t)d << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    case QUANT_Q8_0:
        return double_from_f16(d) * (int8_t)block[2 + j];
    case QUANT_Q4_K:
    case QUANT_Q5_K: {
        const uint8_t *s = block + 4, *q = block + (type == QUANT_Q4_K ? 16 : 48);
        int scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) + 16 * (s[group - 4] >> 6);
        int min = group < 4 ? s[group + 4] & 63 : (s[group + 4] >> 4) + 16 * (s[group] >> 6);
        int weight = group % 2 ? q[group / 2 * 32 + j % 32] >> 4 : q[group / 2 * 32 + j % 32] & 15;
        if (type == QUANT_Q5_K)
            weight += 16 * (block[16 + j % 32] >> group & 1);
        return double_from_f16(d) * scale * weight - double_from_f16(dmin) * min;
    }
    default: { /* QUANT_Q6_K */
        const uint8_t *low = block + j / 128 * 64, *high = block + 128 + j / 128 * 32;
        int part = (int)(j % 128 / 32), l = (int)(j % 32);
        int weight = (part < 2 ? low[part * 32 + l] & 15 : low[(part - 2) * 32 + l] >> 4) + 16 * (high[l] >> 2 * part & 3);
        memcpy(&d, block + 208, 2);
        return double_from_f16(d) * (int8_t)block[192 + j / 16] * (weight - 32);
    }
    }
}

static inline void *aligned_bytes(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p == NULL)
        abort();
    return p;
}

/* Equal bits, or both NaN. */
static inline bool same_float(float a, float b) {
    return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b));
}

#endif
