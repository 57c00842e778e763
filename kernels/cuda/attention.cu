/* Causal attention over the paged cache: see cuda_attention in cuda.h for shapes, attention.cuh for a warp's work. */
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_rope.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/stream.cuh"

namespace {

constexpr uint32_t ROUNDED_MAX = 8192; /* dimensions of a row that are rounded at a time */
/*
 * Pieces of all rows, by the step's longest context, up to which each gets a block: of more, most may be behind their row's
 * context, and blocks that only find this out take time too.
 */
constexpr uint32_t DECODE_BLOCKS = 1 << 15;
constexpr uint32_t SPLIT_RING_BYTES = 192 << 10;

template <class VALUE, int DIM> struct split_shape {
    static constexpr uint32_t block_bytes = kv_head_values<VALUE>(DIM) * sizeof(VALUE);
    static constexpr uint32_t most_warps = SPLIT_RING_BYTES / (ATTENTION_PIECE_BLOCKS * block_bytes);
    static constexpr int warps = most_warps < 12 ? most_warps : 12;
    /* Of whole_kernel: more would have too few registers. */
    static constexpr int whole_warps = DIM < 128 || warps < 8 ? warps : 8;
};

/* Of each warp. */
template <class VALUE, int DIM> struct alignas(128) split_memory {
    unsigned char blocks[ATTENTION_PIECE_BLOCKS][split_shape<VALUE, DIM>::block_bytes];
    uint64_t barriers[ATTENTION_PIECE_BLOCKS];
    alignas(16) float own[sizeof(VALUE) == 1 ? 2 * DIM : 4]; /* for attention_own */
};

/*
 * All pieces of a tile by one warp, blocks through its ring as in split_kernel: where attention_many does not run, or
 * has but one row a tile. ROWS 1: tiles have no rows 8 to 15. ROPE: as for split_kernel.
 */
template <class VALUE, int DIM, int ROWS, bool ROPE>
__global__ void __launch_bounds__(split_shape<VALUE, DIM>::whole_warps * 32, 1)
    whole_kernel(const attention_parameters p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    launch_dependents();
#if LAUNCH_COPIES
    extern __shared__ __align__(128) unsigned char memory[];
    split_memory<VALUE, DIM> &shared = ((split_memory<VALUE, DIM> *)memory)[warp];
    stream_ring ring = stream_create(shared.blocks, shared.barriers, split_shape<VALUE, DIM>::block_bytes,
                                     ATTENTION_PIECE_BLOCKS, lane);
#endif
    for (uint32_t unit = warp * gridDim.x + blockIdx.x; unit < p.tile_count * p.kv_heads;
         unit += gridDim.x * split_shape<VALUE, DIM>::whole_warps) {
        const uint32_t tile = unit / p.kv_heads, kv_head = unit % p.kv_heads;
        const uint32_t row = ROPE ? tile : p.tiles[tile], count = ROPE ? 1 : p.tile_rows[tile];
        if (count == 0)
            continue;
        const uint32_t *table = p.tables + p.table[row];
        const uint32_t last = p.position[row + count - 1], blocks = last / CUDA_KV_BLOCK + 1;
#if LAUNCH_COPIES
        uint32_t sent = 0;
        const auto fill = [&] {
#pragma unroll 1
            for (; sent < blocks && !stream_full(ring); sent++)
                stream_put(ring, {block_head<VALUE, DIM>(p, table[sent], kv_head)},
                           split_shape<VALUE, DIM>::block_bytes, lane);
        };
        if (ROPE)
            fill();
#endif
        wait_for_predecessor();
        attention_rows<DIM> rows;
        attention_own<DIM> own;
        attention_state<DIM> total, piece;
        if constexpr (ROPE) {
            own.load(p, row, kv_head, lane);
            rotate_queries(p, row, kv_head, last, lane, rows);
        } else {
            load_rows(p, tile, true, kv_head, lane, rows);
        }
        total.clear();
#pragma unroll 1
        for (uint32_t first = 0; first < blocks; first += ATTENTION_PIECE_BLOCKS) {
            piece.clear();
#pragma unroll 1
            for (uint32_t b = first; b < min(first + ATTENTION_PIECE_BLOCKS, blocks); b++) {
#if LAUNCH_COPIES
                fill();
                const VALUE *head = (const VALUE *)stream_get(ring);
                if constexpr (ROPE)
                    if (b == last / CUDA_KV_BLOCK) {
                        own.store(p, last, block_head<VALUE, DIM>(p, table[b], kv_head), (VALUE *)head,
                                  shared.own, lane);
                        shared_seen_async();
                        __syncwarp();
                    }
#else
                const VALUE *head = block_head<VALUE, DIM>(p, table[b], kv_head);
#endif
                attend_block<0, ROWS>(rows, head, (int)(b * CUDA_KV_BLOCK), lane, piece);
#if LAUNCH_COPIES
                stream_release(ring);
#endif
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float keep, add;
                join_factors(total.max[r], piece.max[r], keep, add);
                total.sum[r] = join(total.sum[r], keep, row_sum(piece.sum[r]), add);
#pragma unroll
                for (int n = 0; n < DIM / 8; n++)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; e++)
                        total.out[n][e] = join(total.out[n][e], keep, piece.out[n][e], add);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (rows.limit[r] >= 0) {
                float *y = p.y + (uint64_t)tile_row_head(p, row, kv_head, lane / 4 + 8 * r) * DIM + 2 * (lane & 3);
#pragma unroll
                for (int n = 0; n < DIM / 8; n++)
                    *(float2 *)(y + 8 * n) = make_float2(quotient(total.out[n][2 * r], total.sum[r]),
                                                         quotient(total.out[n][2 * r + 1], total.sum[r]));
            }
    }
}

/* One piece of one tile for one KV head, and which of its blocks is to be copied next. */
struct split_unit {
    uint32_t index, tile, row, kv_head, piece, block, end, last; /* row: the tile's first; last: its last's position */
    const uint32_t *table;
};

/* The first unit at or behind `index`, in strides, that its tile's context has. Pieces come first, of all tiles. */
template <bool ROPE>
__device__ __forceinline__ split_unit split_unit_from(const attention_parameters &p, uint32_t index, uint32_t stride) {
    const uint32_t per_piece = p.kv_heads * p.tile_count;
    for (; index < per_piece * p.pieces; index += stride) {
        const uint32_t piece = index / per_piece, tile = index % per_piece / p.kv_heads;
        const uint32_t rows = ROPE ? 1 : p.tile_rows[tile], row = ROPE ? tile : p.tiles[tile];
        if (rows == 0)
            continue;
        const uint32_t last_row = row + rows - 1, first = piece * ATTENTION_PIECE_BLOCKS;
        const uint32_t last = p.position[last_row], blocks = last / CUDA_KV_BLOCK + 1;
        if (first < blocks)
            return {index,
                    tile,
                    row,
                    index % p.kv_heads,
                    piece,
                    first,
                    min(first + ATTENTION_PIECE_BLOCKS, blocks),
                    last,
                    p.tables + p.table[last_row]};
    }
    return {index, 0, 0, 0, 0, 0, 0, 0, NULL};
}

/* ONE: the tile is one row, all of it in rows g. */
template <int DIM, bool ONE>
__device__ __forceinline__ void store_piece(const attention_parameters &p, const attention_rows<DIM> &rows,
                                            const split_unit &u, int lane, const attention_state<DIM> &s) {
#pragma unroll
    for (int r = 0; r < (ONE ? 1 : 2); r++) {
        const float sum = row_sum(s.sum[r]);
        if (rows.limit[r] < 0)
            continue;
        const uint32_t head = ONE ? u.row * p.heads + u.kv_head * p.group + lane / 4
                                  : tile_row_head(p, u.row, u.kv_head, lane / 4 + 8 * r);
        const uint64_t at = (uint64_t)head * p.pieces + u.piece;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
            *(float2 *)(p.partial + at * DIM + 8 * n + 2 * (lane & 3)) =
                make_float2(s.out[n][2 * r], s.out[n][2 * r + 1]);
        if ((lane & 3) == 0)
            p.stats[at] = make_float2(s.max[r], sum);
    }
}

/*
 * Pieces, a warp each. Where there is a copy engine the blocks of a piece come through the warp's ring, which fills for
 * the next piece while this one is worked on; what was in the cache before this step begins its way to L2 at once.
 * With ROPE all of the cache but the row's own position was there before this step: the ring fills before the predecessor
 * has ended, and the warp with the own position puts it into its copy.
 */
template <class VALUE, int DIM, bool ROPE>
__global__ void __launch_bounds__(split_shape<VALUE, DIM>::warps * 32, 1)
    split_kernel(const attention_parameters p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const uint32_t stride = gridDim.x * (blockDim.x / 32);
    launch_dependents();
    split_unit next = split_unit_from<ROPE>(p, warp * gridDim.x + blockIdx.x, stride);
#if LAUNCH_COPIES
    extern __shared__ __align__(128) unsigned char memory[];
    constexpr uint32_t bytes = split_shape<VALUE, DIM>::block_bytes;
    split_memory<VALUE, DIM> &shared = ((split_memory<VALUE, DIM> *)memory)[warp];
    stream_ring ring = stream_create(shared.blocks, shared.barriers, bytes, ATTENTION_PIECE_BLOCKS, lane);
    const auto fill = [&] {
#pragma unroll 1
        for (; next.block < next.end && !stream_full(ring); next.block++)
            stream_put(ring, {block_head<VALUE, DIM>(p, next.table[next.block], next.kv_head)}, bytes, lane);
    };
    if (ROPE)
        fill();
    else if (lane < (int)(next.end - next.block))
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                         block_head<VALUE, DIM>(p, next.table[next.block + lane], next.kv_head)),
                     "r"(bytes));
#endif
    wait_for_predecessor();
#if LAUNCH_COPIES
    if (!ROPE)
        fill();
#endif
    while (next.table) {
        const split_unit now = next;
        attention_rows<DIM> rows;
        attention_own<DIM> own;
        attention_state<DIM> s;
        if constexpr (ROPE) {
            own.load(p, now.row, now.kv_head, lane);
            rotate_queries(p, now.row, now.kv_head, now.last, lane, rows);
        } else {
            load_rows(p, now.tile, true, now.kv_head, lane, rows);
        }
        s.clear();
        next = split_unit_from<ROPE>(p, now.index + stride, stride);
        for (uint32_t b = now.piece * ATTENTION_PIECE_BLOCKS; b < now.end; b++) {
#if LAUNCH_COPIES
            fill();
            const VALUE *head = (const VALUE *)stream_get(ring);
            if constexpr (ROPE)
                if (b == now.last / CUDA_KV_BLOCK) {
                    own.store(p, now.last, block_head<VALUE, DIM>(p, now.table[b], now.kv_head), (VALUE *)head,
                              shared.own, lane);
                    shared_seen_async();
                    __syncwarp();
                }
#else
            const VALUE *head = block_head<VALUE, DIM>(p, now.table[b], now.kv_head);
#endif
            attend_block<DIM <= 128 ? DIM / 8 : 0, ROPE ? 1 : 2>(rows, head, (int)(b * CUDA_KV_BLOCK), lane, s);
#if LAUNCH_COPIES
            stream_release(ring);
#endif
        }
#if LAUNCH_COPIES
        fill();
#endif
        store_piece<DIM, ROPE>(p, rows, now, lane, s);
    }
}

