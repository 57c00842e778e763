#ifndef MOED_KERNELS_CUDA_ATTENTION_ROPE_CUH
#define MOED_KERNELS_CUDA_ATTENTION_ROPE_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/rope.cuh"

/* What attention does in the place of cuda_rope, with its bits, where a tile is one row. */

/* The query heads of a KV head, at most 8; lane 8 t + i of norm_and_rotate is class i of lane 4 g + t here. */
template <int DIM>
static __device__ __forceinline__ void rotate_queries(const attention_parameters &p, uint32_t row, uint32_t kv_head,
                                                      uint32_t position, int lane, attention_rows<DIM> &rows) {
    constexpr int PARTS = DIM / 32;
    const int g = lane / 4, t = lane & 3;
    const bool there = g < (int)p.group;
    const uint32_t head = kv_head * p.group + (there ? g : 0);
    const float *in = p.rope.qkv + ((uint64_t)row * (p.heads + 2 * p.kv_heads) + head) * DIM + 8 * t;
    const float *turns = p.rope.cos_sin + (uint64_t)position * DIM + 16 * t, *norm = p.rope.q_norm + 8 * t;
    float x[PARTS][8], weight[PARTS][8], turn[PARTS / 2][16], sums[8] = {};
#pragma unroll
    for (int d = 0; d < PARTS; d++)
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            *(float4 *)(x[d] + i) = *(const float4 *)(in + 32 * d + i);
            *(float4 *)(weight[d] + i) = *(const float4 *)(norm + 32 * d + i);
            *(float4 *)(turn[d / 2] + 8 * (d % 2) + i) = *(const float4 *)(turns + 64 * (d / 2) + 8 * (d % 2) + i);
        }
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int d = 0; d < PARTS; d++)
            sums[i] = fmaf(x[d][i], x[d][i], sums[i]);
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
    }
#pragma unroll
    for (int half = 4; half; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++)
            sums[i] += sums[i + half];
    const float factor = 1.0f / sqrtf(sums[0] / (float)DIM + p.rope.epsilon);
#pragma unroll
    for (int d = 0; d < PARTS; d++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[d][i] = x[d][i] * factor * weight[d][i];
#pragma unroll
    for (int d = 0; d < PARTS / 2; d++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float a = x[d][i], b = x[d + PARTS / 2][i], cosine = turn[d][2 * i], sine = turn[d][2 * i + 1];
            x[d][i] = fmaf(a, cosine, -(b * sine));
            x[d + PARTS / 2][i] = fmaf(a, sine, b * cosine);
        }
#pragma unroll
    for (int d = 0; d < PARTS; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = pack_halves(x[d][2 * i] * p.q_scale, x[d][2 * i + 1] * p.q_scale);
            rows.q[d][2 * i] = there ? pair : 0;
            rows.q[d][2 * i + 1] = 0;
        }
    rows.limit[0] = there ? (int)position : -1;
    rows.limit[1] = -1;
    rows.last = (int)position;
}

/*
 * A row's own key and value, x in shared memory, into the position's block in a cache in Q8_0 and into a copy of that: bytes
 * too, or halves in f16's order. A lane has eight of them, four lanes a group; where there are fewer eights lanes do the
 * same.
 */
