/*
 * Causal attention of many rows on Hopper, with the bits of attention.cu: see cuda_attention in cuda.h.
 *
 * A block takes eight tiles for one KV head, and of these one run of tiles of the same sequence after the other: a
 * warpgroup copies the pieces of the run's context to a ring of stages, and runs ahead over runs; two warpgroups of four
 * tiles each multiply by wgmma, which sums as mma.m16n8k16 does. Its sums lie in a lane's registers as those of mma do,
 * so all between the products is attention.cuh's. Blocks with the longest contexts come first.
 * Of a cache in Q8_0 the copy engine brings pieces as they are to a ring of their own, and the copying warpgroup makes
 * halves of them.
 */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace {

constexpr int CONSUMERS = 2, GROUP_THREADS = 128, THREADS = (CONSUMERS + 1) * GROUP_THREADS;
constexpr int GROUP_TILES = 4, UNIT_TILES = CONSUMERS * GROUP_TILES;
constexpr int STAGES = 4, PACKED_STAGES = 3;

/*
 * A piece as wgmma wants its right operands, rows of 64 halves swizzled (wgmma_offset). Of every 32 dimensions or
 * positions pair 4 t + n lies at 4 n + t, as left operands have them.
 */
template <int DIM> struct piece_stage {
    half keys[DIM / 64][CUDA_KV_PIECE][64]; /* row 32 b + 8 j + 2 t + e: position 32 b + 8 t + 2 j + e */
    half values[DIM][CUDA_KV_PIECE];
};

template <int DIM> struct shared_memory {
    piece_stage<DIM> stages[STAGES];
    uint64_t full[STAGES], empty[STAGES];
};

/* Behind it, pieces of a cache in Q8_0 as they lie there. */
template <int DIM> struct packed_memory {
    uint8_t blocks[PACKED_STAGES][ATTENTION_PIECE_BLOCKS][kv_head_values<uint8_t>(DIM)];
    uint64_t full[PACKED_STAGES];
};

template <class VALUE, int DIM> constexpr size_t shared_bytes() {
    return sizeof(shared_memory<DIM>) + (sizeof(VALUE) == 1 ? sizeof(packed_memory<DIM>) : 0);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* The block's tiles, tile i in lane i: its sequence's block table and its last position. */
struct unit_tiles {
    uint32_t table;
    int last, lane;
    bool there;

    __device__ __forceinline__ unit_tiles(const attention_parameters &p, uint32_t first_tile, int lane_)
        : table(0), last(-1), lane(lane_) {
        const uint32_t tile = first_tile + lane;
        const uint32_t rows = lane < UNIT_TILES && tile < p.tile_count ? p.tile_rows[tile] : 0;
        there = rows > 0;
        if (there) {
            table = p.table[p.tiles[tile]];
            last = (int)p.position[p.tiles[tile] + rows - 1];
        }
    }
    /* The first tile at or behind `tile` that is there, and the end of those of its sequence that follow it. */
    __device__ __forceinline__ uint32_t run_begin(uint32_t tile) const {
        const uint32_t left = __ballot_sync(0xffffffffu, there && lane >= (int)tile);
        return left ? __ffs(left) - 1 : UNIT_TILES;
    }
    __device__ __forceinline__ uint32_t run_end(uint32_t begin) const {
        const uint32_t of_run = __shfl_sync(0xffffffffu, table, begin);
        return begin + __ffs(~(__ballot_sync(0xffffffffu, there && table == of_run) >> begin)) - 1;
    }
    __device__ __forceinline__ int last_of(uint32_t begin, uint32_t end) const {
        return __reduce_max_sync(0xffffffffu, lane >= (int)begin && lane < (int)end ? last : -1);
    }
};

__device__ __forceinline__ uint32_t pieces_until(int last) {
    return (uint32_t)(last + CUDA_KV_PIECE) / CUDA_KV_PIECE;
}

/* Two halves, or as many of their `bytes` as are not to be zero. */
template <bool WHOLE> __device__ __forceinline__ void copy_pair(uint32_t to, const half *from, uint32_t bytes) {
    if (WHOLE)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* Block b of a piece; values from position `left` of the block on are zeros: what lies there may be anything. */
template <int DIM, bool WHOLE>
__device__ __forceinline__ void copy_block(const piece_stage<DIM> &stage, const half *block, int b, int left, int warp,
                                           int lane) {
    const int t = lane / 4 % 4, n = lane % 4, upper = lane / 16;
#pragma unroll
    for (int e = 0; e < 2; e++) { /* a warp has positions 8 warp to 8 warp + 7, a lane pair `lane` of 64 dimensions */
        const uint32_t to =
            shared_address(stage.keys) + b * 32 * 128 + wgmma_offset(2 * warp + e, 4 * upper + n) + 4 * t;
        const half *from = block + (8 * warp + e) * DIM + 2 * lane;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int d = 0; d < DIM / 64; d++)
                copy_pair<true>(to + j * 8 * 128 + d * (uint32_t)sizeof stage.keys[0], from + 2 * j * DIM + 64 * d, 4);
    }
    const int row = warp + 4 * upper; /* of every 8 dimensions; 4 apart, lanes meet all banks */
    const uint32_t to = shared_address(stage.values) + wgmma_offset(row, 4 * b + n) + 4 * t;
    const half *from = block + (DIM + row) * CUDA_KV_BLOCK + 2 * (lane % 16);
    const uint32_t bytes = 2 * max(min(left - 2 * (lane % 16), 2), 0);
#pragma unroll
    for (int m = 0; m < DIM / 8; m++)
        copy_pair<WHOLE>(to + m * 8 * 128, from + m * 8 * CUDA_KV_BLOCK, bytes);
}

/* The warpgroup that fills the ring from a cache of halves. */
template <int DIM>
__device__ void copy_pieces(const attention_parameters &p, shared_memory<DIM> &shared, const unit_tiles &tiles,
                            uint32_t kv_head, int warp, int lane) {
    ring_place<STAGES> place;
    for (uint32_t begin = tiles.run_begin(0); begin < UNIT_TILES;) {
        const uint32_t end = tiles.run_end(begin);
        const int last = tiles.last_of(begin, end);
        const uint32_t *table = p.tables + __shfl_sync(0xffffffffu, tiles.table, begin);
        for (uint32_t i = 0; i < pieces_until(last); i++, place.step()) {
            barrier_wait(&shared.empty[place.at], place.parity ^ 1);
#pragma unroll
            for (int b = 0; b < (int)ATTENTION_PIECE_BLOCKS; b++) {
                const int start = (int)(i * CUDA_KV_PIECE) + b * CUDA_KV_BLOCK, left = last + 1 - start;
                const half *from = block_head<half, DIM>(p, table[min(start, last) / CUDA_KV_BLOCK], kv_head);
                if (left >= CUDA_KV_BLOCK)
                    copy_block<DIM, true>(shared.stages[place.at], from, b, left, warp, lane);
                else
                    copy_block<DIM, false>(shared.stages[place.at], from, b, left, warp, lane);
            }
            barrier_arrive_copied(&shared.full[place.at]);
        }
        begin = tiles.run_begin(end);
    }
}

/*
 * Writes 32 bytes of a row of a stage, q + 128 each, as halves from `to` on; their pairs 4 t + n go to sixteen n. The pairs'
 * scales: words t of scales.
 */
__device__ __forceinline__ void expand_row(const uint8_t *bytes, const uint4 (&scales)[4], uint32_t row,
                                           uint32_t first_sixteen, uint32_t to) {
    uint4 eights[4];
#pragma unroll
    for (int t = 0; t < 4; t += 2) {
        const uint4 q = *(const uint4 *)(bytes + 8 * t);
        eights[t] = kv_expand_eight(make_uint2(q.x, q.y), scales[t]);
        eights[t + 1] = kv_expand_eight(make_uint2(q.z, q.w), scales[t + 1]);
    }
    const auto store = [&](int n, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + wgmma_offset(row, first_sixteen + n)), "r"(a),
                     "r"(b), "r"(c), "r"(d)
                     : "memory");
    };
    store(0, eights[0].x, eights[1].x, eights[2].x, eights[3].x);
    store(1, eights[0].y, eights[1].y, eights[2].y, eights[3].y);
    store(2, eights[0].z, eights[1].z, eights[2].z, eights[3].z);
    store(3, eights[0].w, eights[1].w, eights[2].w, eights[3].w);
}

