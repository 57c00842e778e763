#include <immintrin.h>

#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

/*
 * Lane = row. The weights of a group are unpacked once into eight registers of four unsigned bytes a row and multiplied
 * with each of the n tokens of a pass (vpdpbusd with a broadcast of four activations); every token has one register of
 * sums. n is a constant in every function that is marked INLINE, so that its arrays are registers.
 */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { TOKENS = 16 /* most of a pass */, PREFETCH_BYTES = 4096 };

INLINE __m512i load(const uint8_t *p) {
    return _mm512_load_si512(p);
}

INLINE __m512i broadcast(const void *p) {
    return _mm512_set1_epi32((int)load_u32(p));
}

/* (a & mask) | b */
INLINE __m512i merge(__m512i a, __m512i mask, __m512i b) {
    return _mm512_ternarylogic_epi32(a, mask, b, 0xea);
}

INLINE __m512 load_f16(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p));
}

/* Asks for lines far ahead: tiles lie one behind the other, and the processor's own prefetching does not see as far. */
INLINE void prefetch(const uint8_t *p, unsigned words) {
    UNROLL for (unsigned w = 0; w < words; w++)
        _mm_prefetch(p + w * TILE_WORD + PREFETCH_BYTES, _MM_HINT_T0);
}

/* Keeps the compiler from holding what it loaded from p in registers: better to load it again than to spill. */
INLINE const uint8_t *again(unsigned n, const uint8_t *p) {
    if (n > 4)
        __asm__("" : "+r"(p));
    return p;
}

/* Sixteen weights of all rows, w[0-3], times q[0-15], added to sum. */
INLINE __m512i dot16(__m512i sum, const __m512i *w, const int8_t *q) {
    UNROLL for (int j = 0; j < 4; j++)
        sum = _mm512_dpbusd_epi32(sum, w[j], broadcast(q + 4 * j));
    return sum;
}

/* For few tokens in two chains, because then nothing else fills their latency. */
INLINE __m512 dot32(unsigned n, const __m512i *w, const int8_t *q) {
    __m512i zero = _mm512_setzero_si512(), low = dot16(zero, w, q);
    if (n > 4)
        return _mm512_cvtepi32_ps(dot16(low, w + 4, q + 16));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(low, dot16(zero, w + 4, q + 16)));
}

INLINE void store(unsigned n, const __m512 *sum, uint32_t rows, float *const *y) {
    __mmask16 mask = (__mmask16)((1u << rows) - 1);
    UNROLL for (unsigned t = 0; t < n; t++)
        _mm512_mask_storeu_ps(y[t], mask, sum[t]);
}

/* All scales and minima of a Q4_K or Q5_K block: [group][row]. */
struct k_scales {
    _Alignas(64) float scale[8][CPU_TILE_ROWS], min[8][CPU_TILE_ROWS];
};

INLINE void k_scales_unpack(const uint8_t *block, struct k_scales *out) {
    const __m512i m6 = _mm512_set1_epi8(0x3f), m4 = _mm512_set1_epi8(0x0f), m2 = _mm512_set1_epi8(0x30);
    __m512i pairs = load(block);
    __m512 d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    __m512 dmin = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    __m512i a = load(block + Q4_K_SCALES * TILE_WORD), b = load(block + (Q4_K_SCALES + 1) * TILE_WORD);
    __m512i c = load(block + (Q4_K_SCALES + 2) * TILE_WORD);
    __m512i scale[2] = {_mm512_and_si512(a, m6), merge(_mm512_srli_epi32(a, 2), m2, _mm512_and_si512(c, m4))};
    __m512i min[2] = {_mm512_and_si512(b, m6),
                      merge(_mm512_srli_epi32(b, 2), m2, _mm512_and_si512(_mm512_srli_epi32(c, 4), m4))};
    const __m512i byte = _mm512_set1_epi32(0xff);
    UNROLL for (unsigned g = 0; g < 8; g++) {
        __m512i s = _mm512_and_si512(_mm512_srli_epi32(scale[g / 4], g % 4 * 8), byte);
        __m512i m = _mm512_and_si512(_mm512_srli_epi32(min[g / 4], g % 4 * 8), byte);
        _mm512_store_ps(out->scale[g], _mm512_mul_ps(d, _mm512_cvtepi32_ps(s)));
        _mm512_store_ps(out->min[g], _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(m)));
    }
}

