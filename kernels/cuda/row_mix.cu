/*
 * down and the mixture of experts in a step of one row, with the choice of experts and the rounding of their hidden rows:
 * see cuda_row_mix in cuda.h, and row.cuh.
 */
#include <algorithm>

#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/row.cuh"

namespace {

constexpr uint32_t MIX_WARPS = 12; /* registers suffice for these beside a block of the product before */
static_assert(USED_MOST * CUDA_TILE_ROWS <= 32 * MIX_WARPS, "a thread for each sum of an expert");

struct mix_parameters {
    matmul_part w;
    uint32_t chunks, chains, columns, experts, used;
    const float *logits, *hidden;
    uint32_t *chosen;
    float *weights;
    uint32_t expert_bytes; /* in shared memory: weights, and behind them the hidden row */
};

/* Behind it lie the experts. */
struct alignas(128) mix_memory {
    float sums[USED_MOST][CUDA_CHAINS][CUDA_TILE_ROWS], factor[USED_MOST];
    uint32_t chosen[USED_MOST];
    float weight[32];
    uint64_t weights_full[USED_MOST];
};

/* A block is a tile of all experts: warp i prepares the expert of rank i, then all chains are dealt to all warps. */
template <int TYPE>
__global__ void __launch_bounds__(32 * MIX_WARPS) mix_kernel(const __grid_constant__ mix_parameters p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char memory[];
    mix_memory &shared = *reinterpret_cast<mix_memory *>(memory);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, fours = p.columns / 4;
    constexpr uint32_t chunk_bytes = (uint32_t)launch_chunk_bytes(TYPE);
    const uint32_t bytes = p.chunks * chunk_bytes;
    unsigned char *const experts = memory + sizeof shared, *const weights = experts + warp * p.expert_bytes;
    if (warp == 0) { /* the logits have been there since the predecessor let this begin */
        const route_choice choice = route_choose<EXPERTS_A_LANE>(p.logits, p.experts, p.used, lane, shared.chosen);
        const float weight = route_weight(choice, p.used, lane);
        shared.weight[lane] = weight;
        if (blockIdx.x == 0 && lane < p.used) {
            p.chosen[lane] = shared.chosen[lane];
            p.weights[lane] = weight;
        }
    }
    __syncthreads();
    if (lane == 0 && warp < p.used) {
        barrier_create(&shared.weights_full[warp], 1);
        barriers_created();
        fetch(weights, p.w.tiles + shared.chosen[warp] * p.w.expert_bytes + (uint64_t)blockIdx.x * bytes, bytes,
              &shared.weights_full[warp]);
    }
    wait_for_predecessor();
    launch_dependents(); /* blocks that begin while gate and up end put this moment off */
    const uint32_t row = blockIdx.x * CUDA_TILE_ROWS + threadIdx.x;
    const bool writes = threadIdx.x < CUDA_TILE_ROWS && row < p.w.rows;
    const float before = writes ? p.w.y[row] : 0.0f;
    if (warp < p.used) {
        float4 *hidden = (float4 *)(weights + bytes);
        constexpr uint32_t AT_ONCE = 6; /* fours of a lane */
        const float4 *from = (const float4 *)(p.hidden + warp * p.columns);
        float greatest = 0, shrink;
#pragma unroll 1
        for (uint32_t i = lane; i < fours; i += 32 * AT_ONCE) {
            float4 value[AT_ONCE];
#pragma unroll
            for (uint32_t k = 0; k < AT_ONCE; k++)
                value[k] = i + 32 * k < fours ? from[i + 32 * k] : make_float4(0, 0, 0, 0);
#pragma unroll
            for (uint32_t k = 0; k < AT_ONCE; k++) {
                greatest = greater(greatest, greatest_of(value[k]));
                if (i + 32 * k < fours)
                    hidden[i + 32 * k] = value[k];
            }
        }
        const float scale = rounding_scale(warp_greatest(greatest), shrink);
        /* In place: halves take the room of floats that have been read. */
#pragma unroll 1
        for (uint32_t i = lane; i < CUDA_CHUNK / 4 * p.chunks; i += 64) {
            const uint2 first = i < fours ? rounded(hidden[i], shrink) : make_uint2(0, 0);
            const uint2 second = i + 32 < fours ? rounded(hidden[i + 32], shrink) : make_uint2(0, 0);
            __syncwarp();
            ((uint2 *)hidden)[i] = first;
            ((uint2 *)hidden)[i + 32] = second;
        }
        if (lane == 0)
            shared.factor[warp] = scale * p.w.inverse_scale;
    }
    __syncthreads();
    uint32_t expert = 0, chain = warp;
#pragma unroll 1
    while (true) {
        for (; chain >= p.chains; chain -= p.chains)
            expert++;
        if (expert >= p.used)
            break;
        barrier_wait(&shared.weights_full[expert], 0);
        const unsigned char *of = experts + expert * p.expert_bytes;
        float sums[4] = {};
#pragma unroll 1
        for (uint32_t chunk = chain; chunk < p.chunks; chunk += CUDA_CHAINS)
            multiply_chunk<TYPE>(of + chunk * chunk_bytes, of + bytes + 2 * CUDA_CHUNK * chunk, p.w.scale, lane, sums);
        if (lane % 4 == 0) {
            float *out = shared.sums[expert][chain] + lane / 4;
            out[0] = sums[0];
            out[8] = sums[2];
        }
        chain += MIX_WARPS;
    }
    __syncthreads();
    if (threadIdx.x < p.used * CUDA_TILE_ROWS) {
        float(*own)[CUDA_TILE_ROWS] = shared.sums[threadIdx.x / CUDA_TILE_ROWS];
        const uint32_t r = threadIdx.x % CUDA_TILE_ROWS;
        own[0][r] = matmul_join(p.chains, [&](int chain) { return own[chain][r]; }) *
                    shared.factor[threadIdx.x / CUDA_TILE_ROWS];
    }
    __syncthreads();
    if (!writes)
        return;
    float mixture = 0;
#pragma unroll
    for (uint32_t rank = 0; rank < USED_MOST; rank++)
        if (rank < p.used)
            mixture = fmaf(shared.weight[rank], shared.sums[rank][0][threadIdx.x], mixture);
    p.w.y[row] = before + mixture;
#endif
}

uint32_t expert_bytes_of(const struct cuda_matrix *down) {
    return (chunks_of(down) * ((uint32_t)launch_chunk_bytes(down->type) + 4 * CUDA_CHUNK) + 127) / 128 * 128;
}

} // namespace

