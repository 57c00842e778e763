/*
 * y = W x, dense, for more than a few tokens on Hopper, with the bits of matmul.cu: see cuda_matmul in cuda.h.
 *
 * Four blocks of a cluster share a few tiles of 16 rows, and each has one chain of their sums. So a block reads a quarter
 * of the tokens' columns, once, and all that it reads lies in its shared memory: weights, whose copies begin before the
 * predecessor has ended, and up to 64 tokens. Each block then finishes a quarter of the tokens, with the sums of all. More
 * tokens are more clusters.
 */
#include <algorithm>

#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/tile.cuh"

namespace {

constexpr int TOKENS = 64, WARPS_MAX = 12;
constexpr uint32_t TILES_MOST = 12; /* of a cluster */
constexpr uint32_t TOKENS_FEW = 16; /* up to which a block for each tile is faster, if there are enough */
constexpr uint32_t ROW_BYTES = matmul_token_bytes(CUDA_CHUNK); /* of a token's chunk */
constexpr size_t SHARED_MOST = 227 << 10;

struct cluster_parameters {
    matmul_part parts[CUDA_PARTS];
    const half *x;
    const float *x_scale;
    uint32_t part_count, chunks, x_stride, tokens;
    uint32_t tiles, token_groups; /* of a cluster; of a pass, each of which has a warp for every tile or two */
};

/* Chunks of the longest chain. */
__host__ __device__ constexpr uint32_t chain_chunks(uint32_t chunks) {
    return (chunks + CUDA_CHAINS - 1) / CUDA_CHAINS;
}

/* Floats of a token's sums. The tokens of a lane's and its neighbours' lie in different banks. */
__host__ __device__ constexpr uint32_t sums_stride(uint32_t tiles) {
    return tiles * CUDA_TILE_ROWS + 4;
}

/* Where things lie in a block's shared memory. Barrier 0: weights; 1 + k: tokens of chunk k of the chain. */
struct layout {
    uint32_t tokens, weights, sums, barriers, bytes;

    __host__ __device__ layout(uint32_t chunks, uint32_t tiles, uint32_t pass_tokens, uint32_t chunk_bytes) {
        const uint32_t own = chain_chunks(chunks);
        tokens = 0;
        weights = tokens + own * pass_tokens * ROW_BYTES;
        sums = weights + own * tiles * chunk_bytes;
        barriers = sums + pass_tokens * sums_stride(tiles) * (uint32_t)sizeof(float);
        bytes = barriers + 8 * (1 + own);
    }
};

#if __CUDA_ARCH__ >= 900

/* All blocks of the cluster have come here, and what they wrote is seen. */
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Loads from the same address of another block of the cluster. */
__device__ __forceinline__ float load_remote(uint32_t address, uint32_t block) {
    float value;
    asm volatile("{\n"
                 ".reg .u32 there;\n"
                 "mapa.shared::cluster.u32 there, %1, %2;\n"
                 "ld.shared::cluster.f32 %0, [there];\n"
                 "}\n"
                 : "=f"(value)
                 : "r"(address), "r"(block));
    return value;
}

/* The tokens and tiles of a block, and the chunks of its chain. */
struct share {
    uint32_t chain, own, first_tile, first_token, count;
};

template <int TYPE>
__device__ __forceinline__ void copy_weights(const cluster_parameters &p, const matmul_part &w, const share &at,
                                             uint32_t weights, uint32_t barrier) {
    constexpr uint32_t chunk_bytes = launch_chunk_bytes(TYPE);
    if (threadIdx.x == 0)
        barrier_expect(barrier, p.tiles * at.own * chunk_bytes);
    for (uint32_t i = threadIdx.x; i < p.tiles * at.own; i += blockDim.x) {
        const uint32_t tile = min(at.first_tile + i / at.own, w.row_tiles - 1);
        const uint64_t chunk = (uint64_t)tile * p.chunks + at.chain + CUDA_CHAINS * (i % at.own);
        barrier_copy(weights + i * chunk_bytes, w.tiles + chunk * chunk_bytes, chunk_bytes, barrier);
    }
}

/* A warp copies a token's columns of a chunk at a time. */
__device__ __forceinline__ void copy_tokens(const cluster_parameters &p, const share &at, uint32_t pass_tokens,
                                            uint32_t tokens, uint32_t barriers) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    for (uint32_t k = 0; k < at.own; k++) {
        const half *from = p.x + (uint64_t)at.first_token * p.x_stride + CUDA_CHUNK * (at.chain + CUDA_CHAINS * k);
        for (uint32_t j = warp; j < at.count; j += blockDim.x / 32)
            copy_sixteen(tokens + (k * pass_tokens + j) * ROW_BYTES + 16 * lane,
                         from + (uint64_t)j * p.x_stride + 8 * lane);
        barrier_arrive_copied(barriers + 8 * k);
    }
}