/* Units go to as many multiprocessors as there are, and few have few warps. */
template <class VALUE, int DIM, bool ROPE>
cudaError_t launch_split(const attention_parameters &p, cudaStream_t stream) {
    const bool rings = launch_has_copies(split_kernel<VALUE, DIM, ROPE>);
    constexpr uint32_t most = split_shape<VALUE, DIM>::warps;
    const uint32_t units = p.tile_count * p.kv_heads * p.pieces;
    const uint32_t blocks = rings ? std::min(units, launch_processors()) : (units + most - 1) / most;
    const uint32_t warps = std::min((units + blocks - 1) / blocks, most);
    const size_t shared = rings ? warps * sizeof(split_memory<VALUE, DIM>) : 0;
    const cudaError_t error =
        cudaFuncSetAttribute(split_kernel<VALUE, DIM, ROPE>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(split_kernel<VALUE, DIM, ROPE>, dim3(blocks), dim3(warps * 32), shared, stream, p);
}

template <class VALUE, int DIM>
cudaError_t launch_whole(const attention_parameters &p, cudaStream_t stream) {
    const bool rings = launch_has_copies(whole_kernel<VALUE, DIM, 1, false>);
    constexpr uint32_t warps = split_shape<VALUE, DIM>::whole_warps;
    const uint32_t blocks = (p.tile_count * p.kv_heads + warps - 1) / warps;
    const size_t shared = rings ? warps * sizeof(split_memory<VALUE, DIM>) : 0;
    /* Few units are spread over all processors. */
    const dim3 grid(rings ? std::min(p.tile_count * p.kv_heads, launch_processors()) : blocks);
    auto kernel = p.tile_count == p.rows && p.group <= 8 ? whole_kernel<VALUE, DIM, 1, false>
                                                         : whole_kernel<VALUE, DIM, 2, false>;
    if constexpr (DIM == 64 || DIM == 128)
        kernel = p.rope.qkv ? whole_kernel<VALUE, DIM, 1, true> : kernel;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(kernel, grid, dim3(warps * 32), shared, stream, p);
}

template <class VALUE, int DIM>
cudaError_t launch_dim(const attention_parameters &p, const struct cuda_heads *heads, cudaStream_t stream) {
    const uint32_t columns = p.heads * DIM;
    if (p.out.half && columns > ROUNDED_MAX)
        return cudaErrorInvalidValue;
    if (p.partial) {
        cudaError_t error;
        if constexpr (DIM == 64 || DIM == 128)
            error = !p.rope.qkv                                       ? launch_split<VALUE, DIM, false>(p, stream)
                    : p.rows * p.kv_heads * p.pieces <= DECODE_BLOCKS ? attention_decode(p, heads, stream)
                                                                      : launch_split<VALUE, DIM, true>(p, stream);
        else
            error = launch_split<VALUE, DIM, false>(p, stream);
        return error ? error : attention_join(p, DIM, stream);
    }
    const bool many = attention_many_runs(DIM) && p.tile_count < p.rows;
    const cudaError_t error = many ? attention_many(p, heads, stream) : launch_whole<VALUE, DIM>(p, stream);
    return error || !p.out.half ? error : cuda_round(p.y, columns, p.rows, &p.out, stream);
}

template <class VALUE>
cudaError_t launch_value(attention_parameters &p, const struct cuda_heads *heads, cudaStream_t stream) {
    p.block_values = (uint64_t)heads->kv_heads * kv_head_values<VALUE>(heads->head_dim);
    switch (heads->head_dim) {
    case 32: return launch_dim<VALUE, 32>(p, heads, stream);
    case 64: return launch_dim<VALUE, 64>(p, heads, stream);
    case 96: return launch_dim<VALUE, 96>(p, heads, stream);
    case 128: return launch_dim<VALUE, 128>(p, heads, stream);
    case 256: return launch_dim<VALUE, 256>(p, heads, stream);
    default: return cudaErrorInvalidValue;
    }
}

uint32_t piece_count(uint32_t context_limit) {
    return (context_limit + CUDA_KV_PIECE - 1) / CUDA_KV_PIECE;
}

} // namespace

