/*
 * RMS norm and NeoX rotation of the heads of q and k, and the way of k and v into the cache: see cuda_rope in cuda.h.
 * One warp a head.
 */
#include <cuda_fp16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rope.cuh"

namespace {

constexpr int WARPS = 4;

struct parameters {
    const float *qkv, *q_norm, *k_norm, *cos_sin;
    const uint32_t *position, *table, *tables;
    half *q, *cache;
    uint32_t heads, kv_heads;
    float epsilon, q_scale;
};

template <int DIM> __global__ void __launch_bounds__(WARPS * 32) rope_kernel(const parameters p) {
    const int lane = threadIdx.x & 31;
    const uint32_t row = blockIdx.x, head = blockIdx.y * WARPS + threadIdx.x / 32, all = p.heads + 2 * p.kv_heads;
    launch_dependents();
    if (head >= all)
        return;
    const uint32_t position = p.position[row];
    const uint32_t block = p.tables[p.table[row] + position / CUDA_KV_BLOCK];
    const float *cos_sin = p.cos_sin + (uint64_t)position * DIM;
    if (32 * lane < DIM)
        asm volatile("prefetch.global.L1 [%0];" ::"l"(cos_sin + 32 * lane));
    wait_for_predecessor();
    float x[DIM / 32];
    const float *in = p.qkv + ((uint64_t)row * all + head) * DIM;
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        x[i] = in[lane + 32 * i];
    if (head < p.heads) {
        norm_and_rotate<DIM>(x, p.q_norm, cos_sin, p.epsilon, lane);
        half *q = p.q + ((uint64_t)row * p.heads + head) * DIM;
#pragma unroll
        for (int i = 0; i < DIM / 32; i++)
            q[lane + 32 * i] = __float2half_rn(x[i] * p.q_scale);
        return;
    }
    const bool is_key = head < p.heads + p.kv_heads;
    const uint32_t kv_head = head - p.heads - (is_key ? 0 : p.kv_heads), at = position % CUDA_KV_BLOCK;
    half *keys = p.cache + ((uint64_t)block * p.kv_heads + kv_head) * 2 * DIM * CUDA_KV_BLOCK;
    half *values = keys + DIM * CUDA_KV_BLOCK;
    if (is_key)
        norm_and_rotate<DIM>(x, p.k_norm, cos_sin, p.epsilon, lane);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) {
        const uint32_t d = lane + 32 * i;
        (is_key ? keys[at * DIM + d] : values[d * CUDA_KV_BLOCK + at]) = __float2half_rn(x[i]);
    }
}

} // namespace

cudaError_t cuda_rope(const struct cuda_heads *heads, const struct cuda_rows *rows, const float *qkv,
                      const float *q_norm, const float *k_norm, float epsilon, const float *cos_sin, void *q,
                      void *cache, cudaStream_t stream) {
    const float log2_e = 1.44269504f;
    const parameters p = {qkv,
                          q_norm,
                          k_norm,
                          cos_sin,
                          rows->position,
                          rows->table,
                          rows->tables,
                          (half *)q,
                          (half *)cache,
                          heads->heads,
                          heads->kv_heads,
                          epsilon,
                          log2_e / sqrtf((float)heads->head_dim)};
    const uint32_t all = heads->heads + 2 * heads->kv_heads;
    const dim3 grid(rows->rows, (all + WARPS - 1) / WARPS), block(WARPS * 32);
    switch (heads->head_dim) {
    case 32: return launch(rope_kernel<32>, grid, block, 0, stream, p);
    case 64: return launch(rope_kernel<64>, grid, block, 0, stream, p);
    case 96: return launch(rope_kernel<96>, grid, block, 0, stream, p);
    case 128: return launch(rope_kernel<128>, grid, block, 0, stream, p);
    case 256: return launch(rope_kernel<256>, grid, block, 0, stream, p);
    default: return cudaErrorInvalidValue;
    }
}
