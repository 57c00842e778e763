#ifndef MOED_KERNELS_CUDA_MANY_CUH
#define MOED_KERNELS_CUDA_MANY_CUH

#include <algorithm>
#include <cuda_fp16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/unit.cuh"

/* What the warpgroups of matmul_many.cu share. */
namespace {

struct many_parameters {
    matmul_part w;
    const half *x;
    const float *x_scale;
    unit_list units;
    const uint32_t *order;
    uint32_t chunks, x_stride, x_divisor;
};

constexpr int UNIT_TOKENS = 128, UNIT_TILES = 8, UNIT_ROWS = UNIT_TILES * CUDA_TILE_ROWS;
constexpr int CONSUMERS = 2, GROUP_THREADS = 128, GROUP_WARPS = GROUP_THREADS / 32;
constexpr int THREADS = (CONSUMERS + 2) * GROUP_THREADS;
constexpr int STAGE_COLUMNS = 64, STAGE_BYTES = UNIT_TOKENS * STAGE_COLUMNS * 2;
constexpr int COPIED_TOKENS = GROUP_THREADS / 8; /* of a stage by one copy of each thread, a multiple of 8 */
constexpr int CHUNK_STAGES = CUDA_CHUNK / STAGE_COLUMNS;
/*
 * Of the units known at a time the writers are at the first, the multipliers at most two further on; the copiers' ring is
 * at most eight stages, so that they are at most two units, of at least four stages each, ahead of these.
 */
constexpr int MAPS = 6;
constexpr int SUMS_STRIDE = UNIT_ROWS + 4; /* tokens 0, 2, 4, 6 of eight rows meet in no bank */
constexpr int SHARED_MOST = 227 * 1024, STAGES_MOST = 8;

/* What all warps know of a unit. */
struct unit_map {
    const uint8_t *tiles; /* of the expert */
    uint32_t count;       /* tokens; 0: there is no unit, and none follows */
    uint32_t row_tile;
    uint32_t row[UNIT_TOKENS]; /* of y */
};

/* Formats whose chunks have no room in shared memory are read from device memory where they are used. */
template <int TYPE> struct shared_memory {
    static constexpr bool STAGED = launch_chunk_bytes(TYPE) <= 4352;
    static constexpr int CHUNKS = STAGED ? 2 : 1, CHUNK_BYTES = STAGED ? launch_chunk_bytes(TYPE) : 16;
    static constexpr int OTHER_BYTES = CHUNKS * UNIT_TILES * CHUNK_BYTES + UNIT_TOKENS * SUMS_STRIDE * 4 +
                                       MAPS * sizeof(unit_map) + 512;
    static constexpr int STAGES = std::min((SHARED_MOST - OTHER_BYTES) / STAGE_BYTES, STAGES_MOST);

    unsigned char stages[STAGES][STAGE_BYTES];
    unsigned char weights[CHUNKS][UNIT_TILES][CHUNK_BYTES];
    float sums[UNIT_TOKENS][SUMS_STRIDE];
    unit_map maps[MAPS];
    uint64_t full[STAGES], empty[STAGES], weights_full[CHUNKS], weights_empty[CHUNKS], map_full[MAPS], sums_full,
        sums_empty;
};

} // namespace

#endif
