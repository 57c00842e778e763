#ifndef MOED_KERNELS_CPU_VECTOR_LANES_H
#define MOED_KERNELS_CPU_VECTOR_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/f16.h"

/*
 * Sixteen floats in the widest registers that VECTOR_ISA (C, AVX2 or AVX512, set by the file that includes this) has.
 * What is written in terms of them rounds the same everywhere: only the operations below differ, and each is one IEEE
 * operation per lane or has a fixed order.
 */
#define VECTOR_ISA_C 0
#define VECTOR_ISA_AVX2 1
#define VECTOR_ISA_AVX512 2

#if VECTOR_ISA == VECTOR_ISA_AVX512

#include <immintrin.h>

#define VECTOR_NAME(name) name##_avx512
struct lanes { __m512 v; };
#define LANES(expression) ((struct lanes){expression})

static inline struct lanes lanes_set(float x) { return LANES(_mm512_set1_ps(x)); }
static inline struct lanes lanes_load(const float *p) { return LANES(_mm512_loadu_ps(p)); }
static inline void lanes_store(float *p, struct lanes a) { _mm512_storeu_ps(p, a.v); }
static inline struct lanes lanes_load_f16(const uint16_t *p) {
    return LANES(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)));
}
static inline void lanes_store_f16(uint16_t *p, struct lanes a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline struct lanes lanes_load_i8(const int8_t *p) {
    return LANES(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))));
}
/* p[0], p[2], ... and p[1], p[3], ... of 32 floats */
static inline void lanes_load_pairs(const float *p, struct lanes *even, struct lanes *odd) {
    const __m512i step = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
    even->v = _mm512_permutex2var_ps(a, step, b);
    odd->v = _mm512_permutex2var_ps(a, _mm512_add_epi32(step, _mm512_set1_epi32(1)), b);
}
static inline struct lanes lanes_add(struct lanes a, struct lanes b) { return LANES(_mm512_add_ps(a.v, b.v)); }
static inline struct lanes lanes_sub(struct lanes a, struct lanes b) { return LANES(_mm512_sub_ps(a.v, b.v)); }
static inline struct lanes lanes_mul(struct lanes a, struct lanes b) { return LANES(_mm512_mul_ps(a.v, b.v)); }
static inline struct lanes lanes_div(struct lanes a, struct lanes b) { return LANES(_mm512_div_ps(a.v, b.v)); }
static inline struct lanes lanes_fma(struct lanes a, struct lanes b, struct lanes c) {
    return LANES(_mm512_fmadd_ps(a.v, b.v, c.v));
}
/* a > b ? a : b */
static inline struct lanes lanes_max(struct lanes a, struct lanes b) { return LANES(_mm512_max_ps(a.v, b.v)); }
/* a < b ? x : y */
static inline struct lanes lanes_if_less(struct lanes a, struct lanes b, struct lanes x, struct lanes y) {
    return LANES(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v));
}
/* NaN where a is, else x */
static inline struct lanes lanes_keep_nan(struct lanes a, struct lanes x) {
    return LANES(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), x.v, a.v));
}
/* a times two to the power that the low bits of n's representation hold */
static inline struct lanes lanes_scale(struct lanes a, struct lanes n) {
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
    return LANES(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), exponent)));
}

#elif VECTOR_ISA == VECTOR_ISA_AVX2

#include <immintrin.h>

#define VECTOR_NAME(name) name##_avx2
struct lanes { __m256 lo, hi; };
#define LANES(lo, hi) ((struct lanes){lo, hi})

