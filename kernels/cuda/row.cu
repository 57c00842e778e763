/*
 * Products of a step of one row, with the norm or the choice of experts before them, and dense products of a few: see
 * cuda_row_matmul in cuda.h, and row.cuh.
 */
#include <algorithm>

#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/row.cuh"

namespace {

constexpr uint32_t TILES_MOST = 6, TILE_THREADS = 32 * CUDA_CHAINS; /* a block's tiles, a warp a chain */
constexpr uint32_t COLUMNS_MOST = NORM_COLUMNS_MAX, ROUNDS_MOST = COLUMNS_MOST / CUDA_CHUNK / CUDA_CHAINS;
constexpr uint32_t EXPANDED_BYTES = 2 * CUDA_TILE_ROWS * CUDA_CHUNK; /* of a chunk */
constexpr uint32_t SUMS_STRIDE = CUDA_ROW_TOKENS + 1;
static_assert(CUDA_TILE_ROWS * SUMS_STRIDE * sizeof(float) <= launch_chunk_bytes(QUANT_Q4_K), "sums in a chunk's place");
/* Of which two do not fit into a multiprocessor: blocks that begin early would crowd on those that happen to have room. */
constexpr uint32_t SHARED_ALONE = 115 << 10;
constexpr uint32_t SHARED_BESIDE = 190 << 10; /* leaves room for a block of attention's join */

struct row_parameters {
    matmul_part parts[CUDA_PARTS];
    uint32_t tiles[CUDA_PARTS]; /* of a block of the part, at most blockDim.x / TILE_THREADS */
    uint32_t part_count, chunks, chains, columns, rows;
    const half *x; /* rounded; or NULL: `floats` are to be normed */
    const float *x_scale, *floats, *norm;
    float epsilon;
    uint32_t x_bytes;                             /* of a row, in shared memory */
    uint32_t weights_at, tile_bytes, expanded_at; /* there */
    uint32_t expanded;                            /* chunks of a tile; others are expanded where they are used */
    const float *logits;                          /* by expert, or NULL */
    uint32_t experts, used, blocks;               /* used: matrices, a rank's each, of so many blocks */
};

/* Behind it lie x, what is to be normed and the norm, and the weights. */
struct alignas(128) row_memory {
    float squares[NORM_WARPS], greatest[TILES_MOST * CUDA_CHAINS]; /* greatest: of each warp */
    uint32_t chosen[USED_MOST];
    uint64_t weights_full[TILES_MOST][ROUNDS_MOST], x_full, norm_full; /* weights: a chunk of every chain each */
};

#if __CUDA_ARCH__ >= 900

/* multiply_chunk in two steps: each lane reads what it has written. */
template <int TYPE>
__device__ __forceinline__ void expand_chunk(const unsigned char *weights, float matrix_scale, uint32_t lane,
                                             uint4 *to) {
    const tile_in_place<TYPE> now(weights, matrix_scale, lane);
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        uint32_t a[2][8];
        now.fragments(i, a);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t *operand = a[k / 2] + 4 * (k & 1);
            to[32 * (4 * i + k) + lane] = make_uint4(operand[0], operand[1], operand[2], operand[3]);
        }
    }
}

__device__ __forceinline__ void multiply_expanded(const uint4 *from, const unsigned char *x, uint32_t lane,
                                                  float sums[4]) {
#pragma unroll 4
    for (int i = 0; i < 4; i++) {
        uint32_t a[2][8];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint4 operand = from[32 * (4 * i + k) + lane];
            uint32_t *to = a[k / 2] + 4 * (k & 1);
            to[0] = operand.x;
            to[1] = operand.y;
            to[2] = operand.z;
            to[3] = operand.w;
        }
        multiply_pair(a, x + 16 * (lane & 3) + 128 * i, sums);
    }
}

/*
 * The row normed and rounded, by a block; returns its scale. values: shared, the row, and behind it the norm's weights.
 * The shares of the squares are those of norm.cuh: a warp has those of one of its warps after the other.
 */