/* One warp: TILES tiles from `tile` of the cluster's, times 8 * N_TILES tokens from `token` of the pass's. */
template <int TYPE, int N_TILES, int TILES>
__device__ __forceinline__ void multiply(const cluster_parameters &p, const matmul_part &w, const share &at,
                                         const layout &in, unsigned char *memory, uint32_t tile_index, uint32_t token) {
    constexpr uint32_t chunk_bytes = launch_chunk_bytes(TYPE);
    const int lane = threadIdx.x & 31;
    const uint32_t pass_tokens = p.token_groups * 8 * N_TILES;
    const uint32_t barriers = shared_address(memory + in.barriers);
    float sums[TILES][N_TILES][4] = {};
    if (at.own > 0)
        barrier_wait(barriers, 0);
    for (uint32_t k = 0; k < at.own; k++) {
        const half *x[N_TILES];
#pragma unroll
        for (int n = 0; n < N_TILES; n++) /* columns behind the last token repeat it, and nobody reads what comes of them */
            x[n] = (const half *)(memory + in.tokens +
                                  (k * pass_tokens + min(token + 8 * n + lane / 4, at.count - 1)) * ROW_BYTES) +
                   8 * (lane & 3);
        tile<TYPE> now[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++)
            now[i].template load<tile_staged>(memory + in.weights + ((tile_index + i) * at.own + k) * chunk_bytes,
                                              lane);
        decltype(now[0].factors(w.scale, lane)) factors[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++)
            factors[i] = now[i].factors(w.scale, lane);
        barrier_wait(barriers + 8 * (1 + k), 0);
#pragma unroll
        for (int group = 0; group < CUDA_CHUNK / 32; group++) {
            uint4 b[N_TILES];
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                b[n] = *(const uint4 *)(x[n] + 32 * group);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                uint32_t a[8];
                now[i].fragments(group, factors[i], a);
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    mma(sums[i][n], a, b[n].x, b[n].y);
                    mma(sums[i][n], a + 4, b[n].z, b[n].w);
                }
            }
        }
    }
    float *out = (float *)(memory + in.sums) + tile_index * CUDA_TILE_ROWS + lane / 4;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                out[(token + 8 * n + 2 * (lane & 3) + q % 2) * sums_stride(p.tiles) + CUDA_TILE_ROWS * i + q / 2 * 8] =
                    sums[i][n][q];
}

/* Joins the chains of the tokens that are this block's to finish. */
__device__ __forceinline__ void finish(const cluster_parameters &p, const matmul_part &w, const share &at,
                                       const float *sums) {
    const bool swiglu = w.epilogue == CUDA_SWIGLU;
    const uint32_t tile_rows = swiglu ? CUDA_TILE_ROWS / 2 : CUDA_TILE_ROWS, rows = p.tiles * tile_rows;
    const uint32_t quarter = (at.count + CUDA_CHAINS - 1) / CUDA_CHAINS, first = at.chain * quarter;
    const uint32_t count = first < at.count ? min(at.count - first, quarter) : 0;
    for (uint32_t i = threadIdx.x; i < rows * count; i += blockDim.x) {
        const uint32_t j = first + i / rows, r = i % rows, row = at.first_tile * tile_rows + r;
        if (row >= w.rows)
            continue;
        const uint32_t in =
            shared_address(sums + j * sums_stride(p.tiles) + r / tile_rows * CUDA_TILE_ROWS + r % tile_rows);
        const auto sum = [&](uint32_t s) {
            return matmul_join(CUDA_CHAINS, [&](int chain) { return load_remote(s, chain); });
        };
        const uint32_t token = at.first_token + j;
        const float factor = p.x_scale[token] * w.inverse_scale;
        matmul_finish(w.epilogue, sum(in) * factor,
                      swiglu ? sum(in + CUDA_TILE_ROWS / 2 * (uint32_t)sizeof(float)) * factor : 0,
                      w.y + (uint64_t)token * w.y_stride + row);
    }
}

