#ifndef MOED_KERNELS_CPU_CPU_H
#define MOED_KERNELS_CPU_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/quant.h"

/*
 * CPU kernels of the forward pass. Each operation exists in plain C and, where it pays, for AVX2 and AVX-512 (VNNI);
 * all give the same bits: integer sums are exact, and every chain of float operations has one order, written down at
 * the operation, in which a product feeding a sum is one fused multiply-add. Nothing here allocates or has state.
 */

enum cpu_isa { CPU_ISA_C, CPU_ISA_AVX2, CPU_ISA_AVX512 };

/*
 * Weights are computed with in tiles of 16 rows, lane = row, in the kernels' own order but with the bytes of the format.
 * A matrix whose rows are no multiple of 16 ends in a tile padded with zero rows.
 */
enum { CPU_TILE_ROWS = 16 };

/*
 * 32 activations of a token, for quantized weights: x[i] is about scale * q[i]. scale = max|x| / 127, 0 where the largest
 * is too small for a normal scale; q = x * (127 / max|x|), rounded to nearest even. A token of k activations is k / 32 of
 * these. The two negated sums are where the dot products with unsigned weights start.
 */
struct cpu_activation {
    int8_t q[32];
    float scale;
    float sum;          /* scale * sum of q */
    int32_t negated[2]; /* minus the sum of q[0-15] and of q[16-31] */
};

/* Bytes of the buffer behind one token's quantized activations, a multiple of 64. k is a multiple of 32. */
size_t cpu_activation_bytes(uint32_t k);

/* Bytes of one packed tile of 16 rows of k weights: 16 times the format's row, rounded up to 64. 0: a format moed does
 * not run, or a k that is no whole number of blocks. */
size_t cpu_tile_bytes(enum quant_type type, uint32_t k);
/* True where the format is multiplied with quantized activations, false where with float ones (F32, F16, BF16). */
bool cpu_type_is_quantized(enum quant_type type);

struct cpu_kernels {
    enum cpu_isa isa;
    const char *name; /* "c", "avx2", "avx512" */

    /* x[k], k a multiple of 32. A NaN or Inf in x makes the group's scale and sum NaN and its q zero, so that it shows. */
    void (*quantize)(const float *x, uint32_t k, struct cpu_activation *activations);

    /* 1 to 16 rows of the file's format, 2-byte aligned and row_bytes apart, into one tile, 64-byte aligned. The tile's
     * other rows are zero. */
    void (*pack)(enum quant_type type, uint32_t k, const void *rows_data, size_t row_bytes, uint32_t rows, void *tile);

    /*
     * y[t][0 .. rows) = W x[t] for one tile and n tokens. x[t] is struct cpu_activation [k / 32] for quantized formats and
     * float [k] for the others. rows <= 16 is how many of the tile's rows are stored. n is any number: each token's result
     * is the same whatever n is.
     * Order, quantized: acc = 0; for each group g of 32, rising: acc = fma((float)dot(g) * wscale(g), scale[g], acc), then,
     * where the format has minima, acc = fma(-wmin(g), sum[g], acc). dot(g) is exact; for Q6_K it is the exact
     * scale-weighted sum of both 16s and wscale is d; for Q4_K and Q5_K wscale = d * scale6, wmin = dmin * min6, both exact.
     * Order, float: four sums by k mod 4, each a chain of fma over rising k; ((s0 + s1) + (s2 + s3)).
     */
    void (*matmul_tile)(enum quant_type type, uint32_t k, const void *tile, uint32_t rows, const void *const *x,
                        float *const *y, uint32_t n);

    /* One row of the file's format, 2-byte aligned, to float; for embeddings. */
    void (*dequantize)(enum quant_type type, const void *row, uint32_t k, float *x);

    /* y[i] = x[i] * (1 / sqrt(mean(x^2) + epsilon)) * weight[i]. Sum: 16 lanes of fma by i mod 16, then halved 8, 4, 2, 1. */
    void (*rms_norm)(const float *x, const float *weight, uint32_t n, float epsilon, float *y);

    /* NeoX rotation in place of one head: (x[i], x[i + dim / 2]) by table[i] = {cos, sin} of its position. */
    void (*rope)(float *x, uint32_t dim, const float *cos_sin);

    /* y[i] = silu(gate[i]) * up[i], silu(x) = x / (1 + exp(-x)), exp by cpu_exp's polynomial. */
    void (*swiglu)(const float *gate, const float *up, uint32_t n, float *y);

    /* y[i] = fma(scale, x[i], y[i]) */
    void (*axpy)(float scale, const float *x, uint32_t n, float *y);

    void (*f32_to_f16)(const float *x, uint32_t n, uint16_t *y);

    /*
     * Softmax over all experts, the k likeliest (ties: the lower id), weights renormalized to sum 1. A NaN logit makes
     * all weights NaN but never repeats an expert.
     */
    void (*route)(const float *logits, uint32_t experts, uint32_t used, uint32_t *chosen, float *weights);

    /*
     * Attention of one KV head over one run of positions, for all query rows that share it: see attention.h for the
     * shapes and the order of its sums.
     */
    const struct cpu_attention_kernels *attention;
};

/* The best kernels this processor can run, at most `most`. Never NULL: plain C always runs. */
const struct cpu_kernels *cpu_kernels_select(enum cpu_isa most);
/* "c", "avx2", "avx512" or "auto" to cpu_isa; false for another name. */
bool cpu_isa_parse(const char *name, enum cpu_isa *isa);

/* exp(x) for x in [-87, 88], 0 below and Inf above; NaN stays NaN; a degree-6 polynomial in fma, within 1 ulp; the same bits everywhere. */
float cpu_exp(float x);

#endif