__device__ __forceinline__ float norm_row(const row_parameters &p, float4 *values, uint2 *to, row_memory &shared) {
    const uint32_t fours = p.columns / 4, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const float4 *norm = values + fours;
    barrier_wait(&shared.x_full, 0);
#pragma unroll 1
    for (uint32_t part = warp; part < NORM_WARPS; part += warps) {
        float sum = 0;
#pragma unroll 1
        for (uint32_t i = 32 * part + lane; i < fours; i += NORM_THREADS)
            sum = add_squares(values[i], sum);
        sum = warp_reduce(sum, plus);
        if (lane == 0)
            shared.squares[part] = sum;
    }
    __syncthreads();
    barrier_wait(&shared.norm_full, 0);
    const float factor = norm_factor(join_squares(shared.squares), p.columns, p.epsilon);
    float greatest = 0, shrink;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < fours; i += blockDim.x) {
        values[i] = normed(values[i], factor, norm[i]);
        greatest = greater(greatest, greatest_of(values[i]));
    }
    greatest = warp_greatest(greatest);
    if (lane == 0)
        shared.greatest[warp] = greatest;
    __syncthreads();
    const float scale = rounding_scale(warp_greatest(lane < warps ? shared.greatest[lane] : 0), shrink);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < CUDA_CHUNK / 4 * p.chunks; i += blockDim.x)
        to[i] = i < fours ? rounded(values[i], shrink) : make_uint2(0, 0);
    __syncthreads();
    return scale;
}

constexpr uint32_t HOLD_BYTES = 11; /* of a block's weights, for each cycle that a place is held: they take longer */

/*
 * Until the next kernel's blocks have begun: on a multiprocessor that had none of this kernel there would be room for two,
 * for which all others would wait.
 */
__device__ __forceinline__ void hold_place(uint32_t cycles) {
    for (const long long from = clock64(); clock64() - from < cycles;)
        __nanosleep(100);
}

#endif

/*
 * A block has p.tiles of its part, a warp for each chain of one. By expert blocks behind those of the last rank have none.
 * A part has the format TYPE or OTHER.
 */
