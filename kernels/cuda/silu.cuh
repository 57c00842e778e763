#ifndef MOED_KERNELS_CUDA_SILU_CUH
#define MOED_KERNELS_CUDA_SILU_CUH

static __device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

/*
 * silu of several at once. A division branches for operands near the ends of the range, which would let each wait for the
 * one before; for others these are its steps, and give the same bits.
 */
template <int COUNT> static __device__ __forceinline__ void silu_all(float (&x)[COUNT]) {
    float quotient[COUNT];
    bool plain = true;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float divisor = 1.0f + expf(-x[i]);
        float inverse;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
        inverse = fmaf(inverse, fmaf(-divisor, inverse, 1.0f), inverse);
        const float near = x[i] * inverse;
        quotient[i] = fmaf(inverse, fmaf(-divisor, near, x[i]), near);
        plain = plain && fabsf(x[i]) >= 0x1p-60f && fabsf(x[i]) <= 0x1p6f;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        x[i] = plain ? quotient[i] : silu(x[i]);
}

#endif
