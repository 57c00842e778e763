#ifndef MOED_KERNELS_QUANT_H
#define MOED_KERNELS_QUANT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Block formats of GGUF tensors (source: ggml's ggml-common.h, read for the layout). Numbers are those of the file.
 * A row is a whole number of blocks. All multi-byte fields are little-endian; f16 is IEEE binary16.
 */
enum quant_type {
    QUANT_F32 = 0,
    QUANT_F16 = 1,
    QUANT_Q8_0 = 8,
    QUANT_Q4_K = 12,
    QUANT_Q5_K = 13,
    QUANT_Q6_K = 14,
    QUANT_BF16 = 30,
};

enum { QUANT_K = 256, QUANT_SCALES_BYTES = 12 };

/* w[i] = d * q[i] */
struct quant_q8_0 {
    uint16_t d;
    int8_t q[32];
};

/*
 * Eight groups of 32: w = d * scale[g] * q - dmin * min[g]. scales: 6 bits each, bytes 0-3 scale[0-3] and 4-7 min[0-3] in
 * their low six bits, bytes 8-11 the low four bits of scale[4-7] and, in the high half, of min[4-7], whose upper two bits
 * are the top bits of bytes 0-3 and 4-7. q: 64 weights in 32 bytes, the first 32 in the low halves.
 */
struct quant_q4_k {
    uint16_t d, dmin;
    uint8_t scales[QUANT_SCALES_BYTES];
    uint8_t q[QUANT_K / 2];
};

/* As Q4_K, with bit g of high[i] the fifth bit of weight i of group g. */
struct quant_q5_k {
    uint16_t d, dmin;
    uint8_t scales[QUANT_SCALES_BYTES];
    uint8_t high[QUANT_K / 8];
    uint8_t q[QUANT_K / 2];
};

/*
 * Sixteen groups of 16: w = d * scale[g] * (q - 32), q of six bits. In each half of 128 weights: the low four bits of
 * weights 0-31 and 64-95 are the halves of low[0-31], those of 32-63 and 96-127 of low[32-63]; high[i] holds the upper
 * two bits of weights i, 32 + i, 64 + i and 96 + i, from the lowest bits on.
 */
struct quant_q6_k {
    uint8_t low[QUANT_K / 2];
    uint8_t high[QUANT_K / 4];
    int8_t scales[QUANT_K / 16];
    uint16_t d;
};

static_assert(sizeof(struct quant_q8_0) == 34, "Q8_0");
static_assert(sizeof(struct quant_q4_k) == 144, "Q4_K");
static_assert(sizeof(struct quant_q5_k) == 176, "Q5_K");
static_assert(sizeof(struct quant_q6_k) == 210, "Q6_K");

struct quant_format {
    const char *name;         /* "Q4_K" */
    uint32_t block_weights;   /* of one block: 1, 32 or 256 */
    uint32_t block_bytes;
};

/* The format of a type number from a file, or NULL for one moed does not run. */
static inline const struct quant_format *quant_format(uint32_t type) {
    static const struct quant_format f32 = {"F32", 1, 4}, f16 = {"F16", 1, 2}, bf16 = {"BF16", 1, 2},
                                     q8_0 = {"Q8_0", 32, 34}, q4_k = {"Q4_K", 256, 144}, q5_k = {"Q5_K", 256, 176},
                                     q6_k = {"Q6_K", 256, 210};
    switch (type) {
    case QUANT_F32: return &f32;
    case QUANT_F16: return &f16;
    case QUANT_BF16: return &bf16;
    case QUANT_Q8_0: return &q8_0;
    case QUANT_Q4_K: return &q4_k;
    case QUANT_Q5_K: return &q5_k;
    case QUANT_Q6_K: return &q6_k;
    default: return NULL;
    }
}

#endif
