/*
 * Attention of decode rows that does what cuda_rope does: the first half of cuda_attention, split, with rope, where pieces
 * are not so many. Its code is small on purpose: at few rows kernels take the time in which their instructions come from L2.
 */
#include "kernels/cuda/attention_rope.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr int QUERY_WARPS = 8, DECODE_THREADS = 32 * (QUERY_WARPS + 1); /* one a query head, and one for the key */

/* Blocks a multiprocessor up to which four warps that share the values take less time than eight. */
constexpr uint32_t FEW_BLOCKS = 4;

/* Of a cache in Q8_0 a block, 68 * DIM bytes, comes to where its values will be, and is expanded in place. */
template <class VALUE, int DIM> struct alignas(128) decode_memory {
    half blocks[ATTENTION_PIECE_BLOCKS][(sizeof(VALUE) == 1 ? 66 : 64) * DIM];
    half q[QUERY_WARPS][DIM + 32]; /* padded, as the scores are, so that rows lie in different banks */
    float scores[QUERY_WARPS][CUDA_KV_PIECE + 4];
    uint64_t barrier;
};

/* The first `count` blocks of a piece in Q8_0 as halves, by all query warps: all is read before any is written. */
template <int DIM>
__device__ __forceinline__ void expand_blocks(decode_memory<uint8_t, DIM> &shared, int count) {
    constexpr int EIGHTS = 8 * DIM, OWN = EIGHTS / (32 * QUERY_WARPS), GROUPS = DIM / 32; /* of a block; a thread's */
    uint4 halves[ATTENTION_PIECE_BLOCKS][OWN];
    const bool takes_part = threadIdx.x < 32 * QUERY_WARPS;
#pragma unroll
    for (int b = 0; b < (int)ATTENTION_PIECE_BLOCKS; b++)
        if (takes_part && b < count)
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const uint8_t *block = (const uint8_t *)shared.blocks[b] + CUDA_KV_BLOCK * DIM * sizeof(half);
                const half *scales = (const half *)(block + kv_scales_at(DIM));
                const uint32_t eight = 32 * QUERY_WARPS * i + threadIdx.x, tile = eight / 128, row = eight / 4 % 32;
                uint4 of;
                if (i < OWN / 2) /* keys */
                    of.x = of.y = of.z = of.w = half2_bits(__half2half2(scales[row * GROUPS + tile]));
                else
                    of = *(const uint4 *)(scales + CUDA_KV_BLOCK * tile + 8 * (eight % 4));
                halves[b][i] = kv_expand_eight(((const uint2 *)block)[eight], of);
            }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < (int)ATTENTION_PIECE_BLOCKS; b++)
        if (takes_part && b < count)
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const uint32_t eight = 32 * QUERY_WARPS * i + threadIdx.x, tile = eight / 128, row = eight / 4 % 32;
                const uint32_t position = kv_key_row(row); /* it is its own inverse */
                *(uint4 *)(shared.blocks[b] +
                           (i < OWN / 2 ? position * DIM + 32 * tile + 8 * (eight % 4) : 8 * eight)) = halves[b][i];
            }
    __syncthreads();
}

/*
 * A block is one piece of one row for one KV head. Its cache comes before the predecessor has ended; then each warp rotates
 * a vector, multiplies one of the eight products of keys of 8 positions, and, where it is one of VALUE_WARPS, makes the
 * weights of all and multiplies with its share of the values' dimensions. Each sum is made as in attend_block.
 */
