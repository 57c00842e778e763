#ifndef MOED_KERNELS_CPU_TILE_H
#define MOED_KERNELS_CPU_TILE_H

#include <stdint.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

/*
 * The layout of packed tiles. A block of 16 rows is the file's block transposed in words of four bytes: word w of rows
 * 0 to 15 stand side by side in 64 bytes, so that one vector holds, for each row, four consecutive weights of a group (or
 * their nibbles). Words stand in the order in which they are needed, because memory is fast only in order:
 *
 *   Q4_K   0     d and dmin              Q5_K   0      d and dmin
 *          1-3   the 12 bytes of scales         1-3    the 12 bytes of scales
 *          4-35  q                              4-11   high
 *                                               12-43  q
 *   Q6_K   0-3   scales                  Q8_0   0      d of two blocks
 *          4-11  high of groups 0-3             1-16   their q, sign bit inverted: q + 128, unsigned
 *          12-27 low of groups 0-3
 *          28-51 the same of groups 4-7
 *
 * In Q4_K and Q5_K the halves of a byte of q belong to groups 2p and 2p + 1. In the file's Q6_K they belong to groups u
 * and u + 2 of a half of the block; the tile's low[] pairs them as the others do: 8 words for groups 0 and 1, 8 for 2 and 3.
 * The d of Q6_K precede all blocks of the tile, padded to 64 bytes. Float formats are transposed in their own elements.
 */
enum {
    TILE_WORD = 4 * CPU_TILE_ROWS, /* bytes of one word of all rows */
    Q4_K_SCALES = 1, Q4_K_Q = 4, Q4_K_WORDS = 36,
    Q5_K_SCALES = 1, Q5_K_HIGH = 4, Q5_K_Q = 12, Q5_K_WORDS = 44,
    Q6_K_HALF = 4, Q6_K_HALF_WORDS = 24, Q6_K_LOW = 8, /* within a half */
    Q6_K_WORDS = 52,
    Q8_0_WORDS = 8, Q8_0_PAIR_WORDS = 17,
    TILE_D = 2 * CPU_TILE_ROWS, /* bytes of the d of one block */
};

static inline size_t q6_k_head_bytes(uint32_t blocks) {
    return ((size_t)blocks + 1) / 2 * (2 * TILE_D);
}

static inline size_t q8_0_d_offset(uint32_t block) {
    return (size_t)(block / 2) * Q8_0_PAIR_WORDS * TILE_WORD + block % 2 * TILE_D;
}

static inline size_t q8_0_q_offset(uint32_t block) {
    return ((size_t)(block / 2) * Q8_0_PAIR_WORDS + 1 + block % 2 * Q8_0_WORDS) * TILE_WORD;
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF is little-endian, and its blocks are used as they are");

static inline uint32_t load_u32(const void *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint16_t load_u16(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float f32_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t f32_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float f32_from_bf16(uint16_t h) {
    return f32_from_bits((uint32_t)h << 16);
}

/* Scale and minimum of group g of a Q4_K or Q5_K block from its 12 bytes of scales, `stride` apart in words of four. */
static inline void k_scales_get(const uint8_t *scales, uint32_t stride, uint32_t g, uint32_t *scale, uint32_t *min) {
    const uint8_t *a = scales + g % 4, *b = a + stride, *c = b + stride;
    if (g < 4) {
        *scale = *a & 63;
        *min = *b & 63;
    } else {
        *scale = (*c & 15) | (*a >> 6) << 4;
        *min = *c >> 4 | (*b >> 6) << 4;
    }
}

#endif
