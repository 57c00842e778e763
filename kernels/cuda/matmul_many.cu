/*
 * y = W x for many tokens on Hopper, with the bits of matmul.cu: see cuda_matmul in cuda.h.
 *
 * A unit is 128 rows of one expert (or of the dense matrix) times up to 128 tokens, of an item cut into pieces of nearly
 * one size. One block a multiprocessor takes units blockIdx.x, blockIdx.x + gridDim.x, ... by four warpgroups:
 *   one copies activations to a ring of stages of 64 columns and weights to a ring of chunks, and runs ahead over units;
 *   two, with 64 rows each, expand weights to f16 in registers and multiply by wgmma, for little more tokens than there
 *   are; a warp's registers of a tile are its quarter of wgmma's left operand;
 *   one takes their sums from shared memory, while they are at the next unit, and writes y.
 * Tokens come interleaved (cuda_activation), so that each column meets its weight. Chains run one after the other: `sums`
 * holds the running one, `total` those before.
 */
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/many.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* Fills the rings and the maps, up to a map without tokens. */
template <int TYPE> __device__ void copy_units(const many_parameters &p, shared_memory<TYPE> &shared, int thread) {
    using memory = shared_memory<TYPE>;
    const uint32_t sixteen = thread % 8, first_row = thread / 8, first_offset = wgmma_offset(first_row, sixteen);
    ring_place<memory::STAGES> stage;
    ring_place<memory::CHUNKS> chunk;
    ring_place<MAPS> map;
    unit_finder finder(p.units, thread % 32);
    const auto row_of = [&](const unit &at) { /* of y, of the thread's token */
        const uint32_t j = at.first + min((uint32_t)thread, max(at.count, 1u) - 1);
        return p.order && at.count ? p.order[j] : j;
    };
    uint32_t index = blockIdx.x;
    unit next = finder.find(index);
    uint32_t next_row = row_of(next);
    for (;; map.step()) {
        const unit at = next;
        unit_map &known = shared.maps[map.at];
        const uint8_t *tiles = p.w.tiles + at.expert * p.w.expert_bytes;
        known.row[thread] = next_row;
        if (thread == 0) {
            known.tiles = tiles;
            known.count = at.count;
            known.row_tile = at.row_tile;
        }
        barrier_arrive(&shared.map_full[map.at]);
        if (at.count == 0)
            break;
        barrier_wait(&shared.map_full[map.at], map.parity); /* the others' rows */
        next = finder.find(index += gridDim.x);
        next_row = row_of(next); /* used a unit later */

        const int copies = (at.count + COPIED_TOKENS - 1) / COPIED_TOKENS;
        uint32_t rows[UNIT_TOKENS / COPIED_TOKENS]; /* of x, in sixteens of bytes */
#pragma unroll
        for (int i = 0; i < UNIT_TOKENS / COPIED_TOKENS; i++)
            rows[i] = known.row[first_row + COPIED_TOKENS * i] / p.x_divisor * (p.x_stride / 8) + sixteen;
        for (uint32_t chain = 0; chain < CUDA_CHAINS; chain++)
            for (uint32_t column = chain * CUDA_CHUNK; column < p.x_stride; column += CUDA_CHAINS * CUDA_CHUNK) {
                if (memory::STAGED) {
                    if (thread == 0) {
                        barrier_wait(&shared.weights_empty[chunk.at], chunk.parity ^ 1);
                        barrier_expect(&shared.weights_full[chunk.at], UNIT_TILES * memory::CHUNK_BYTES);
                        for (uint32_t i = 0; i < UNIT_TILES; i++) { /* tiles behind the last repeat it */
                            const uint64_t tile = min(at.row_tile + i, p.w.row_tiles - 1);
                            barrier_copy(shared.weights[chunk.at][i],
                                         tiles + (tile * p.chunks + column / CUDA_CHUNK) * memory::CHUNK_BYTES,
                                         memory::CHUNK_BYTES, &shared.weights_full[chunk.at]);
                        }
                    }
                    __syncwarp();
                    chunk.step();
                }
                for (uint32_t quarter = 0; quarter < CHUNK_STAGES; quarter++) {
                    barrier_wait(&shared.empty[stage.at], stage.parity ^ 1);
                    const uint32_t to = shared_address(shared.stages[stage.at]) + first_offset;
                    const uint4 *from = (const uint4 *)(p.x + column + STAGE_COLUMNS * quarter);
#pragma unroll
                    for (int i = 0; i < UNIT_TOKENS / COPIED_TOKENS; i++) {
                        if (i >= copies)
                            break;
                        copy_sixteen(to + wgmma_offset(COPIED_TOKENS * i, 0), from + rows[i]);
                    }
                    barrier_arrive_copied(&shared.full[stage.at]);
                    stage.step();
                }
            }
    }
}