template <class VALUE, int DIM, int VALUE_WARPS>
__global__ void __launch_bounds__(DECODE_THREADS) decode_kernel(const attention_parameters p) {
#if __CUDA_ARCH__ >= 900
    constexpr int TILES = DIM / 8 / VALUE_WARPS; /* of 8 dimensions, a warp's */
    __shared__ decode_memory<VALUE, DIM> shared;
    constexpr uint32_t bytes = kv_head_values<VALUE>(DIM) * sizeof(VALUE);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane & 3;
    const uint32_t kv_head = blockIdx.x, row = blockIdx.y, piece = blockIdx.z;
    const int position = (int)p.position[row], first = (int)(piece * CUDA_KV_PIECE);
    const bool is_key = warp == QUERY_WARPS;
    launch_dependents();
    if (position < first)
        return;
    const int count = position < first + CUDA_KV_BLOCK ? 1 : 2;
    VALUE *cached = NULL; /* the last block */
    if (is_key) {
        const uint32_t *table = p.tables + p.table[row] + piece * ATTENTION_PIECE_BLOCKS;
        if (lane == 0) {
            barrier_create(&shared.barrier, 1);
            barriers_created();
            barrier_expect(&shared.barrier, count * bytes);
        }
#pragma unroll 1
        for (int b = 0; b < count; b++) {
            cached = block_head<VALUE, DIM>(p, table[b], kv_head);
            if (lane == 0)
                barrier_copy(shared.blocks[b] + (sizeof(VALUE) == 1 ? CUDA_KV_BLOCK * DIM : 0), cached, bytes,
                             &shared.barrier);
        }
        __syncwarp();
    }
    constexpr int OWN = DIM / 32, TURNS = OWN / 2; /* lane's: dimension lane + 32 i in [i], as in norm_and_rotate */
    const float *norm = is_key ? p.rope.k_norm : p.rope.q_norm;
    const float2 *turns = (const float2 *)p.rope.cos_sin + (uint32_t)position * (DIM / 2) + lane;
    float weight[OWN];
    float2 turn[TURNS];
#pragma unroll
    for (int i = 0; i < OWN; i++)
        weight[i] = norm[lane + 32 * i];
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        turn[i] = turns[32 * i];
    if constexpr (sizeof(VALUE) == 1) {
        __syncthreads(); /* the barrier is there */
        barrier_wait(&shared.barrier, 0);
        expand_blocks(shared, count);
    }
    wait_for_predecessor();
    if (is_key ? position < first + CUDA_KV_PIECE : warp < (int)p.group) {
        const uint32_t head = is_key ? p.heads + kv_head : kv_head * p.group + warp;
        const float *in = p.rope.qkv + (uint64_t)(row * (p.heads + 2 * p.kv_heads) + head) * DIM + lane;
        float x[OWN], value[OWN], squares = 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            x[i] = in[32 * i];
            value[i] = is_key ? in[p.kv_heads * DIM + 32 * i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < OWN; i++)
            squares = fmaf(x[i], x[i], squares);
        const float factor = norm_factor(warp_reduce(squares, plus), DIM, p.rope.epsilon);
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const float a = x[i] * factor * weight[i], b = x[i + TURNS] * factor * weight[i + TURNS];
            x[i] = fmaf(a, turn[i].x, -(b * turn[i].y));
            x[i + TURNS] = fmaf(a, turn[i].y, b * turn[i].x);
        }
        if (is_key) {
            const uint32_t at = (uint32_t)position % CUDA_KV_BLOCK, key_at = at * DIM + lane,
                           value_at = (DIM + lane) * CUDA_KV_BLOCK + at;
            if constexpr (sizeof(VALUE) == 1) {
                float *room = shared.scores[0]; /* which has not been used yet */
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    room[lane + 32 * i] = x[i];
                    room[DIM + lane + 32 * i] = value[i];
                }
                __syncwarp();
                store_own_q8_0<DIM>(room, at, cached, shared.blocks[count - 1], lane);
            } else {
                half *copy = shared.blocks[count - 1], *key = cached + key_at, *values = cached + value_at;
                half *key_copy = copy + key_at, *values_copy = copy + value_at;
                barrier_wait(&shared.barrier, 0);
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    key[32 * i] = key_copy[32 * i] = __float2half_rn(x[i]);
                    values[32 * CUDA_KV_BLOCK * i] = values_copy[32 * CUDA_KV_BLOCK * i] = __float2half_rn(value[i]);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < OWN; i++)
                shared.q[warp][lane + 32 * i] = __float2half_rn(x[i] * p.q_scale);
        }
    }
    __syncthreads();
    barrier_wait(&shared.barrier, 0);
    if (warp / 4 < count) { /* not the key's warp */
        const int block = warp / 4, j = warp % 4; /* column n of product j is position 8 (n / 2) + 2 j + n % 2 */
        const half *key = shared.blocks[block] + (8 * (g / 2) + g % 2 + 2 * j) * DIM + 8 * t;
        const int at = CUDA_KV_BLOCK * block + 8 * t + 2 * j;
        float score[4] = {};
#pragma unroll
        for (int d = 0; d < DIM; d += 32) {
            const uint4 q = *(const uint4 *)(shared.q[g] + 8 * t + d), k = *(const uint4 *)(key + d);
            const uint32_t low[4] = {q.x, 0, q.y, 0}, high[4] = {q.z, 0, q.w, 0};
            mma(score, low, k.x, k.y);
            mma(score, high, k.z, k.w);
        }
        *(float2 *)(shared.scores[g] + at) = make_float2(first + at > position ? -INFINITY : score[0],
                                                         first + at >= position ? -INFINITY : score[1]);
    }
    __syncthreads();
    if (warp >= VALUE_WARPS)
        return;
    attention_state<8 * TILES> s;
    s.clear();
