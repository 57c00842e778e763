/*
 * y = W x over quantized tiles, dense or by expert: see cuda_matmul in cuda.h for shapes and the order of sums.
 *
 * A block has ROW_TILES tiles of 16 rows, a warp one chain of one of them after another, so that it can fetch the next
 * chunk of weights while it works on one, and finds activations in the L1 cache, or in shared memory those that the block
 * has rounded. It expands a group of weights to f16 operands once and multiplies it with up to 8 * N_TILES tokens. Weights
 * are fetched before the predecessor has ended wherever it is known by then which.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/tile.cuh"

namespace {

constexpr int WARPS = CUDA_CHAINS, CHUNK_GROUPS = CUDA_CHUNK / 32;
constexpr uint32_t ROUND_TOKENS = 8;     /* of an item that the block may have to round */
constexpr uint32_t BLOCKS_AT_A_TIME = 4; /* of a multiprocessor, at least, that have few tokens */

struct parameters {
    matmul_part parts[CUDA_PARTS];
    const half *x; /* and x_scale, or floats */
    const float *x_scale, *floats;
    const cuda_item *items;
    const uint32_t *item_count, *order;
    uint32_t part_count, columns, chunks, x_stride, x_divisor, tokens;
    bool items_early;
};

/* Assignment and x row of token j of the block's tokens. */
struct token_map {
    const uint32_t *order;
    uint32_t first, divisor;

    __device__ __forceinline__ uint32_t y_row(uint32_t j) const {
        return order ? order[first + j] : first + j;
    }
    __device__ __forceinline__ uint32_t x_row(uint32_t j) const {
        return y_row(j) / divisor;
    }
};

/* What the warps of a block tell each other: their chains' sums, and where the tokens' results go. */
template <int N_TILES, int ROW_TILES> struct exchange {
    float sums[ROW_TILES][CUDA_CHAINS][CUDA_TILE_ROWS][8 * N_TILES + 1];
    uint32_t y_row[8 * N_TILES];
    float x_scale[8 * N_TILES];
};

__device__ __forceinline__ void prefetch(const uint8_t *bytes, uint32_t count, int lane) {
    for (uint32_t i = 128 * lane; i < count; i += 128 * 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + i));
}

/* Where a warp is: a chunk of a chain of a tile of the block. */
struct place {
    uint32_t row_tile, chain, chunk;

    __device__ __forceinline__ void settle(uint32_t chains) {
        for (; chain >= chains; chain -= chains)
            row_tile++;
        chunk = chain;
    }
    __device__ __forceinline__ place after(uint32_t chunks, uint32_t chains) const {
        place next = {row_tile, chain, chunk + CUDA_CHAINS};
        if (next.chunk >= chunks) {
            next.chain += WARPS;
            next.settle(chains);
        }
        return next;
    }
    __device__ __forceinline__ bool same_chain(const place &other) const {
        return row_tile == other.row_tile && chain == other.chain;
    }
};

/* Activations of a few groups: a lane's part of its column of each right operand. */
template <int N_TILES> struct operands {
    static constexpr int STAGE = N_TILES <= 2 ? 2 : 1; /* groups */
    uint4 b[STAGE][N_TILES];

    __device__ __forceinline__ void load(const half *const x[N_TILES], uint32_t chunk, int stage) {
#pragma unroll
        for (int i = 0; i < STAGE; i++)
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                b[i][n] = *(const uint4 *)(x[n] + CUDA_CHUNK * chunk + 32 * (STAGE * stage + i));
    }
};