/* A warp's share of a piece: a lane has a row of a tile of keys, and one of values. WHOLE and left: as for copy_block. */
template <int DIM, bool WHOLE>
__device__ __forceinline__ void expand_piece(const piece_stage<DIM> &stage, const uint8_t *blocks, int left, int warp,
                                             int lane) {
    constexpr int GROUPS = DIM / 32;
#pragma unroll 1
    for (int tile = warp; tile < (int)ATTENTION_PIECE_BLOCKS * GROUPS; tile += GROUP_THREADS / 32) {
        const int b = tile / GROUPS, d = tile % GROUPS;
        const uint8_t *block = blocks + b * kv_head_values<uint8_t>(DIM), *row = block + KV_TILE * d + 32 * lane;
        const half *of = (const half *)(block + kv_scales_at(DIM));
        const uint32_t of_key = half2_bits(__half2half2(of[lane * GROUPS + d]));
        uint4 scales[4];
#pragma unroll
        for (int t = 0; t < 4; t++)
            scales[t] = make_uint4(of_key, of_key, of_key, of_key);
        expand_row(row, scales, 32 * b + lane, 4 * (d % 2), shared_address(stage.keys[d / 2]));
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int at = 32 * b + 8 * t, last = left - 1;
            scales[t] = ((const uint4 *)(of + DIM + CUDA_KV_BLOCK * d))[t];
            if (!WHOLE)
                scales[t] = make_uint4(
                    scales[t].x & values_mask(at, last), scales[t].y & values_mask(at + 2, last),
                    scales[t].z & values_mask(at + 4, last), scales[t].w & values_mask(at + 6, last));
        }
        expand_row(row + CUDA_KV_BLOCK * DIM, scales, 32 * d + lane, 4 * b, shared_address(stage.values));
    }
}

