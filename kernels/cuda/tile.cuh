#ifndef MOED_KERNELS_CUDA_TILE_CUH
#define MOED_KERNELS_CUDA_TILE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

/*
 * Weights on the GPU: chunks of 16 rows by 256 columns, in the order in which a warp feeds them to mma.m16n8k16, with the
 * bytes of the format. Lane 4 g + t holds rows g and g + 8; of every group of 32 columns it holds columns 8 t to 8 t + 7,
 * as four pairs n = 0..3. Pairs 0 and 1 are the operands of the group's first mma, 2 and 3 of its second; which columns
 * meet in one mma does not matter as long as activations follow the same order, and so a lane reads its 8 activations
 * of a group with one 16-byte load.
 *
 * "Word" below is what one lane holds of one row and one group, pair n's two weights in its two 16-bit halves:
 *   Q4_K  [4][32 lanes] {g of group 2i, g + 8 of 2i, g of 2i + 1, g + 8 of 2i + 1}: word with pair n at bits 4 n, turned
 *         left by 2; [16 rows] {d, dmin, three words of scales s and minima m: byte t has s_t with the two high bits of m_t
 *         above it, the four low bits of m_t with those of m_(t + 4) above them, s_(t + 4) with the high bits of m_(t + 4)}
 *   Q5_K  as Q4_K, but words are not turned, then [32 lanes] four words of high bits, one for two groups: combination c of
 *         row and group (in the order above) and pair n at bit 4 c + n of each half; then the rows' scales as Q4_K
 *   Q6_K  [6][32 lanes] four words, three of them a group: row g's pairs 0 and 1 at bits 4 and 10 and the low four bits of
 *         its pair 2 at 0; so of g + 8; their pairs 3 at 4 and 10, and the high two bits of their pairs 2 at 0 and 2;
 *         [16 rows] 16 scales; [16 rows] d
 *   Q8_0  [8 groups][32 lanes] {8 of row g, 8 of row g + 8}; [16 rows] d of 8 groups
 *   F16, BF16  [8 groups][2: g, g + 8][32 lanes] 8 weights;  F32  [8 groups][2][2: first, second four][32 lanes] 4 weights
 *
 * A weight is used as the f16 nearest to it times the matrix's scale, a power of two: for Q4_K and Q5_K
 * fma(2^b + q, s, c) in f16 with s = f16(d scale6) and c = f16(-2^b s - dmin min6), b = 4 or 5; for the others one product.
 */

static __device__ __forceinline__ uint32_t tile_select(uint32_t bits, uint32_t mask, uint32_t base) {
    uint32_t out; /* bits & mask | base */
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(bits), "r"(mask), "r"(base));
    return out;
}

static __device__ __forceinline__ half2 tile_half2(uint32_t bits) {
    return *reinterpret_cast<half2 *>(&bits);
}

static __device__ __forceinline__ uint32_t tile_bits(half2 value) {
    return *reinterpret_cast<uint32_t *>(&value);
}

/* Left by a positive, right by a negative constant. */
template <int SHIFT> static __device__ __forceinline__ uint32_t tile_shift(uint32_t bits) {
    return SHIFT >= 0 ? bits << (SHIFT & 31) : bits >> (-SHIFT & 31);
}

/* Bytes i of two words, in the low bytes of the halves; in their high bytes is something else. */
static __device__ __forceinline__ uint32_t tile_bytes(uint32_t low, uint32_t high, int i) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(0x4400 + 0x1111 * i));
    return out;
}

/* 1024 + the value, 0 to 255, in each half, less so much: exact. */
static __device__ __forceinline__ half2 tile_integers(uint32_t bits, float less) {
    return __hsub2(tile_half2(bits), __float2half2_rn(less));
}

/* d times the matrix's scale, by two powers of two that are normal numbers in f16. */
static __device__ __forceinline__ half2 tile_scaled(half2 d, float matrix_scale) {
    const float first = fminf(fmaxf(matrix_scale, 0x1p-14f), 0x1p15f);
    const float inverse = __uint_as_float((254u << 23) - __float_as_uint(first));
    return __hmul2(__hmul2(d, __float2half2_rn(first)), __float2half2_rn(matrix_scale * inverse));
}

/* Where a chunk is loaded from: device memory, to be read once, or shared memory. */
struct tile_streamed {
    template <class T> static __device__ __forceinline__ T read(const T *from) {
        return __ldcs(from);
    }
};
struct tile_staged {
    template <class T> static __device__ __forceinline__ T read(const T *from) {
        return *from;
    }
};