template <int TYPE, int OTHER, int N_TILES, int TILES>
__device__ __forceinline__ void run(const cluster_parameters &p, unsigned char *memory) {
    constexpr uint32_t chunk_bytes = launch_chunk_bytes(TYPE) > launch_chunk_bytes(OTHER) ? launch_chunk_bytes(TYPE)
                                                                                           : launch_chunk_bytes(OTHER);
    const uint32_t pass_tokens = p.token_groups * 8 * N_TILES, cluster = blockIdx.x / CUDA_CHAINS;
    const layout in(p.chunks, p.tiles, pass_tokens, chunk_bytes);
    const uint32_t base = shared_address(memory), barriers = base + in.barriers;
    uint32_t i = 0;
    while (i + 1 < p.part_count && cluster >= p.parts[i + 1].first_block)
        i++;
    const matmul_part &w = p.parts[i];
    share at;
    at.chain = blockIdx.x % CUDA_CHAINS;
    at.own = (p.chunks + CUDA_CHAINS - 1 - at.chain) / CUDA_CHAINS;
    at.first_tile = (cluster - w.first_block) * p.tiles;
    at.first_token = blockIdx.y * pass_tokens;
    at.count = min(p.tokens - at.first_token, pass_tokens);
    const bool other = TYPE != OTHER && w.type != TYPE;

    if (threadIdx.x == 0) {
        for (uint32_t k = 0; k < 1 + at.own; k++)
            barrier_create(barriers + 8 * k, k == 0 ? 1 : blockDim.x);
        barriers_created();
    }
    __syncthreads();
    if (other)
        copy_weights<OTHER>(p, w, at, base + in.weights, barriers);
    else
        copy_weights<TYPE>(p, w, at, base + in.weights, barriers);
    wait_for_predecessor();
    copy_tokens(p, at, pass_tokens, base + in.tokens, barriers + 8);
    const uint32_t warp = threadIdx.x / 32, tile = warp / p.token_groups * TILES,
                   token = warp % p.token_groups * 8 * N_TILES;
    if (other)
        multiply<OTHER, N_TILES, TILES>(p, w, at, in, memory, tile, token);
    else
        multiply<TYPE, N_TILES, TILES>(p, w, at, in, memory, tile, token);
    cluster_barrier();
    finish(p, w, at, (const float *)(memory + in.sums));
    cluster_barrier(); /* no block ends while another reads its sums */
}

#endif

/* A part has the format TYPE or OTHER. */
template <int TYPE, int OTHER, int N_TILES, int TILES>
__global__ void __launch_bounds__(WARPS_MAX * 32, 1) cluster_kernel(const __grid_constant__ cluster_parameters p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char memory[];
    launch_dependents();
    run<TYPE, OTHER, N_TILES, TILES>(p, memory);
#endif
}

/* A way to cut a product: tiles of a cluster, tokens of a pass. */
struct cut {
    uint32_t tiles, pass_tokens;
    size_t shared;
};

/* The fewest tiles a cluster with which all run at once; where that cannot be, the most that fit. tiles 0: none fit. */
cut choose_cut(const struct cuda_matmul *m, uint32_t count) {
    const uint32_t at_once = launch_processors() / CUDA_CHAINS * 9 / 10; /* they lie in groups of other than fours */
    const uint32_t chunks = matmul_chunks(m);
    const uint32_t pass_tokens = m->tokens <= 16 ? 16 : m->tokens <= 32 ? 32 : TOKENS;
    uint32_t chunk_bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        chunk_bytes = std::max(chunk_bytes, (uint32_t)launch_chunk_bytes(m[i].w->type));
    cut best = {};
    for (uint32_t tiles = 2; tiles <= TILES_MOST; tiles += 2) {
        const layout in(chunks, tiles, pass_tokens, chunk_bytes);
        if (in.bytes > SHARED_MOST)
            break;
        uint32_t clusters = 0;
        for (uint32_t i = 0; i < count; i++)
            clusters += (matmul_row_tiles(m + i) + tiles - 1) / tiles;
        best = {tiles, pass_tokens, in.bytes};
        if (clusters <= at_once)
            break;
    }
    return best;
}

