#include <immintrin.h>

#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

/*
 * Packing is a transposition (tile.h): 16 words of 16 rows at a time, in registers. Sixteen streams that are short are too
 * many for the processor's own prefetching; as the rows of a matrix follow each other, those of the next tile are fetched,
 * in order, while these are packed.
 */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* Rows of 32-bit words to columns: 16 by 16. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* v[4r + c], lane l: word 4l + c of rows 4r to 4r + 3. */
    UNROLL for (int c = 0; c < 4; c++) {
        __m512i low01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), high01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        __m512i low23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        __m512i high23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    UNROLL for (int i = 0; i < 16; i++)
        v[i] = t[i];
}

struct source {
    const uint8_t *rows;
    size_t row_bytes;
    const uint8_t *next; /* what is fetched next of the next tile */
};

static struct source source_begin(const void *rows, size_t row_bytes) {
    return (struct source){rows, row_bytes, (const uint8_t *)rows + CPU_TILE_ROWS * row_bytes};
}

/* v[i] = word i of all rows, from 1 to 16 words that begin `offset` bytes into the rows. */
INLINE void columns_get(struct source *source, size_t offset, unsigned words, __m512i v[16]) {
    const uint8_t *p = source->rows + offset;
    const __mmask16 mask = (__mmask16)((1u << words) - 1);
    UNROLL for (unsigned r = 0; r < CPU_TILE_ROWS; r++)
        v[r] = _mm512_maskz_loadu_epi32(mask, p + r * source->row_bytes);
    for (unsigned i = 0; i < words; i++, source->next += 64)
        _mm_prefetch(source->next, _MM_HINT_T1);
    transpose(v);
}

INLINE void columns_put(const __m512i *v, unsigned words, uint8_t *out) {
    UNROLL for (unsigned i = 0; i < 16; i++)
        if (i < words)
            _mm512_store_si512(out + i * TILE_WORD, v[i]);
}

static void pack_words(struct source source, uint32_t words, uint8_t *out) {
    uint32_t w = 0;
    __m512i v[16];
    for (; w + 16 <= words; w += 16) {
        columns_get(&source, 4 * (size_t)w, 16, v);
        columns_put(v, 16, out + (size_t)w * TILE_WORD);
    }
    if (w < words) {
        columns_get(&source, 4 * (size_t)w, words - w, v);
        columns_put(v, words - w, out + (size_t)w * TILE_WORD);
    }
}

/* Two columns of halves to a word; count is even. */
static void pack_halves(struct source source, uint32_t count, uint8_t *out) {
    for (uint32_t i = 0; i < count; i += 32) {
        uint32_t words = count - i < 32 ? (count - i) / 2 : 16;
        __m512i v[16];
        columns_get(&source, 2 * (size_t)i, words, v);
        UNROLL for (unsigned w = 0; w < 16; w++)
            if (w < words) {
                __m256i *pair = (__m256i *)(out + (i + 2 * (size_t)w) * TILE_D);
                _mm256_store_si256(pair, _mm512_cvtepi32_epi16(v[w]));
                _mm256_store_si256(pair + 1, _mm512_cvtepi32_epi16(_mm512_srli_epi32(v[w], 16)));
            }
    }
}

static void gather_d(struct source source, size_t offset, uint8_t *out) {
    uint16_t d[CPU_TILE_ROWS];
    UNROLL for (uint32_t r = 0; r < CPU_TILE_ROWS; r++)
        d[r] = load_u16(source.rows + r * source.row_bytes + offset);
    memcpy(out, d, sizeof d);
}

/* Sixteen words of low[] of half a block: halves of bytes from groups 0 and 2, 1 and 3 to 0 and 1, 2 and 3. */
INLINE void pair_q6_k_groups(__m512i v[16]) {
    const __m512i first_half = _mm512_set1_epi8(0x0f);
    UNROLL for (unsigned j = 0; j < 8; j++) {
        __m512i a = v[j], b = v[8 + j];
        /* Bitwise first_half ? left : right. */
        v[j] = _mm512_ternarylogic_epi32(first_half, a, _mm512_slli_epi32(b, 4), 0xca);
        v[8 + j] = _mm512_ternarylogic_epi32(first_half, _mm512_srli_epi32(a, 4), b, 0xca);
    }
}

static void pack_q6_k(struct source source, uint32_t blocks, uint8_t *tile) {
    uint8_t *out = tile + q6_k_head_bytes(blocks);
    for (uint32_t b = 0; b < blocks; b++, out += Q6_K_WORDS * TILE_WORD) {
        const size_t block = b * sizeof(struct quant_q6_k);
        __m512i v[16];
        for (uint32_t half = 0; half < 2; half++) {
            columns_get(&source, block + offsetof(struct quant_q6_k, low) + 64 * half, 16, v);
            pair_q6_k_groups(v);
            columns_put(v, 16, out + (Q6_K_HALF + half * Q6_K_HALF_WORDS + Q6_K_LOW) * TILE_WORD);
        }
        columns_get(&source, block + offsetof(struct quant_q6_k, high), 16, v);
        columns_put(v, 8, out + Q6_K_HALF * TILE_WORD);
        columns_put(v + 8, 8, out + (Q6_K_HALF + Q6_K_HALF_WORDS) * TILE_WORD);
        columns_get(&source, block + offsetof(struct quant_q6_k, scales), 4, v);
        columns_put(v, 4, out);
        gather_d(source, block + offsetof(struct quant_q6_k, d), tile + b * TILE_D);
    }
}

static void pack_q8_0(struct source source, uint32_t blocks, uint8_t *tile) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (uint32_t b = 0; b < blocks; b++) {
        const size_t block = b * sizeof(struct quant_q8_0);
        __m512i v[16];
        columns_get(&source, block + offsetof(struct quant_q8_0, q), Q8_0_WORDS, v);
        UNROLL for (unsigned i = 0; i < Q8_0_WORDS; i++)
            v[i] = _mm512_xor_si512(v[i], sign);
        columns_put(v, Q8_0_WORDS, tile + q8_0_q_offset(b));
        gather_d(source, block + offsetof(struct quant_q8_0, d), tile + q8_0_d_offset(b));
    }
}

void cpu_pack_avx512(enum quant_type type, uint32_t k, const void *rows_data, size_t row_bytes, uint32_t rows,
                     void *tile) {
    struct source source = source_begin(rows_data, row_bytes);
    if (rows < CPU_TILE_ROWS || ((type == QUANT_F16 || type == QUANT_BF16) && k % 2 != 0)) {
        cpu_pack_c(type, k, rows_data, row_bytes, rows, tile);
        return;
    }
    switch (type) {
    case QUANT_F32:
        pack_words(source, k, tile);
        break;
    case QUANT_F16:
    case QUANT_BF16:
        pack_halves(source, k, tile);
        break;
    case QUANT_Q4_K:
        pack_words(source, k / QUANT_K * Q4_K_WORDS, tile);
        break;
    case QUANT_Q5_K:
        pack_words(source, k / QUANT_K * Q5_K_WORDS, tile);
        break;
    case QUANT_Q6_K:
        pack_q6_k(source, k / QUANT_K, tile);
        break;
    case QUANT_Q8_0:
        pack_q8_0(source, k / 32, tile);
        break;
    }
}