/* The rings as a multiplying warp sees them. */
template <int TYPE> struct reader {
    shared_memory<TYPE> &shared;
    ring_place<shared_memory<TYPE>::STAGES> next, oldest; /* oldest: of those held */
    ring_place<shared_memory<TYPE>::CHUNKS> chunk;

    /* The next stage's descriptor, when its copy is complete. */
    __device__ __forceinline__ uint64_t take() {
        barrier_wait(&shared.full[next.at], next.parity);
        shared_seen_async();
        const uint64_t descriptor = wgmma_descriptor(shared_address(shared.stages[next.at]));
        next.step();
        return descriptor;
    }
    /* This warp is done with the oldest stage it holds. */
    __device__ __forceinline__ void release(int lane) {
        if (lane == 0)
            barrier_arrive(&shared.empty[oldest.at]);
        oldest.step();
    }
    __device__ __forceinline__ void load(tile<TYPE> &tile, uint32_t warp_tile, int lane) {
        barrier_wait(&shared.weights_full[chunk.at], chunk.parity);
        tile.template load<tile_staged>(shared.weights[chunk.at][warp_tile], lane);
        __syncwarp();
        if (lane == 0)
            barrier_arrive(&shared.weights_empty[chunk.at]);
        chunk.step();
    }
};

/* The warp's 16 rows times N tokens; their sums go to shared memory as soon as the unit before has been written. */
template <int TYPE, int N>
__device__ __forceinline__ void multiply_unit(const many_parameters &p, shared_memory<TYPE> &shared,
                                              reader<TYPE> &reader, const unit_map &map, uint32_t sums_parity,
                                              uint32_t warp_tile, int lane) {
    constexpr size_t chunk_bytes = launch_chunk_bytes(TYPE);
    float total[N / 2], sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        total[i] = 0;
    for (uint32_t chain = 0; chain < CUDA_CHAINS; chain++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            sums[i] = 0;
        for (uint32_t chunk = chain; chunk < p.chunks; chunk += CUDA_CHAINS) {
            tile<TYPE> now;
            if (shared_memory<TYPE>::STAGED)
                reader.load(now, warp_tile, lane);
            else
                now.load(map.tiles + (min(map.row_tile + warp_tile, p.w.row_tiles - 1) * (uint64_t)p.chunks + chunk) *
                                         chunk_bytes,
                         lane);
            const auto factors = now.factors(p.w.scale, lane);
            uint32_t a[2][8]; /* a group is expanded while the one before is multiplied */
            uint64_t b = 0;
#pragma unroll
            for (int group = 0; group < CUDA_CHUNK / 32; group++) {
                now.fragments(group, factors, a[group & 1]);
                b = group & 1 ? b + 4 : reader.take();
                wgmma_fence();
                wgmma_multiply<true>(sums, a[group & 1], b);
                wgmma_multiply<true>(sums, a[group & 1] + 4, b + 2);
                wgmma_commit();
                wgmma_wait<1>(sums);
                if (group % 2 == 0 && (group > 0 || chunk > chain))
                    reader.release(lane);
            }
        }
        wgmma_wait<0>(sums);
        if (chain < p.chunks)
            reader.release(lane);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            total[i] += sums[i];
    }

    barrier_wait(&shared.sums_empty, sums_parity ^ 1);
    float *out = &shared.sums[2 * (lane & 3)][warp_tile * CUDA_TILE_ROWS + lane / 4];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        out[(8 * (i / 4) + i % 2) * SUMS_STRIDE + (i & 2 ? 8 : 0)] = total[i];
    barrier_arrive(&shared.sums_full);
}

