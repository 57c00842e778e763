#ifndef MOED_KERNELS_CUDA_KV_CACHE_CUH
#define MOED_KERNELS_CUDA_KV_CACHE_CUH

#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

/*
 * What of a KV head lies in a block of the cache, for who writes and who reads it: see CUDA_KV_BLOCK in cuda.h. VALUE is half
 * for QUANT_F16, uint8_t for QUANT_Q8_0. Distances are in VALUEs.
 */
template <class VALUE> static constexpr __host__ __device__ uint32_t kv_head_values(uint32_t head_dim) {
    return sizeof(VALUE) == 1 ? CUDA_KV_BLOCK * (2 * head_dim + head_dim / 8) : 2 * CUDA_KV_BLOCK * head_dim;
}

static constexpr int KV_TILE = CUDA_KV_BLOCK * 32; /* bytes of Q8_0: of each position's key, or value, one group */

/* Where Q8_0 has its scales, in bytes: of keys [row][head_dim / 32], and behind them of values [head_dim / 32][position]. */
static constexpr __host__ __device__ uint32_t kv_scales_at(uint32_t head_dim) {
    return 2 * CUDA_KV_BLOCK * head_dim;
}

/* Where a tile of keys in Q8_0 has a position: row 8 j + n is column n of mma j (attend_block). */
static __device__ __forceinline__ uint32_t kv_key_row(uint32_t position) {
    return position % 8 / 2 * 8 + position / 8 * 2 + position % 2;
}

static __device__ __forceinline__ uint32_t half2_bits(half2 pair) {
    return *reinterpret_cast<const uint32_t *>(&pair);
}

static __device__ __forceinline__ half2 bits_half2(uint32_t bits) {
    return *reinterpret_cast<const half2 *>(&bits);
}

/* Two bytes of a word (2 HIGH, 2 HIGH + 1), q + 128 each, as q times scale. */
template <int HIGH> static __device__ __forceinline__ uint32_t kv_expand(uint32_t word, half2 scale) {
    const uint32_t pair = __byte_perm(word, 0x64646464, HIGH ? 0x4342 : 0x4140); /* 1024 + 128 + q, exact in f16 */
    return half2_bits(__hmul2(__hsub2(bits_half2(pair), __float2half2_rn(1152.0f)), scale));
}

/* Eight values q + 128 times the scales of their pairs. */
static __device__ __forceinline__ uint4 kv_expand_eight(uint2 q, uint4 scales) {
    return make_uint4(kv_expand<0>(q.x, bits_half2(scales.x)), kv_expand<1>(q.x, bits_half2(scales.y)),
                      kv_expand<0>(q.y, bits_half2(scales.z)), kv_expand<1>(q.y, bits_half2(scales.w)));
}

/*
 * What lane 4 g + t of a warp reads for attention (attention.cuh): eights of dimensions from 32 d + 8 t on of the key in
 * column g of mma j, and eights of positions from 8 t on of dimension 8 n + g of the values.
 */
template <class VALUE, int DIM> struct kv_reader;

template <int DIM> struct kv_reader<half, DIM> {
    typedef uint4 eight;
    const half *head;
    int g, t;

    __device__ __forceinline__ kv_reader(const half *head, int lane) : head(head), g(lane / 4), t(lane & 3) {}
    __device__ __forceinline__ eight key_eight(int j, int d) const {
        const half *key = head + (8 * (g / 2) + g % 2) * DIM + 8 * t;
        return *(const uint4 *)(key + 2 * j * DIM + 32 * d);
    }
    __device__ __forceinline__ eight value_eight(int n) const {
        const half *value = head + (DIM + g) * CUDA_KV_BLOCK + 8 * t;
        return *(const uint4 *)(value + 8 * n * CUDA_KV_BLOCK);
    }
    __device__ __forceinline__ uint4 key_halves(eight k, int, int) const {
        return k;
    }
    /* `masks` of pairs of positions: without a bit, the value is 0. */
    __device__ __forceinline__ uint4 value_halves(eight v, int, const uint32_t masks[4]) {
        return make_uint4(v.x & masks[0], v.y & masks[1], v.z & masks[2], v.w & masks[3]);
    }
};

template <int DIM> struct kv_reader<uint8_t, DIM> {
    typedef uint2 eight;
    static constexpr int GROUPS = DIM / 32;
    struct alignas(GROUPS % 2 ? 2 : 2 * GROUPS) row_scales {
        half of[GROUPS];
    };
    const uint8_t *key, *value;
    const half *value_scale;
    row_scales key_scales[4];
    uint4 scales; /* of values, of eight positions and the group in hand */

    __device__ __forceinline__ kv_reader(const uint8_t *head, int lane)
        : key(head + 32 * (lane / 4) + 8 * (lane & 3)), value(key + CUDA_KV_BLOCK * DIM) {
        const half *of_keys = (const half *)(head + kv_scales_at(DIM));
        value_scale = of_keys + DIM + 8 * (lane & 3);
#pragma unroll
        for (int j = 0; j < 4; j++)
            key_scales[j] = ((const row_scales *)of_keys)[8 * j + lane / 4];
    }
    __device__ __forceinline__ eight key_eight(int j, int d) const {
        return *(const uint2 *)(key + KV_TILE * d + 32 * 8 * j);
    }
    __device__ __forceinline__ eight value_eight(int n) const {
        return *(const uint2 *)(value + 32 * 8 * n);
    }
    __device__ __forceinline__ uint4 key_halves(eight k, int j, int d) const {
        const uint32_t scale = half2_bits(__half2half2(key_scales[j].of[d]));
        return kv_expand_eight(k, make_uint4(scale, scale, scale, scale));
    }
    /* n rises from 0 in steps of 1. */
    __device__ __forceinline__ uint4 value_halves(eight v, int n, const uint32_t masks[4]) {
        if (n % 4 == 0) { /* four eights of rows are a group */
            scales = *(const uint4 *)(value_scale + CUDA_KV_BLOCK * (n / 4));
            scales = make_uint4(scales.x & masks[0], scales.y & masks[1], scales.z & masks[2], scales.w & masks[3]);
        }
        return kv_expand_eight(v, scales);
    }
};

/* By their bits absolute values are in order, NaN above all. */
static __device__ __forceinline__ uint32_t kv_greatness(float x) {
    return __float_as_uint(x) & 0x7fffffffu;
}

/* The scale of a group of Q8_0, and what its values are multiplied by, from the greatest of their kv_greatness. */
static __device__ __forceinline__ half kv_scale(uint32_t greatest, float &factor) {
    const float most = __uint_as_float(greatest);
    const half scale = __float2half_rn(most / 127.0f);
    const bool finite = __half2float(scale) < INFINITY;
    factor = finite && __half2float(scale) > 0 ? 127.0f / most : 0.0f;
    return finite ? scale : __float2half_rn(NAN);
}

/* q + 128; of a value that is not finite, with its factor 0, 128. */
static __device__ __forceinline__ uint8_t kv_quantize(float x, float factor) {
    return (uint8_t)(128 + __float2int_rn(x * factor));
}

#endif