/* ROUNDS: rows are `floats`, which the block rounds to shared memory. */
template <int TYPE, bool ROUNDS, int N_TILES, int ROW_TILES>
__device__ __forceinline__ void multiply(const parameters &p, const matmul_part &w, uint32_t block,
                                         exchange<N_TILES, ROW_TILES> &shared) {
    constexpr int TOKENS = 8 * N_TILES, STAGE = operands<N_TILES>::STAGE, STAGES = CHUNK_GROUPS / STAGE;
    constexpr int DEPTH = N_TILES == 8 ? 1 : 2; /* stages of activations in registers */
    constexpr size_t chunk_bytes = launch_chunk_bytes(TYPE);
    const int lane = threadIdx.x & 31;
    const uint32_t chains = min(p.chunks, (uint32_t)CUDA_CHAINS); /* that have chunks */
    const uint32_t row_tiles = min(w.row_tiles - block * ROW_TILES, (uint32_t)ROW_TILES);
    const bool early = !p.items || p.items_early;

    if (early) {
        launch_dependents();
    } else {
        wait_for_predecessor();
        launch_dependents(); /* who comes next finds the items there */
    }
    const uint8_t *tiles = w.tiles;
    token_map map = {p.order, blockIdx.y * TOKENS, p.x_divisor};
    uint32_t count = p.tokens > map.first ? min(p.tokens - map.first, (uint32_t)TOKENS) : 0;
    if (p.items) {
        /* From L2 if the kernel that followed the items' maker may not have ended. */
        const auto read = [](const uint32_t *from) { return ROUNDS ? __ldcg(from) : *from; };
        const cuda_item *own = p.items + blockIdx.y, item = {read(&own->expert), read(&own->first), read(&own->count)};
        if (blockIdx.y >= read(p.item_count))
            return;
        tiles += item.expert * w.expert_bytes;
        map.first = item.first;
        count = item.count;
    }
    tiles += (uint64_t)block * ROW_TILES * p.chunks * chunk_bytes;
    const auto chunk_at = [&](const place &at) { return tiles + (at.row_tile * p.chunks + at.chunk) * chunk_bytes; };
    place at = {0, threadIdx.x / 32, 0};
    at.settle(chains);
    tile<TYPE> next;
    if (at.row_tile < row_tiles)
        next.load(chunk_at(at), lane);
    if (early) {
        for (place a = at.after(p.chunks, chains); a.row_tile < row_tiles; a = a.after(p.chunks, chains))
            prefetch(chunk_at(a), chunk_bytes, lane);
        wait_for_predecessor();
    }
    const half *x[N_TILES]; /* columns behind the last token repeat it, and nobody reads what comes of them */
    if constexpr (ROUNDS) {
        extern __shared__ __align__(16) half halves[];
        const uint32_t stride = matmul_token_stride(p.x_stride);
        for (uint32_t j = threadIdx.x / 32; j < count; j += WARPS) {
            const float4 *row = (const float4 *)(p.floats + (uint64_t)map.x_row(j) * p.columns);
            const float scale = round_few(row, p.columns / 4, p.chunks, (uint2 *)(halves + j * stride), lane);
            if (lane == 0) {
                shared.y_row[j] = map.y_row(j);
                shared.x_scale[j] = scale * w.inverse_scale;
            }
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            x[n] = halves + min(8 * n + lane / 4, count - 1) * stride + 8 * (lane & 3);
    } else {
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            x[n] = p.x + (uint64_t)map.x_row(min(8 * n + lane / 4, count - 1)) * p.x_stride + 8 * (lane & 3);
        if (threadIdx.x < count) {
            shared.y_row[threadIdx.x] = map.y_row(threadIdx.x);
            shared.x_scale[threadIdx.x] = p.x_scale[map.x_row(threadIdx.x)] * w.inverse_scale;
        }
    }

    float sums[N_TILES][4] = {};
    operands<N_TILES> b[DEPTH];
    if (DEPTH > 1 && at.row_tile < row_tiles)
        b[0].load(x, at.chunk, 0);
    while (at.row_tile < row_tiles) {
        const tile<TYPE> now = next;
        const place then = at.after(p.chunks, chains);
        if (then.row_tile < row_tiles)
            next.load(chunk_at(then), lane);
        const auto factors = now.factors(w.scale, lane);
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            if (DEPTH == 1)
                b[0].load(x, at.chunk, s);
            else if (s + 1 < STAGES)
                b[(s + 1) % DEPTH].load(x, at.chunk, s + 1);
            else if (then.row_tile < row_tiles)
                b[0].load(x, then.chunk, 0);
#pragma unroll
            for (int i = 0; i < STAGE; i++) {
                uint32_t a[8];
                now.fragments(STAGE * s + i, factors, a);
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    const uint4 v = b[s % DEPTH].b[i][n];
                    mma(sums[n], a, v.x, v.y);
                    mma(sums[n], a + 4, v.z, v.w);
                }
            }
        }
        if (!then.same_chain(at)) {
            float(*out)[TOKENS + 1] = shared.sums[at.row_tile][at.chain];
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                const int token = 8 * n + 2 * (lane & 3);
                out[lane / 4][token] = sums[n][0];
                out[lane / 4][token + 1] = sums[n][1];
                out[lane / 4 + 8][token] = sums[n][2];
                out[lane / 4 + 8][token + 1] = sums[n][3];
                sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
            }
        }
        at = then;
    }
    __syncthreads();

    const bool swiglu = w.epilogue == CUDA_SWIGLU;
    static_assert((ROW_TILES & (ROW_TILES - 1)) == 0, "a power of two, so that rows and tokens are told apart by shifts");
    constexpr uint32_t tiles_shift = ROW_TILES == 1 ? 0 : ROW_TILES == 2 ? 1 : 2;
    const uint32_t rows_shift = swiglu ? 3 : 4, block_shift = rows_shift + tiles_shift; /* rows of a tile's results */
    for (uint32_t i = threadIdx.x; i < count << block_shift; i += blockDim.x) {
        const uint32_t j = i >> block_shift, r = i & ((1u << block_shift) - 1), out_row = (block << block_shift) + r;
        if (out_row >= w.rows)
            continue;
        const float(*in)[CUDA_TILE_ROWS][TOKENS + 1] = shared.sums[r >> rows_shift];
        const auto sum = [&](uint32_t q) { return matmul_join(chains, [&](int chain) { return in[chain][q][j]; }); };
        const uint32_t q = r & ((1u << rows_shift) - 1);
        const float factor = shared.x_scale[j];
        float *y = w.y + (uint64_t)shared.y_row[j] * w.y_stride + out_row;
        matmul_finish(w.epilogue, sum(q) * factor, swiglu ? sum(q + CUDA_TILE_ROWS / 2) * factor : 0, y);
    }
}