/* The warpgroup that fills the ring from a cache in Q8_0. */
template <int DIM>
__device__ void expand_pieces(const attention_parameters &p, shared_memory<DIM> &shared, packed_memory<DIM> &packed,
                              const unit_tiles &tiles, uint32_t kv_head, int warp, int lane) {
    constexpr uint32_t BYTES = kv_head_values<uint8_t>(DIM);
    ring_place<STAGES> place;
    ring_place<PACKED_STAGES> from;
    for (uint32_t begin = tiles.run_begin(0); begin < UNIT_TILES;) {
        const uint32_t end = tiles.run_end(begin);
        const int last = tiles.last_of(begin, end);
        const uint32_t *table = p.tables + __shfl_sync(0xffffffffu, tiles.table, begin), pieces = pieces_until(last);
        const auto fetch = [&](uint32_t piece, uint32_t at) { /* one thread's */
            barrier_expect(&packed.full[at], ATTENTION_PIECE_BLOCKS * BYTES);
#pragma unroll
            for (int b = 0; b < (int)ATTENTION_PIECE_BLOCKS; b++) {
                const uint32_t block = min(piece * ATTENTION_PIECE_BLOCKS + b, (uint32_t)last / CUDA_KV_BLOCK);
                barrier_copy(packed.blocks[at][b], block_head<uint8_t, DIM>(p, table[block], kv_head), BYTES,
                             &packed.full[at]);
            }
        };
        if (warp == 0 && lane == 0)
            for (uint32_t i = 0; i < min(pieces, (uint32_t)PACKED_STAGES); i++)
                fetch(i, (from.at + i) % PACKED_STAGES);
        for (uint32_t i = 0; i < pieces; i++, place.step(), from.step()) {
            barrier_wait(&packed.full[from.at], from.parity);
            barrier_wait(&shared.empty[place.at], place.parity ^ 1);
            const int left = last + 1 - (int)(i * CUDA_KV_PIECE);
            if (left >= CUDA_KV_PIECE)
                expand_piece<DIM, true>(shared.stages[place.at], packed.blocks[from.at][0], left, warp, lane);
            else
                expand_piece<DIM, false>(shared.stages[place.at], packed.blocks[from.at][0], left, warp, lane);
            barrier_arrive(&shared.full[place.at]);
            asm volatile("bar.sync 1, %0;" ::"n"(GROUP_THREADS) : "memory"); /* all have read what goes now */
            if (warp == 0 && lane == 0 && i + PACKED_STAGES < pieces)
                fetch(i + PACKED_STAGES, from.at);
        }
        begin = tiles.run_begin(end);
    }
}

/* Begins the product of a warpgroup's rows with the keys of a stage. */
template <int DIM>
__device__ __forceinline__ void begin_scores(const attention_rows<DIM> &rows, const piece_stage<DIM> &stage,
                                             float (&scores)[32]) {
    const uint64_t keys = wgmma_descriptor(shared_address(stage.keys));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < DIM / 32; d++) {
        const uint64_t at = keys + d / 2 * (sizeof stage.keys[0] >> 4) + d % 2 * 4;
        if (d == 0)
            wgmma_multiply<false>(scores, rows.q[d], at);
        else
            wgmma_multiply<true>(scores, rows.q[d], at);
        wgmma_multiply<true>(scores, rows.q[d] + 4, at + 2);
    }
    wgmma_commit();
}

