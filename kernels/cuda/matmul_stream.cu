/*
 * y = W x by expert on Hopper, with the bits of matmul.cu: see cuda_matmul in cuda.h.
 *
 * A job is two tiles of 16 rows of one item. A block a multiprocessor takes a run of jobs (item_run), each of its groups
 * of warps one after another, and each warp of a group one chain of it. So a warp knows all its chunks beforehand: they
 * come through its ring in the order in which it multiplies them, over the borders of jobs. The tokens of the run's items
 * lie in shared memory, where the first warp copies them, the next item's while there is room.
 */
#include <algorithm>

#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/item_run.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/stream.cuh"
#include "kernels/cuda/tile.cuh"

namespace {

constexpr int WARPS = 16, THREADS = 32 * WARPS, JOB_TILES = 2, JOB_ROWS = JOB_TILES * CUDA_TILE_ROWS;
constexpr uint32_t TOKENS = CUDA_STREAM_TOKENS, MAPS = 4, SLOTS_MOST = 4;
constexpr uint32_t GROUPS_MOST = 15; /* named barriers 1 .. 15 */
constexpr size_t SHARED_MOST = 227 << 10;
constexpr uint32_t JOBS_LEAST = 1024; /* fewer leave multiprocessors idle */
constexpr uint32_t TOKENS_FEW = 16;   /* of an item, up to which chains of one chunk are faster in matmul.cu */

struct stream_parameters {
    matmul_part w;
    const half *x;
    const float *x_scale;
    const cuda_item *items;
    const uint32_t *item_count, *order;
    uint32_t chunks, x_stride, x_divisor, item_jobs;
    uint32_t chains, groups; /* that have chunks: warps of a group; of a block */
    uint32_t slots;          /* of a warp's ring */
    bool items_early;
};

/* An item whose tokens are in shared memory: from row `base` of the buffer on, which wraps. */
struct token_map {
    uint32_t base, count, y_row[TOKENS];
    float factor[TOKENS];
};

/* A group's sums. */
struct exchange {
    float sums[CUDA_CHAINS][JOB_ROWS][TOKENS + 1];
};

/* Behind it lie exchange [groups], the tokens [TOKENS] and the rings [WARPS]. */
struct shared_memory {
    token_map maps[MAPS];
    uint64_t full[MAPS], empty[MAPS];
    uint64_t ring[WARPS][SLOTS_MOST];
};

/* In shared memory, with 64 bytes between: what eight lanes read of two tokens lies in different banks. */
__host__ __device__ constexpr uint32_t token_bytes(uint32_t x_stride) {
    return 2 * x_stride + 64;
}

#if __CUDA_ARCH__ >= 900

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

/* The warp's chunks, of the two tiles of a job together, begun as far ahead as the ring has room. */
template <int TYPE> struct feeder {
    stream_ring ring;
    job_place at;
    const uint8_t *tile;
    uint32_t chain, chunk, second; /* second: from the first tile to the second */

    __device__ __forceinline__ void feed(const stream_parameters &p, int lane) {
        constexpr uint32_t chunk_bytes = launch_chunk_bytes(TYPE);
        while (at.there() && !stream_full(ring)) {
            if (chunk == chain) {
                const uint32_t first = at.of_item * JOB_TILES, tile_bytes = p.chunks * chunk_bytes;
                tile = p.w.tiles + p.items[at.item].expert * p.w.expert_bytes + (uint64_t)first * tile_bytes;
                second = first + 1 < p.w.row_tiles ? tile_bytes : 0;
            }
            const uint8_t *from = tile + chunk * chunk_bytes;
            stream_put(ring, {from, from + second}, chunk_bytes, lane);
            chunk += CUDA_CHAINS;
            if (chunk < p.chunks)
                continue;
            chunk = chain;
            at.advance(p.groups, p.item_jobs);
        }
    }
};

/* All warps of a group. */
__device__ __forceinline__ void group_barrier(uint32_t group, uint32_t warps) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(32 * warps) : "memory");
}

