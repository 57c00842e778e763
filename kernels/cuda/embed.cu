/* Rows of the embedding, in the file's format, to f32: see cuda_embed in cuda.h. One block a row, a thread a weight. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/launch.cuh"

namespace {

__device__ float f16(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

/* Scale and minimum of group g: kernels/quant.h. */
__device__ void scale6(const uint8_t *s, uint32_t g, float &scale, float &minimum) {
    scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
    minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
}

__device__ float weight(int type, const uint8_t *row, uint32_t i) {
    const uint32_t j = i % QUANT_K, group = j / 32;
    float scale, minimum;
    switch (type) {
    case QUANT_F32: return ((const float *)row)[i];
    case QUANT_F16: return f16(((const uint16_t *)row)[i]);
    case QUANT_BF16: return __uint_as_float((uint32_t)((const uint16_t *)row)[i] << 16);
    case QUANT_Q8_0: {
        const quant_q8_0 *b = (const quant_q8_0 *)row + i / 32;
        return f16(b->d) * b->q[i % 32];
    }
    case QUANT_Q4_K: {
        const quant_q4_k *b = (const quant_q4_k *)row + i / QUANT_K;
        scale6(b->scales, group, scale, minimum);
        const float q = b->q[j / 64 * 32 + j % 32] >> (group % 2 * 4) & 15;
        return f16(b->d) * scale * q - f16(b->dmin) * minimum;
    }
    case QUANT_Q5_K: {
        const quant_q5_k *b = (const quant_q5_k *)row + i / QUANT_K;
        scale6(b->scales, group, scale, minimum);
        const float q = (b->q[j / 64 * 32 + j % 32] >> (group % 2 * 4) & 15) | (b->high[j % 32] >> group & 1) << 4;
        return f16(b->d) * scale * q - f16(b->dmin) * minimum;
    }
    case QUANT_Q6_K: {
        const quant_q6_k *b = (const quant_q6_k *)row + i / QUANT_K;
        const int q = (b->low[j / 128 * 64 + j % 64] >> (j % 128 / 64 * 4) & 15) |
                      (b->high[j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3) << 4;
        return f16(b->d) * (float)b->scales[j / 16] * (float)(q - 32);
    }
    }
    return 0;
}

__global__ void embed_kernel(int type, const uint8_t *table, size_t row_bytes, uint32_t columns, const uint32_t *tokens,
                             float *x) {
    launch_dependents();
    wait_for_predecessor();
    const uint8_t *row = table + tokens[blockIdx.x] * row_bytes;
    for (uint32_t i = threadIdx.x; i < columns; i += blockDim.x)
        x[(uint64_t)blockIdx.x * columns + i] = weight(type, row, i);
}

} // namespace

cudaError_t cuda_embed(enum quant_type type, const void *table, size_t row_bytes, uint32_t columns,
                       const uint32_t *tokens, uint32_t rows, float *x, cudaStream_t stream) {
    return launch(embed_kernel, dim3(rows), dim3(256), 0, stream, (int)type, (const uint8_t *)table, row_bytes, columns,
                  tokens, x);
}
