#ifndef MOED_KERNELS_CUDA_MMA_CUH
#define MOED_KERNELS_CUDA_MMA_CUH

#include <stdint.h>

/*
 * c += a b of 16 x 16 and 16 x 8 f16, in f32. Lane 4 g + t holds of a rows g and g + 8 (a[0], a[2]; a[1], a[3]), of b
 * column g, of c rows g (c[0], c[1]) and g + 8 (c[2], c[3]) at columns 2 t and 2 t + 1.
 */
static __device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
