#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

/* out[w][row] = word w of the row, inverted in the bits of `flip`; rows that are not there hold zeros. */
static void transpose_words(const uint8_t *data, size_t row_bytes, uint32_t rows, uint32_t words, uint32_t flip,
                            uint8_t *out) {
    for (uint32_t w = 0; w < words; w++)
        for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
            uint32_t word = (r < rows ? load_u32(data + r * row_bytes + 4 * w) : 0) ^ flip;
            memcpy(out + w * TILE_WORD + 4 * r, &word, sizeof word);
        }
}

static void transpose_halves(const uint8_t *data, size_t row_bytes, uint32_t rows, uint32_t count, uint8_t *out) {
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
            uint16_t half = r < rows ? load_u16(data + r * row_bytes + 2 * i) : 0;
            memcpy(out + i * TILE_D + 2 * r, &half, sizeof half);
        }
}

/* The transposed low[] of half a Q6_K block in place: see tile.h. */
static void pair_q6_k_groups(uint8_t *low) {
    for (uint32_t i = 0; i < 8 * CPU_TILE_ROWS; i++) {
        uint8_t *first = low + 4 * i, *second = first + 8 * TILE_WORD;
        uint32_t a = load_u32(first), b = load_u32(second);
        uint32_t groups_01 = (a & 0x0f0f0f0f) | (b & 0x0f0f0f0f) << 4;
        uint32_t groups_23 = (a >> 4 & 0x0f0f0f0f) | (b & 0xf0f0f0f0);
        memcpy(first, &groups_01, sizeof groups_01);
        memcpy(second, &groups_23, sizeof groups_23);
    }
}

static void pack_q6_k(const uint8_t *data, size_t row_bytes, uint32_t rows, uint32_t blocks, uint8_t *tile) {
    uint8_t *d = tile, *out = tile + q6_k_head_bytes(blocks);
    for (uint32_t b = 0; b < blocks; b++) {
        transpose_halves(data + offsetof(struct quant_q6_k, d), row_bytes, rows, 1, d);
        transpose_words(data + offsetof(struct quant_q6_k, scales), row_bytes, rows, 4, 0, out);
        for (uint32_t half = 0; half < 2; half++) {
            uint8_t *high = out + (Q6_K_HALF + half * Q6_K_HALF_WORDS) * TILE_WORD, *low = high + Q6_K_LOW * TILE_WORD;
            transpose_words(data + offsetof(struct quant_q6_k, high) + 32 * half, row_bytes, rows, 8, 0, high);
            transpose_words(data + offsetof(struct quant_q6_k, low) + 64 * half, row_bytes, rows, 16, 0, low);
            pair_q6_k_groups(low);
        }
        data += sizeof(struct quant_q6_k);
        out += Q6_K_WORDS * TILE_WORD;
        d += TILE_D;
    }
}

static void pack_q8_0(const uint8_t *data, size_t row_bytes, uint32_t rows, uint32_t blocks, uint8_t *tile) {
    for (uint32_t b = 0; b < blocks; b++) {
        transpose_halves(data + offsetof(struct quant_q8_0, d), row_bytes, rows, 1, tile + q8_0_d_offset(b));
        transpose_words(data + offsetof(struct quant_q8_0, q), row_bytes, rows, Q8_0_WORDS, 0x80808080,
                        tile + q8_0_q_offset(b));
        data += sizeof(struct quant_q8_0);
    }
}

void cpu_pack_c(enum quant_type type, uint32_t k, const void *rows_data, size_t row_bytes, uint32_t rows, void *tile) {
    switch (type) {
    case QUANT_F32:
        transpose_words(rows_data, row_bytes, rows, k, 0, tile);
        break;
    case QUANT_F16:
    case QUANT_BF16:
        transpose_halves(rows_data, row_bytes, rows, k, tile);
        break;
    case QUANT_Q4_K:
        transpose_words(rows_data, row_bytes, rows, k / QUANT_K * Q4_K_WORDS, 0, tile);
        break;
    case QUANT_Q5_K:
        transpose_words(rows_data, row_bytes, rows, k / QUANT_K * Q5_K_WORDS, 0, tile);
        break;
    case QUANT_Q6_K:
        pack_q6_k(rows_data, row_bytes, rows, k / QUANT_K, tile);
        break;
    case QUANT_Q8_0:
        pack_q8_0(rows_data, row_bytes, rows, k / 32, tile);
        break;
    }
}