/* Begins the product of block b's weights with its values. */
template <int DIM, int b>
__device__ __forceinline__ void begin_values(const uint32_t weights[8], const piece_stage<DIM> &stage,
                                             float (&out)[DIM / 2]) {
    const uint64_t values = wgmma_descriptor(shared_address(stage.values)) + 4 * b;
    wgmma_fence();
    wgmma_multiply<(b > 0)>(out, weights, values);
    wgmma_multiply<true>(out, weights + 4, values + 2);
    wgmma_commit();
}

/* What a warpgroup has of its rows: `piece` of the present piece, `total` of those before it. Sums in wgmma's order. */
template <int DIM> struct many_state {
    float max[2], sum[2], total[DIM / 2];
    float piece_max[2], piece_sum[2], piece[DIM / 2];
    float scores[32];

    __device__ __forceinline__ void clear() {
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0;
#pragma unroll
        for (int n = 0; n < DIM / 2; n++)
            total[n] = 0;
    }
    /* From scores to sums, of which those of the last block are still being made. No row ends before `whole`. */
    __device__ __forceinline__ void weigh(const attention_rows<DIM> &rows, const piece_stage<DIM> &stage, int start,
                                          int whole, int lane) {
        const int second = start + CUDA_KV_BLOCK;
        float keep[2];
        uint32_t weights[ATTENTION_PIECE_BLOCKS][8];
        piece_max[0] = piece_max[1] = -INFINITY;
        piece_sum[0] = piece_sum[1] = 0;
        wgmma_wait<0>(scores);
        weigh_scores(scores, start, rows.limit, second - 1 > whole, lane, piece_max, piece_sum, keep, weights[0]);
        begin_values<DIM, 0>(weights[0], stage, piece);
        weigh_scores(scores + 16, second, rows.limit, second + CUDA_KV_BLOCK - 1 > whole, lane, piece_max, piece_sum,
                     keep, weights[1]);
        wgmma_wait<0>(piece);
#pragma unroll
        for (int n = 0; n < DIM / 2; n++)
            piece[n] *= keep[n / 2 % 2];
        begin_values<DIM, 1>(weights[1], stage, piece);
    }
    __device__ __forceinline__ void join() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float keep, add;
            join_factors(max[r], piece_max[r], keep, add);
            sum[r] = ::join(sum[r], keep, row_sum(piece_sum[r]), add);
#pragma unroll
            for (int n = 2 * r; n < DIM / 2; n += n % 2 ? 3 : 1)
                total[n] = ::join(total[n], keep, piece[n], add);
        }
    }
    __device__ __forceinline__ void store(const attention_parameters &p, const attention_rows<DIM> &rows, uint32_t tile,
                                          uint32_t kv_head, int lane) const {
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (rows.limit[r] >= 0) {
                float *y = p.y + (uint64_t)tile_row_head(p, p.tiles[tile], kv_head, lane / 4 + 8 * r) * DIM + 2 * (lane & 3);
#pragma unroll
                for (int n = 2 * r; n < DIM / 2; n += 4)
                    *(float2 *)(y + 2 * (n - 2 * r)) = make_float2(quotient(total[n], sum[r]),
                                                                   quotient(total[n + 1], sum[r]));
        }
    }
};

/* One run's pieces for a warpgroup whose rows end at `last`; all of the run's are waited for and released. */
template <int DIM>
__device__ __forceinline__ void attend_run(const attention_parameters &p, shared_memory<DIM> &shared,
                                           ring_place<STAGES> &place, uint32_t tile, bool there, uint32_t kv_head,
                                           int last, uint32_t run_pieces, int lane) {
    many_state<DIM> state;
    const uint32_t pieces = pieces_until(last);
    if (pieces > 0) {
        attention_rows<DIM> rows;
        load_rows(p, tile, there, kv_head, lane, rows);
        const int whole = __reduce_min_sync(0xffffffffu, min(rows.limit[0], rows.limit[1]));
        state.clear();
        const auto next_scores = [&] {
            barrier_wait(&shared.full[place.at], place.parity);
            shared_seen_async();
            begin_scores(rows, shared.stages[place.at], state.scores);
        };
        next_scores();
        for (uint32_t i = 0; i + 1 < pieces; i++) {
            const uint32_t stage = place.at;
            state.weigh(rows, shared.stages[stage], (int)(i * CUDA_KV_PIECE), whole, lane);
            place.step();
            next_scores(); /* while this piece is joined */
            wgmma_wait<1>(state.piece);
            if (lane == 0)
                barrier_arrive(&shared.empty[stage]);
            state.join();
        }
        state.weigh(rows, shared.stages[place.at], (int)((pieces - 1) * CUDA_KV_PIECE), whole, lane);
        wgmma_wait<0>(state.piece);
        if (lane == 0)
            barrier_arrive(&shared.empty[place.at]);
        place.step();
        state.join();
        state.store(p, rows, tile, kv_head, lane);
    }
    for (uint32_t i = pieces; i < run_pieces; i++, place.step()) {
        barrier_wait(&shared.full[place.at], place.parity);
        __syncwarp(); /* or a lane could fall two phases behind, which looks like none */
        if (lane == 0)
            barrier_arrive(&shared.empty[place.at]);
    }
}

