/*
 * y = W x by expert, or of very many rows, on Hopper, with the bits of matmul.cu: see cuda_matmul in cuda.h.
 *
 * A job is two tiles of 16 rows of one item. A block a multiprocessor takes a run of jobs (item_run), each of its groups
 * of warps one after another, and each warp of a group one chain of it. So a warp knows all its chunks beforehand: they
 * come through its ring in the order in which it multiplies them, over the borders of jobs. The tokens of the run's items
 * lie in shared memory, where the first warp copies them, the next item's while there is room.
 *
 * Where no chain has more than one chunk, as in down, a job is one tile and a warp has all its chains: what such a product
 * takes is the way from one kernel to the next, not multiplications. So it begins as soon as a multiprocessor is free, and
 * rounds the tokens itself, a warp each.
 */
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/item_run.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/stream.cuh"
#include "kernels/cuda/tile.cuh"

namespace {

constexpr int WARPS = 16, THREADS = 32 * WARPS, JOB_TILES = 2, JOB_ROWS = JOB_TILES * CUDA_TILE_ROWS;

/* Tiles of a job whose chains are all one warp's, or have a warp each. */
__host__ __device__ constexpr int job_tiles(bool whole) {
    return whole ? 1 : JOB_TILES;
}

constexpr uint32_t TOKENS = CUDA_STREAM_TOKENS, MAPS = 4, SLOTS_MOST = 4;
constexpr uint32_t GROUPS_MOST = 15; /* named barriers 1 .. 15 */
constexpr size_t SHARED_MOST = 227 << 10;
constexpr uint32_t JOBS_LEAST = 1024; /* fewer leave multiprocessors idle */
constexpr uint32_t TOKENS_FEW = 16;   /* of an item, up to which down's are faster in matmul.cu */

struct stream_parameters {
    matmul_part w;
    const half *x; /* and x_scale, or floats */
    const float *x_scale, *floats;
    const cuda_item *items; /* NULL: one, of all tokens in their order */
    const uint32_t *item_count, *order;
    uint32_t tokens, columns, chunks, x_stride, x_divisor, item_limit, item_jobs;
    uint32_t warps, groups;     /* of a group; of a block */
    uint32_t slots, token_rows; /* of a warp's ring; of the tokens' buffer */
    uint32_t items_at;          /* in shared memory */
    bool items_early;

    /* WHOLE: from L2, as the kernel that followed the items' maker may not have ended. */
    template <bool WHOLE> __device__ __forceinline__ uint32_t read(const uint32_t *from) const {
        return WHOLE ? __ldcg(from) : *from;
    }
    template <bool WHOLE> __device__ __forceinline__ cuda_item item(uint32_t i) const {
        return items ? cuda_item{read<WHOLE>(&items[i].expert), read<WHOLE>(&items[i].first), read<WHOLE>(&items[i].count)}
                     : cuda_item{0, 0, tokens};
    }
    template <bool WHOLE> __device__ __forceinline__ uint32_t assignment(uint32_t i) const {
        return order ? read<WHOLE>(order + i) : i;
    }
};

/* An item whose tokens are in shared memory: from row `base` of the buffer on, which wraps. */
struct token_map {
    uint32_t base, count, y_row[TOKENS];
    float factor[TOKENS];
};

/* The sums of a group of warps. */
struct exchange {
    float sums[CUDA_CHAINS][JOB_ROWS][TOKENS + 1];
};

/*
 * Behind it lie exchange [groups], if a job's chains are not one warp's, the tokens [token_rows], the rings [WARPS] and the
 * items [item_limit].
 */
struct shared_memory {
    token_map maps[MAPS];
    uint64_t full[MAPS], empty[MAPS];
    uint64_t ring[WARPS][SLOTS_MOST];
};

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ cuda_item *items_in_shared(const stream_parameters &p) {
    extern __shared__ __align__(128) unsigned char memory[];
    return (cuda_item *)(memory + p.items_at);
}

/* A job of a run that ends before `end`, and what it is of its item: found by adding, as a division takes 20 times as long. */
struct job_place {
    uint32_t job, end, item, of_item;

