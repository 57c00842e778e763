#include "kernels/cpu/f16.h"
#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

/* Products of d, a scale and a weight fit a float's 24 bits: nothing but the subtraction of a minimum rounds. */

static void dequantize_k(uint16_t d, uint16_t dmin, const uint8_t *scales, const uint8_t *high, const uint8_t *q,
                         float *x) {
    for (uint32_t g = 0; g < 8; g++) {
        uint32_t scale6, min6;
        k_scales_get(scales, 4, g, &scale6, &min6);
        float scale = cpu_f16_to_f32(d) * (float)scale6, min = cpu_f16_to_f32(dmin) * (float)min6;
        for (uint32_t i = 0; i < 32; i++) {
            uint32_t weight = q[g / 2 * 32 + i] >> g % 2 * 4 & 15;
            if (high != NULL)
                weight |= (high[i] >> g & 1) << 4;
            x[32 * g + i] = scale * (float)weight - min;
        }
    }
}

static void dequantize_q6_k(const struct quant_q6_k *block, float *x) {
    float d = cpu_f16_to_f32(block->d);
    for (uint32_t g = 0; g < 8; g++) {
        const uint8_t *low = block->low + g / 4 * 64 + g % 2 * 32, *high = block->high + g / 4 * 32;
        for (uint32_t i = 0; i < 32; i++) {
            int32_t weight = (low[i] >> g % 4 / 2 * 4 & 15) | (high[i] >> g % 4 * 2 & 3) << 4;
            x[32 * g + i] = d * (float)block->scales[2 * g + i / 16] * (float)(weight - 32);
        }
    }
}

void cpu_dequantize(enum quant_type type, const void *row, uint32_t k, float *x) {
    switch (type) {
    case QUANT_F32:
        memcpy(x, row, k * sizeof *x);
        break;
    case QUANT_F16:
        for (uint32_t i = 0; i < k; i++)
            x[i] = cpu_f16_to_f32(load_u16((const uint8_t *)row + 2 * i));
        break;
    case QUANT_BF16:
        for (uint32_t i = 0; i < k; i++)
            x[i] = f32_from_bf16(load_u16((const uint8_t *)row + 2 * i));
        break;
    case QUANT_Q8_0:
        for (const struct quant_q8_0 *b = row, *end = b + k / 32; b < end; b++, x += 32)
            for (uint32_t i = 0; i < 32; i++)
                x[i] = cpu_f16_to_f32(b->d) * (float)b->q[i];
        break;
    case QUANT_Q4_K:
        for (const struct quant_q4_k *b = row, *end = b + k / QUANT_K; b < end; b++, x += QUANT_K)
            dequantize_k(b->d, b->dmin, b->scales, NULL, b->q, x);
        break;
    case QUANT_Q5_K:
        for (const struct quant_q5_k *b = row, *end = b + k / QUANT_K; b < end; b++, x += QUANT_K)
            dequantize_k(b->d, b->dmin, b->scales, b->high, b->q, x);
        break;
    case QUANT_Q6_K:
        for (const struct quant_q6_k *b = row, *end = b + k / QUANT_K; b < end; b++, x += QUANT_K)
            dequantize_q6_k(b, x);
        break;
    }
}