/* Each number of tokens costs registers, for ptxas gives the sums of one no registers of another's: at eight it spills. */
template <int TYPE>
__device__ void multiply_units(const many_parameters &p, shared_memory<TYPE> &shared, uint32_t warp_tile, int lane) {
    reader<TYPE> reader = {shared};
    ring_place<MAPS> map;
    for (uint32_t parity = 0;; parity ^= 1, map.step()) {
        barrier_wait(&shared.map_full[map.at], map.parity);
        const unit_map &known = shared.maps[map.at];
        switch ((known.count + UNIT_TOKEN_STEP - 1) / UNIT_TOKEN_STEP) {
        case 0: return;
        case 1:
        case 2: multiply_unit<TYPE, 32>(p, shared, reader, known, parity, warp_tile, lane); break;
        case 3: multiply_unit<TYPE, 48>(p, shared, reader, known, parity, warp_tile, lane); break;
        case 4: multiply_unit<TYPE, 64>(p, shared, reader, known, parity, warp_tile, lane); break;
        case 5: multiply_unit<TYPE, 80>(p, shared, reader, known, parity, warp_tile, lane); break;
        case 6: multiply_unit<TYPE, 96>(p, shared, reader, known, parity, warp_tile, lane); break;
        default: multiply_unit<TYPE, 128>(p, shared, reader, known, parity, warp_tile, lane);
        }
    }
}

/* Rows lane, lane + 32, ... of the warp's tokens, every fourth of the unit. */
template <int EPILOGUE, int TYPE>
__device__ __forceinline__ void write_unit(const many_parameters &p, const shared_memory<TYPE> &shared,
                                           const unit_map &map, uint32_t own_row, float own_factor, int warp,
                                           int lane) {
    constexpr bool SWIGLU = EPILOGUE == CUDA_SWIGLU, GATED = EPILOGUE == CUDA_GATED, ADD = EPILOGUE == CUDA_ADD;
    constexpr int TILE_ROWS = SWIGLU ? CUDA_TILE_ROWS / 2 : CUDA_TILE_ROWS, PARTS = UNIT_TILES * TILE_ROWS / 32;
    constexpr int BATCH = GATED ? 1 : 2; /* tokens gone about together, so that they wait together */
    const uint32_t first_row = map.row_tile * TILE_ROWS + lane;
    for (uint32_t first = warp; first < map.count; first += BATCH * GROUP_WARPS) {
        float *y[BATCH], value[BATCH * PARTS], gate[BATCH * PARTS]; /* gate: or what y was */
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const uint32_t j = min(first + GROUP_WARPS * b, map.count - 1);
            const float factor = __shfl_sync(0xffffffffu, own_factor, j / GROUP_WARPS);
            y[b] = p.w.y + (uint64_t)__shfl_sync(0xffffffffu, own_row, j / GROUP_WARPS) * p.w.y_stride + first_row;
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const int row = lane + 32 * i;
                const float *sum = &shared.sums[j][SWIGLU ? row / 8 * CUDA_TILE_ROWS + row % 8 : row];
                value[PARTS * b + i] = sum[SWIGLU ? CUDA_TILE_ROWS / 2 : 0] * factor;
                gate[PARTS * b + i] = 0;
                if (SWIGLU)
                    gate[PARTS * b + i] = sum[0] * factor;
                else if ((GATED || ADD) && first_row + 32 * i < p.w.rows)
                    gate[PARTS * b + i] = y[b][32 * i];
            }
        }
        if (SWIGLU || GATED)
            silu_all(gate);
#pragma unroll
        for (int i = 0; i < BATCH * PARTS; i++)
            if (first + GROUP_WARPS * (i / PARTS) < map.count && first_row + 32 * (i % PARTS) < p.w.rows)
                y[i / PARTS][32 * (i % PARTS)] = SWIGLU || GATED ? gate[i] * value[i]
                                                 : ADD           ? __fadd_rn(gate[i], value[i])
                                                                 : value[i];
    }
}

template <int TYPE>
__device__ void write_units(const many_parameters &p, shared_memory<TYPE> &shared, int warp, int lane) {
    ring_place<MAPS> map;
    for (uint32_t parity = 0;; parity ^= 1, map.step()) {
        barrier_wait(&shared.map_full[map.at], map.parity);
        const unit_map &known = shared.maps[map.at];
        if (known.count == 0)
            return;
        const uint32_t row = known.row[warp + GROUP_WARPS * lane];
        const float factor = p.x_scale[row / p.x_divisor] * p.w.inverse_scale;
        barrier_wait(&shared.sums_full, parity);
        switch (p.w.epilogue) {
        case CUDA_STORE: write_unit<CUDA_STORE>(p, shared, known, row, factor, warp, lane); break;
        case CUDA_ADD: write_unit<CUDA_ADD>(p, shared, known, row, factor, warp, lane); break;
        case CUDA_SWIGLU: write_unit<CUDA_SWIGLU>(p, shared, known, row, factor, warp, lane); break;
        case CUDA_GATED: write_unit<CUDA_GATED>(p, shared, known, row, factor, warp, lane); break;
        }
        barrier_arrive(&shared.sums_empty);
    }
}