/*
 * One chunk in a lane's registers: load() fetches it, factors() decodes its scales, and fragments() gives the eight
 * operands of one group: a[0..3] of its first mma (row g, g + 8 with pair 0; g, g + 8 with pair 1) and a[4..7] of its
 * second. A warp calls each as a whole.
 */
template <int TYPE> struct tile;

/* f16 factors {s, c} of groups t and t + 4 of a row, for the formats with minima. */
static __device__ __forceinline__ void tile_row_factors(uint4 row, float base, float matrix_scale, int t, half2 out[2]) {
    const uint32_t scales = tile_bytes(row.y, row.w, t), low = tile_bytes(row.z, row.z >> 4, t);
    const uint32_t minima = tile_select(low, 0x000f000fu, 0x64006400u) | (scales >> 2 & 0x00300030u);
    const half2 d = tile_scaled(tile_half2(row.x), matrix_scale);
    const half2 s = __hmul2(__low2half2(d), tile_integers(tile_select(scales, 0x003f003fu, 0x64006400u), 1024.0f));
    const half2 shift = __hmul2(s, __float2half2_rn(-base)); /* exact */
    const half2 c = __hfma2(__hneg2(__high2half2(d)), tile_integers(minima, 1024.0f), shift);
    out[0] = __lows2half2(s, c);
    out[1] = __highs2half2(s, c);
}

/*
 * The four lanes of a row need the factors of the same eight groups: lane t makes those of groups t and t + 4, and gets
 * the others from its neighbours, which all lanes of the warp have to ask for together.
 */
struct tile_factors {
    half2 row0[2], row8[2];

    __device__ __forceinline__ half2 of_row0(int group) const {
        return __shfl_sync(0xffffffffu, row0[group / 4], group & 3, 4);
    }
    __device__ __forceinline__ half2 of_row8(int group) const {
        return __shfl_sync(0xffffffffu, row8[group / 4], group & 3, 4);
    }
};

static __device__ __forceinline__ tile_factors tile_factors_of(uint4 row0, uint4 row8, float base, float matrix_scale,
                                                               int lane) {
    tile_factors f;
    tile_row_factors(row0, base, matrix_scale, lane & 3, f.row0);
    tile_row_factors(row8, base, matrix_scale, lane & 3, f.row8);
    return f;
}

/* Two pairs of a word turned so that they begin at bit 2. To shift the first would take longer than to subtract. */
static __device__ __forceinline__ void tile_weights4(uint32_t word, half2 factor, uint32_t &first, uint32_t &second) {
    const half2 q0 = __hsub2(tile_half2(tile_select(word, 0x003c003cu, 0x5c005c00u)), /* 256 + q */
                             __float2half2_rn(240.0f)),
                q1 = tile_half2(tile_select(word, 0x03c003c0u, 0x4c004c00u)); /* 16 + q */
    first = tile_bits(__hfma2(q0, __low2half2(factor), __high2half2(factor)));
    second = tile_bits(__hfma2(q1, __low2half2(factor), __high2half2(factor)));
}

/* Operands of a group from its words of rows g and g + 8. */
static __device__ __forceinline__ void tile_group4(uint32_t low, uint32_t high, half2 f0, half2 f8, uint32_t a[8]) {
    tile_weights4(low, f0, a[0], a[2]);
    tile_weights4(high, f8, a[1], a[3]);
    tile_weights4(__funnelshift_r(low, low, 8), f0, a[4], a[6]);
    tile_weights4(__funnelshift_r(high, high, 8), f8, a[5], a[7]);
}

template <> struct tile<QUANT_Q4_K> {
    uint4 q[4], row0, row8;

    template <class FROM = tile_streamed> __device__ __forceinline__ void load(const uint8_t *chunk, int lane) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            q[i] = FROM::read((const uint4 *)chunk + 32 * i + lane);
        row0 = FROM::read((const uint4 *)(chunk + 2048) + lane / 4);
        row8 = FROM::read((const uint4 *)(chunk + 2048) + lane / 4 + 8);
    }

    __device__ __forceinline__ tile_factors factors(float matrix_scale, int lane) const {
        return tile_factors_of(row0, row8, 16.0f, matrix_scale, lane);
    }

    __device__ __forceinline__ void fragments(int group, const tile_factors &factors, uint32_t a[8]) const {
        const uint4 v = q[group / 2];
        const uint32_t low = group & 1 ? v.z : v.x, high = group & 1 ? v.w : v.y;
        tile_group4(low, high, factors.of_row0(group), factors.of_row8(group), a);
    }
};