static inline struct lanes lanes_set(float x) { return LANES(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline struct lanes lanes_load(const float *p) { return LANES(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void lanes_store(float *p, struct lanes a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
static inline struct lanes lanes_load_f16(const uint16_t *p) {
    return LANES(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
static inline void lanes_store_f16(uint16_t *p, struct lanes a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline struct lanes lanes_load_i8(const int8_t *p) {
    return LANES(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                 _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))));
}
static inline __m256 lanes_every_other(__m256 a, __m256 b, bool odd) {
    __m256 mixed = odd ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
static inline void lanes_load_pairs(const float *p, struct lanes *even, struct lanes *odd) {
    __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8), c = _mm256_loadu_ps(p + 16), d = _mm256_loadu_ps(p + 24);
    *even = LANES(lanes_every_other(a, b, false), lanes_every_other(c, d, false));
    *odd = LANES(lanes_every_other(a, b, true), lanes_every_other(c, d, true));
}
static inline struct lanes lanes_add(struct lanes a, struct lanes b) {
    return LANES(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi));
}
static inline struct lanes lanes_sub(struct lanes a, struct lanes b) {
    return LANES(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi));
}
static inline struct lanes lanes_mul(struct lanes a, struct lanes b) {
    return LANES(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi));
}
static inline struct lanes lanes_div(struct lanes a, struct lanes b) {
    return LANES(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi));
}
static inline struct lanes lanes_fma(struct lanes a, struct lanes b, struct lanes c) {
    return LANES(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
static inline struct lanes lanes_max(struct lanes a, struct lanes b) {
    return LANES(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi));
}
static inline struct lanes lanes_if_less(struct lanes a, struct lanes b, struct lanes x, struct lanes y) {
    return LANES(_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
                 _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)));
}
static inline struct lanes lanes_keep_nan(struct lanes a, struct lanes x) {
    return LANES(_mm256_blendv_ps(x.lo, a.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
                 _mm256_blendv_ps(x.hi, a.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)));
}
static inline __m256 lanes_scale_half(__m256 a, __m256 n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
static inline struct lanes lanes_scale(struct lanes a, struct lanes n) {
    return LANES(lanes_scale_half(a.lo, n.lo), lanes_scale_half(a.hi, n.hi));
}

#else

#define VECTOR_NAME(name) name##_c
struct lanes { float f[16]; };

#define LANES_EACH(expression)                    \
    do {                                          \
        struct lanes result;                      \
        for (int i = 0; i < 16; i++)              \
            result.f[i] = (expression);           \
        return result;                            \
    } while (0)

static inline struct lanes lanes_set(float x) { LANES_EACH(x); }
static inline struct lanes lanes_load(const float *p) { LANES_EACH(p[i]); }
static inline void lanes_store(float *p, struct lanes a) { memcpy(p, a.f, sizeof a.f); }
static inline struct lanes lanes_load_f16(const uint16_t *p) { LANES_EACH(cpu_f16_to_f32(p[i])); }
static inline void lanes_store_f16(uint16_t *p, struct lanes a) {
    for (int i = 0; i < 16; i++)
        p[i] = cpu_f32_to_f16(a.f[i]);
}
static inline struct lanes lanes_load_i8(const int8_t *p) { LANES_EACH((float)p[i]); }
static inline void lanes_load_pairs(const float *p, struct lanes *even, struct lanes *odd) {
    for (int i = 0; i < 16; i++) {
        even->f[i] = p[2 * i];
        odd->f[i] = p[2 * i + 1];
    }
}
static inline struct lanes lanes_add(struct lanes a, struct lanes b) { LANES_EACH(a.f[i] + b.f[i]); }
static inline struct lanes lanes_sub(struct lanes a, struct lanes b) { LANES_EACH(a.f[i] - b.f[i]); }
static inline struct lanes lanes_mul(struct lanes a, struct lanes b) { LANES_EACH(a.f[i] * b.f[i]); }
static inline struct lanes lanes_div(struct lanes a, struct lanes b) { LANES_EACH(a.f[i] / b.f[i]); }
static inline struct lanes lanes_fma(struct lanes a, struct lanes b, struct lanes c) {
    LANES_EACH(fmaf(a.f[i], b.f[i], c.f[i]));
}
static inline struct lanes lanes_max(struct lanes a, struct lanes b) { LANES_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
static inline struct lanes lanes_if_less(struct lanes a, struct lanes b, struct lanes x, struct lanes y) {
    LANES_EACH(a.f[i] < b.f[i] ? x.f[i] : y.f[i]);
}
static inline struct lanes lanes_keep_nan(struct lanes a, struct lanes x) {
    LANES_EACH(a.f[i] != a.f[i] ? a.f[i] : x.f[i]);
}
static inline struct lanes lanes_scale(struct lanes a, struct lanes n) {
    uint32_t bits[16], exponent[16];
    memcpy(bits, a.f, sizeof bits);
    memcpy(exponent, n.f, sizeof exponent);
    for (int i = 0; i < 16; i++)
        bits[i] += exponent[i] << 23;
    memcpy(a.f, bits, sizeof bits);
    return a;
}

#endif

/* The first n < 16 floats, zeros behind them. */
static inline struct lanes lanes_load_part(const float *p, uint32_t n) {
    float part[16] = {0};
    memcpy(part, p, n * sizeof *part);
    return lanes_load(part);
}

static inline void lanes_store_part(float *p, struct lanes a, uint32_t n) {
    float part[16];
    lanes_store(part, a);
    memcpy(p, part, n * sizeof *part);
}

static inline float lanes_first(struct lanes a) {
    float part[16];
    lanes_store(part, a);
    return part[0];
}

/* Halved 8, 4, 2, 1: lane i and lane i + 8, and so on. */
static inline float lanes_sum(struct lanes a) {
    float s[16];
    lanes_store(s, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

/* NaNs are passed over; a lane of -Inf is the least. */
static inline float lanes_greatest(struct lanes a) {
    float s[16];
    lanes_store(s, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
    return s[0];
}

/*
 * exp(x) = 2^n exp(r), n the integer nearest to x / ln 2, |r| <= ln 2 / 2; exp(r) by a polynomial with the least
 * greatest relative error (4.4e-9) among those of degree 6 that begin with 1 + r.
 */
static inline struct lanes lanes_exp(struct lanes x) {
    const struct lanes round = lanes_set(0x1.8p23f); /* added, it leaves the nearest integer in the low bits */
    struct lanes n = lanes_fma(x, lanes_set(0x1.715476p+0f), round), k = lanes_sub(n, round);
    struct lanes r = lanes_fma(k, lanes_set(-0x1.62e4p-1f), x);
    r = lanes_fma(k, lanes_set(-0x1.7f7d1cp-20f), r);
    struct lanes p = lanes_fma(lanes_set(0x1.6a2352p-10f), r, lanes_set(0x1.123a6cp-7f));
    p = lanes_fma(p, r, lanes_set(0x1.5558f4p-5f));
    p = lanes_fma(p, r, lanes_set(0x1.555490p-3f));
    p = lanes_fma(p, r, lanes_set(0x1.fffffcp-2f));
    p = lanes_fma(p, r, lanes_set(1));
    p = lanes_fma(p, r, lanes_set(1));
    struct lanes y = lanes_scale(p, n);
    y = lanes_if_less(x, lanes_set(-87), lanes_set(0), y);
    y = lanes_if_less(lanes_set(88), x, lanes_set(INFINITY), y);
    return lanes_keep_nan(x, y);
}

#endif