    __device__ __forceinline__ job_place(uint32_t job, uint32_t end, uint32_t item_jobs)
        : job(job), end(end), item(job / item_jobs), of_item(job % item_jobs) {}
    __device__ __forceinline__ bool there() const {
        return job < end;
    }
    __device__ __forceinline__ void advance(uint32_t jobs, uint32_t item_jobs) {
        job += jobs;
        for (of_item += jobs; of_item >= item_jobs; of_item -= item_jobs)
            item++;
    }
};

/* The warp's chunks, of the tiles of a job together, begun as far ahead as the ring has room. */
template <int TYPE, bool WHOLE> struct feeder {
    stream_ring ring;
    job_place at;
    uint32_t first, chunk;               /* first: of a job's chunks */
    const uint8_t *matrix = NULL, *tile; /* matrix: of item `item` */
    uint32_t item, second;               /* second: from the first tile to the second */

    __device__ __forceinline__ feeder(const stream_ring &ring, const job_place &at, uint32_t first)
        : ring(ring), at(at), first(first), chunk(first), item(at.item - 1) {} /* none yet */

    __device__ __forceinline__ void feed(const stream_parameters &p, int lane) {
        constexpr uint32_t chunk_bytes = launch_chunk_bytes(TYPE);
        while (at.there() && !stream_full(ring)) {
            if (chunk == first) {
                const uint32_t tile_bytes = p.chunks * chunk_bytes, first_tile = at.of_item * job_tiles(WHOLE);
                if (item != at.item)
                    matrix = p.w.tiles + items_in_shared(p)[at.item].expert * p.w.expert_bytes;
                item = at.item;
                tile = matrix + (uint64_t)first_tile * tile_bytes;
                second = first_tile + 1 < p.w.row_tiles ? tile_bytes : 0;
            }
            const uint8_t *from = tile + chunk * chunk_bytes;
            if constexpr (WHOLE)
                stream_put(ring, {from}, chunk_bytes, lane);
            else
                stream_put(ring, {from, from + second}, chunk_bytes, lane);
            chunk += WHOLE ? 1 : CUDA_CHAINS;
            if (chunk < p.chunks)
                continue;
            chunk = first;
            at.advance(p.groups, p.item_jobs);
        }
    }
};

/* All warps of a group. */
__device__ __forceinline__ void group_barrier(uint32_t group, uint32_t warps) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(32 * warps) : "memory");
}

/* Where a lane reads its columns of tokens; those behind the last repeat it, and nobody reads what comes of them. */
template <int N_TILES> struct token_columns {
    const unsigned char *x[N_TILES];

    __device__ __forceinline__ token_columns(const stream_parameters &p, const token_map &map,
                                             const unsigned char *tokens, int lane) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            const uint32_t row = map.base + min(8 * n + lane / 4, map.count - 1);
            x[n] = tokens + (row < p.token_rows ? row : row - p.token_rows) * matmul_token_bytes(p.x_stride) +
                   16 * (lane & 3);
        }
    }
};

/* Adds the products of the ring's next chunks, one of each of TILES, with the tokens; the ring is fed on. */
template <int TYPE, bool WHOLE, int TILES, int N_TILES>
__device__ __forceinline__ void multiply_chunk(const stream_parameters &p, feeder<TYPE, WHOLE> &weights, uint32_t chunk,
                                               const token_columns<N_TILES> &columns, int lane,
                                               float (&sums)[TILES][N_TILES][4]) {
    tile<TYPE> now[TILES];
    const uint8_t *slot = stream_get(weights.ring);
#pragma unroll
    for (int i = 0; i < TILES; i++)
        now[i].template load<tile_staged>(slot + i * launch_chunk_bytes(TYPE), lane);
    stream_release(weights.ring);
    weights.feed(p, lane);
    decltype(now[0].factors(p.w.scale, lane)) factors[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++)
        factors[i] = now[i].factors(p.w.scale, lane);
#pragma unroll
    for (int step = 0; step < CUDA_CHUNK / 32; step++) {
        uint4 b[N_TILES];
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            b[n] = *(const uint4 *)(columns.x[n] + 2 * CUDA_CHUNK * chunk + 64 * step);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint32_t a[8];
            now[i].fragments(step, factors[i], a);
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                mma(sums[i][n], a, b[n].x, b[n].y);
                mma(sums[i][n], a + 4, b[n].z, b[n].w);
            }
        }
    }
}