template <int TYPE, int OTHER>
__global__ void __launch_bounds__(TILES_MOST *TILE_THREADS) row_kernel(const __grid_constant__ row_parameters p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char memory[];
    row_memory &shared = *reinterpret_cast<row_memory *>(memory);
    unsigned char *x = memory + sizeof shared;
    float4 *values = (float4 *)(x + p.x_bytes); /* of one row */
    const uint32_t lane = threadIdx.x % 32, chain = threadIdx.x / 32 % CUDA_CHAINS, own = threadIdx.x / TILE_THREADS;
    const uint32_t rank = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
    uint32_t part = 0;
    while (part + 1 < p.part_count && block >= p.parts[part + 1].first_block)
        part++;
    const matmul_part &w = p.parts[part];
    const bool is_other = TYPE != OTHER && w.type != TYPE;
    const uint32_t chunk_bytes = (uint32_t)launch_chunk_bytes(is_other ? OTHER : TYPE);
    const uint32_t tiles = p.tiles[part], first_tile = (block - w.first_block) * tiles, tile = first_tile + own;
    const bool has_tile = own < tiles && tile < w.row_tiles;
    const uint32_t rounds = (p.chunks + CUDA_CHAINS - 1) / CUDA_CHAINS; /* of copies: a chunk of every chain each */
    const uint32_t own_rounds = has_tile && chain < p.chunks ? (p.chunks - chain + CUDA_CHAINS - 1) / CUDA_CHAINS : 0;
    unsigned char *const weights = memory + p.weights_at + own * p.tile_bytes;
    uint4 *const expanded = (uint4 *)(memory + p.expanded_at + EXPANDED_BYTES * p.expanded * own);
    if (threadIdx.x == 0) {
        barrier_create(&shared.x_full, 1);
        barrier_create(&shared.norm_full, 1);
    }
    if (lane == 0 && chain == 0)
#pragma unroll 1
        for (uint32_t i = 0; i < rounds; i++)
            barrier_create(&shared.weights_full[own][i], 1);
    barriers_created();
    __syncthreads();
    const uint8_t *from = w.tiles;
    if (p.logits) {
        wait_for_predecessor();
        launch_dependents(); /* who comes next finds the logits there */
        if (rank == p.used) {
            hold_place(p.tile_bytes * (blockDim.x / TILE_THREADS) / HOLD_BYTES);
            return;
        }
        if (threadIdx.x == 0)
            fetch(x, p.x, 2 * CUDA_CHUNK * p.chunks, &shared.x_full);
        if (threadIdx.x < 32)
            route_choose<EXPERTS_A_LANE>(p.logits, p.experts, rank + 1, lane, shared.chosen);
        __syncthreads();
        from += shared.chosen[rank] * w.expert_bytes;
    } else {
        launch_dependents();
    }
    if (lane == 0 && has_tile) { /* as many threads as can begin the copies */
        from += (uint64_t)tile * p.chunks * chunk_bytes;
#pragma unroll 1
        for (uint32_t i = chain; i < rounds; i += CUDA_CHAINS) {
            const uint32_t first = i * CUDA_CHAINS, count = min(p.chunks - first, (uint32_t)CUDA_CHAINS);
            fetch(weights + first * chunk_bytes, from + first * chunk_bytes, count * chunk_bytes,
                  &shared.weights_full[own][i]);
        }
    }
#pragma unroll 1
    for (uint32_t i = 0; i < own_rounds && CUDA_CHAINS * i + chain < p.expanded; i++) {
        const uint32_t chunk = CUDA_CHAINS * i + chain;
        barrier_wait(&shared.weights_full[own][i], 0);
        uint4 *to = expanded + EXPANDED_BYTES / 16 * chunk;
        if (is_other)
            expand_chunk<OTHER>(weights + chunk * chunk_bytes, w.scale, lane, to);
        else
            expand_chunk<TYPE>(weights + chunk * chunk_bytes, w.scale, lane, to);
    }
    if (!p.logits) {
        if (threadIdx.x == 0 && p.x)
            barrier_expect(&shared.x_full, 2 * CUDA_CHUNK * p.chunks * p.rows);
        if (threadIdx.x == 0 && !p.x)
            fetch(values + p.columns / 4, p.norm, 4 * p.columns, &shared.norm_full);
        wait_for_predecessor();
        if (lane == 0 && p.x)
            for (uint32_t i = threadIdx.x / 32; i < p.rows; i += blockDim.x / 32)
                barrier_copy(x + i * p.x_bytes, p.x + (uint64_t)i * CUDA_CHUNK * p.chunks, 2 * CUDA_CHUNK * p.chunks,
                             &shared.x_full);
        if (threadIdx.x == 0 && !p.x)
            fetch(values, p.floats, 4 * p.columns, &shared.x_full);
    }
    /* What the thread will write, of its own tile, and what was there before. */
    const bool swiglu = w.epilogue == CUDA_SWIGLU;
    const uint32_t tile_shift = swiglu ? 3 : 4, row = threadIdx.x & ((1u << tile_shift) - 1);
    const uint32_t token = threadIdx.x % TILE_THREADS >> tile_shift, out_row = (tile << tile_shift) + row;
    const bool writes = has_tile && token < p.rows && out_row < w.rows;
    float *y = w.y + (uint64_t)(rank + token) * w.y_stride + out_row;
    const float before = writes && w.epilogue == CUDA_ADD ? *y : 0.0f;
    float scale;
    if (p.x) {
        scale = p.x_scale[min(token, p.rows - 1)];
        barrier_wait(&shared.x_full, 0);
    } else {
        scale = norm_row(p, values, (uint2 *)x, shared);
    }
    float sums[4] = {};
    const unsigned char *own_x = x + min(lane / 4, p.rows - 1) * p.x_bytes; /* behind the last row it is repeated */
#pragma unroll 1
    for (uint32_t i = 0; i < own_rounds; i++) {
        const uint32_t chunk = CUDA_CHAINS * i + chain;
        const unsigned char *x_chunk = own_x + 2 * CUDA_CHUNK * chunk;
        if (chunk < p.expanded) {
            multiply_expanded(expanded + EXPANDED_BYTES / 16 * chunk, x_chunk, lane, sums);
            continue;
        }
        barrier_wait(&shared.weights_full[own][i], 0);
        if (is_other)
            multiply_chunk<OTHER>(weights + chunk * chunk_bytes, x_chunk, w.scale, lane, sums);
        else
            multiply_chunk<TYPE>(weights + chunk * chunk_bytes, x_chunk, w.scale, lane, sums);
    }
    /* Where the warp's first chunk of weights was. */
    const auto chain_sums = [&](uint32_t chain) { return (float *)(weights + chain * chunk_bytes); };
    if (own_rounds > 0) {
        __syncwarp(); /* its lanes have read that */
        float *out = chain_sums(chain) + lane / 4 * SUMS_STRIDE + 2 * (lane & 3);
        out[0] = sums[0];
        out[1] = sums[1];
        out[8 * SUMS_STRIDE] = sums[2];
        out[8 * SUMS_STRIDE + 1] = sums[3];
    }
    __syncthreads();
    if (!writes)
        return;
    const float factor = scale * w.inverse_scale;
    const auto sum = [&](uint32_t row) {
        return matmul_join(p.chains, [&](int chain) { return chain_sums(chain)[row * SUMS_STRIDE + token]; }) * factor;
    };
    if (swiglu)
        *y = silu(sum(row)) * sum(row + CUDA_TILE_ROWS / 2);
    else
        *y = w.epilogue == CUDA_ADD ? __fadd_rn(before, sum(row)) : sum(row); /* as matmul_finish does */
#endif
}