template <int N, int C>
static __device__ __forceinline__ uint32_t tile_weights5(uint32_t word, uint32_t bits, half2 factor) {
    uint32_t q = tile_select(tile_shift<5 - 4 * N>(word), 0x01e001e0u, 0x50005000u); /* 32 + low bits */
    q = tile_select(tile_shift<9 - (4 * C + N)>(bits), 0x02000200u, q);
    return tile_bits(__hfma2(tile_half2(q), __low2half2(factor), __high2half2(factor)));
}

template <int ODD>
static __device__ __forceinline__ void tile_group5(uint32_t low, uint32_t high, uint32_t bits, half2 f0, half2 f8,
                                                   uint32_t a[8]) {
    a[0] = tile_weights5<0, 2 * ODD>(low, bits, f0);
    a[1] = tile_weights5<0, 2 * ODD + 1>(high, bits, f8);
    a[2] = tile_weights5<1, 2 * ODD>(low, bits, f0);
    a[3] = tile_weights5<1, 2 * ODD + 1>(high, bits, f8);
    a[4] = tile_weights5<2, 2 * ODD>(low, bits, f0);
    a[5] = tile_weights5<2, 2 * ODD + 1>(high, bits, f8);
    a[6] = tile_weights5<3, 2 * ODD>(low, bits, f0);
    a[7] = tile_weights5<3, 2 * ODD + 1>(high, bits, f8);
}

template <> struct tile<QUANT_Q5_K> {
    uint4 q[4], bits, row0, row8;

    template <class FROM = tile_streamed> __device__ __forceinline__ void load(const uint8_t *chunk, int lane) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            q[i] = FROM::read((const uint4 *)chunk + 32 * i + lane);
        bits = FROM::read((const uint4 *)(chunk + 2048) + lane);
        row0 = FROM::read((const uint4 *)(chunk + 2560) + lane / 4);
        row8 = FROM::read((const uint4 *)(chunk + 2560) + lane / 4 + 8);
    }

    __device__ __forceinline__ tile_factors factors(float matrix_scale, int lane) const {
        return tile_factors_of(row0, row8, 32.0f, matrix_scale, lane);
    }

    __device__ __forceinline__ void fragments(int group, const tile_factors &factors, uint32_t a[8]) const {
        const uint4 v = q[group / 2];
        const uint32_t b = group / 2 == 0 ? bits.x : group / 2 == 1 ? bits.y : group / 2 == 2 ? bits.z : bits.w;
        const half2 f0 = factors.of_row0(group), f8 = factors.of_row8(group);
        if (group & 1)
            tile_group5<1>(v.z, v.w, b, f0, f8, a);
        else
            tile_group5<0>(v.x, v.y, b, f0, f8, a);
    }
};

/* A pair, once its bits 4 to 9 are at 64, times the scale: q is above 64, and 32 less is meant. */
static __device__ __forceinline__ uint32_t tile_weights6(uint32_t bits, half2 scale) {
    return tile_bits(__hmul2(__hsub2(tile_half2(bits), __float2half2_rn(96.0f)), scale)); /* the difference is exact */
}

/* The operands of a group from its three words; scales: rows g and g + 8. */
static __device__ __forceinline__ void tile_group6(uint32_t first, uint32_t second, uint32_t third, half2 scales,
                                                   uint32_t a[8]) {
    const half2 s0 = __low2half2(scales), s8 = __high2half2(scales);
    const auto pair = [](uint32_t bits) { return tile_select(bits, 0x03f003f0u, 0x54005400u); };
    const auto spread = [](uint32_t word, uint32_t high) { /* at 8 and 9 of `high` */
        return tile_select(high, 0x03000300u, tile_select(word << 4, 0x00f000f0u, 0x54005400u));
    };
    a[0] = tile_weights6(pair(first), s0);
    a[1] = tile_weights6(pair(second), s8);
    a[2] = tile_weights6(pair(first >> 6), s0);
    a[3] = tile_weights6(pair(second >> 6), s8);
    a[4] = tile_weights6(spread(first, third << 8), s0);
    a[5] = tile_weights6(spread(second, third << 6), s8);
    a[6] = tile_weights6(pair(third), s0);
    a[7] = tile_weights6(pair(third >> 6), s8);
}