/* One chain of a job's tiles, whose sums go to where all warps of the group find them. */
template <int TYPE, int N_TILES>
__device__ __forceinline__ void multiply_chain(const stream_parameters &p, feeder<TYPE, false> &weights,
                                               const token_map &map, const unsigned char *tokens, exchange &out,
                                               uint32_t group, int lane) {
    const token_columns<N_TILES> columns(p, map, tokens, lane);
    float sums[JOB_TILES][N_TILES][4] = {};
    for (uint32_t chunk = weights.first; chunk < p.chunks; chunk += CUDA_CHAINS)
        multiply_chunk(p, weights, chunk, columns, lane, sums);
    group_barrier(group, p.warps); /* the sums of the job before are read */
    float(*to)[TOKENS + 1] = out.sums[weights.first] + lane / 4;
#pragma unroll
    for (int i = 0; i < JOB_TILES; i++)
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                to[CUDA_TILE_ROWS * i + q / 2 * 8][8 * n + 2 * (lane & 3) + q % 2] = sums[i][n][q];
    group_barrier(group, p.warps);
}

/* Joins the chains of a job. */
__device__ __forceinline__ void finish(const stream_parameters &p, const token_map &map, const exchange &in,
                                       uint32_t first_tile, uint32_t thread) {
    const bool swiglu = p.w.epilogue == CUDA_SWIGLU;
    static_assert(JOB_TILES == 2, "");
    const uint32_t rows_shift = swiglu ? 3 : 4, job_shift = rows_shift + 1; /* rows of a tile's results, and of a job's */
    for (uint32_t i = thread; i < map.count << job_shift; i += 32 * p.warps) {
        const uint32_t j = i >> job_shift, r = i & ((1u << job_shift) - 1), row = (first_tile << rows_shift) + r;
        if (row >= p.w.rows)
            continue;
        const auto sum = [&](uint32_t q) {
            return matmul_join(p.warps, [&](int chain) { return in.sums[chain][q][j]; });
        };
        const uint32_t q = (r >> rows_shift) * CUDA_TILE_ROWS + (r & ((1u << rows_shift) - 1));
        const float factor = map.factor[j];
        matmul_finish(p.w.epilogue, sum(q) * factor, swiglu ? sum(q + CUDA_TILE_ROWS / 2) * factor : 0,
                      p.w.y + (uint64_t)map.y_row[j] * p.w.y_stride + row);
    }
}

/* All chains of a tile, each of one chunk, whose sums a lane joins as they come. */
template <int TYPE, int N_TILES>
__device__ __forceinline__ void multiply_whole(const stream_parameters &p, feeder<TYPE, true> &weights,
                                               const token_map &map, const unsigned char *tokens, uint32_t tile,
                                               int lane) {
    const token_columns<N_TILES> columns(p, map, tokens, lane);
    float joined[N_TILES][4];
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            joined[n][q] = -0.0f; /* and a sum are that sum */
#pragma unroll 1
    for (uint32_t chunk = 0; chunk < CUDA_CHAINS; chunk++) {
        float sums[1][N_TILES][4] = {};
        if (chunk < p.chunks)
            multiply_chunk(p, weights, chunk, columns, lane, sums);
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                joined[n][q] += sums[0][n][q]; /* in matmul_join's order, and 0 of a chain that there is not */
    }
    const bool swiglu = p.w.epilogue == CUDA_SWIGLU;
    const uint32_t row = tile * (swiglu ? CUDA_TILE_ROWS / 2 : CUDA_TILE_ROWS) + lane / 4;
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int q = 0; q < 2; q++) {
            const uint32_t j = 8 * n + 2 * (lane & 3) + q;
            if (j >= map.count)
                continue;
            const float low = joined[n][q] * map.factor[j], high = joined[n][2 + q] * map.factor[j];
            float *y = p.w.y + (uint64_t)map.y_row[j] * p.w.y_stride + row;
            if (row < p.w.rows)
                matmul_finish(p.w.epilogue, low, high, y);
            if (!swiglu && row + CUDA_TILE_ROWS / 2 < p.w.rows)
                matmul_finish(p.w.epilogue, high, 0, y + CUDA_TILE_ROWS / 2);
        }
}

