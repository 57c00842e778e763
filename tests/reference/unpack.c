#include <math.h>
#include <string.h>

#include "tests/reference/reference.h"

/*
 * The block formats, byte by byte from their definition (ggml's quantize_row_*_ref and dequantize_row_*, read for the
 * layout), in double precision. Nothing of kernels/ is used, on purpose.
 */
enum { F32 = 0, F16 = 1, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

static uint32_t little_endian(const unsigned char *bytes, int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; i++) value |= (uint32_t)bytes[i] << 8 * i;
    return value;
}

static double binary32(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double binary16(const unsigned char *bytes) {
    uint32_t bits = little_endian(bytes, 2);
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                      : ldexp(fraction, -24);
    return bits >> 15 ? -magnitude : magnitude;
}

static void unpack_q8_0(const unsigned char *block, double *out) {
    double d = binary16(block);
    for (int i = 0; i < 32; i++) out[i] = d * (signed char)block[2 + i];
}

/* The 6-bit scale and min of group g of 8, from the 12 packed bytes. */
static void scale_and_min(const unsigned char *packed, int g, int *scale, int *min) {
    if (g < 4) {
        *scale = packed[g] & 63;
        *min = packed[g + 4] & 63;
    } else {
        *scale = (packed[g + 4] & 15) | packed[g - 4] >> 6 << 4;
        *min = packed[g + 4] >> 4 | packed[g] >> 6 << 4;
    }
}

/* Q4_K, and Q5_K where `high` holds the fifth bits. */
static void unpack_q4_q5_k(const unsigned char *block, const unsigned char *high, const unsigned char *low,
                           double *out) {
    double d = binary16(block), dmin = binary16(block + 2);
    for (int i = 0; i < 256; i++) {
        int g = i / 32, scale, min;
        scale_and_min(block + 4, g, &scale, &min);
        int byte = low[g / 2 * 32 + i % 32], q = g % 2 ? byte >> 4 : byte & 15;
        if (high) q += (high[i % 32] >> g & 1) * 16;
        out[i] = d * scale * q - dmin * min;
    }
}

static void unpack_q6_k(const unsigned char *block, double *out) {
    const unsigned char *low = block, *high = block + 128, *scales = block + 192;
    double d = binary16(block + 208);
    for (int i = 0; i < 256; i++) {
        int half = i / 128, r = i % 128; /* of 128; in it four runs of 32 */
        int nibbles = low[half * 64 + r % 64], q = r < 64 ? nibbles & 15 : nibbles >> 4;
        q |= (high[half * 32 + r % 32] >> r / 32 * 2 & 3) << 4;
        out[i] = d * (signed char)scales[i / 16] * (q - 32);
    }
}

int reference_unpack(uint32_t type, const unsigned char *blocks, uint64_t count, double *out) {
    switch (type) {
    case F32:
        for (uint64_t i = 0; i < count; i++) out[i] = binary32(little_endian(blocks + 4 * i, 4));
        return 0;
    case F16:
        for (uint64_t i = 0; i < count; i++) out[i] = binary16(blocks + 2 * i);
        return 0;
    case BF16:
        for (uint64_t i = 0; i < count; i++) out[i] = binary32(little_endian(blocks + 2 * i, 2) << 16);
        return 0;
    case Q8_0:
        for (uint64_t i = 0; i < count; i += 32) unpack_q8_0(blocks + i / 32 * 34, out + i);
        return 0;
    case Q4_K:
        for (uint64_t i = 0; i < count; i += 256, blocks += 144) unpack_q4_q5_k(blocks, NULL, blocks + 16, out + i);
        return 0;
    case Q5_K:
        for (uint64_t i = 0; i < count; i += 256, blocks += 176)
            unpack_q4_q5_k(blocks, blocks + 16, blocks + 48, out + i);
        return 0;
    case Q6_K:
        for (uint64_t i = 0; i < count; i += 256, blocks += 210) unpack_q6_k(blocks, out + i);
        return 0;
    default:
        return -1;
    }
}
