/*
 * RMS norm and NeoX rotation of the heads of q and k, and the way of k and v into the cache: see cuda_rope in cuda.h.
 * One warp a head, of one row or of MANY: with many rows what binds is how many loads are under way, and V, which lies
 * transposed, is then stored MANY positions at a time.
 */
#include <cuda_fp16.h>

#include "kernels/cuda/kv_cache.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rope.cuh"

namespace {

constexpr int WARPS = 4, MANY = 4;
constexpr uint32_t MANY_ROWS = 512; /* enough for all multiprocessors */

struct parameters {
    const float *qkv, *q_norm, *k_norm, *cos_sin;
    const uint32_t *position, *table, *tables;
    half *q;
    void *cache;
    uint32_t heads, kv_heads, rows;
    float epsilon, q_scale;
};

/* Whether the rows from `first` on are neighbouring positions of one block, from a multiple of their number on. */
template <int ROWS>
__device__ __forceinline__ bool neighbours(const parameters &p, uint32_t first, const uint32_t position[ROWS]) {
    bool all = first + ROWS <= p.rows && position[0] % ROWS == 0;
#pragma unroll
    for (int j = 1; j < ROWS; j++)
        all = all && position[j] == position[0] + j && p.table[first + j] == p.table[first];
    return all;
}

/* The way of keys or values of ROWS rows into a cache of Q8_0. `wide`: the rows are neighbours. */
template <int DIM, int ROWS>
__device__ __forceinline__ void store_q8_0(const parameters &p, const float (&x)[ROWS][DIM / 32],
                                           const uint32_t (&block)[ROWS], const uint32_t (&position)[ROWS],
                                           uint32_t kv_head, bool is_key, bool wide, int lane) {
    const auto head = [&](int j) {
        return (uint8_t *)p.cache + ((uint64_t)block[j] * p.kv_heads + kv_head) * kv_head_values<uint8_t>(DIM);
    };
    constexpr int GROUPS = DIM / 32;
    float all[ROWS * GROUPS];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            all[j * GROUPS + i] = x[j][i];
    /* Lane j GROUPS + i makes the scale of row j's group i: there is one division for all. */
    uint32_t greatest = 0;
#pragma unroll
    for (int i = 0; i < ROWS * GROUPS; i++) {
        const uint32_t of_group = __reduce_max_sync(0xffffffffu, kv_greatness(all[i]));
        greatest = lane == i ? of_group : greatest;
    }
    float factor;
    const half scale = kv_scale(greatest, factor);
    uint8_t q[ROWS * GROUPS];
#pragma unroll
    for (int i = 0; i < ROWS * GROUPS; i++)
        q[i] = kv_quantize(all[i], __shfl_sync(0xffffffffu, factor, i));
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const uint32_t at = position[j] % CUDA_KV_BLOCK, row = kv_key_row(at), i = lane - j * GROUPS;
        if (i < GROUPS)
            ((half *)(head(j) + kv_scales_at(DIM)))[is_key ? row * GROUPS + i : DIM + CUDA_KV_BLOCK * i + at] = scale;
        if (wide)
            continue;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            head(j)[is_key ? KV_TILE * g + 32 * row + lane : (DIM + lane + 32 * g) * CUDA_KV_BLOCK + at] =
                q[j * GROUPS + g];
    }
    if constexpr (ROWS == MANY)
        if (wide)
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                *(uchar4 *)(head(0) + (DIM + lane + 32 * i) * CUDA_KV_BLOCK + position[0] % CUDA_KV_BLOCK) =
                    make_uchar4(q[i], q[GROUPS + i], q[2 * GROUPS + i], q[3 * GROUPS + i]);
}

