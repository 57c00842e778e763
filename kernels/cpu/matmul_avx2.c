#include <immintrin.h>

#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

/*
 * As matmul_avx512.c, for one half of the tile's rows at a time: lane = row. vpmaddubsw adds two products of an unsigned
 * weight and an activation in 16 bits; how many of those sums fit 16 bits, too, depends on the weights' size.
 */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { TOKENS = 4, LANES = 8, HALF = 4 * LANES };

/* Most products of vpmaddubsw whose sum fits 16 bits: two weights of 15, 31 or 63 times 127 each. */
enum { SPAN_Q4 = 8, SPAN_Q5 = 4, SPAN_Q6 = 2 };

INLINE __m256i load(const uint8_t *p) {
    return _mm256_load_si256((const __m256i *)p);
}

INLINE __m256i broadcast(const void *p) {
    return _mm256_set1_epi32((int)load_u32(p));
}

INLINE __m256 load_f16(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p));
}

/* words times 4 weights of all lanes, times q, added to sum. */
INLINE __m256i dot(__m256i sum, unsigned words, unsigned span, const __m256i *w, const int8_t *q) {
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL for (unsigned i = 0; i < words; i += span) {
        __m256i part = _mm256_maddubs_epi16(w[i], broadcast(q + 4 * i));
        UNROLL for (unsigned j = i + 1; j < i + span; j++)
            part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w[j], broadcast(q + 4 * j)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, ones));
    }
    return sum;
}

INLINE void store(unsigned n, const __m256 *sum, uint32_t rows, float *const *y) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)rows), lanes);
    UNROLL for (unsigned t = 0; t < n; t++)
        _mm256_maskstore_ps(y[t], mask, sum[t]);
}

/* Scales and minima of a Q4_K or Q5_K block for these rows: [group][row]. */
struct k_scales {
    _Alignas(32) float scale[8][LANES], min[8][LANES];
};

INLINE __m256 f16_of_words(__m256i words) {
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

INLINE __m256i high_bits(__m256i v, __m256i low) {
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(v, 2), _mm256_set1_epi8(0x30)), low);
}

INLINE void k_scales_unpack(const uint8_t *block, struct k_scales *out) {
    const __m256i m6 = _mm256_set1_epi8(0x3f), m4 = _mm256_set1_epi8(0x0f), byte = _mm256_set1_epi32(0xff);
    __m256i pairs = load(block);
    __m256 d = f16_of_words(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)));
    __m256 dmin = f16_of_words(_mm256_srli_epi32(pairs, 16));
    __m256i a = load(block + Q4_K_SCALES * TILE_WORD), b = load(block + (Q4_K_SCALES + 1) * TILE_WORD);
    __m256i c = load(block + (Q4_K_SCALES + 2) * TILE_WORD);
    __m256i scale[2] = {_mm256_and_si256(a, m6), high_bits(a, _mm256_and_si256(c, m4))};
    __m256i min[2] = {_mm256_and_si256(b, m6), high_bits(b, _mm256_and_si256(_mm256_srli_epi32(c, 4), m4))};
    UNROLL for (unsigned g = 0; g < 8; g++) {
        __m256i s = _mm256_and_si256(_mm256_srli_epi32(scale[g / 4], g % 4 * 8), byte);
        __m256i m = _mm256_and_si256(_mm256_srli_epi32(min[g / 4], g % 4 * 8), byte);
        _mm256_store_ps(out->scale[g], _mm256_mul_ps(d, _mm256_cvtepi32_ps(s)));
        _mm256_store_ps(out->min[g], _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(m)));
    }
}