/* Blocks of a multiprocessor that registers are made to suffice for, as far as that was found to gain. */
constexpr int least_blocks(int type, int n_tiles) {
    return launch_chunk_bytes(type) > 5000 ? 1 : n_tiles == 1 ? 5 : n_tiles == 2 ? 4 : n_tiles == 8 ? 3 : 1;
}

/* A part has the format TYPE or OTHER. */
template <int TYPE, int OTHER, bool ROUNDS, int N_TILES, int ROW_TILES>
__global__ void __launch_bounds__(WARPS * 32, least_blocks(TYPE, N_TILES))
    matmul_kernel(const __grid_constant__ parameters p) {
    __shared__ exchange<N_TILES, ROW_TILES> shared;
    uint32_t i = 0;
    while (i + 1 < p.part_count && blockIdx.x >= p.parts[i + 1].first_block)
        i++;
    const matmul_part &w = p.parts[i];
    const uint32_t block = blockIdx.x - w.first_block;
    if (TYPE == OTHER || w.type == TYPE)
        multiply<TYPE, ROUNDS>(p, w, block, shared);
    else
        multiply<OTHER, ROUNDS>(p, w, block, shared);
}

template <int TYPE, int OTHER, int N_TILES, int ROW_TILES>
cudaError_t launch_tiles(parameters &p, uint32_t groups, cudaStream_t stream) {
    uint32_t blocks = 0;
    for (uint32_t i = 0; i < p.part_count; i++) {
        p.parts[i].first_block = blocks;
        blocks += (p.parts[i].row_tiles + ROW_TILES - 1) / ROW_TILES;
    }
    if constexpr (N_TILES == 1 && TYPE == OTHER && matmul_is_quantized(TYPE))
        if (p.floats)
            return launch(matmul_kernel<TYPE, OTHER, true, N_TILES, ROW_TILES>, dim3(blocks, groups), dim3(WARPS * 32),
                          p.tokens * matmul_token_bytes(p.x_stride), stream, p);
    return launch(matmul_kernel<TYPE, OTHER, false, N_TILES, ROW_TILES>, dim3(blocks, groups), dim3(WARPS * 32), 0, stream,
                  p);
}

/*
 * Tiles of a block: as few as make no more blocks than run at a time. Blocks of a second round would wait once more for
 * what the first had to wait for.
 */
uint32_t tiles_each(const parameters &p, uint32_t groups) {
    const uint32_t at_a_time = BLOCKS_AT_A_TIME * launch_processors();
    uint32_t tiles = 0, each = 1;
    for (uint32_t i = 0; i < p.part_count; i++)
        tiles += p.parts[i].row_tiles;
    while (each < 4 && tiles / each * groups > at_a_time)
        each *= 2;
    return each;
}

template <int TYPE, int OTHER, int N_TILES>
cudaError_t launch_few(parameters &p, uint32_t groups, cudaStream_t stream) {
    const uint32_t each = tiles_each(p, groups);
    return each == 1   ? launch_tiles<TYPE, OTHER, N_TILES, 1>(p, groups, stream)
           : each == 2 ? launch_tiles<TYPE, OTHER, N_TILES, 2>(p, groups, stream)
                       : launch_tiles<TYPE, OTHER, N_TILES, 4>(p, groups, stream);
}

