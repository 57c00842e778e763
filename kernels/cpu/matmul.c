#include <math.h>

#include "kernels/cpu/f16.h"
#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

enum { TOKENS = 16 }; /* of one pass over the tile */

/* 32 weights of 16 rows, unpacked: w[j][r][i] is weight 4j + i of row r. */
struct group {
    int8_t w[8][CPU_TILE_ROWS][4];
    int32_t scale16[2][CPU_TILE_ROWS]; /* integer scales of both 16s: those of Q6_K, 1 elsewhere */
    float scale[CPU_TILE_ROWS], min[CPU_TILE_ROWS];
    bool has_min;
};

static void group_k(const uint8_t *block, bool fifth, uint32_t g, struct group *out) {
    const uint8_t *q = block + (fifth ? Q5_K_Q : Q4_K_Q) * TILE_WORD + g / 2 * 8 * TILE_WORD;
    const uint8_t *high = block + Q5_K_HIGH * TILE_WORD;
    uint8_t *w = (uint8_t *)out->w;
    for (uint32_t i = 0; i < sizeof out->w; i++) {
        w[i] = q[i] >> g % 2 * 4 & 15;
        if (fifth)
            w[i] |= (uint8_t)((high[i] >> g & 1) << 4);
    }
    for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
        uint32_t scale, min;
        k_scales_get(block + Q4_K_SCALES * TILE_WORD + 4 * r, TILE_WORD, g, &scale, &min);
        out->scale[r] = cpu_f16_to_f32(load_u16(block + 4 * r)) * (float)scale;
        out->min[r] = cpu_f16_to_f32(load_u16(block + 4 * r + 2)) * (float)min;
        out->scale16[0][r] = out->scale16[1][r] = 1;
    }
    out->has_min = true;
}

static void group_q6_k(const uint8_t *block, const uint8_t *d, uint32_t g, struct group *out) {
    const uint8_t *high = block + (Q6_K_HALF + g / 4 * Q6_K_HALF_WORDS) * TILE_WORD;
    const uint8_t *low = high + (Q6_K_LOW + g % 4 / 2 * 8) * TILE_WORD;
    int8_t *w = (int8_t *)out->w;
    for (uint32_t i = 0; i < sizeof out->w; i++)
        w[i] = (int8_t)(((low[i] >> g % 2 * 4 & 15) | (high[i] >> g % 4 * 2 & 3) << 4) - 32);
    for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
        const int8_t *scales = (const int8_t *)block + g / 2 * TILE_WORD + 4 * r + g % 2 * 2;
        out->scale16[0][r] = scales[0];
        out->scale16[1][r] = scales[1];
        out->scale[r] = cpu_f16_to_f32(load_u16(d + 2 * r));
    }
    out->has_min = false;
}

static void group_q8_0(const uint8_t *block, const uint8_t *d, struct group *out) {
    int8_t *w = (int8_t *)out->w;
    for (uint32_t i = 0; i < sizeof out->w; i++)
        w[i] = (int8_t)(block[i] ^ 0x80);
    for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
        out->scale16[0][r] = out->scale16[1][r] = 1;
        out->scale[r] = cpu_f16_to_f32(load_u16(d + 2 * r));
    }
    out->has_min = false;
}

static void group_get(enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t g, struct group *out) {
    uint32_t b = g / 8;
    switch (type) {
    case QUANT_Q4_K:
        group_k(tile + (size_t)b * Q4_K_WORDS * TILE_WORD, false, g % 8, out);
        break;
    case QUANT_Q5_K:
        group_k(tile + (size_t)b * Q5_K_WORDS * TILE_WORD, true, g % 8, out);
        break;
    case QUANT_Q6_K:
        group_q6_k(tile + q6_k_head_bytes(k / QUANT_K) + (size_t)b * Q6_K_WORDS * TILE_WORD, tile + b * TILE_D, g % 8, out);
        break;
    default: /* QUANT_Q8_0 */
        group_q8_0(tile + q8_0_q_offset(g), tile + q8_0_d_offset(g), out);
    }
}

static void group_dot(const struct group *group, const int8_t *q, int32_t *dot) {
    for (uint32_t r = 0; r < CPU_TILE_ROWS; r++)
        dot[r] = 0;
    for (uint32_t half = 0; half < 2; half++) {
        int32_t sum[CPU_TILE_ROWS] = {0};
        for (uint32_t j = 4 * half; j < 4 * half + 4; j++)
            for (uint32_t r = 0; r < CPU_TILE_ROWS; r++)
                for (uint32_t i = 0; i < 4; i++)
                    sum[r] += group->w[j][r][i] * q[4 * j + i];
        for (uint32_t r = 0; r < CPU_TILE_ROWS; r++)
            dot[r] += sum[r] * group->scale16[half][r];
    }
}

static void matmul_quantized(enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t rows, const void *const *x,
                             float *const *y, uint32_t n) {
    float sum[TOKENS][CPU_TILE_ROWS] = {{0}};
    for (uint32_t g = 0; g < k / 32; g++) {
        struct group group;
        group_get(type, k, tile, g, &group);
        for (uint32_t t = 0; t < n; t++) {
            const struct cpu_activation *a = (const struct cpu_activation *)x[t] + g;
            int32_t dot[CPU_TILE_ROWS];
            group_dot(&group, a->q, dot);
            for (uint32_t r = 0; r < rows; r++) {
                sum[t][r] = fmaf((float)dot[r] * group.scale[r], a->scale, sum[t][r]);
                if (group.has_min)
                    sum[t][r] = fmaf(-group.min[r], a->sum, sum[t][r]);
            }
        }
    }
    for (uint32_t t = 0; t < n; t++)
        memcpy(y[t], sum[t], rows * sizeof(float));
}

static float weight_f32(enum quant_type type, const uint8_t *tile, size_t i) {
    if (type == QUANT_F32)
        return f32_from_bits(load_u32(tile + 4 * i));
    uint16_t half = load_u16(tile + 2 * i);
    return type == QUANT_F16 ? cpu_f16_to_f32(half) : f32_from_bf16(half);
}

static void matmul_float(enum quant_type type, uint32_t k, const uint8_t *tile, uint32_t rows, const float *x, float *y) {
    float sum[4][CPU_TILE_ROWS] = {{0}};
    for (uint32_t i = 0; i < k; i++)
        for (uint32_t r = 0; r < rows; r++)
            sum[i % 4][r] = fmaf(weight_f32(type, tile, (size_t)i * CPU_TILE_ROWS + r), x[i], sum[i % 4][r]);
    for (uint32_t r = 0; r < rows; r++)
        y[r] = (sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]);
}

void cpu_matmul_tile_c(enum quant_type type, uint32_t k, const void *tile, uint32_t rows, const void *const *x,
                       float *const *y, uint32_t n) {
    if (!cpu_type_is_quantized(type)) {
        for (uint32_t t = 0; t < n; t++)
            matmul_float(type, k, tile, rows, x[t], y[t]);
        return;
    }
    for (uint32_t t = 0; t < n; t += TOKENS)
        matmul_quantized(type, k, tile, rows, x + t, y + t, n - t < TOKENS ? n - t : TOKENS);
}