INLINE void matmul_k(unsigned n, bool fifth, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                     float *const *y) {
    const __m256i nibble = _mm256_set1_epi8(0x0f), bit4 = _mm256_set1_epi8(0x10);
    const unsigned words = fifth ? Q5_K_WORDS : Q4_K_WORDS, q_word = fifth ? Q5_K_Q : Q4_K_Q;
    __m256 sum[TOKENS];
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t] = _mm256_setzero_ps();
    for (uint32_t b = 0; b < k / QUANT_K; b++, tile += words * TILE_WORD) {
        struct k_scales scales;
        k_scales_unpack(tile, &scales);
        for (uint32_t g = 0; g < 8; g++) {
            const uint8_t *q = tile + (q_word + g / 2 * 8) * TILE_WORD, *high = tile + Q5_K_HIGH * TILE_WORD;
            const __m128i shift = _mm_cvtsi32_si128((int)(g % 2 * 4)), bit = _mm_cvtsi32_si128((int)g);
            __m256i w[8];
            UNROLL for (unsigned j = 0; j < 8; j++) {
                w[j] = _mm256_and_si256(_mm256_srl_epi32(load(q + j * TILE_WORD), shift), nibble);
                if (fifth) { /* bit g to bit 4 */
                    __m256i fifths = _mm256_slli_epi32(_mm256_srl_epi32(load(high + j * TILE_WORD), bit), 4);
                    w[j] = _mm256_or_si256(w[j], _mm256_and_si256(fifths, bit4));
                }
            }
            const __m256 scale = _mm256_load_ps(scales.scale[g]), min = _mm256_load_ps(scales.min[g]);
            UNROLL for (unsigned t = 0; t < n; t++) {
                const struct cpu_activation *a = (const struct cpu_activation *)x[t] + 8 * b + g;
                __m256i whole = dot(_mm256_setzero_si256(), 8, fifth ? SPAN_Q5 : SPAN_Q4, w, a->q);
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale);
                sum[t] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(a->scale), sum[t]);
                sum[t] = _mm256_fnmadd_ps(min, _mm256_set1_ps(a->sum), sum[t]);
            }
        }
    }
    store(n, sum, rows, y);
}

INLINE void matmul_q6_k(unsigned n, uint32_t k, const uint8_t *tile, const uint8_t *d, uint32_t rows,
                        const void *const *x, float *const *y) {
    const __m256i nibble = _mm256_set1_epi8(0x0f), top = _mm256_set1_epi8(0x30);
    __m256 sum[TOKENS];
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t] = _mm256_setzero_ps();
    for (uint32_t b = 0; b < k / QUANT_K; b++, tile += Q6_K_WORDS * TILE_WORD, d += TILE_D) {
        const __m256 block_scale = load_f16(d);
        for (uint32_t g = 0; g < 8; g++) {
            const uint8_t *high = tile + (Q6_K_HALF + g / 4 * Q6_K_HALF_WORDS) * TILE_WORD;
            const uint8_t *low = high + (Q6_K_LOW + g % 4 / 2 * 8) * TILE_WORD;
            const __m128i shift = _mm_cvtsi32_si128((int)(g % 2 * 4)), bits = _mm_cvtsi32_si128((int)(g % 4 * 2));
            __m256i w[8];
            UNROLL for (unsigned j = 0; j < 8; j++) {
                __m256i upper = _mm256_slli_epi32(_mm256_srl_epi32(load(high + j * TILE_WORD), bits), 4);
                w[j] = _mm256_and_si256(_mm256_srl_epi32(load(low + j * TILE_WORD), shift), nibble);
                w[j] = _mm256_or_si256(w[j], _mm256_and_si256(upper, top));
            }
            __m256i scales = _mm256_sll_epi32(load(tile + g / 2 * TILE_WORD), _mm_cvtsi32_si128(g % 2 ? 0 : 16));
            const __m256 scale0 = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(scales, 8), 24));
            const __m256 scale1 = _mm256_cvtepi32_ps(_mm256_srai_epi32(scales, 24));
            UNROLL for (unsigned t = 0; t < n; t++) {
                const struct cpu_activation *a = (const struct cpu_activation *)x[t] + 8 * b + g;
                /* From -32 * sum of q; both dots and their weighted sum are integers below 2^24, exact in a float. */
                __m256i dot0 = dot(_mm256_slli_epi32(broadcast(&a->negated[0]), 5), 4, SPAN_Q6, w, a->q);
                __m256i dot1 = dot(_mm256_slli_epi32(broadcast(&a->negated[1]), 5), 4, SPAN_Q6, w + 4, a->q + 16);
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dot0), scale0);
                scaled = _mm256_mul_ps(_mm256_fmadd_ps(_mm256_cvtepi32_ps(dot1), scale1, scaled), block_scale);
                sum[t] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(a->scale), sum[t]);
            }
        }
    }
    store(n, sum, rows, y);
}

/* Weights of the full eight bits: magnitudes as the unsigned side, their signs moved to the activations. */
INLINE __m256i dot_signed(const __m256i *w, const int8_t *q) {
    __m256i sum = _mm256_setzero_si256();
    UNROLL for (unsigned j = 0; j < 8; j++) {
        __m256i part = _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(broadcast(q + 4 * j), w[j]));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
    }
    return sum;
}

