/*
 * Repacks rows of a GGUF tensor into the tiles of tile.cuh, and bounds their weights: cuda_pack and cuda_weight_bound of
 * cuda.h. A warp packs one chunk; lane 4 g + t gathers the columns 8 t to 8 t + 7 of every group, of rows g and g + 8.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

namespace {

struct source {
    const uint8_t *rows, *pairs;
    size_t row_bytes;
    uint32_t columns, count;

    /* The file's row behind row r of a tile; NULL behind the last. */
    __device__ const uint8_t *row(uint32_t tile, uint32_t r) const {
        const uint32_t half = CUDA_TILE_ROWS / 2;
        const uint32_t index = pairs ? tile * half + r % half : tile * CUDA_TILE_ROWS + r;
        if (index >= count)
            return NULL;
        return (pairs && r >= half ? pairs : rows) + index * row_bytes;
    }
};

__device__ uint32_t q4(const quant_q4_k *block, uint32_t k) {
    return block->q[k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
}

__device__ uint32_t q5_low(const quant_q5_k *block, uint32_t k) {
    return block->q[k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
}

__device__ uint32_t q5_high(const quant_q5_k *block, uint32_t k) {
    return block->high[k % 32] >> (k / 32) & 1;
}

__device__ uint32_t q6(const quant_q6_k *block, uint32_t k) {
    const uint32_t low = block->low[k / 128 * 64 + k % 64] >> (k % 128 / 64 * 4) & 15;
    return low | (block->high[k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3) << 4;
}

/* Words turned left by `turn`; combination c of a uint4: {row g, group 2 i}, {g + 8, 2 i}, {g, 2 i + 1}, {g + 8, 2 i + 1}. */
template <class BLOCK, class LOW>
__device__ void pack_low(const BLOCK *const block[2], LOW low, uint32_t turn, uint32_t lane, uint4 *out) {
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t words[4];
        for (uint32_t c = 0; c < 4; c++) {
            words[c] = 0;
            for (uint32_t slot = 0; slot < 8 && block[c % 2]; slot++) {
                const uint32_t k = 32 * (2 * i + c / 2) + 8 * (lane & 3) + slot;
                words[c] |= low(block[c % 2], k) << (16 * (slot & 1) + 4 * (slot / 2));
            }
            words[c] = __funnelshift_l(words[c], words[c], turn);
        }
        out[32 * i + lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

/* d, dmin and the twelve bytes of scales and minima of Q4_K and Q5_K: groups t and t + 4 in bytes t. */
template <class BLOCK> __device__ void pack_row_scales(const BLOCK *block, uint4 *out) {
    uint32_t words[4] = {};
    if (block)
        words[0] = block->d | (uint32_t)block->dmin << 16;
    for (uint32_t t = 0; t < 4 && block; t++) {
        const uint32_t y = block->scales[t], z = block->scales[4 + t], w = block->scales[8 + t];
        const uint32_t s0 = y & 63, m0 = z & 63, s4 = (w & 15) | (y >> 6) << 4, m4 = w >> 4 | (z >> 6) << 4;
        words[1] |= (s0 | (m0 >> 4) << 6) << (8 * t);
        words[2] |= ((m0 & 15) | (m4 & 15) << 4) << (8 * t);
        words[3] |= (s4 | (m4 >> 4) << 6) << (8 * t);
    }
    *out = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class BLOCK> __device__ const BLOCK *block_at(const uint8_t *row, uint32_t chunk) {
    return row ? (const BLOCK *)row + chunk : NULL;
}

__device__ void pack_q4_k(const source &s, uint32_t tile, uint32_t chunk, uint32_t lane, uint8_t *out) {
    const quant_q4_k *block[2] = {block_at<quant_q4_k>(s.row(tile, lane / 4), chunk),
                                  block_at<quant_q4_k>(s.row(tile, lane / 4 + 8), chunk)};
    pack_low(block, q4, 2, lane, (uint4 *)out);
    if (lane < CUDA_TILE_ROWS)
        pack_row_scales(block_at<quant_q4_k>(s.row(tile, lane), chunk), (uint4 *)(out + 2048) + lane);
}

__device__ void pack_q5_k(const source &s, uint32_t tile, uint32_t chunk, uint32_t lane, uint8_t *out) {
    const quant_q5_k *block[2] = {block_at<quant_q5_k>(s.row(tile, lane / 4), chunk),
                                  block_at<quant_q5_k>(s.row(tile, lane / 4 + 8), chunk)};
    pack_low(block, q5_low, 0, lane, (uint4 *)out);
    uint32_t words[4] = {};
    for (uint32_t group = 0; group < 8; group++)
        for (uint32_t r = 0; r < 2; r++)
            for (uint32_t slot = 0; slot < 8 && block[r]; slot++)
                words[group / 2] |= q5_high(block[r], 32 * group + 8 * (lane & 3) + slot)
                                    << (16 * (slot & 1) + 4 * (2 * (group & 1) + r) + slot / 2);
    ((uint4 *)(out + 2048))[lane] = make_uint4(words[0], words[1], words[2], words[3]);
    if (lane < CUDA_TILE_ROWS)
        pack_row_scales(block_at<quant_q5_k>(s.row(tile, lane), chunk), (uint4 *)(out + 2560) + lane);
}

__device__ void pack_q6_k(const source &s, uint32_t tile, uint32_t chunk, uint32_t lane, uint8_t *out) {
    const quant_q6_k *block[2] = {block_at<quant_q6_k>(s.row(tile, lane / 4), chunk),
                                  block_at<quant_q6_k>(s.row(tile, lane / 4 + 8), chunk)};
    for (uint32_t group = 0; group < 8; group++) {
        uint32_t words[3] = {};
        for (uint32_t r = 0; r < 2; r++)
            for (uint32_t slot = 0; slot < 8 && block[r]; slot++) {
                const uint32_t q = q6(block[r], 32 * group + 8 * (lane & 3) + slot), half = 16 * (slot & 1);
                switch (slot / 2) {
                case 0: words[r] |= q << (half + 4); break;
                case 1: words[r] |= q << (half + 10); break;
                case 2:
                    words[r] |= (q & 15) << half;
                    words[2] |= q >> 4 << (half + 2 * r);
                    break;
                case 3: words[2] |= q << (half + 4 + 6 * r); break;
                }
            }
        for (uint32_t i = 0; i < 3; i++) {
            const uint32_t word = 3 * group + i;
            ((uint32_t *)out)[4 * (32 * (word / 4) + lane) + word % 4] = words[i];
        }
    }
    if (lane < CUDA_TILE_ROWS) {
        const quant_q6_k *own = block_at<quant_q6_k>(s.row(tile, lane), chunk);
        for (uint32_t i = 0; i < 16; i++)
            ((int8_t *)out)[3072 + 16 * lane + i] = own ? own->scales[i] : 0;
        ((uint16_t *)(out + 3328))[lane] = own ? own->d : 0;
    }
}

__device__ void pack_q8_0(const source &s, uint32_t tile, uint32_t chunk, uint32_t lane, uint8_t *out) {
    for (uint32_t group = 0; group < 8; group++) {
        const bool inside = chunk * CUDA_CHUNK + 32 * group < s.columns;
        uint32_t words[4] = {};
        for (uint32_t r = 0; r < 2; r++) {
            const quant_q8_0 *block = block_at<quant_q8_0>(s.row(tile, lane / 4 + 8 * r), 8 * chunk + group);
            for (uint32_t slot = 0; slot < 8 && block && inside; slot++)
                words[2 * r + slot / 4] |= (uint32_t)(uint8_t)block->q[8 * (lane & 3) + slot] << (8 * (slot & 3));
        }
        ((uint4 *)out)[32 * group + lane] = make_uint4(words[0], words[1], words[2], words[3]);
        if (lane < CUDA_TILE_ROWS) {
            const quant_q8_0 *own = block_at<quant_q8_0>(s.row(tile, lane), 8 * chunk + group);
            ((uint16_t *)(out + 4096))[8 * lane + group] = own && inside ? own->d : 0;
        }
    }
}

template <class WEIGHT>
__device__ void pack_plain(const source &s, uint32_t tile, uint32_t chunk, uint32_t lane, uint8_t *out) {
    constexpr uint32_t in_lane = 16 / sizeof(WEIGHT),
                       parts = 8 / in_lane; /* 16 bytes a lane; 8 slots a group and row */
    for (uint32_t group = 0; group < 8; group++)
        for (uint32_t r = 0; r < 2; r++) {
            const WEIGHT *row = (const WEIGHT *)s.row(tile, lane / 4 + 8 * r);
            for (uint32_t slot = 0; slot < 8; slot++) {
                const uint32_t k = chunk * CUDA_CHUNK + 32 * group + 8 * (lane & 3) + slot;
                const uint32_t at = (((2 * group + r) * parts + slot / in_lane) * 32 + lane) * in_lane + slot % in_lane;
                ((WEIGHT *)out)[at] = row && k < s.columns ? row[k] : (WEIGHT)0;
            }
        }
}

__global__ void pack_kernel(int type, source s, uint8_t *tiles) {
    const uint32_t chunk = blockIdx.x, tile = blockIdx.y * blockDim.y + threadIdx.y, lane = threadIdx.x;
    const uint32_t rows = s.pairs ? 2 * s.count : s.count;
    if (tile * CUDA_TILE_ROWS >= rows)
        return;
    uint8_t *out = tiles + ((size_t)tile * gridDim.x + chunk) * launch_chunk_bytes(type);
    switch (type) {
    case QUANT_Q4_K: pack_q4_k(s, tile, chunk, lane, out); break;
    case QUANT_Q5_K: pack_q5_k(s, tile, chunk, lane, out); break;
    case QUANT_Q6_K: pack_q6_k(s, tile, chunk, lane, out); break;
    case QUANT_Q8_0: pack_q8_0(s, tile, chunk, lane, out); break;
    case QUANT_F16:
    case QUANT_BF16: pack_plain<uint16_t>(s, tile, chunk, lane, out); break;
    case QUANT_F32: pack_plain<uint32_t>(s, tile, chunk, lane, out); break;
    }
}

__device__ float f16_size(uint16_t bits) {
    return fabsf(__half2float(__ushort_as_half(bits)));
}

__device__ float block_bound(int type, const uint8_t *block) {
    switch (type) {
    case QUANT_Q4_K:
        return f16_size(((const quant_q4_k *)block)->d) * (63 * 15) + f16_size(((const quant_q4_k *)block)->dmin) * 63;
    case QUANT_Q5_K:
        return f16_size(((const quant_q5_k *)block)->d) * (63 * 31) + f16_size(((const quant_q5_k *)block)->dmin) * 63;
    case QUANT_Q6_K: return f16_size(((const quant_q6_k *)block)->d) * (128 * 32);
    case QUANT_Q8_0: return f16_size(((const quant_q8_0 *)block)->d) * 128;
    case QUANT_F16: return f16_size(*(const uint16_t *)block);
    case QUANT_BF16: return fabsf(__uint_as_float((uint32_t) * (const uint16_t *)block << 16));
    default: return fabsf(*(const float *)block);
    }
}

/* Floats that are not negative compare like their bits, so that the greatest does not depend on the order. */
__global__ void bound_kernel(int type, const uint8_t *data, size_t block_bytes, size_t blocks, uint32_t *bound) {
    float greatest = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < blocks; i += (size_t)gridDim.x * blockDim.x)
        greatest = fmaxf(greatest, block_bound(type, data + i * block_bytes));
    greatest = warp_reduce(greatest, [](float a, float b) { return fmaxf(a, b); });
    if (threadIdx.x % 32 == 0)
        atomicMax(bound, __float_as_uint(greatest));
}

} // namespace

size_t cuda_matrix_expert_bytes(enum quant_type type, uint32_t columns, uint32_t rows) {
    const size_t chunks = (columns + (size_t)CUDA_CHUNK - 1) / CUDA_CHUNK;
    const size_t tiles = (rows + (size_t)CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
    return tiles * chunks * launch_chunk_bytes(type);
}

cudaError_t cuda_pack(enum quant_type type, const void *rows_data, const void *pairs, size_t row_bytes,
                      uint32_t columns, uint32_t rows, void *tiles, cudaStream_t stream) {
    const source s = {(const uint8_t *)rows_data, (const uint8_t *)pairs, row_bytes, columns, rows};
    const uint32_t tile_count = ((pairs ? 2 * rows : rows) + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
    const dim3 block(32, 4), grid((columns + CUDA_CHUNK - 1) / CUDA_CHUNK, (tile_count + block.y - 1) / block.y);
    pack_kernel<<<grid, block, 0, stream>>>(type, s, (uint8_t *)tiles);
    return cudaGetLastError();
}

cudaError_t cuda_weight_bound(enum quant_type type, const void *rows_data, size_t blocks, uint32_t *bound,
                              cudaStream_t stream) {
    const uint32_t grid = blocks / 256 + 1 < 2048 ? (uint32_t)(blocks / 256 + 1) : 2048;
    bound_kernel<<<grid, 256, 0, stream>>>(type, (const uint8_t *)rows_data, quant_format(type)->block_bytes, blocks,
                                           bound);
    return cudaGetLastError();
}
