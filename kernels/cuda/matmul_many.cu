/*
 * y = W x for many tokens on Hopper, with the bits of matmul.cu: see cuda_matmul in cuda.h.
 *
 * A unit is 128 rows of one expert (or of the dense matrix) times up to 128 tokens. One block a multiprocessor takes
 * units blockIdx.x, blockIdx.x + gridDim.x, ...: a warpgroup copies activations to a ring of stages of 64 columns, and
 * runs ahead over units; two warpgroups with 64 rows each expand weights to f16 in registers and multiply by wgmma,
 * which sums as mma.m16n8k16 does. A warp's registers of a tile are its quarter of wgmma's left operand; tokens come
 * interleaved (cuda_activation), so that each column meets its weight. Chains run one after the other: `sums` holds the
 * running one, `total` those before.
 */
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tile.cuh"

namespace {

struct many_parameters {
    const uint8_t *tiles;
    const half *x;
    const float *x_scale;
    float *y;
    const cuda_item *items;
    const uint32_t *item_count, *order;
    uint64_t expert_bytes;
    uint32_t chunks, row_tiles, row_blocks, rows, y_stride, x_stride, x_divisor, tokens;
    float scale, inverse_scale;
    enum cuda_epilogue epilogue;
};

constexpr int UNIT_TOKENS = CUDA_MANY_TOKENS, UNIT_TILES = 8, CONSUMERS = 2, GROUP_THREADS = 128;
constexpr int THREADS = (CONSUMERS + 1) * GROUP_THREADS;
constexpr int STAGE_COLUMNS = 64, STAGE_BYTES = UNIT_TOKENS * STAGE_COLUMNS * 2, STAGES = 8, STAGES_BEHIND = 3;
constexpr int CHUNK_STAGES = CUDA_CHUNK / STAGE_COLUMNS;
/* A unit has at least CHUNK_STAGES stages: when the copiers begin unit u + 4, u is done with. */
constexpr int MAPS = 4;

struct token_map {
    uint32_t row[UNIT_TOKENS]; /* of y */
    float factor[UNIT_TOKENS];
};

struct shared_memory {
    unsigned char stages[STAGES][STAGE_BYTES];
    token_map maps[MAPS];
    uint64_t full[STAGES], empty[STAGES];
};

/* Tokens first .. first + count of expert `expert`, and the unit's first tile of rows. */
struct unit {
    uint32_t expert, first, count, row_tile;
};

__device__ __forceinline__ uint32_t unit_count(const many_parameters &p) {
    const uint32_t groups = p.items ? *p.item_count : (p.tokens + UNIT_TOKENS - 1) / UNIT_TOKENS;
    return groups * p.row_blocks;
}

__device__ __forceinline__ unit unit_at(const many_parameters &p, uint32_t index) {
    const uint32_t group = index / p.row_blocks, row_tile = index % p.row_blocks * UNIT_TILES;
    if (p.items) {
        const cuda_item item = p.items[group];
        return {item.expert, item.first, item.count, row_tile};
    }
    const uint32_t first = group * UNIT_TOKENS;
    return {0, first, min(p.tokens - first, (uint32_t)UNIT_TOKENS), row_tile};
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void barrier_create(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define SUMS_16(s, i)                                                                                                  \
    "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]),        \
        "+f"(s[i + 7]), "+f"(s[i + 8]), "+f"(s[i + 9]), "+f"(s[i + 10]), "+f"(s[i + 11]), "+f"(s[i + 12]),             \
        "+f"(s[i + 13]), "+f"(s[i + 14]), "+f"(s[i + 15])
#define NAMES_32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* sums += a b: 64 rows, 16 columns, 2 * size of sums tokens. */
__device__ __forceinline__ void multiply(float (&s)[32], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NAMES_32 "}, {%32, %33, %34, %35}, %36, "
                 "1, 1, 1, 0;"
                 : SUMS_16(s, 0), SUMS_16(s, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply(float (&s)[64], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES_64 "}, {%64, %65, %66, %67}, %68, "
                 "1, 1, 1, 0;"
                 : SUMS_16(s, 0), SUMS_16(s, 16), SUMS_16(s, 32), SUMS_16(s, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void multiply_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Rows of 128 bytes, swizzled in sixteens within 8 rows: stage_offset below. */
__device__ __forceinline__ uint64_t stage_descriptor(const unsigned char *stage) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (shared_address(stage) & 0x3ffff) >> 4;
}

__device__ __forceinline__ uint32_t stage_offset(uint32_t row, uint32_t sixteen) {
    return row * 128 + ((sixteen ^ (row & 7)) << 4);
}

/* The warpgroup that fills the ring. */
__device__ void copy_tokens(const many_parameters &p, shared_memory &shared, int thread) {
    const uint32_t units = unit_count(p);
    const uint32_t sixteen = thread % 8, first_row = thread / 8;
    uint32_t stage = 0, parity = 1, issued = 0, map = 0;
    for (uint32_t u = blockIdx.x; u < units; u += gridDim.x, map = (map + 1) % MAPS) {
        const unit at = unit_at(p, u);
        const half *rows[UNIT_TOKENS / 16];
#pragma unroll
        for (int i = 0; i < UNIT_TOKENS / 16; i++) {
            const uint32_t j = min(first_row + 16 * i, at.count - 1),
                           y = p.order ? p.order[at.first + j] : at.first + j;
            rows[i] = p.x + (uint64_t)(y / p.x_divisor) * p.x_stride + 8 * sixteen;
        }
        const uint32_t own = min((uint32_t)thread, at.count - 1),
                       y = p.order ? p.order[at.first + own] : at.first + own;
        const float factor = p.x_scale[y / p.x_divisor] * p.inverse_scale;
        bool mapped = false;
        for (uint32_t chain = 0; chain < CUDA_CHAINS; chain++)
            for (uint32_t column = chain * CUDA_CHUNK; column < p.x_stride; column += CUDA_CHAINS * CUDA_CHUNK)
                for (uint32_t quarter = 0; quarter < CHUNK_STAGES; quarter++) {
                    barrier_wait(&shared.empty[stage], parity);
                    if (!mapped) {
                        shared.maps[map].row[thread] = y;
                        shared.maps[map].factor[thread] = factor;
                        mapped = true;
                    }
#pragma unroll
                    for (int i = 0; i < UNIT_TOKENS / 16; i++)
                        if (16 * i < at.count) {
                            const uint32_t to =
                                shared_address(shared.stages[stage]) + stage_offset(first_row + 16 * i, sixteen);
                            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to),
                                         "l"(rows[i] + column + STAGE_COLUMNS * quarter)
                                         : "memory");
                        }
                    asm volatile("cp.async.commit_group;" ::: "memory");
                    if (issued++ >= STAGES_BEHIND) {
                        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES_BEHIND) : "memory");
                        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                        barrier_arrive(&shared.full[(stage + STAGES - STAGES_BEHIND) % STAGES]);
                    }
                    stage = (stage + 1) % STAGES;
                    parity ^= stage == 0;
                }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (uint32_t behind = min(issued, (uint32_t)STAGES_BEHIND); behind > 0; behind--)
        barrier_arrive(&shared.full[(stage + STAGES - behind) % STAGES]);
}

/* Where a consumer stands in the ring: stages come and go in order. */
struct ring_reader {
    shared_memory &shared;
    uint32_t stage = 0, parity = 0;
    bool begun = false;

    /* The next stage's descriptor, when its copy is complete. */
    __device__ __forceinline__ uint64_t next() {
        stage = begun ? (stage + 1) % STAGES : 0;
        parity ^= begun && stage == 0;
        begun = true;
        barrier_wait(&shared.full[stage], parity);
        return stage_descriptor(shared.stages[stage]);
    }
    /* This warp is done with the stage before the present one. */
    __device__ __forceinline__ void release_previous(bool there, int lane) {
        if (there && lane == 0)
            barrier_arrive(&shared.empty[(stage + STAGES - 1) % STAGES]);
    }
};

template <int TYPE, int N>
__device__ __forceinline__ void multiply_unit(const many_parameters &p, ring_reader &ring, const unit &at,
                                              const token_map &map, uint32_t warp_tile, int lane) {
    constexpr bool AHEAD = sizeof(tile<TYPE>) <= 144; /* larger ones leave no registers for a second */
    constexpr size_t chunk_bytes = launch_chunk_bytes(TYPE);
    const uint8_t *row = p.tiles + at.expert * p.expert_bytes +
                         (uint64_t)min(at.row_tile + warp_tile, p.row_tiles - 1) * p.chunks * chunk_bytes;
    float total[N / 2], sums[N / 2];
    tile<TYPE> next;
    if (AHEAD)
        next.load(row, lane);
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        total[i] = 0;
    for (uint32_t chain = 0; chain < CUDA_CHAINS; chain++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            sums[i] = 0;
        for (uint32_t chunk = chain; chunk < p.chunks; chunk += CUDA_CHAINS) {
            tile<TYPE> now;
            if (AHEAD) {
                now = next;
                const uint32_t then = chunk + CUDA_CHAINS < p.chunks ? chunk + CUDA_CHAINS : chain + 1;
                if (then < p.chunks)
                    next.load(row + then * chunk_bytes, lane);
            } else {
                now.load(row + chunk * chunk_bytes, lane);
            }
            const auto factors = now.factors(p.scale, lane);
            uint32_t a[2][8];
            uint64_t b = 0;
#pragma unroll
            for (int group = 0; group < CUDA_CHUNK / 32; group++) {
                now.fragments(group, factors, a[group & 1]);
                const bool previous = ring.begun;
                b = group & 1 ? b + 4 : ring.next();
                multiply_fence();
                multiply(sums, a[group & 1], b);
                multiply(sums, a[group & 1] + 4, b + 2);
                multiply_commit();
                multiply_wait<1>();
                if (!(group & 1))
                    ring.release_previous(previous, lane);
            }
        }
        multiply_wait<0>();
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            total[i] = chain == 0 ? sums[i] : total[i] + sums[i];
    }

    const bool swiglu = p.epilogue == CUDA_SWIGLU;
    const uint32_t tile_rows = swiglu ? CUDA_TILE_ROWS / 2 : CUDA_TILE_ROWS;
    const uint32_t out_row = (at.row_tile + warp_tile) * tile_rows + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 4; i++) { /* token 8 (i / 2) + 2 t + i % 2 */
        const uint32_t j = 8 * (i / 2) + 2 * (lane & 3) + i % 2;
        if (j >= at.count)
            continue;
        const float factor = map.factor[j];
        float *y = p.y + (uint64_t)map.row[j] * p.y_stride + out_row;
        const float first = total[4 * (i / 2) + i % 2] * factor, second = total[4 * (i / 2) + 2 + i % 2] * factor;
        if (swiglu) {
            if (out_row < p.rows)
                *y = silu(first) * second;
            continue;
        }
        if (out_row < p.rows)
            *y = p.epilogue == CUDA_ADD ? *y + first : p.epilogue == CUDA_GATED ? silu(*y) * first : first;
        if (out_row + 8 < p.rows)
            y[8] = p.epilogue == CUDA_ADD ? y[8] + second : p.epilogue == CUDA_GATED ? silu(y[8]) * second : second;
    }
}

#endif

template <int TYPE> __global__ void __launch_bounds__(THREADS, 1) many_kernel(const many_parameters p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char memory[];
    shared_memory &shared = *reinterpret_cast<shared_memory *>(memory);
    const int group = threadIdx.x / GROUP_THREADS, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_create(&shared.full[i], GROUP_THREADS);
            barrier_create(&shared.empty[i], CONSUMERS * GROUP_THREADS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    launch_dependents();
    wait_for_predecessor();
    if (group == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        copy_tokens(p, shared, threadIdx.x % GROUP_THREADS);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        ring_reader ring = {shared};
        const uint32_t units = unit_count(p), warp_tile = threadIdx.x / 32;
        uint32_t map = 0;
        for (uint32_t u = blockIdx.x; u < units; u += gridDim.x, map = (map + 1) % MAPS) {
            const unit at = unit_at(p, u);
            if (at.count > UNIT_TOKENS / 2)
                multiply_unit<TYPE, UNIT_TOKENS>(p, ring, at, shared.maps[map], warp_tile, lane);
            else
                multiply_unit<TYPE, UNIT_TOKENS / 2>(p, ring, at, shared.maps[map], warp_tile, lane);
        }
    }
#endif
}

template <int TYPE> cudaError_t launch_many(const many_parameters &p, uint32_t units, cudaStream_t stream) {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    error = error ? error : cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    error = error ? error
                  : cudaFuncSetAttribute(many_kernel<TYPE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         sizeof(shared_memory));
    return error ? error
                 : launch(many_kernel<TYPE>, dim3(std::min(units, (uint32_t)processors)), dim3(THREADS),
                          sizeof(shared_memory), stream, p);
}

} // namespace

bool cuda_matmul_many_runs(void) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, many_kernel<QUANT_Q4_K>) == cudaSuccess &&
           attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
}

