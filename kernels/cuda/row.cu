/*
 * The products of a step of one row, with what stands between them, and dense products of a few: see cuda_row_matmul in
 * cuda.h.
 *
 * In such a step most of the time goes to latency, and to fetching instructions. So weights are copied to shared memory
 * before the predecessor has ended, wherever it is known by then which, and expanded in a rolled loop; and the norm
 * before a product, the choice of experts and the rounding of their hidden rows are done by each block for itself, in
 * place of a kernel that all would wait for. The order of every sum is that of the kernels for any number of rows.
 */
#include <algorithm>

#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/tile.cuh"

namespace {

constexpr uint32_t TILES_MOST = 6, TILE_THREADS = 32 * CUDA_CHAINS; /* a block's tiles, a warp a chain */
constexpr uint32_t COLUMNS_MOST = NORM_COLUMNS_MAX, ROUNDS_MOST = COLUMNS_MOST / CUDA_CHUNK / CUDA_CHAINS;
constexpr uint32_t EXPANDED_BYTES = 2 * CUDA_TILE_ROWS * CUDA_CHUNK; /* of a chunk */
constexpr uint32_t USED_MOST = 8, EXPERTS_A_LANE = 4;
constexpr uint32_t SUMS_STRIDE = CUDA_ROW_TOKENS + 1;
constexpr uint32_t MIX_WARPS = 12; /* registers suffice for these beside a block of the product before */
/*
 * Of Hopper's shared memory: what a block can have, and of what two do not fit into a multiprocessor, for blocks that begin
 * early would crowd on those that happen to have room.
 */
constexpr uint32_t SHARED_MOST = 227 << 10, SHARED_ALONE = 115 << 10;
constexpr uint32_t SHARED_BESIDE = 190 << 10; /* leaves room for a block of attention's join */

struct row_parameters {
    matmul_part parts[CUDA_PARTS];
    uint32_t tiles[CUDA_PARTS]; /* of a block of the part, at most blockDim.x / TILE_THREADS */
    uint32_t part_count, chunks, chains, columns, rows;
    const half *x; /* rounded; or NULL: `floats` are to be normed */
    const float *x_scale, *floats, *norm;
    float epsilon;
    uint32_t x_bytes;                           /* of a row, in shared memory */
    uint32_t weights_at, tile_bytes, expanded_at; /* there */
    uint32_t expanded;                            /* chunks of a tile; others are expanded where they are used */
    const float *logits;                          /* by expert, or NULL */
    uint32_t experts, used, blocks; /* used: matrices, a rank's each, of so many blocks */
};

/* Behind it lie x, what is to be normed and the norm, and the weights. */
struct alignas(128) row_memory {
    float squares[NORM_WARPS], greatest[TILES_MOST * CUDA_CHAINS]; /* greatest: of each warp */
    uint32_t chosen[USED_MOST];
    uint64_t weights_full[TILES_MOST][ROUNDS_MOST], x_full, norm_full; /* weights: a chunk of every chain each */
};

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

#if __CUDA_ARCH__ >= 900

/* sums (mma.cuh; every column of b is x) += two groups of weights times x, the lane's part of each. */
__device__ __forceinline__ void multiply_pair(const uint32_t a[2][8], const unsigned char *x, float sums[4]) {
    const uint4 b0 = *(const uint4 *)x, b1 = *(const uint4 *)(x + 64);
    mma(sums, a[0], b0.x, b0.y);
    mma(sums, a[0] + 4, b0.z, b0.w);
    mma(sums, a[1], b1.x, b1.y);
    mma(sums, a[1] + 4, b1.z, b1.w);
}

template <int TYPE>
__device__ __forceinline__ void multiply_chunk(const unsigned char *weights, const unsigned char *x, float matrix_scale,
                                               uint32_t lane, float sums[4]) {
    const tile_in_place<TYPE> now(weights, matrix_scale, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t a[2][8];
        now.fragments(i, a);
        multiply_pair(a, x + 16 * (lane & 3) + 128 * i, sums);
    }
}

/* The same in two steps: each lane reads what it has written. */
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

__device__ __forceinline__ void fetch(void *to, const void *from, uint32_t bytes, uint64_t *full) {
    barrier_expect(full, bytes);
    barrier_copy(to, from, bytes, full);
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

template <class KERNEL, class PARAMETERS>
cudaError_t launch_shared(KERNEL *kernel, dim3 grid, uint32_t threads, uint32_t shared, cudaStream_t stream,
                          const PARAMETERS &p) {
    /* The greatest share of shared memory: else none of these could begin beside another. */
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                             cudaSharedmemCarveoutMaxShared);
    error = error ? error : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(kernel, grid, dim3(threads), shared, stream, p);
}

uint32_t chunks_of(const struct cuda_matrix *w) {
    return (w->columns + CUDA_CHUNK - 1) / CUDA_CHUNK;
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
    /* Between rows 64 more: what eight lanes read of two of them lies in different banks. */
    plan.x_bytes = 2 * CUDA_CHUNK * chunks + (rows > 1 ? 64 : 0);
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

uint32_t expert_bytes_of(const struct cuda_matrix *down) {
    return (chunks_of(down) * ((uint32_t)launch_chunk_bytes(down->type) + 4 * CUDA_CHUNK) + 127) / 128 * 128;
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

bool cuda_row_takes_mix(const struct cuda_matrix *down, uint32_t used) {
    return matmul_is_quantized(down->type) && down->experts <= 32 * EXPERTS_A_LANE && used <= USED_MOST &&
           sizeof(mix_memory) + used * expert_bytes_of(down) <= SHARED_MOST && launch_is_hopper(mix_kernel<QUANT_Q4_K>);
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