INLINE void matmul_k(unsigned n, bool fifth, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                     float *const *y) {
    const __m512i nibble = _mm512_set1_epi8(0x0f), bit4 = _mm512_set1_epi8(0x10);
    const unsigned words = fifth ? Q5_K_WORDS : Q4_K_WORDS, q_word = fifth ? Q5_K_Q : Q4_K_Q;
    __m512 sum[TOKENS];
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t] = _mm512_setzero_ps();
    for (uint32_t b = 0; b < k / QUANT_K; b++, tile += words * TILE_WORD) {
        struct k_scales scales;
        k_scales_unpack(tile, &scales);
        prefetch(tile, q_word);
        for (uint32_t pair = 0; pair < 4; pair++) {
            const uint8_t *q = tile + (q_word + pair * 8) * TILE_WORD, *high = tile + Q5_K_HIGH * TILE_WORD;
            prefetch(q, 8);
            UNROLL for (unsigned odd = 0; odd < 2; odd++) {
                const uint32_t g = 2 * pair + odd;
                const __m512i turn = _mm512_set1_epi32((int)g - 4); /* brings bit g to bit 4 */
                __m512i w[8];
                UNROLL for (unsigned j = 0; j < 8; j++) {
                    __m512i v = load(q + j * TILE_WORD);
                    w[j] = _mm512_and_si512(odd ? _mm512_srli_epi32(v, 4) : v, nibble);
                    if (fifth)
                        w[j] = merge(_mm512_rorv_epi32(load(high + j * TILE_WORD), turn), bit4, w[j]);
                }
                const __m512 scale = _mm512_load_ps(scales.scale[g]), min = _mm512_load_ps(scales.min[g]);
                UNROLL for (unsigned t = 0; t < n; t++) {
                    const struct cpu_activation *a = (const struct cpu_activation *)x[t] + 8 * b + g;
                    __m512 dot = _mm512_mul_ps(dot32(n, w, a->q), scale);
                    sum[t] = _mm512_fmadd_ps(dot, _mm512_set1_ps(a->scale), sum[t]);
                    sum[t] = _mm512_fnmadd_ps(min, _mm512_set1_ps(a->sum), sum[t]);
                }
                q = again(n, q);
                high = again(n, high);
            }
        }
    }
    store(n, sum, rows, y);
}

INLINE void matmul_q4_k(unsigned n, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                        float *const *y) {
    matmul_k(n, false, k, tile, rows, x, y);
}

INLINE void matmul_q5_k(unsigned n, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                        float *const *y) {
    matmul_k(n, true, k, tile, rows, x, y);
}

INLINE void matmul_q6_k(unsigned n, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                        float *const *y) {
    const __m512i nibble = _mm512_set1_epi8(0x0f), top = _mm512_set1_epi8(0x30);
    const uint8_t *d = tile;
    __m512 sum[TOKENS];
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t] = _mm512_setzero_ps();
    tile += q6_k_head_bytes(k / QUANT_K);
    for (uint32_t b = 0; b < k / QUANT_K; b++, tile += Q6_K_WORDS * TILE_WORD, d += TILE_D) {
        const __m512 block_scale = load_f16(d);
        prefetch(tile, Q6_K_HALF);
        for (uint32_t pair = 0; pair < 4; pair++) {
            const uint8_t *high = tile + (Q6_K_HALF + pair / 2 * Q6_K_HALF_WORDS) * TILE_WORD;
            const uint8_t *low = high + (Q6_K_LOW + pair % 2 * 8) * TILE_WORD;
            const __m512i scales = load(tile + pair * TILE_WORD);
            prefetch(high + pair % 2 * 12 * TILE_WORD, 12);
            UNROLL for (unsigned odd = 0; odd < 2; odd++) {
                const uint32_t g = 2 * pair + odd;
                const __m512i turn = _mm512_set1_epi32((int)(g % 4 * 2) - 4); /* brings the group's two bits to 4 and 5 */
                __m512i w[8];
                UNROLL for (unsigned j = 0; j < 8; j++) {
                    __m512i v = load(low + j * TILE_WORD);
                    w[j] = _mm512_and_si512(odd ? _mm512_srli_epi32(v, 4) : v, nibble);
                    w[j] = merge(_mm512_rorv_epi32(load(high + j * TILE_WORD), turn), top, w[j]);
                }
                const __m512 scale0 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(scales, odd ? 8 : 24), 24));
                const __m512 scale1 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(scales, odd ? 0 : 16), 24));
                UNROLL for (unsigned t = 0; t < n; t++) {
                    const struct cpu_activation *a = (const struct cpu_activation *)x[t] + 8 * b + g;
                    /* From -32 * sum of q; both dots and their weighted sum are integers below 2^24, exact in a float. */
                    __m512i dot0 = dot16(_mm512_slli_epi32(broadcast(&a->negated[0]), 5), w, a->q);
                    __m512i dot1 = dot16(_mm512_slli_epi32(broadcast(&a->negated[1]), 5), w + 4, a->q + 16);
                    __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dot0), scale0);
                    dot = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(dot1), scale1, dot), block_scale);
                    sum[t] = _mm512_fmadd_ps(dot, _mm512_set1_ps(a->scale), sum[t]);
                }
                low = again(n, low);
                high = again(n, high);
            }
        }
    }
    store(n, sum, rows, y);
}