/* Whether the phase has ended, with one answer for all of the warp. */
__device__ __forceinline__ bool warp_done(shared_place barrier, uint32_t parity) {
    return __all_sync(0xffffffffu, barrier_done(barrier, parity));
}

/* Brings the run's items' tokens: the first warp has them copied, or each warp rounds some. */
template <bool ROUNDS> struct token_copier {
    uint32_t first_item, count, next, oldest, base, used;

    /* Begins what there is room for. */
    __device__ __forceinline__ void advance(const stream_parameters &p, shared_memory &shared, unsigned char *tokens,
                                            uint32_t warp, int lane) {
        for (; next < count; next++) {
            const cuda_item item = items_in_shared(p)[first_item + next];
            for (; used + item.count > p.token_rows || next - oldest == MAPS; oldest++) {
                if (!warp_done(&shared.empty[oldest % MAPS], oldest / MAPS & 1))
                    return;
                used -= items_in_shared(p)[first_item + oldest].count;
            }
            if constexpr (ROUNDS)
                round(p, shared, tokens, item, warp, lane);
            else
                copy(p, shared, shared_address(tokens), item, lane);
            base += item.count;
            base -= base < p.token_rows ? 0 : p.token_rows;
            used += item.count;
        }
    }

    __device__ __forceinline__ void copy(const stream_parameters &p, shared_memory &shared, uint32_t tokens,
                                         const cuda_item &item, int lane) {
        token_map &map = shared.maps[next % MAPS];
        const uint32_t full = shared_address(&shared.full[next % MAPS]);
        const bool own = (uint32_t)lane < item.count;
        uint32_t y = item.first + lane, x = 0;
        const uint32_t at = base + lane, row = at < p.token_rows ? at : at - p.token_rows;
        if (own) {
            y = p.assignment<false>(y);
            x = y / p.x_divisor;
            barrier_expect_more(full, 2 * p.x_stride);
            barrier_copy(tokens + row * matmul_token_bytes(p.x_stride), p.x + (uint64_t)x * p.x_stride, 2 * p.x_stride,
                         full);
            map.y_row[lane] = y;
            map.factor[lane] = p.x_scale[x] * p.w.inverse_scale; /* which comes while the row does */
        }
        if (lane == 0) {
            map.base = base;
            map.count = item.count;
        }
        barrier_arrive(full); /* every lane, after its part of the map */
    }

    /* Rows of the buffer are dealt to the warps in turn. */
    __device__ __forceinline__ void round(const stream_parameters &p, shared_memory &shared, unsigned char *tokens,
                                          const cuda_item &item, uint32_t warp, int lane) {
        token_map &map = shared.maps[next % MAPS];
#pragma unroll 1
        for (uint32_t j = (warp - base) % WARPS; j < item.count; j += WARPS) {
            const uint32_t y = p.assignment<true>(item.first + j), at = base + j;
            const uint32_t row = at < p.token_rows ? at : at - p.token_rows;
            const float4 *values = (const float4 *)(p.floats + (uint64_t)(y / p.x_divisor) * p.columns);
            const float scale = round_few(values, p.columns / 4, p.chunks,
                                          (uint2 *)(tokens + row * matmul_token_bytes(p.x_stride)), lane);
            if (lane == 0) {
                map.y_row[j] = y;
                map.factor[j] = scale * p.w.inverse_scale;
            }
        }
        if (warp == 0 && lane == 0) {
            map.base = base;
            map.count = item.count;
        }
        barrier_arrive(&shared.full[next % MAPS]);
    }
};

#endif