#pragma unroll 1
    for (int b = 0; b < count; b++) {
        const float *from = shared.scores[g] + CUDA_KV_BLOCK * b + 8 * t;
        const float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
        float scores[16] = {low.x, low.y, 0, 0, low.z, low.w, 0, 0, high.x, high.y, 0, 0, high.z, high.w}, keep[2];
        uint32_t weights[8] = {}, behind[4];
        weigh_scores<1>(scores, 0, NULL, false, lane, s.max, s.sum, keep, weights);
        const int bits = 16 * (position + 1 - first - CUDA_KV_BLOCK * b - 8 * t); /* of the lane's values up to `position` */
#pragma unroll
        for (int i = 0; i < 4; i++)
            behind[i] = __funnelshift_lc(0, ~0u, max(bits - 32 * i, 0));
        const half *value = shared.blocks[b] + (DIM + 8 * TILES * warp + g) * CUDA_KV_BLOCK + 8 * t;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const uint4 v = *(const uint4 *)(value + 8 * n * CUDA_KV_BLOCK);
            s.out[n][0] *= keep[0];
            s.out[n][1] *= keep[0];
            mma(s.out[n], weights, v.x & ~behind[0], v.y & ~behind[1]);
            mma(s.out[n], weights + 4, v.z & ~behind[2], v.w & ~behind[3]);
        }
    }
    const float sum = row_sum(s.sum[0]);
    if (g >= (int)p.group)
        return;
    const uint32_t at = (row * p.heads + kv_head * p.group + g) * p.pieces + piece;
    float *partial = p.partial + (uint64_t)at * DIM + 8 * TILES * warp + 2 * t;
#pragma unroll
    for (int n = 0; n < TILES; n++)
        *(float2 *)(partial + 8 * n) = make_float2(s.out[n][0], s.out[n][1]);
    if (warp == 0 && t == 0)
        p.stats[at] = make_float2(s.max[0], sum);
#endif
}

template <class VALUE>
cudaError_t launch_value(const attention_parameters &p, uint32_t head_dim, cudaStream_t stream) {
    const bool few = p.rows * p.kv_heads * p.pieces <= FEW_BLOCKS * launch_processors();
    auto kernel = few ? decode_kernel<VALUE, 128, 4> : decode_kernel<VALUE, 128, 8>;
    if (head_dim == 64)
        kernel = few ? decode_kernel<VALUE, 64, 4> : decode_kernel<VALUE, 64, 8>;
    return launch(kernel, dim3(p.kv_heads, p.rows, p.pieces), dim3(DECODE_THREADS), 0, stream, p);
}

} // namespace

cudaError_t attention_decode(const attention_parameters &p, const struct cuda_heads *heads, cudaStream_t stream) {
    return heads->cache == QUANT_Q8_0 ? launch_value<uint8_t>(p, heads->head_dim, stream)
                                      : launch_value<half>(p, heads->head_dim, stream);
}