/* How a launch of row_kernel is cut, and what of shared memory is where; shared 0: it cannot be. */
struct row_plan {
    uint32_t tiles, x_bytes, weights_at, tile_bytes, expanded_at, expanded, shared; /* tiles: of a block */
};

row_plan plan_row(const struct cuda_matrix *const *parts, uint32_t count, bool normed, uint32_t used, uint32_t rows) {
    const uint32_t chunks = chunks_of(parts[0]), processors = std::max(launch_processors(), 1u);
    row_plan plan = {};
    uint32_t tiles = 0;
    for (uint32_t i = 0; i < count; i++) {
        tiles += (parts[i]->rows + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS * std::max(used, 1u);
        plan.tile_bytes = std::max(plan.tile_bytes, chunks * (uint32_t)launch_chunk_bytes(parts[i]->type));
    }
    plan.x_bytes = rows > 1 ? matmul_token_bytes(CUDA_CHUNK * chunks) : 2 * CUDA_CHUNK * chunks;
    plan.weights_at = sizeof(row_memory) + rows * plan.x_bytes + (normed ? 8 * parts[0]->columns : 0);
    plan.weights_at = (plan.weights_at + 127) / 128 * 128;
    plan.tiles = std::min((tiles + processors - 1) / processors, TILES_MOST);
    while (plan.tiles > 1 && plan.weights_at + plan.tiles * plan.tile_bytes > SHARED_MOST)
        plan.tiles--;
    uint32_t end = plan.weights_at + plan.tiles * plan.tile_bytes;
    plan.expanded_at = (end + 127) / 128 * 128;
    const uint32_t most = rows > 1 ? SHARED_BESIDE : SHARED_MOST, chunk_bytes = plan.tiles * EXPANDED_BYTES;
    if (used == 0 && plan.expanded_at < most)
        plan.expanded = std::min(chunks, (most - plan.expanded_at) / chunk_bytes);
    if (plan.expanded < chunks) /* of one row all or none: better is room beside the predecessor */
        plan.expanded = rows > 1 ? plan.expanded / CUDA_CHAINS * CUDA_CHAINS : 0;
    if (plan.expanded > 0)
        end = plan.expanded_at + plan.expanded * chunk_bytes;
    plan.shared = end <= SHARED_MOST ? std::max(end, SHARED_ALONE) : 0;
    return plan;
}

} // namespace

bool cuda_row_takes(const struct cuda_matrix *const *parts, uint32_t count, bool normed, uint32_t used, uint32_t tokens) {
    bool takes = tokens >= 1 && tokens <= CUDA_ROW_TOKENS && (tokens == 1 || (!normed && used == 0)) &&
                 matmul_is_quantized(parts[0]->type) && parts[0]->columns <= COLUMNS_MOST && count <= CUDA_PARTS &&
                 used <= USED_MOST && launch_is_hopper(row_kernel<QUANT_Q4_K, QUANT_Q4_K>);
    for (uint32_t i = 1; i < count; i++)
        takes = takes && (parts[i]->type == parts[0]->type ||
                          (parts[i]->type == QUANT_Q6_K && parts[0]->type != QUANT_Q8_0));
    return takes && plan_row(parts, count, normed, used, tokens).shared > 0;
}