/* WHOLE: a job is one tile, and a group one warp; there are no more chunks than chains, and rows are `floats`. */
template <int TYPE, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 1) stream_kernel(const __grid_constant__ stream_parameters p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char memory[];
    constexpr uint32_t slot_bytes = job_tiles(WHOLE) * launch_chunk_bytes(TYPE);
    shared_memory &shared = *reinterpret_cast<shared_memory *>(memory);
    exchange *exchanges = reinterpret_cast<exchange *>(memory + sizeof shared);
    unsigned char *tokens = reinterpret_cast<unsigned char *>(exchanges + (WHOLE ? 0 : p.groups)),
                  *rings = tokens + p.token_rows * matmul_token_bytes(p.x_stride);
    cuda_item *const items = items_in_shared(p);
    const uint32_t warp = threadIdx.x / 32, group = WHOLE ? warp : warp / p.warps;
    const int lane = threadIdx.x & 31;
    if (p.items_early)
        launch_dependents();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < MAPS; i++) {
            barrier_create(&shared.full[i], WHOLE ? THREADS : 32);
            barrier_create(&shared.empty[i], 32 * p.groups * p.warps);
        }
        barriers_created();
    }
    if (!p.items_early) {
        wait_for_predecessor();
        launch_dependents(); /* who comes next finds the items there */
    }
    const uint32_t item_count = p.items ? p.read<WHOLE>(p.item_count) : 1;
    for (uint32_t i = threadIdx.x; i < p.item_limit; i += THREADS) /* all, as how many there are comes no sooner */
        items[i] = p.item<WHOLE>(i);
    __syncthreads();
    if (group >= p.groups) {
        wait_for_predecessor();
        return;
    }
    uint32_t begin, end;
    item_run(items, item_count, p.item_jobs, lane, begin, end);
    job_place at(begin + group, end, p.item_jobs);
    feeder<TYPE, WHOLE> weights(
        stream_create(rings + warp * p.slots * slot_bytes, shared.ring[warp], slot_bytes, p.slots, lane), at,
        WHOLE ? 0 : warp % p.warps);
    weights.feed(p, lane);
    if (p.items_early)
        wait_for_predecessor();
    if (begin == end)
        return;

    token_copier<WHOLE> copier = {};
    copier.first_item = begin / p.item_jobs;
    copier.count = (end - 1) / p.item_jobs - copier.first_item + 1;
    uint32_t k = 0; /* of the run's items */
#pragma unroll 1
    while (true) {
        if (WHOLE || warp == 0)
            copier.advance(p, shared, tokens, warp, lane);
        if (!warp_done(&shared.full[k % MAPS], k / MAPS & 1))
            continue;
        const bool there = at.there();
        if (!there || copier.first_item + k < at.item) { /* the warp is done with item k */
            if (k + 1 == copier.count)
                break;
            barrier_arrive(&shared.empty[k % MAPS]); /* tokens of others wait for it, also where there is no job left */
            k++;
            continue;
        }
        const token_map &map = shared.maps[k % MAPS];
        const auto multiply = [&](auto n_tiles) {
            constexpr int N_TILES = decltype(n_tiles)::value;
            if constexpr (WHOLE)
                multiply_whole<TYPE, N_TILES>(p, weights, map, tokens, at.of_item, lane);
            else
                multiply_chain<TYPE, N_TILES>(p, weights, map, tokens, exchanges[group], group, lane);
        };
        switch ((map.count + 7) / 8) {
        case 1: multiply(std::integral_constant<int, 1>()); break;
        case 2: multiply(std::integral_constant<int, 2>()); break;
        default: multiply(std::integral_constant<int, 3>());
        }
        if constexpr (!WHOLE)
            finish(p, map, exchanges[group], at.of_item * JOB_TILES, threadIdx.x - 32 * p.warps * group);
        at.advance(p.groups, p.item_jobs);
    }
#endif
}

uint32_t item_limit(const struct cuda_matmul *m) {
    return m->items ? m->item_limit : 1;
}

/* How a product is cut; slots 0: it cannot be. */
struct stream_plan {
    bool whole;
    uint32_t warps, groups, slots, token_rows;
    size_t items_at, shared;
};