INLINE void matmul_q8_0(unsigned n, uint32_t k, const uint8_t *tile, const uint8_t *d, uint32_t rows,
                        const void *const *x, float *const *y) {
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    __m256 sum[TOKENS];
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t] = _mm256_setzero_ps();
    for (uint32_t g = 0; g < k / 32; g++) {
        __m256i w[8];
        UNROLL for (unsigned j = 0; j < 8; j++)
            w[j] = _mm256_xor_si256(load(tile + q8_0_q_offset(g) + j * TILE_WORD), sign);
        const __m256 scale = load_f16(d + q8_0_d_offset(g));
        UNROLL for (unsigned t = 0; t < n; t++) {
            const struct cpu_activation *a = (const struct cpu_activation *)x[t] + g;
            __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dot_signed(w, a->q)), scale);
            sum[t] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(a->scale), sum[t]);
        }
    }
    store(n, sum, rows, y);
}

INLINE __m256 load_floats(enum quant_type type, const uint8_t *tile, size_t i) {
    if (type == QUANT_F32)
        return _mm256_load_ps((const float *)(tile + i * TILE_WORD));
    if (type == QUANT_F16)
        return load_f16(tile + i * TILE_D);
    __m128i halves = _mm_load_si128((const __m128i *)(tile + i * TILE_D));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE void matmul_float(unsigned n, enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t rows,
                         const void *const *x, float *const *y) {
    __m256 sum[4][TOKENS], total[TOKENS];
    UNROLL for (unsigned c = 0; c < 4; c++)
        UNROLL for (unsigned t = 0; t < n; t++)
            sum[c][t] = _mm256_setzero_ps();
    for (uint32_t i = 0; i < k; i += 4)
        UNROLL for (unsigned c = 0; c < 4; c++)
            if (i + c < k) {
                __m256 w = load_floats(type, tile, i + c);
                UNROLL for (unsigned t = 0; t < n; t++)
                    sum[c][t] = _mm256_fmadd_ps(w, _mm256_set1_ps(((const float *)x[t])[i + c]), sum[c][t]);
            }
    UNROLL for (unsigned t = 0; t < n; t++)
        total[t] = _mm256_add_ps(_mm256_add_ps(sum[0][t], sum[1][t]), _mm256_add_ps(sum[2][t], sum[3][t]));
    store(n, total, rows, y);
}

/* n tokens and the half of the rows that begins at `first`. */
INLINE void pass(unsigned n, enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t first, uint32_t rows,
                 const void *const *x, float *const *y) {
    const uint8_t *words = tile + 4 * first, *halves = tile + 2 * first;
    switch (type) {
    case QUANT_Q4_K:
        matmul_k(n, false, k, words, rows, x, y);
        break;
    case QUANT_Q5_K:
        matmul_k(n, true, k, words, rows, x, y);
        break;
    case QUANT_Q6_K:
        matmul_q6_k(n, k, words + q6_k_head_bytes(k / QUANT_K), halves, rows, x, y);
        break;
    case QUANT_Q8_0:
        matmul_q8_0(n, k, words, halves, rows, x, y);
        break;
    case QUANT_F32:
        matmul_float(n, type, k, words, rows, x, y);
        break;
    case QUANT_F16:
    case QUANT_BF16:
        matmul_float(n, type, k, halves, rows, x, y);
        break;
    }
}

#define PASS(n)                                                                                                 \
    static void pass_##n(enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t first, uint32_t rows, \
                         const void *const *x, float *const *y) {                                              \
        pass(n, type, k, tile, first, rows, x, y);                                                             \
    }

PASS(1)
PASS(2)
PASS(4)

void cpu_matmul_tile_avx2(enum quant_type type, uint32_t k, const void *tile, uint32_t rows, const void *const *x,
                          float *const *y, uint32_t n) {
    /* Float products have four sums a token, and there are 16 registers. */
    const uint32_t most = cpu_type_is_quantized(type) ? 4 : 2;
    for (uint32_t first = 0; first < rows; first += LANES)
        for (uint32_t t = 0, count; t < n; t += count) {
            float *out[TOKENS];
            count = n - t >= most ? most : n - t >= 2 ? 2 : 1;
            for (uint32_t i = 0; i < count; i++)
                out[i] = y[t + i] + first;
            (count == 4 ? pass_4 : count == 2 ? pass_2 : pass_1)(type, k, tile, first, rows - first, x + t, out);
        }
}