#endif

template <class VALUE, int DIM>
__global__ void __launch_bounds__(THREADS, 1) many_kernel(const attention_parameters p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char memory[];
    shared_memory<DIM> &shared = *reinterpret_cast<shared_memory<DIM> *>(memory);
    const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const uint32_t kv_head = blockIdx.x % p.kv_heads,
                   first_tile = (gridDim.x - 1 - blockIdx.x) / p.kv_heads * UNIT_TILES;
    packed_memory<DIM> &packed = *reinterpret_cast<packed_memory<DIM> *>(memory + sizeof shared); /* with Q8_0 */
    if (threadIdx.x == 0) {
        for (int i = 0; i < PACKED_STAGES && sizeof(VALUE) == 1; i++)
            barrier_create(&packed.full[i], 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_create(&shared.full[i], GROUP_THREADS);
            barrier_create(&shared.empty[i], CONSUMERS * GROUP_THREADS / 32);
        }
        barriers_created();
    }
    __syncthreads();
    launch_dependents();
    const unit_tiles tiles(p, first_tile, lane);
    if (group == CONSUMERS) {
        /* Who expands wants more registers than who copies; in all there are 504. */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(sizeof(VALUE) == 1 ? 56 : 40));
        wait_for_predecessor();
        if constexpr (sizeof(VALUE) == 1)
            expand_pieces(p, shared, packed, tiles, kv_head, warp % GROUP_TILES, lane);
        else
            copy_pieces(p, shared, tiles, kv_head, warp % GROUP_TILES, lane);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(sizeof(VALUE) == 1 ? 224 : 232));
        wait_for_predecessor();
        ring_place<STAGES> place;
        for (uint32_t begin = tiles.run_begin(0); begin < UNIT_TILES;) {
            const uint32_t end = tiles.run_end(begin);
            const uint32_t group_begin = max(begin, (uint32_t)(group * GROUP_TILES)),
                           group_end = min(end, (uint32_t)((group + 1) * GROUP_TILES));
            attend_run(p, shared, place, first_tile + warp, (uint32_t)warp >= begin && (uint32_t)warp < end, kv_head,
                       tiles.last_of(group_begin, group_end), pieces_until(tiles.last_of(begin, end)), lane);
            begin = tiles.run_begin(end);
        }
    }
#endif
}

template <class VALUE, int DIM> cudaError_t launch_many(const attention_parameters &p, cudaStream_t stream) {
    constexpr size_t bytes = shared_bytes<VALUE, DIM>();
    const cudaError_t error =
        cudaFuncSetAttribute(many_kernel<VALUE, DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return error ? error
                 : launch(many_kernel<VALUE, DIM>, dim3((p.tile_count + UNIT_TILES - 1) / UNIT_TILES * p.kv_heads),
                          dim3(THREADS), bytes, stream, p);
}

template <class VALUE>
cudaError_t launch_value(const attention_parameters &p, uint32_t head_dim, cudaStream_t stream) {
    return head_dim == 64 ? launch_many<VALUE, 64>(p, stream) : launch_many<VALUE, 128>(p, stream);
}

} // namespace

bool attention_many_runs(uint32_t head_dim) {
    return (head_dim == 64 || head_dim == 128) && launch_is_hopper(many_kernel<half, 128>);
}

cudaError_t attention_many(const attention_parameters &p, const struct cuda_heads *heads, cudaStream_t stream) {
    return heads->cache == QUANT_Q8_0 ? launch_value<uint8_t>(p, heads->head_dim, stream)
                                      : launch_value<half>(p, heads->head_dim, stream);
}