/*
 * Columns 8 t to 8 t + 7 lie in one half of the group: those of lanes t = 0, 1 in its first sixteen, of 2, 3 in its
 * second. Of such a pair the even lane makes the scales {row g, row g + 8} of groups 0 to 3, the odd one of 4 to 7.
 */
struct tile_factors6 {
    half2 rows[4];
};

/* d: of both rows, times the matrix's scale. */
static __device__ __forceinline__ tile_factors6 tile_factors6_of(uint4 scales0, uint4 scales8, half2 d, int lane) {
    const uint32_t low0 = lane & 1 ? scales0.z : scales0.x, high0 = lane & 1 ? scales0.w : scales0.y;
    const uint32_t low8 = lane & 1 ? scales8.z : scales8.x, high8 = lane & 1 ? scales8.w : scales8.y;
    tile_factors6 f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t scales = tile_bytes(i < 2 ? low0 : high0, i < 2 ? low8 : high8, 2 * (i & 1) + (lane & 2) / 2);
        f.rows[i] = __hmul2(d, tile_integers((scales & 0x00ff00ffu) ^ 0x64806480u, 1152.0f));
    }
    return f;
}

template <> struct tile<QUANT_Q6_K> {
    uint4 q[6], scales0, scales8;
    half2 d; /* of both rows */

    template <class FROM = tile_streamed> __device__ __forceinline__ void load(const uint8_t *chunk, int lane) {
#pragma unroll
        for (int i = 0; i < 6; i++)
            q[i] = FROM::read((const uint4 *)chunk + 32 * i + lane);
        scales0 = FROM::read((const uint4 *)(chunk + 3072) + lane / 4);
        scales8 = FROM::read((const uint4 *)(chunk + 3072) + lane / 4 + 8);
        d = __halves2half2(FROM::read((const half *)(chunk + 3328) + lane / 4),
                           FROM::read((const half *)(chunk + 3328) + lane / 4 + 8));
    }

    __device__ __forceinline__ tile_factors6 factors(float matrix_scale, int lane) const {
        return tile_factors6_of(scales0, scales8, tile_scaled(d, matrix_scale), lane);
    }

    __device__ __forceinline__ void fragments(int group, const tile_factors6 &factors, uint32_t a[8]) const {
        const auto word = [&](int i) {
            const uint4 v = q[i / 4];
            return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
        };
        const half2 both = __shfl_sync(0xffffffffu, factors.rows[group & 3], group / 4, 2);
        tile_group6(word(3 * group), word(3 * group + 1), word(3 * group + 2), both, a);
    }
};

/* Two int8 of a word (bytes 2 HIGH, 2 HIGH + 1) times a scale. */
template <int HIGH> static __device__ __forceinline__ uint32_t tile_weights8(uint32_t word, half2 scale) {
    /* 0x6480 + (q + 128) - 1152 with q + 128 in the low byte: 1024 + (q + 128), exact in f16. */
    uint32_t biased = word ^ 0x80808080u, pair;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(biased), "r"(0x64646464u), "r"(HIGH ? 0x4342 : 0x4140));
    return tile_bits(__hmul2(__hsub2(tile_half2(pair), __float2half2_rn(1152.0f)), scale));
}

static __device__ __forceinline__ void tile_group8(uint4 v, half2 s0, half2 s8, uint32_t a[8]) {
    a[0] = tile_weights8<0>(v.x, s0);
    a[1] = tile_weights8<0>(v.z, s8);
    a[2] = tile_weights8<1>(v.x, s0);
    a[3] = tile_weights8<1>(v.z, s8);
    a[4] = tile_weights8<0>(v.y, s0);
    a[5] = tile_weights8<0>(v.w, s8);
    a[6] = tile_weights8<1>(v.y, s0);
    a[7] = tile_weights8<1>(v.w, s8);
}