cudaError_t cuda_row_matmul(const struct cuda_matmul *m, uint32_t count, const struct cuda_norm *norm,
                            const struct cuda_route *route, cudaStream_t stream) {
    const struct cuda_matrix *parts[CUDA_PARTS];
    enum quant_type other = m->w->type;
    for (uint32_t i = 0; i < count; i++) {
        parts[i] = m[i].w;
        other = m[i].w->type != m->w->type ? m[i].w->type : other;
    }
    const uint32_t rows = route ? 1 : m->tokens;
    const row_plan plan = plan_row(parts, count, norm, route ? route->used : 0, rows);
    if (plan.shared == 0 || rows == 0 || rows > CUDA_ROW_TOKENS || (rows > 1 && norm))
        return cudaErrorInvalidValue;
    row_parameters p = {};
    uint32_t blocks = 0;
    const auto blocks_of = [&](uint32_t i) { return (p.parts[i].row_tiles + p.tiles[i] - 1) / p.tiles[i]; };
    for (uint32_t i = 0; i < count; i++) {
        p.parts[i] = matmul_part_of(m + i);
        p.tiles[i] = plan.tiles;
        blocks += blocks_of(i);
    }
    const uint32_t processors = std::max(launch_processors(), 1u);
    for (uint32_t i = 0; i < count; i++) { /* what takes longest gets what is left of the multiprocessors */
        if (m[i].w->type == m->w->type)
            continue;
        blocks -= blocks_of(i);
        while (p.tiles[i] > 1 && blocks + (p.parts[i].row_tiles + p.tiles[i] - 2) / (p.tiles[i] - 1) <= processors)
            p.tiles[i]--;
        blocks += blocks_of(i);
    }
    for (uint32_t i = 1; i < count; i++)
        p.parts[i].first_block = p.parts[i - 1].first_block + blocks_of(i - 1);
    p.part_count = count;
    p.chunks = matmul_chunks(m);
    p.chains = std::min(p.chunks, (uint32_t)CUDA_CHAINS);
    p.columns = m->w->columns;
    p.weights_at = plan.weights_at;
    p.tile_bytes = plan.tile_bytes;
    p.x_bytes = plan.x_bytes;
    p.rows = rows;
    p.expanded_at = plan.expanded_at;
    p.expanded = plan.expanded;
    if (norm) {
        p.floats = norm->x;
        p.norm = norm->norm;
        p.epsilon = norm->epsilon;
    } else {
        p.x = (const half *)m->x;
        p.x_scale = m->x_scale;
    }
    if (route) {
        p.logits = route->logits;
        p.experts = route->experts;
    }
    p.blocks = blocks;
    p.used = route ? route->used : 1;
    const uint32_t all = blocks * p.used;
    const uint32_t idle = route ? std::min((processors - all % processors) % processors, blocks) : 0;
    const dim3 grid(all + idle);
    const auto go = [&](auto *kernel) {
        return launch_shared(kernel, grid, plan.tiles * TILE_THREADS, plan.shared, stream, p);
    };
    const bool alike = other == m->w->type;
    switch (m->w->type) {
    case QUANT_Q4_K: return alike ? go(row_kernel<QUANT_Q4_K, QUANT_Q4_K>) : go(row_kernel<QUANT_Q4_K, QUANT_Q6_K>);
    case QUANT_Q5_K: return alike ? go(row_kernel<QUANT_Q5_K, QUANT_Q5_K>) : go(row_kernel<QUANT_Q5_K, QUANT_Q6_K>);
    case QUANT_Q6_K: return go(row_kernel<QUANT_Q6_K, QUANT_Q6_K>);
    case QUANT_Q8_0: return go(row_kernel<QUANT_Q8_0, QUANT_Q8_0>);
    default: return cudaErrorInvalidValue;
    }
}
