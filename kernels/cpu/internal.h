#ifndef MOED_KERNELS_CPU_INTERNAL_H
#define MOED_KERNELS_CPU_INTERNAL_H

#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu.h"

/* What each instruction set brings to the tables of struct cpu_kernels; see cpu.h for what the operations do. */

#if defined(__x86_64__)
#define CPU_X86 1
#else
#define CPU_X86 0
#endif

#define CPU_VECTOR_DECLARE(isa)                                                                                  \
    void cpu_rms_norm_##isa(const float *x, const float *weight, uint32_t n, float epsilon, float *y);           \
    void cpu_rope_##isa(float *x, uint32_t dim, const float *cos_sin);                                           \
    void cpu_swiglu_##isa(const float *gate, const float *up, uint32_t n, float *y);                             \
    void cpu_axpy_##isa(float scale, const float *x, uint32_t n, float *y);                                      \
    void cpu_f32_to_f16_##isa(const float *x, uint32_t n, uint16_t *y);                                          \
    void cpu_route_##isa(const float *logits, uint32_t experts, uint32_t used, uint32_t *chosen, float *weights); \
    extern const struct cpu_attention_kernels cpu_attention_##isa

#define CPU_QUANTIZE_DECLARE(isa) \
    void cpu_quantize_##isa(const float *x, uint32_t k, struct cpu_activation *activations)
#define CPU_PACK_DECLARE(isa)                                                                                     \
    void cpu_pack_##isa(enum quant_type type, uint32_t k, const void *rows_data, size_t row_bytes, uint32_t rows, \
                        void *tile)
#define CPU_MATMUL_DECLARE(isa)                                                                   \
    void cpu_matmul_tile_##isa(enum quant_type type, uint32_t k, const void *tile, uint32_t rows, \
                               const void *const *x, float *const *y, uint32_t n)

void cpu_dequantize(enum quant_type type, const void *row, uint32_t k, float *x);

CPU_QUANTIZE_DECLARE(c);
CPU_PACK_DECLARE(c);
CPU_MATMUL_DECLARE(c);
CPU_VECTOR_DECLARE(c);
#if CPU_X86 /* compiled for avx2, fma and f16c, or avx512f, bw, dq, vl and vnni besides */
CPU_QUANTIZE_DECLARE(avx2);
CPU_PACK_DECLARE(avx512);
CPU_MATMUL_DECLARE(avx2);
CPU_MATMUL_DECLARE(avx512);
CPU_VECTOR_DECLARE(avx2);
CPU_VECTOR_DECLARE(avx512);
#endif

#endif