template <> struct tile<QUANT_Q8_0> {
    uint4 q[8], d0, d8;

    template <class FROM = tile_streamed> __device__ __forceinline__ void load(const uint8_t *chunk, int lane) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            q[i] = FROM::read((const uint4 *)chunk + 32 * i + lane);
        d0 = FROM::read((const uint4 *)(chunk + 4096) + lane / 4);
        d8 = FROM::read((const uint4 *)(chunk + 4096) + lane / 4 + 8);
    }

    static __device__ __forceinline__ half2 scale(uint4 d, int group, float matrix_scale) {
        const uint32_t word = group / 2 == 0 ? d.x : group / 2 == 1 ? d.y : group / 2 == 2 ? d.z : d.w;
        const half2 both = tile_half2(word);
        return __float2half2_rn((group & 1 ? __high2float(both) : __low2float(both)) * matrix_scale);
    }

    __device__ __forceinline__ float factors(float matrix_scale, int) const {
        return matrix_scale;
    }

    __device__ __forceinline__ void fragments(int group, float matrix_scale, uint32_t a[8]) const {
        const half2 s0 = scale(d0, group, matrix_scale), s8 = scale(d8, group, matrix_scale);
        tile_group8(q[group], s0, s8, a);
    }
};

static __device__ __forceinline__ uint32_t tile_weights16(uint32_t word, float matrix_scale, bool bfloat) {
    float low, high;
    if (bfloat) {
        low = __uint_as_float(word << 16);
        high = __uint_as_float(word & 0xffff0000u);
    } else {
        low = __low2float(tile_half2(word));
        high = __high2float(tile_half2(word));
    }
    return tile_bits(__floats2half2_rn(low * matrix_scale, high * matrix_scale));
}

template <bool BFLOAT> struct tile16 {
    uint4 w[16];

    template <class FROM = tile_streamed> __device__ __forceinline__ void load(const uint8_t *chunk, int lane) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            w[i] = FROM::read((const uint4 *)chunk + 32 * i + lane);
    }

    __device__ __forceinline__ float factors(float matrix_scale, int) const {
        return matrix_scale;
    }

    __device__ __forceinline__ void fragments(int group, float matrix_scale, uint32_t a[8]) const {
        const uint4 g = w[2 * group], g8 = w[2 * group + 1];
        a[0] = tile_weights16(g.x, matrix_scale, BFLOAT);
        a[1] = tile_weights16(g8.x, matrix_scale, BFLOAT);
        a[2] = tile_weights16(g.y, matrix_scale, BFLOAT);
        a[3] = tile_weights16(g8.y, matrix_scale, BFLOAT);
        a[4] = tile_weights16(g.z, matrix_scale, BFLOAT);
        a[5] = tile_weights16(g8.z, matrix_scale, BFLOAT);
        a[6] = tile_weights16(g.w, matrix_scale, BFLOAT);
        a[7] = tile_weights16(g8.w, matrix_scale, BFLOAT);
    }
};

template <> struct tile<QUANT_F16> : tile16<false> {};
template <> struct tile<QUANT_BF16> : tile16<true> {};

/* Read from memory where it is used: a chunk in registers would fill them all. */
template <> struct tile<QUANT_F32> {
    const float4 *w;

    template <class FROM = tile_streamed> __device__ __forceinline__ void load(const uint8_t *chunk, int lane) {
        w = (const float4 *)chunk + lane;
    }

    __device__ __forceinline__ float factors(float matrix_scale, int) const {
        return matrix_scale;
    }

    __device__ __forceinline__ void fragments(int group, float s, uint32_t a[8]) const {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const float4 first = __ldcs(w + 32 * (4 * group + 2 * row)),
                         second = __ldcs(w + 32 * (4 * group + 2 * row + 1));
            a[row] = tile_bits(__floats2half2_rn(first.x * s, first.y * s));
            a[row + 2] = tile_bits(__floats2half2_rn(first.z * s, first.w * s));
            a[row + 4] = tile_bits(__floats2half2_rn(second.x * s, second.y * s));
            a[row + 6] = tile_bits(__floats2half2_rn(second.z * s, second.w * s));
        }
    }
};

/*
 * A chunk that is read where it lies in shared memory, two groups at a time: in a loop, it takes a fraction of the code
 * of tile<TYPE>. fragments() gives what those of groups 2 i and 2 i + 1 do there. A warp calls each as a whole.
 */
template <int TYPE> struct tile_in_place;

/* The factors of a row's groups 2 i and 2 i + 1, from the lanes that have made them (tile_factors). */
static __device__ __forceinline__ void tile_pair_factors(const half2 row[2], int i, half2 pair[2]) {
    const half2 own = i < 2 ? row[0] : row[1];
    pair[0] = __shfl_sync(0xffffffffu, own, 2 * i & 3, 4);
    pair[1] = __shfl_sync(0xffffffffu, own, 2 * i & 3 | 1, 4);
}

