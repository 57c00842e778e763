#include <immintrin.h>

#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

static inline int32_t sum_lanes(__m128i v) {
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}

/* Largest magnitude as in quantize.c: by the bits. Groups that are not plain numbers are left to plain C. */
static void quantize_group(const float *x, struct cpu_activation *out) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 v[4];
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        largest = _mm256_max_epi32(largest, _mm256_castps_si256(_mm256_and_ps(v[i], magnitude)));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    uint32_t bits = (uint32_t)_mm_cvtsi128_si32(most);
    if (bits >= 0x7f800000 || bits < 0x04000000) {
        cpu_quantize_c(x, 32, out);
        return;
    }
    float max = f32_from_bits(bits);
    const __m256 inverse = _mm256_set1_ps(127 / max);
    __m256i q[4];
    for (int i = 0; i < 4; i++)
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    __m256i low = _mm256_add_epi32(q[0], q[1]), high = _mm256_add_epi32(q[2], q[3]);
    out->negated[0] = -sum_lanes(_mm_add_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
    out->negated[1] = -sum_lanes(_mm_add_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    /* Packing works within 128 bits: the words of four bytes come out as 0 2 4 6 1 3 5 7. */
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)out->q, bytes);
    out->scale = max / 127;
    out->sum = out->scale * (float)-(out->negated[0] + out->negated[1]);
}

void cpu_quantize_avx2(const float *x, uint32_t k, struct cpu_activation *activations) {
    for (uint32_t g = 0; g < k / 32; g++)
        quantize_group(x + 32 * g, activations + g);
}