cudaError_t cuda_matmul_many(const struct cuda_matmul *m, cudaStream_t stream) {
    const struct cuda_matrix *w = m->w;
    many_parameters p = {};
    p.tiles = (const uint8_t *)w->tiles;
    p.x = (const half *)m->x;
    p.x_scale = m->x_scale;
    p.y = m->y;
    p.items = m->items;
    p.item_count = m->item_count;
    p.order = m->items ? m->order : NULL;
    p.expert_bytes = cuda_matrix_expert_bytes(w->type, w->columns, w->rows);
    p.chunks = (w->columns + CUDA_CHUNK - 1) / CUDA_CHUNK;
    p.row_tiles = (w->rows + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
    p.row_blocks = (p.row_tiles + UNIT_TILES - 1) / UNIT_TILES;
    p.rows = m->epilogue == CUDA_SWIGLU ? w->rows / 2 : w->rows;
    p.y_stride = m->y_stride;
    p.x_stride = p.chunks * CUDA_CHUNK;
    p.x_divisor = m->x_divisor ? m->x_divisor : 1;
    p.tokens = m->tokens;
    p.scale = w->scale;
    p.inverse_scale = 1.0f / w->scale;
    p.epilogue = m->epilogue;
    const uint32_t groups = m->items ? m->item_limit : (m->tokens + UNIT_TOKENS - 1) / UNIT_TOKENS;
    switch (w->type) {
    case QUANT_F32:
        return launch_many<QUANT_F32>(p, groups * p.row_blocks, stream);
    case QUANT_F16:
        return launch_many<QUANT_F16>(p, groups * p.row_blocks, stream);
    case QUANT_BF16:
        return launch_many<QUANT_BF16>(p, groups * p.row_blocks, stream);
    case QUANT_Q8_0:
        return launch_many<QUANT_Q8_0>(p, groups * p.row_blocks, stream);
    case QUANT_Q4_K:
        return launch_many<QUANT_Q4_K>(p, groups * p.row_blocks, stream);
    case QUANT_Q5_K:
        return launch_many<QUANT_Q5_K>(p, groups * p.row_blocks, stream);
    case QUANT_Q6_K:
        return launch_many<QUANT_Q6_K>(p, groups * p.row_blocks, stream);
    }
    return cudaErrorInvalidValue;
}