size_t cuda_kv_block_bytes(const struct cuda_heads *heads) {
    return heads->cache == QUANT_Q8_0 ? heads->kv_heads * (size_t)kv_head_values<uint8_t>(heads->head_dim)
                                      : heads->kv_heads * (size_t)kv_head_values<half>(heads->head_dim) * sizeof(half);
}

uint32_t cuda_attention_tile_tokens(const struct cuda_heads *heads) {
    return 16 / (heads->heads / heads->kv_heads);
}

size_t cuda_attention_partial_floats(const struct cuda_heads *heads, uint32_t rows, uint32_t context_limit) {
    return (size_t)rows * heads->heads * piece_count(context_limit) * (heads->head_dim + 2);
}

bool cuda_attention_takes_rope(const struct cuda_heads *heads) {
    return heads->heads / heads->kv_heads <= 8 && attention_many_runs(heads->head_dim); /* the same build and device */
}

cudaError_t cuda_attention(const struct cuda_attention *a, cudaStream_t stream) {
    attention_parameters p = {};
    if (a->rope && !cuda_attention_takes_rope(&a->heads))
        return cudaErrorInvalidValue;
    if (a->rope)
        p.rope = *a->rope;
    p.q_scale = rope_query_scale(a->heads.head_dim);
    p.q = (const half *)a->q;
    p.cache = a->cache;
    p.position = a->rows.position;
    p.table = a->rows.table;
    p.tables = a->rows.tables;
    p.tiles = a->tiles;
    p.tile_rows = a->tile_rows;
    p.partial = a->partial;
    p.y = a->y;
    p.out = a->out;
    p.heads = a->heads.heads;
    p.kv_heads = a->heads.kv_heads;
    p.group = a->heads.heads / a->heads.kv_heads;
    p.rows = a->rows.rows;
    p.pieces = piece_count(a->context_limit);
    if (p.partial)
        p.stats = (float2 *)(p.partial + (size_t)p.rows * p.heads * p.pieces * a->heads.head_dim);
    p.tile_count = a->tile_count;
    switch (a->heads.cache) {
    case QUANT_F16: return launch_value<half>(p, &a->heads, stream);
    case QUANT_Q8_0: return launch_value<uint8_t>(p, &a->heads, stream);
    default: return cudaErrorInvalidValue;
    }
}
