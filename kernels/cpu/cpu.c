#include "kernels/cpu/cpu.h"

#include <string.h>

#include "kernels/cpu/internal.h"

#define KERNELS(id, isa_, quantize_isa, pack_isa, matmul_isa)                                                        \
    {                                                                                                                \
        .isa = id, .name = #isa_, .quantize = cpu_quantize_##quantize_isa, .pack = cpu_pack_##pack_isa,              \
        .matmul_tile = cpu_matmul_tile_##matmul_isa, .dequantize = cpu_dequantize, .rms_norm = cpu_rms_norm_##isa_,  \
        .rope = cpu_rope_##isa_, .swiglu = cpu_swiglu_##isa_, .axpy = cpu_axpy_##isa_,                               \
        .f32_to_f16 = cpu_f32_to_f16_##isa_, .route = cpu_route_##isa_, .attention = &cpu_attention_##isa_,          \
    }

static const struct cpu_kernels kernels_c = KERNELS(CPU_ISA_C, c, c, c, c);
#if CPU_X86
static const struct cpu_kernels kernels_avx2 = KERNELS(CPU_ISA_AVX2, avx2, avx2, c, avx2);
static const struct cpu_kernels kernels_avx512 = KERNELS(CPU_ISA_AVX512, avx512, avx2, avx512, avx512);

/* Every processor with AVX2 and FMA has F16C. */
static bool have_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool have_avx512(void) {
    return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

const struct cpu_kernels *cpu_kernels_select(enum cpu_isa most) {
#if CPU_X86
    if (most >= CPU_ISA_AVX512 && have_avx512())
        return &kernels_avx512;
    if (most >= CPU_ISA_AVX2 && have_avx2())
        return &kernels_avx2;
#endif
    return &kernels_c;
}

bool cpu_isa_parse(const char *name, enum cpu_isa *isa) {
    static const struct {
        const char *name;
        enum cpu_isa isa;
    } names[] = {{"auto", CPU_ISA_AVX512}, {"c", CPU_ISA_C}, {"avx2", CPU_ISA_AVX2}, {"avx512", CPU_ISA_AVX512}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i].name) == 0) {
            *isa = names[i].isa;
            return true;
        }
    return false;
}

static size_t round_to_line(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

size_t cpu_activation_bytes(uint32_t k) {
    return round_to_line(k / 32 * sizeof(struct cpu_activation));
}

size_t cpu_tile_bytes(enum quant_type type, uint32_t k) {
    const struct quant_format *format = quant_format(type);
    if (format == NULL || k % format->block_weights != 0)
        return 0;
    return round_to_line((size_t)k / format->block_weights * format->block_bytes * CPU_TILE_ROWS);
}

bool cpu_type_is_quantized(enum quant_type type) {
    return type != QUANT_F32 && type != QUANT_F16 && type != QUANT_BF16;
}
