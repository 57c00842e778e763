#ifndef MOED_KERNELS_CPU_F16_H
#define MOED_KERNELS_CPU_F16_H

#include <stdint.h>
#include <string.h>

/* IEEE binary16 in plain C, the same bits as F16C gives: rounding to nearest even, NaNs made quiet, payload kept. */

static inline float cpu_f16_to_f32(uint16_t h) {
    /* Exponent and mantissa moved into place, then rebiased by a product that is exact, subnormals included. */
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, bits;
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof bits);
    if (magnitude >= 0x0f800000) /* Inf or NaN */
        bits = magnitude | 0x7f800000 | (magnitude > 0x0f800000 ? 0x00400000 : 0);
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t cpu_f32_to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) /* 65520 rounds to Inf */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24 */
        float value;
        memcpy(&value, &magnitude, sizeof value);
        value += 0.5f;
        memcpy(&bits, &value, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

#endif
