/*
 * Attention of decode rows that does what cuda_rope does: the first half of cuda_attention, split, with rope. Its code is
 * small on purpose: at few rows kernels take the time in which their instructions come from L2.
 */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr int QUERY_WARPS = 8, DECODE_THREADS = 32 * (QUERY_WARPS + 1); /* one a query head, and one for the key */

template <int DIM> struct alignas(128) decode_memory {
    half blocks[ATTENTION_PIECE_BLOCKS][2 * DIM * CUDA_KV_BLOCK];
    half q[QUERY_WARPS][DIM + 32];               /* padded, as the scores are, so that rows lie in different banks */
    float scores[QUERY_WARPS][CUDA_KV_PIECE + 4];
    uint64_t barrier;
};

/*
 * A block is one piece of one row for one KV head. Its cache comes before the predecessor has ended; then each warp rotates
 * a vector, multiplies one of the eight products of keys of 8 positions, and, with the weights of all, an eighth of the
 * values' dimensions. Each sum is made as in attend_block.
 */
template <int DIM> __global__ void __launch_bounds__(DECODE_THREADS) decode_kernel(const attention_parameters p) {
#if __CUDA_ARCH__ >= 900
    constexpr int TILES = DIM / 8 / QUERY_WARPS; /* of 8 dimensions, a warp's */
    __shared__ decode_memory<DIM> shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane & 3;
    const uint32_t kv_head = blockIdx.x, row = blockIdx.y, piece = blockIdx.z;
    const int position = (int)p.position[row], first = (int)(piece * CUDA_KV_PIECE);
    const bool is_key = warp == QUERY_WARPS;
    launch_dependents();
    if (position < first)
        return;
    const int count = position < first + CUDA_KV_BLOCK ? 1 : 2;
    half *cached = NULL; /* the last block */
    if (is_key) {
        const uint32_t *table = p.tables + p.table[row] + piece * ATTENTION_PIECE_BLOCKS;
        if (lane == 0) {
            barrier_create(&shared.barrier, 1);
            barriers_created();
            barrier_expect(&shared.barrier, count * sizeof shared.blocks[0]);
        }
#pragma unroll 1
        for (int b = 0; b < count; b++) {
            cached = block_keys<DIM>(p, table[b], kv_head);
            if (lane == 0)
                barrier_copy(shared.blocks[b], cached, sizeof shared.blocks[b], &shared.barrier);
        }
        __syncwarp();
    }
    constexpr int OWN = DIM / 32, TURNS = OWN / 2; /* lane's: dimension lane + 32 i in [i], as in norm_and_rotate */
    const float *norm = is_key ? p.rope.k_norm : p.rope.q_norm;
    const float2 *turns = (const float2 *)p.rope.cos_sin + (uint32_t)position * (DIM / 2) + lane;
    float x[OWN], value[OWN], weight[OWN];
    float2 turn[TURNS];
#pragma unroll
    for (int i = 0; i < OWN; i++)
        weight[i] = norm[lane + 32 * i];
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        turn[i] = turns[32 * i];
    wait_for_predecessor();
    if (is_key ? position < first + CUDA_KV_PIECE : warp < (int)p.group) {
        const uint32_t head = is_key ? p.heads + kv_head : kv_head * p.group + warp;
        const float *in = p.rope.qkv + (uint64_t)(row * (p.heads + 2 * p.kv_heads) + head) * DIM + lane;
        float squares = 0;
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
            half *copy = shared.blocks[count - 1];
            const uint32_t at = (uint32_t)position % CUDA_KV_BLOCK;
            barrier_wait(&shared.barrier, 0);
#pragma unroll
            for (int i = 0; i < DIM / 32; i++) {
                const uint32_t d = lane + 32 * i, key_at = at * DIM + d, value_at = (DIM + d) * CUDA_KV_BLOCK + at;
                cached[key_at] = copy[key_at] = __float2half_rn(x[i]);
                cached[value_at] = copy[value_at] = __float2half_rn(value[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < DIM / 32; i++)
                shared.q[warp][lane + 32 * i] = __float2half_rn(x[i] * p.q_scale);
        }
    }
    __syncthreads();
    barrier_wait(&shared.barrier, 0);
    if (warp / 4 < count) { /* not the key's warp */
        const int block = warp / 4, j = warp % 4; /* column n of product j is position 8 (n / 2) + 2 j + n % 2 */
        const half *key = shared.blocks[block] + (8 * (g / 2) + g % 2 + 2 * j) * DIM + 8 * t;
        float score[4] = {};
#pragma unroll
        for (int d = 0; d < DIM; d += 32) {
            const uint4 q = *(const uint4 *)(shared.q[g] + 8 * t + d), k = *(const uint4 *)(key + d);
            const uint32_t low[4] = {q.x, 0, q.y, 0}, high[4] = {q.z, 0, q.w, 0};
            mma(score, low, k.x, k.y);
            mma(score, high, k.z, k.w);
        }
        *(float2 *)(shared.scores[g] + CUDA_KV_BLOCK * block + 8 * t + 2 * j) = make_float2(score[0], score[1]);
    }
    __syncthreads();
    if (is_key)
        return;
    attention_state<8 * TILES> s;
    s.clear();
#pragma unroll 1
    for (int b = 0; b < count; b++) {
        const int start = first + CUDA_KV_BLOCK * b;
        const float *from = shared.scores[g] + CUDA_KV_BLOCK * b + 8 * t;
        float scores[16], keep[2];
        uint32_t weights[8] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            scores[4 * j] = from[2 * j];
            scores[4 * j + 1] = from[2 * j + 1];
        }
        weigh_scores<1>(scores, start, &position, true, lane, s.max, s.sum, keep, weights);
        uint32_t masks[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            masks[i] = values_mask(start + 8 * t + 2 * i, position);
        const half *value = shared.blocks[b] + (DIM + 8 * TILES * warp + g) * CUDA_KV_BLOCK + 8 * t;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const uint4 v = *(const uint4 *)(value + 8 * n * CUDA_KV_BLOCK);
            s.out[n][0] *= keep[0];
            s.out[n][1] *= keep[0];
            mma(s.out[n], weights, v.x & masks[0], v.y & masks[1]);
            mma(s.out[n], weights + 4, v.z & masks[2], v.w & masks[3]);
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

} // namespace

cudaError_t attention_decode(const attention_parameters &p, uint32_t head_dim, cudaStream_t stream) {
    return launch(head_dim == 64 ? decode_kernel<64> : decode_kernel<128>, dim3(p.kv_heads, p.rows, p.pieces),
                  dim3(DECODE_THREADS), 0, stream, p);
}