template <int TYPE, int OTHER, int N_TILES, int TILES>
cudaError_t launch_cluster(cluster_parameters &p, const cut &c, cudaStream_t stream) {
    const auto kernel = cluster_kernel<TYPE, OTHER, N_TILES, TILES>;
    p.tiles = c.tiles;
    p.token_groups = c.pass_tokens / (8 * N_TILES);
    uint32_t clusters = 0;
    for (uint32_t i = 0; i < p.part_count; i++) {
        p.parts[i].first_block = clusters;
        clusters += (p.parts[i].row_tiles + c.tiles - 1) / c.tiles;
    }
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)c.shared);
    if (error != cudaSuccess)
        return error;
    return launch_clusters(CUDA_CHAINS, kernel,
                           dim3(clusters * CUDA_CHAINS, (p.tokens + c.pass_tokens - 1) / c.pass_tokens),
                           dim3(32 * (c.tiles / TILES) * p.token_groups), c.shared, stream, p);
}

template <int TYPE, int OTHER>
cudaError_t launch_types(cluster_parameters &p, const cut &c, cudaStream_t stream) {
    if (c.pass_tokens == 16)
        return launch_cluster<TYPE, OTHER, 2, 1>(p, c, stream);
    if (c.tiles * c.pass_tokens <= WARPS_MAX * 32)
        return launch_cluster<TYPE, OTHER, 4, 1>(p, c, stream);
    return launch_cluster<TYPE, OTHER, 4, 2>(p, c, stream);
}

bool is_k_quant(enum quant_type type) {
    return type == QUANT_Q4_K || type == QUANT_Q5_K || type == QUANT_Q6_K;
}

} // namespace

bool matmul_cluster_takes(const struct cuda_matmul *m, uint32_t count) {
    if (count > CUDA_PARTS || m->items || m->tokens <= 8)
        return false;
    const enum quant_type first = m[0].w->type;
    uint32_t row_tiles = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (!is_k_quant(first) || (m[i].w->type != first && m[i].w->type != QUANT_Q6_K))
            return false;
        row_tiles += matmul_row_tiles(m + i);
    }
    return (m->tokens > TOKENS_FEW || row_tiles < launch_processors()) && cuda_matmul_streams() &&
           choose_cut(m, count).tiles > 0;
}

cudaError_t matmul_cluster(const struct cuda_matmul *m, uint32_t count, cudaStream_t stream) {
    cluster_parameters p = {};
    bool alike = true;
    for (uint32_t i = 0; i < count; i++) {
        p.parts[i] = matmul_part_of(m + i);
        alike = alike && m[i].w->type == m[0].w->type;
    }
    p.x = (const half *)m->x;
    p.x_scale = m->x_scale;
    p.part_count = count;
    p.chunks = matmul_chunks(m);
    p.x_stride = p.chunks * CUDA_CHUNK;
    p.tokens = m->tokens;
    const cut c = choose_cut(m, count);
    switch (m->w->type) {
    case QUANT_Q4_K:
        return alike ? launch_types<QUANT_Q4_K, QUANT_Q4_K>(p, c, stream)
                     : launch_types<QUANT_Q4_K, QUANT_Q6_K>(p, c, stream);
    case QUANT_Q5_K:
        return alike ? launch_types<QUANT_Q5_K, QUANT_Q5_K>(p, c, stream)
                     : launch_types<QUANT_Q5_K, QUANT_Q6_K>(p, c, stream);
    case QUANT_Q6_K: return launch_types<QUANT_Q6_K, QUANT_Q6_K>(p, c, stream);
    default: return cudaErrorInvalidValue;
    }
}