template <> struct tile_in_place<QUANT_Q4_K> {
    const uint4 *q;
    tile_factors factors;

    __device__ __forceinline__ tile_in_place(const uint8_t *chunk, float matrix_scale, int lane)
        : q((const uint4 *)chunk + lane) {
        const uint4 *rows = (const uint4 *)(chunk + 2048) + lane / 4;
        factors = tile_factors_of(rows[0], rows[8], 16.0f, matrix_scale, lane);
    }

    __device__ __forceinline__ void fragments(int i, uint32_t a[2][8]) const {
        const uint4 v = q[32 * i];
        half2 f0[2], f8[2];
        tile_pair_factors(factors.row0, i, f0);
        tile_pair_factors(factors.row8, i, f8);
        tile_group4(v.x, v.y, f0[0], f8[0], a[0]);
        tile_group4(v.z, v.w, f0[1], f8[1], a[1]);
    }
};

template <> struct tile_in_place<QUANT_Q5_K> {
    const uint4 *q;
    const uint32_t *bits;
    tile_factors factors;

    __device__ __forceinline__ tile_in_place(const uint8_t *chunk, float matrix_scale, int lane)
        : q((const uint4 *)chunk + lane), bits((const uint32_t *)(chunk + 2048) + 4 * lane) {
        const uint4 *rows = (const uint4 *)(chunk + 2560) + lane / 4;
        factors = tile_factors_of(rows[0], rows[8], 32.0f, matrix_scale, lane);
    }

    __device__ __forceinline__ void fragments(int i, uint32_t a[2][8]) const {
        const uint4 v = q[32 * i];
        half2 f0[2], f8[2];
        tile_pair_factors(factors.row0, i, f0);
        tile_pair_factors(factors.row8, i, f8);
        tile_group5<0>(v.x, v.y, bits[i], f0[0], f8[0], a[0]);
        tile_group5<1>(v.z, v.w, bits[i], f0[1], f8[1], a[1]);
    }
};

template <> struct tile_in_place<QUANT_Q6_K> {
    const uint2 *q;
    tile_factors6 factors;

    __device__ __forceinline__ tile_in_place(const uint8_t *chunk, float matrix_scale, int lane)
        : q((const uint2 *)chunk + 2 * lane) {
        const uint4 *scales = (const uint4 *)(chunk + 3072) + lane / 4;
        const half *d = (const half *)(chunk + 3328) + lane / 4;
        factors = tile_factors6_of(scales[0], scales[8], tile_scaled(__halves2half2(d[0], d[8]), matrix_scale), lane);
    }

    __device__ __forceinline__ void fragments(int i, uint32_t a[2][8]) const {
        const auto words = [&](int k) { return q[64 * (k / 2) + k % 2]; }; /* 2 k and 2 k + 1 of the lane's */
        const uint2 first = words(3 * i), second = words(3 * i + 1), third = words(3 * i + 2);
        const half2 even = i & 1 ? factors.rows[2] : factors.rows[0], odd = i & 1 ? factors.rows[3] : factors.rows[1];
        tile_group6(first.x, first.y, second.x, __shfl_sync(0xffffffffu, even, i / 2, 2), a[0]);
        tile_group6(second.y, third.x, third.y, __shfl_sync(0xffffffffu, odd, i / 2, 2), a[1]);
    }
};

template <> struct tile_in_place<QUANT_Q8_0> {
    const uint4 *q;
    const half *d; /* row g's */
    float matrix_scale;

    __device__ __forceinline__ tile_in_place(const uint8_t *chunk, float matrix_scale, int lane)
        : q((const uint4 *)chunk + lane), d((const half *)(chunk + 4096) + 8 * (lane / 4)), matrix_scale(matrix_scale) {
    }

    __device__ __forceinline__ void fragments(int i, uint32_t a[2][8]) const {
#pragma unroll
        for (int odd = 0; odd < 2; odd++)
            tile_group8(q[32 * (2 * i + odd)], __float2half2_rn(__half2float(d[2 * i + odd]) * matrix_scale),
                        __float2half2_rn(__half2float(d[64 + 2 * i + odd]) * matrix_scale), a[odd]);
    }
};

#endif