template <int DIM, class COPY>
static __device__ __forceinline__ void store_own_q8_0(const float *x, uint32_t at, uint8_t *cached, COPY *copy, int lane) {
    constexpr int GROUPS = DIM / 32;
    constexpr bool HALVES = sizeof(COPY) == sizeof(half);
    static_assert(DIM <= 128, "a lane has one eight");
    const int eight = lane % (2 * DIM / 8), group = eight / 4 % GROUPS;
    const bool is_key = eight < DIM / 8;
    float own[8];
    *(float4 *)own = ((const float4 *)x)[2 * eight];
    *(float4 *)(own + 4) = ((const float4 *)x)[2 * eight + 1];
    uint32_t greatest = 0, words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
        greatest = max(greatest, kv_greatness(own[i]));
    greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
    greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
    float factor;
    const half scale = kv_scale(greatest, factor);
#pragma unroll
    for (int i = 0; i < 8; i++)
        words[i / 4] |= (uint32_t)kv_quantize(own[i], factor) << (8 * (i % 4));
    const uint32_t twice = half2_bits(__half2half2(scale)), row = kv_key_row(at);
    const uint2 packed = make_uint2(words[0], words[1]);
    const uint4 read = kv_expand_eight(packed, make_uint4(twice, twice, twice, twice));
    if (is_key) {
        const uint32_t place = KV_TILE * group + 32 * row + 8 * (eight % 4);
        *(uint2 *)(cached + place) = packed;
        if constexpr (HALVES)
            *(uint4 *)(copy + at * DIM + 8 * eight) = read;
        else
            *(uint2 *)(copy + place) = packed;
    } else {
        const uint32_t pairs[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t place = (DIM + 8 * (eight - DIM / 8) + i) * CUDA_KV_BLOCK + at;
            cached[place] = (uint8_t)(words[i / 4] >> (8 * (i % 4)));
            if constexpr (HALVES)
                copy[place] = __ushort_as_half((unsigned short)(pairs[i / 2] >> (16 * (i % 2))));
            else
                copy[place] = (uint8_t)(words[i / 4] >> (8 * (i % 4)));
        }
    }
    if (eight % 4 == 0) {
        const uint32_t place = is_key ? row * GROUPS + group : DIM + CUDA_KV_BLOCK * group + at;
        ((half *)(cached + kv_scales_at(DIM)))[place] = scale;
        if constexpr (!HALVES)
            ((half *)(copy + kv_scales_at(DIM)))[place] = scale;
    }
}

/* A row's own key and value of a KV head: of dimension lane + 32 i. */
template <int DIM> struct attention_own {
    float key[DIM / 32], value[DIM / 32];

    __device__ __forceinline__ void load(const attention_parameters &p, uint32_t row, uint32_t kv_head, int lane) {
        const float *in =
            p.rope.qkv + ((uint64_t)row * (p.heads + 2 * p.kv_heads) + p.heads + kv_head) * DIM + lane;
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) {
            key[i] = in[32 * i];
            value[i] = in[p.kv_heads * DIM + 32 * i];
        }
    }
    /*
     * Into the position's block in the cache, and into the copy of it that was made before. `room`: shared memory of
     * 2 * DIM floats, with Q8_0.
     */
    template <class VALUE>
    __device__ __forceinline__ void store(const attention_parameters &p, uint32_t position, VALUE *cached, VALUE *copy,
                                          float *room, int lane) const {
        float rotated[DIM / 32];
#pragma unroll
        for (int i = 0; i < DIM / 32; i++)
            rotated[i] = key[i];
        norm_and_rotate<DIM>(rotated, p.rope.k_norm, p.rope.cos_sin + (uint64_t)position * DIM, p.rope.epsilon, lane);
        const uint32_t at = position % CUDA_KV_BLOCK;
        if constexpr (sizeof(VALUE) == 1) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < DIM / 32; i++) {
                room[lane + 32 * i] = rotated[i];
                room[DIM + lane + 32 * i] = value[i];
            }
            __syncwarp();
            store_own_q8_0<DIM>(room, at, cached, copy, lane);
        } else {
#pragma unroll
            for (int i = 0; i < DIM / 32; i++) {
                const uint32_t d = lane + 32 * i, key_at = at * DIM + d, value_at = (DIM + d) * CUDA_KV_BLOCK + at;
                cached[key_at] = copy[key_at] = __float2half_rn(rotated[i]);
                cached[value_at] = copy[value_at] = __float2half_rn(value[i]);
            }
        }
    }
};

#endif