stream_plan plan_stream(const struct cuda_matmul *m) {
    const enum quant_type type = m->w->type;
    const uint32_t chunks = matmul_chunks(m);
    stream_plan plan = {};
    plan.whole = m->floats;
    plan.token_rows = m->items ? TOKENS : m->tokens;
    plan.warps = plan.whole ? 1 : std::min(chunks, (uint32_t)CUDA_CHAINS);
    plan.groups = plan.whole ? WARPS : std::min(WARPS / plan.warps, GROUPS_MOST);
    const size_t slot = WARPS * job_tiles(plan.whole) * launch_chunk_bytes(type);
    const size_t rings_at = sizeof(shared_memory) + (plan.whole ? 0 : plan.groups * sizeof(exchange)) +
                            (size_t)plan.token_rows * matmul_token_bytes(chunks * CUDA_CHUNK);
    const size_t items = item_limit(m) * sizeof(cuda_item);
    if (rings_at + items < SHARED_MOST)
        plan.slots = std::min((uint32_t)((SHARED_MOST - rings_at - items) / slot), SLOTS_MOST);
    plan.items_at = rings_at + plan.slots * slot;
    plan.shared = plan.items_at + items;
    return plan;
}

template <int TYPE, bool WHOLE>
cudaError_t launch_stream(const stream_parameters &p, uint32_t jobs, size_t shared, cudaStream_t stream) {
    const auto kernel = stream_kernel<TYPE, WHOLE>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(kernel, dim3(std::min(jobs, launch_processors())), dim3(THREADS), shared, stream, p);
}

uint32_t item_jobs(const struct cuda_matmul *m, bool whole) {
    const uint32_t tiles = job_tiles(whole);
    return (matmul_row_tiles(m) + tiles - 1) / tiles;
}

uint32_t jobs_most(const struct cuda_matmul *m, bool whole) {
    return item_limit(m) * item_jobs(m, whole);
}

} // namespace

bool cuda_matmul_streams(void) {
    return launch_is_hopper(stream_kernel<QUANT_Q4_K, false>);
}

bool matmul_stream_takes(const struct cuda_matmul *m) {
    if (!matmul_is_quantized(m->w->type) || m->tokens > TOKENS)
        return false;
    const bool few = matmul_chunks(m) <= CUDA_CHAINS;
    if (m->floats ? !few || m->tokens <= TOKENS_FEW : m->items && few && m->tokens <= TOKENS_FEW)
        return false;
    const stream_plan plan = plan_stream(m);
    return plan.slots > 0 && jobs_most(m, plan.whole) >= JOBS_LEAST && cuda_matmul_streams();
}

cudaError_t matmul_stream(const struct cuda_matmul *m, cudaStream_t stream) {
    const stream_plan plan = plan_stream(m);
    stream_parameters p = {};
    p.w = matmul_part_of(m);
    p.x = (const half *)m->x;
    p.x_scale = m->x_scale;
    p.floats = m->floats;
    p.tokens = m->tokens;
    p.columns = m->w->columns;
    p.items = m->items;
    p.item_count = m->item_count;
    p.order = m->order;
    p.chunks = matmul_chunks(m);
    p.x_stride = p.chunks * CUDA_CHUNK;
    p.items_at = (uint32_t)plan.items_at;
    p.item_limit = item_limit(m);
    p.item_jobs = item_jobs(m, plan.whole);
    p.warps = plan.warps;
    p.groups = plan.groups;
    p.slots = plan.slots;
    p.token_rows = plan.token_rows;
    p.x_divisor = m->x_divisor ? m->x_divisor : 1;
    p.items_early = m->items_early || !m->items;
    const auto go = [&](auto type) {
        constexpr int TYPE = decltype(type)::value;
        const uint32_t jobs = jobs_most(m, plan.whole);
        return plan.whole ? launch_stream<TYPE, true>(p, jobs, plan.shared, stream)
                          : launch_stream<TYPE, false>(p, jobs, plan.shared, stream);
    };
    switch (m->w->type) {
    case QUANT_Q4_K: return go(std::integral_constant<int, QUANT_Q4_K>());
    case QUANT_Q5_K: return go(std::integral_constant<int, QUANT_Q5_K>());
    case QUANT_Q6_K: return go(std::integral_constant<int, QUANT_Q6_K>());
    case QUANT_Q8_0: return go(std::integral_constant<int, QUANT_Q8_0>());
    default: return cudaErrorInvalidValue;
    }
}