#endif

template <int TYPE> __global__ void __launch_bounds__(THREADS, 1) many_kernel(const many_parameters p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char memory[];
    shared_memory<TYPE> &shared = *reinterpret_cast<shared_memory<TYPE> *>(memory);
    const int group = threadIdx.x / GROUP_THREADS, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int i = 0; i < shared_memory<TYPE>::STAGES; i++) {
            barrier_create(&shared.full[i], GROUP_THREADS);
            barrier_create(&shared.empty[i], CONSUMERS * GROUP_WARPS);
        }
        for (int i = 0; i < shared_memory<TYPE>::CHUNKS; i++) {
            barrier_create(&shared.weights_full[i], 1);
            barrier_create(&shared.weights_empty[i], CONSUMERS * GROUP_WARPS);
        }
        for (int i = 0; i < MAPS; i++)
            barrier_create(&shared.map_full[i], GROUP_THREADS);
        barrier_create(&shared.sums_full, CONSUMERS * GROUP_THREADS);
        barrier_create(&shared.sums_empty, GROUP_THREADS);
        barriers_created();
    }
    __syncthreads();
    launch_dependents();
    wait_for_predecessor();
    if (group == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        copy_units(p, shared, threadIdx.x % GROUP_THREADS);
    } else if (group == CONSUMERS + 1) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        write_units(p, shared, threadIdx.x % GROUP_THREADS / 32, lane);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        multiply_units(p, shared, threadIdx.x / 32, lane);
    }
#endif
}

template <int TYPE> cudaError_t launch_many(many_parameters &p, cudaStream_t stream) {
    constexpr size_t shared = sizeof(shared_memory<TYPE>);
    static_assert(shared <= SHARED_MOST, "");
    const uint32_t processors = launch_processors();
    const cudaError_t error =
        cudaFuncSetAttribute(many_kernel<TYPE>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    /* Smaller pieces where whole ones would leave half of the multiprocessors without. */
    unit_list &units = p.units;
    units.piece_tokens = UNIT_TOKENS;
    while (!units.items && units.piece_tokens > UNIT_TOKEN_STEP &&
           (units.tokens + units.piece_tokens - 1) / units.piece_tokens * units.row_blocks * 2 <= processors)
        units.piece_tokens /= 2;
    return error ? error : launch(many_kernel<TYPE>, dim3(processors), dim3(THREADS), shared, stream, p);
}

} // namespace

bool cuda_matmul_many_runs(void) {
    return launch_is_hopper(many_kernel<QUANT_Q4_K>);
}

cudaError_t cuda_matmul_many(const struct cuda_matmul *m, cudaStream_t stream) {
    many_parameters p = {};
    p.w = matmul_part_of(m);
    p.x = (const half *)m->x;
    p.x_scale = m->x_scale;
    p.units.items = m->items;
    p.units.item_count = m->item_count;
    p.units.tokens = m->tokens;
    p.units.row_blocks = (p.w.row_tiles + UNIT_TILES - 1) / UNIT_TILES;
    p.units.block_tiles = UNIT_TILES;
    p.order = m->items ? m->order : NULL;
    p.chunks = matmul_chunks(m);
    p.x_stride = p.chunks * CUDA_CHUNK;
    p.x_divisor = m->x_divisor ? m->x_divisor : 1;
    switch (m->w->type) {
    case QUANT_F32: return launch_many<QUANT_F32>(p, stream);
    case QUANT_F16: return launch_many<QUANT_F16>(p, stream);
    case QUANT_BF16: return launch_many<QUANT_BF16>(p, stream);
    case QUANT_Q8_0: return launch_many<QUANT_Q8_0>(p, stream);
    case QUANT_Q4_K: return launch_many<QUANT_Q4_K>(p, stream);
    case QUANT_Q5_K: return launch_many<QUANT_Q5_K>(p, stream);
    case QUANT_Q6_K: return launch_many<QUANT_Q6_K>(p, stream);
    }
    return cudaErrorInvalidValue;
}