bool cuda_row_takes_mix(const struct cuda_matrix *down, uint32_t used) {
    return matmul_is_quantized(down->type) && down->experts <= 32 * EXPERTS_A_LANE && used <= USED_MOST &&
           sizeof(mix_memory) + used * expert_bytes_of(down) <= SHARED_MOST && launch_is_hopper(mix_kernel<QUANT_Q4_K>);
}

cudaError_t cuda_row_mix(const struct cuda_row_mix *m, cudaStream_t stream) {
    struct cuda_matmul product = {};
    product.w = m->w;
    product.y = m->x;
    mix_parameters p = {};
    p.w = matmul_part_of(&product);
    p.chunks = matmul_chunks(&product);
    p.chains = std::min(p.chunks, (uint32_t)CUDA_CHAINS);
    p.columns = m->w->columns;
    p.experts = m->route->experts;
    p.used = m->route->used;
    p.logits = m->route->logits;
    p.hidden = m->hidden;
    p.chosen = m->route->chosen;
    p.weights = m->route->weights;
    p.expert_bytes = expert_bytes_of(m->w);
    const uint32_t shared = sizeof(mix_memory) + p.used * p.expert_bytes;
    const auto go = [&](auto *kernel) {
        return launch_shared(kernel, dim3(p.w.row_tiles), 32 * MIX_WARPS, shared, stream, p);
    };
    switch (m->w->type) {
    case QUANT_Q4_K: return go(mix_kernel<QUANT_Q4_K>);
    case QUANT_Q5_K: return go(mix_kernel<QUANT_Q5_K>);
    case QUANT_Q6_K: return go(mix_kernel<QUANT_Q6_K>);
    case QUANT_Q8_0: return go(mix_kernel<QUANT_Q8_0>);
    default: return cudaErrorInvalidValue;
    }
}