/* A warp takes a head of ROWS rows, of which those behind the last repeat it. */
template <class VALUE, int DIM, int ROWS>
__global__ void __launch_bounds__(WARPS * 32) rope_kernel(const parameters p) {
    const int lane = threadIdx.x & 31;
    const uint32_t first = blockIdx.x * ROWS, head = blockIdx.y * WARPS + threadIdx.x / 32;
    const uint32_t all = p.heads + 2 * p.kv_heads;
    launch_dependents();
    if (head >= all)
        return;
    const auto row = [&](int j) { return min(first + j, p.rows - 1); };
    uint32_t position[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        position[j] = p.position[row(j)];
    const float *cos_sin[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        cos_sin[j] = p.cos_sin + (uint64_t)position[j] * DIM;
        if (32 * lane < DIM)
            asm volatile("prefetch.global.L1 [%0];" ::"l"(cos_sin[j] + 32 * lane));
    }
    const bool is_query = head < p.heads, is_key = !is_query && head < p.heads + p.kv_heads;
    const uint32_t kv_head = head - p.heads - (is_key ? 0 : p.kv_heads);
    uint32_t block[ROWS] = {};
    if (!is_query)
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            block[j] = p.tables[p.table[row(j)] + position[j] / CUDA_KV_BLOCK];
    const bool wide = ROWS == MANY && !is_query && !is_key && neighbours<ROWS>(p, first, position);
    wait_for_predecessor();
    float x[ROWS][DIM / 32];
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int i = 0; i < DIM / 32; i++)
            x[j][i] = p.qkv[((uint64_t)row(j) * all + head) * DIM + lane + 32 * i];
    if (is_query || is_key)
        norm_and_rotate<DIM>(x, is_query ? p.q_norm : p.k_norm, cos_sin, p.epsilon, lane);
    if constexpr (sizeof(VALUE) == 1)
        if (!is_query) {
            store_q8_0<DIM>(p, x, block, position, kv_head, is_key, wide, lane);
            return;
        }
    const auto out = [&](int j) {
        if (is_query)
            return p.q + ((uint64_t)row(j) * p.heads + head) * DIM;
        const uint32_t at = position[j] % CUDA_KV_BLOCK;
        half *keys = (half *)p.cache + ((uint64_t)block[j] * p.kv_heads + kv_head) * 2 * DIM * CUDA_KV_BLOCK;
        return keys + (is_key ? at * DIM : DIM * CUDA_KV_BLOCK + at);
    };
    if constexpr (ROWS == MANY)
        if (wide) {
#pragma unroll
            for (int i = 0; i < DIM / 32; i++) {
                const half2 low = __floats2half2_rn(x[0][i], x[1][i]), high = __floats2half2_rn(x[2][i], x[3][i]);
                *(uint2 *)(out(0) + (lane + 32 * i) * CUDA_KV_BLOCK) = make_uint2(
                    *reinterpret_cast<const uint32_t *>(&low), *reinterpret_cast<const uint32_t *>(&high));
            }
            return;
        }
    const float scale = is_query ? p.q_scale : 1.0f;
    const uint32_t stride = is_query || is_key ? 1 : CUDA_KV_BLOCK;
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int i = 0; i < DIM / 32; i++)
            out(j)[(lane + 32 * i) * stride] = __float2half_rn(x[j][i] * scale);
}

template <class VALUE, int DIM> cudaError_t launch_rope(const parameters &p, cudaStream_t stream) {
    const uint32_t groups = (p.heads + 2 * p.kv_heads + WARPS - 1) / WARPS;
    const dim3 block(WARPS * 32);
    return p.rows >= MANY_ROWS
               ? launch(rope_kernel<VALUE, DIM, MANY>, dim3((p.rows + MANY - 1) / MANY, groups), block, 0, stream, p)
               : launch(rope_kernel<VALUE, DIM, 1>, dim3(p.rows, groups), block, 0, stream, p);
}

template <class VALUE> cudaError_t launch_value(const parameters &p, uint32_t head_dim, cudaStream_t stream) {
    switch (head_dim) {
    case 32: return launch_rope<VALUE, 32>(p, stream);
    case 64: return launch_rope<VALUE, 64>(p, stream);
    case 96: return launch_rope<VALUE, 96>(p, stream);
    case 128: return launch_rope<VALUE, 128>(p, stream);
    case 256: return launch_rope<VALUE, 256>(p, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace

cudaError_t cuda_rope(const struct cuda_heads *heads, const struct cuda_rows *rows, const struct cuda_rope *rope, void *q,
                      void *cache, cudaStream_t stream) {
    const parameters p = {rope->qkv,
                          rope->q_norm,
                          rope->k_norm,
                          rope->cos_sin,
                          rows->position,
                          rows->table,
                          rows->tables,
                          (half *)q,
                          cache,
                          heads->heads,
                          heads->kv_heads,
                          rows->rows,
                          rope->epsilon,
                          rope_query_scale(heads->head_dim)};
    switch (heads->cache) {
    case QUANT_F16: return launch_value<half>(p, heads->head_dim, stream);
    case QUANT_Q8_0: return launch_value<uint8_t>(p, heads->head_dim, stream);
    default: return cudaErrorInvalidValue;
    }
}