template <int TYPE, int OTHER>
cudaError_t launch_types(parameters &p, const struct cuda_matmul *m, cudaStream_t stream) {
    const uint32_t tokens = m->tokens, groups = m->items ? m->item_limit : 1;
    if (tokens <= 8)
        return launch_few<TYPE, OTHER, 1>(p, groups, stream);
    if (tokens <= 16)
        return launch_few<TYPE, OTHER, 2>(p, groups, stream);
    if (tokens <= 32)
        return launch_tiles<TYPE, OTHER, 4, 1>(p, groups, stream);
    return launch_tiles<TYPE, OTHER, 8, 1>(p, m->items ? groups : (tokens + 63) / 64, stream);
}

parameters parameters_of(const struct cuda_matmul *m, uint32_t count) {
    parameters p = {};
    for (uint32_t i = 0; i < count; i++)
        p.parts[i] = matmul_part_of(m + i);
    p.x = (const half *)m->x;
    p.x_scale = m->x_scale;
    p.floats = m->floats;
    p.columns = m->w->columns;
    p.items = m->items;
    p.item_count = m->item_count;
    p.order = m->order;
    p.part_count = count;
    p.chunks = matmul_chunks(m);
    p.x_stride = p.chunks * CUDA_CHUNK;
    p.x_divisor = m->x_divisor ? m->x_divisor : 1;
    p.tokens = m->tokens;
    p.items_early = m->items_early;
    return p;
}

cudaError_t launch_type(parameters &p, const struct cuda_matmul *m, cudaStream_t stream) {
    switch (m->w->type) {
    case QUANT_F32: return launch_types<QUANT_F32, QUANT_F32>(p, m, stream);
    case QUANT_F16: return launch_types<QUANT_F16, QUANT_F16>(p, m, stream);
    case QUANT_BF16: return launch_types<QUANT_BF16, QUANT_BF16>(p, m, stream);
    case QUANT_Q8_0: return launch_types<QUANT_Q8_0, QUANT_Q8_0>(p, m, stream);
    case QUANT_Q4_K: return launch_types<QUANT_Q4_K, QUANT_Q4_K>(p, m, stream);
    case QUANT_Q5_K: return launch_types<QUANT_Q5_K, QUANT_Q5_K>(p, m, stream);
    case QUANT_Q6_K: return launch_types<QUANT_Q6_K, QUANT_Q6_K>(p, m, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace

bool cuda_matmul_rounds(const struct cuda_matmul *m) {
    return m->floats && m->items && matmul_is_quantized(m->w->type) && m->w->columns <= ROUND_FEW_COLUMNS &&
           (m->tokens <= ROUND_TOKENS || matmul_stream_takes(m));
}

cudaError_t cuda_matmul(const struct cuda_matmul *m, cudaStream_t stream) {
    if (matmul_stream_takes(m))
        return matmul_stream(m, stream);
    if (m->floats && !cuda_matmul_rounds(m))
        return cudaErrorInvalidValue;
    if (matmul_cluster_takes(m, 1))
        return matmul_cluster(m, 1, stream);
    parameters p = parameters_of(m, 1);
    return launch_type(p, m, stream);
}

cudaError_t cuda_matmul_parts(const struct cuda_matmul *m, uint32_t count, cudaStream_t stream) {
    if (matmul_cluster_takes(m, count))
        return matmul_cluster(m, count, stream);
    const enum quant_type first = m[0].w->type;
    uint32_t alike = 1, q6 = 0;
    for (uint32_t i = 1; i < count; i++) {
        alike += m[i].w->type == first;
        q6 += m[i].w->type == QUANT_Q6_K;
    }
    if (m->tokens <= CUDA_TOKENS_MAX && count <= CUDA_PARTS) {
        parameters p = parameters_of(m, count);
        if (alike == count)
            return launch_type(p, m, stream);
        if (alike + q6 == count && first == QUANT_Q4_K)
            return launch_types<QUANT_Q4_K, QUANT_Q6_K>(p, m, stream);
        if (alike + q6 == count && first == QUANT_Q5_K)
            return launch_types<QUANT_Q5_K, QUANT_Q6_K>(p, m, stream);
    }
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < count && error == cudaSuccess; i++)
        error = cuda_matmul(m + i, stream);
    return error;
}