template <int TYPE, int N_TILES>
__device__ __forceinline__ void multiply_chain(const stream_parameters &p, feeder<TYPE> &weights, const token_map &map,
                                               const unsigned char *tokens, exchange &out, uint32_t group, int lane) {
    const uint32_t stride = token_bytes(p.x_stride);
    const unsigned char *x[N_TILES];
#pragma unroll
    for (int n = 0; n < N_TILES; n++) { /* columns behind the last token repeat it, and nobody reads what comes of them */
        const uint32_t row = map.base + min(8 * n + lane / 4, map.count - 1);
        x[n] = tokens + (row < TOKENS ? row : row - TOKENS) * stride + 16 * (lane & 3);
    }
    float sums[JOB_TILES][N_TILES][4] = {};
    for (uint32_t chunk = weights.chain; chunk < p.chunks; chunk += CUDA_CHAINS) {
        tile<TYPE> now[JOB_TILES];
        const uint8_t *slot = stream_get(weights.ring);
#pragma unroll
        for (int i = 0; i < JOB_TILES; i++)
            now[i].template load<tile_staged>(slot + i * launch_chunk_bytes(TYPE), lane);
        stream_release(weights.ring);
        weights.feed(p, lane);
        decltype(now[0].factors(p.w.scale, lane)) factors[JOB_TILES];
#pragma unroll
        for (int i = 0; i < JOB_TILES; i++)
            factors[i] = now[i].factors(p.w.scale, lane);
#pragma unroll
        for (int step = 0; step < CUDA_CHUNK / 32; step++) {
            uint4 b[N_TILES];
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                b[n] = *(const uint4 *)(x[n] + 2 * CUDA_CHUNK * chunk + 64 * step);
#pragma unroll
            for (int i = 0; i < JOB_TILES; i++) {
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
    group_barrier(group, p.chains); /* the sums of the job before are read */
    float(*to)[TOKENS + 1] = out.sums[weights.chain] + lane / 4;
#pragma unroll
    for (int i = 0; i < JOB_TILES; i++)
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                to[CUDA_TILE_ROWS * i + q / 2 * 8][8 * n + 2 * (lane & 3) + q % 2] = sums[i][n][q];
    group_barrier(group, p.chains);
}

/* Joins the chains of a job. */
__device__ __forceinline__ void finish(const stream_parameters &p, const token_map &map, const exchange &in,
                                       uint32_t first_tile, uint32_t thread) {
    const bool swiglu = p.w.epilogue == CUDA_SWIGLU;
    static_assert(JOB_TILES == 2, "");
    const uint32_t rows_shift = swiglu ? 3 : 4, job_shift = rows_shift + 1; /* rows of a tile's results, and of a job's */
    for (uint32_t i = thread; i < map.count << job_shift; i += 32 * p.chains) {
        const uint32_t j = i >> job_shift, r = i & ((1u << job_shift) - 1), row = (first_tile << rows_shift) + r;
        if (row >= p.w.rows)
            continue;
        const auto sum = [&](uint32_t q) {
            return matmul_join(p.chains, [&](int chain) { return in.sums[chain][q][j]; });
        };
        const uint32_t q = (r >> rows_shift) * CUDA_TILE_ROWS + (r & ((1u << rows_shift) - 1));
        const float factor = map.factor[j];
        matmul_finish(p.w.epilogue, sum(q) * factor, swiglu ? sum(q + CUDA_TILE_ROWS / 2) * factor : 0,
                      p.w.y + (uint64_t)map.y_row[j] * p.w.y_stride + row);
    }
}

/* Whether the phase has ended, with one answer for all of the warp. */
__device__ __forceinline__ bool warp_done(shared_place barrier, uint32_t parity) {
    return __all_sync(0xffffffffu, barrier_done(barrier, parity));
}

/* One warp's copying of the run's items' tokens. */
struct token_copier {
    uint32_t first_item, count, next, oldest, base, used;

    /* Begins what there is room for. */
    __device__ __forceinline__ void advance(const stream_parameters &p, shared_memory &shared, uint32_t tokens,
                                            int lane) {
        for (; next < count; next++) {
            const cuda_item item = p.items[first_item + next];
            for (; used + item.count > TOKENS || next - oldest == MAPS; oldest++) {
                if (!warp_done(&shared.empty[oldest % MAPS], oldest / MAPS & 1))
                    return;
                used -= p.items[first_item + oldest].count;
            }
            copy(p, shared, tokens, item, lane);
            base = (base + item.count) % TOKENS;
            used += item.count;
        }
    }

    __device__ __forceinline__ void copy(const stream_parameters &p, shared_memory &shared, uint32_t tokens,
                                         const cuda_item &item, int lane) {
        token_map &map = shared.maps[next % MAPS];
        const uint32_t full = shared_address(&shared.full[next % MAPS]);
        const bool own = (uint32_t)lane < item.count;
        uint32_t y = item.first + lane, x = 0;
        if (own) {
            y = p.order[y];
            x = y / p.x_divisor;
            map.y_row[lane] = y;
            map.factor[lane] = p.x_scale[x] * p.w.inverse_scale;
        }
        if (lane == 0) {
            map.base = base;
            map.count = item.count;
        }
        barrier_expect(full, own ? 2 * p.x_stride : 0); /* every lane, after its part of the map */
        const uint32_t row = base + lane;
        if (own)
            barrier_copy(tokens + (row < TOKENS ? row : row - TOKENS) * token_bytes(p.x_stride),
                         p.x + (uint64_t)x * p.x_stride, 2 * p.x_stride, full);
    }
};

#endif

template <int TYPE>
__global__ void __launch_bounds__(THREADS, 1) stream_kernel(const __grid_constant__ stream_parameters p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char memory[];
    constexpr uint32_t slot_bytes = JOB_TILES * launch_chunk_bytes(TYPE);
    shared_memory &shared = *reinterpret_cast<shared_memory *>(memory);
    exchange *exchanges = reinterpret_cast<exchange *>(memory + sizeof shared);
    unsigned char *tokens = reinterpret_cast<unsigned char *>(exchanges + p.groups),
                  *rings = tokens + TOKENS * token_bytes(p.x_stride);
    const uint32_t warp = threadIdx.x / 32, group = warp / p.chains;
    const int lane = threadIdx.x & 31;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < MAPS; i++) {
            barrier_create(&shared.full[i], 32);
            barrier_create(&shared.empty[i], 32 * p.groups * p.chains);
        }
        barriers_created();
    }
    __syncthreads();
    if (!p.items_early || group >= p.groups)
        wait_for_predecessor();
    if (group >= p.groups)
        return;
    uint32_t begin, end;
    item_run(p.items, *p.item_count, p.item_jobs, lane, begin, end);
    job_place at(begin + group, end, p.item_jobs);
    const uint32_t chain = warp % p.chains;
    feeder<TYPE> weights = {
        stream_create(rings + warp * p.slots * slot_bytes, shared.ring[warp], slot_bytes, p.slots, lane), at, NULL, chain,
        chain, 0};
    weights.feed(p, lane);
    if (p.items_early)
        wait_for_predecessor();
    if (begin == end)
        return;

    token_copier copier = {};
    copier.first_item = begin / p.item_jobs;
    copier.count = (end - 1) / p.item_jobs - copier.first_item + 1;
    const auto copy_ahead = [&] {
        if (warp == 0)
            copier.advance(p, shared, shared_address(tokens), lane);
    };
    uint32_t k = 0; /* of the run's items */
    const auto wait_for_item = [&] {
        while (!warp_done(&shared.full[k % MAPS], k / MAPS & 1))
            copy_ahead();
    };
    /* The warp is done with item k. */
    const auto next_item = [&] {
        barrier_arrive(&shared.empty[k % MAPS]);
        k++;
        wait_for_item();
    };
    wait_for_item();
    for (; at.there(); at.advance(p.groups, p.item_jobs)) {
        while (copier.first_item + k < at.item)
            next_item();
        copy_ahead();
        const token_map &map = shared.maps[k % MAPS];
        switch ((map.count + 7) / 8) {
        case 1: multiply_chain<TYPE, 1>(p, weights, map, tokens, exchanges[group], group, lane); break;
        case 2: multiply_chain<TYPE, 2>(p, weights, map, tokens, exchanges[group], group, lane); break;
        default: multiply_chain<TYPE, 3>(p, weights, map, tokens, exchanges[group], group, lane);
        }
        finish(p, map, exchanges[group], at.of_item * JOB_TILES, threadIdx.x - 32 * p.chains * group);
    }
    while (k + 1 < copier.count) /* a group may have no job in the last items: their tokens wait for it all the same */
        next_item();
#endif
}

/* Chains that have chunks. */
uint32_t chains_of(uint32_t x_stride) {
    return std::min(x_stride / CUDA_CHUNK, (uint32_t)CUDA_CHAINS);
}

uint32_t groups_of(uint32_t chains) {
    return std::min(WARPS / chains, GROUPS_MOST);
}

/* What a block has besides its rings. */
size_t shared_bytes(uint32_t x_stride) {
    return sizeof(shared_memory) + groups_of(chains_of(x_stride)) * sizeof(exchange) +
           (size_t)TOKENS * token_bytes(x_stride);
}

/* Slots of a warp's ring; 0 where there is no room. */
uint32_t ring_slots(enum quant_type type, uint32_t x_stride) {
    const size_t all = WARPS * JOB_TILES * launch_chunk_bytes(type), other = shared_bytes(x_stride);
    return other < SHARED_MOST ? std::min((uint32_t)((SHARED_MOST - other) / all), SLOTS_MOST) : 0;
}

template <int TYPE> cudaError_t launch_stream(const stream_parameters &p, uint32_t jobs, cudaStream_t stream) {
    const size_t shared = shared_bytes(p.x_stride) + WARPS * p.slots * JOB_TILES * launch_chunk_bytes(TYPE);
    const cudaError_t error =
        cudaFuncSetAttribute(stream_kernel<TYPE>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error
                 : launch(stream_kernel<TYPE>, dim3(std::min(jobs, launch_processors())), dim3(THREADS), shared, stream,
                          p);
}

uint32_t item_jobs(const struct cuda_matmul *m) {
    return (m->w->rows + JOB_ROWS - 1) / JOB_ROWS;
}

uint32_t jobs_most(const struct cuda_matmul *m) {
    return m->item_limit * item_jobs(m);
}

uint32_t x_stride_of(const struct cuda_matmul *m) {
    return matmul_chunks(m) * CUDA_CHUNK;
}

} // namespace

bool cuda_matmul_streams(void) {
    return launch_is_hopper(stream_kernel<QUANT_Q4_K>);
}

bool matmul_stream_takes(const struct cuda_matmul *m) {
    const bool worth = m->tokens > TOKENS_FEW || x_stride_of(m) > CUDA_CHAINS * CUDA_CHUNK;
    return matmul_is_quantized(m->w->type) && m->items && worth && m->tokens <= TOKENS && jobs_most(m) >= JOBS_LEAST &&
           ring_slots(m->w->type, x_stride_of(m)) > 0 && cuda_matmul_streams();
}

cudaError_t matmul_stream(const struct cuda_matmul *m, cudaStream_t stream) {
    stream_parameters p = {};
    p.w = matmul_part_of(m);
    p.x = (const half *)m->x;
    p.x_scale = m->x_scale;
    p.items = m->items;
    p.item_count = m->item_count;
    p.order = m->order;
    p.x_stride = x_stride_of(m);
    p.chunks = p.x_stride / CUDA_CHUNK;
    p.item_jobs = item_jobs(m);
    p.chains = chains_of(p.x_stride);
    p.groups = groups_of(p.chains);
    p.slots = ring_slots(m->w->type, p.x_stride);
    p.x_divisor = m->x_divisor ? m->x_divisor : 1;
    p.items_early = m->items_early;
    switch (m->w->type) {
    case QUANT_Q4_K: return launch_stream<QUANT_Q4_K>(p, jobs_most(m), stream);
    case QUANT_Q5_K: return launch_stream<QUANT_Q5_K>(p, jobs_most(m), stream);
    case QUANT_Q6_K: return launch_stream<QUANT_Q6_K>(p, jobs_most(m), stream);
    case QUANT_Q8_0: return launch_stream<QUANT_Q8_0>(p, jobs_most(m), stream);
    default: return cudaErrorInvalidValue;
    }
}