INLINE void matmul_q8_0(unsigned n, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                        float *const *y) {
    __m512 sum[TOKENS];
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t] = _mm512_setzero_ps();
    for (uint32_t g = 0; g < k / 32; g++) {
        const uint8_t *q = tile + q8_0_q_offset(g);
        __m512i w[8];
        prefetch(q, 8);
        UNROLL for (unsigned j = 0; j < 8; j++)
            w[j] = load(q + j * TILE_WORD);
        const __m512 scale = load_f16(tile + q8_0_d_offset(g));
        UNROLL for (unsigned t = 0; t < n; t++) {
            const struct cpu_activation *a = (const struct cpu_activation *)x[t] + g;
            /* The weights are 128 too large: from -128 * sum of q. */
            __m512i low = dot16(_mm512_slli_epi32(broadcast(&a->negated[0]), 7), w, a->q);
            __m512i high = dot16(_mm512_slli_epi32(broadcast(&a->negated[1]), 7), w + 4, a->q + 16);
            __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(low, high)), scale);
            sum[t] = _mm512_fmadd_ps(dot, _mm512_set1_ps(a->scale), sum[t]);
        }
    }
    store(n, sum, rows, y);
}

INLINE __m512 load_floats(enum quant_type type, const uint8_t *tile, size_t i) {
    if (type == QUANT_F32)
        return _mm512_load_ps(tile + i * TILE_WORD);
    if (type == QUANT_F16)
        return load_f16(tile + i * TILE_D);
    __m256i halves = _mm256_load_si256((const __m256i *)(tile + i * TILE_D));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Four sums a token: n is at most 4. */
INLINE void matmul_float(unsigned n, enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t rows,
                         const void *const *x, float *const *y) {
    __m512 sum[4][4];
    UNROLL for (unsigned t = 0; t < n; t++)
        UNROLL for (unsigned c = 0; c < 4; c++)
            sum[t][c] = _mm512_setzero_ps();
    uint32_t i = 0;
    for (; i + 4 <= k; i += 4)
        UNROLL for (unsigned c = 0; c < 4; c++) {
            __m512 w = load_floats(type, tile, i + c);
            UNROLL for (unsigned t = 0; t < n; t++)
                sum[t][c] = _mm512_fmadd_ps(w, _mm512_set1_ps(((const float *)x[t])[i + c]), sum[t][c]);
        }
    UNROLL for (unsigned c = 0; c < 3; c++)
        if (i + c < k) {
            __m512 w = load_floats(type, tile, i + c);
            UNROLL for (unsigned t = 0; t < n; t++)
                sum[t][c] = _mm512_fmadd_ps(w, _mm512_set1_ps(((const float *)x[t])[i + c]), sum[t][c]);
        }
    UNROLL for (unsigned t = 0; t < n; t++)
        sum[t][0] = _mm512_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]), _mm512_add_ps(sum[t][2], sum[t][3]));
    __m512 total[4];
    UNROLL for (unsigned t = 0; t < n; t++)
        total[t] = sum[t][0];
    store(n, total, rows, y);
}

typedef void matmul_pass(uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x, float *const *y);

#define QUANTIZED_PASS(format, n)                                                                                     \
    static void format##_##n(uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x, float *const *y) { \
        matmul_##format(n, k, tile, rows, x, y);                                                                      \
    }
/* [n - 1]: n tokens; the last: 16. */
#define QUANTIZED_PASSES(format)                                                                                \
    QUANTIZED_PASS(format, 1)                                                                                   \
    QUANTIZED_PASS(format, 2)                                                                                   \
    QUANTIZED_PASS(format, 3)                                                                                   \
    QUANTIZED_PASS(format, 4)                                                                                   \
    QUANTIZED_PASS(format, 5)                                                                                   \
    QUANTIZED_PASS(format, 6)                                                                                   \
    QUANTIZED_PASS(format, 7)                                                                                   \
    QUANTIZED_PASS(format, 8)                                                                                   \
    QUANTIZED_PASS(format, 16)                                                                                  \
    static matmul_pass *const format##_passes[] = {format##_1, format##_2, format##_3, format##_4, format##_5, \
                                                   format##_6, format##_7, format##_8, format##_16};

QUANTIZED_PASSES(q4_k)
QUANTIZED_PASSES(q5_k)
QUANTIZED_PASSES(q6_k)
QUANTIZED_PASSES(q8_0)

static void run_quantized(matmul_pass *const *passes, uint32_t k, const uint8_t *tile, uint32_t rows,
                          const void *const *x, float *const *y, uint32_t n) {
    for (; n >= 16; n -= 16, x += 16, y += 16)
        passes[8](k, tile, rows, x, y);
    if (n > 8) { /* in two passes of about equal size */
        uint32_t half = (n + 1) / 2;
        passes[half - 1](k, tile, rows, x, y);
        n -= half, x += half, y += half;
    }
    if (n > 0)
        passes[n - 1](k, tile, rows, x, y);
}

#define FLOAT_PASS(name, type, n)                                                                                   \
    static void name##_##n(uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x, float *const *y) { \
        matmul_float(n, type, k, tile, rows, x, y);                                                                 \
    }
#define FLOAT_PASSES(name, type) \
    FLOAT_PASS(name, type, 1)    \
    FLOAT_PASS(name, type, 2)    \
    FLOAT_PASS(name, type, 3)    \
    FLOAT_PASS(name, type, 4)    \
    static matmul_pass *const name##_passes[] = {name##_1, name##_2, name##_3, name##_4};

FLOAT_PASSES(f32, QUANT_F32)
FLOAT_PASSES(f16, QUANT_F16)
FLOAT_PASSES(bf16, QUANT_BF16)

static void run_float(matmul_pass *const *passes, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                      float *const *y, uint32_t n) {
    for (; n >= 4; n -= 4, x += 4, y += 4)
        passes[3](k, tile, rows, x, y);
    if (n > 0)
        passes[n - 1](k, tile, rows, x, y);
}

void cpu_matmul_tile_avx512(enum quant_type type, uint32_t k, const void *tile, uint32_t rows, const void *const *x,
                            float *const *y, uint32_t n) {
    switch (type) {
    case QUANT_F32:
        run_float(f32_passes, k, tile, rows, x, y, n);
        break;
    case QUANT_F16:
        run_float(f16_passes, k, tile, rows, x, y, n);
        break;
    case QUANT_BF16:
        run_float(bf16_passes, k, tile, rows, x, y, n);
        break;
    case QUANT_Q8_0:
        run_quantized(q8_0_passes, k, tile, rows, x, y, n);
        break;
    case QUANT_Q4_K:
        run_quantized(q4_k_passes, k, tile, rows, x, y, n);
        break;
    case QUANT_Q5_K:
        run_quantized(q5_k_passes, k, tile, rows, x, y, n);
        break;
    case QUANT_Q6_K:
        run_quantized(q6_k_passes, k, tile, rows, x, y, n);
        break;
    }
}
