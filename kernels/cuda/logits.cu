/*
 * The router's logits of many rows: a product in f32 with the order of sums of route.cuh. Rows are normed on the way.
 *
 * What a warp has in its lanes where rows are few are 32 classes of columns: class l has fours l, l + 32, .... Here a
 * block has a tile of R * 4 rows and E * 8 experts, of which a lane has every fourth row and every eighth expert. Warp g
 * adds up classes g, g + 8, g + 16 and g + 24 one after the other, for that is the order, and needs only one more sum of
 * each kind; the warps' sums meet in shared memory. Columns come in stages of 32 fours: of 512 columns the eight classes
 * of one turn.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/route.cuh"

namespace {

constexpr uint32_t GROUPS = 8, THREADS = GROUPS * 32, LANE_ROWS = 4, LANE_EXPERTS = 8;
constexpr uint32_t CLASSES = 32, TURNS = CLASSES / GROUPS, STAGE_FOURS = 32, STEPS = STAGE_FOURS / GROUPS;
/* Up to so many logits (128 blocks) the smaller tile takes less time. */
constexpr uint64_t SMALL_TILES = 64 << 10, MIDDLE_TILES = 128 << 10;

template <int R, int E> struct block_tile {
    static constexpr uint32_t rows = R * LANE_ROWS, experts = E * LANE_EXPERTS, lines = rows + experts;
    static constexpr uint32_t stages = lines > 80 ? 3 : lines > 48 ? 4 : 5;
    static constexpr uint32_t sums_stride = experts + LANE_EXPERTS; /* rows of a warp's lanes in different banks */
    float4 ring[stages][lines][STAGE_FOURS];
    static_assert(sizeof(float) * GROUPS * rows * sums_stride <= sizeof ring, "the sums take the ring's place");
};

/* Where four `slot` of a line stands: lines of a warp's lanes in different banks. */
__device__ __forceinline__ uint32_t swizzled(uint32_t slot, uint32_t line) {
    return slot ^ (line & 7);
}

/* The fours of a row that a stage has: stages go through the columns once for each turn of classes. */
struct place {
    uint32_t turn, first; /* first: column's four, a multiple of STEPS * CLASSES */

    __device__ __forceinline__ void advance(uint32_t fours) {
        first += STEPS * CLASSES;
        if (first >= fours) {
            first = 0;
            turn++;
        }
    }
    __device__ __forceinline__ uint32_t four(uint32_t slot) const {
        return first + slot / GROUPS * CLASSES + turn * GROUPS + slot % GROUPS;
    }
};

template <int R, int E>
__global__ void __launch_bounds__(THREADS, R *E >= 32 ? 1 : 2) tiles_kernel(const struct cuda_route r) {
    using block = block_tile<R, E>;
    extern __shared__ __align__(16) unsigned char memory[];
    block &shared = *reinterpret_cast<block *>(memory);
    float4 *norm = reinterpret_cast<float4 *>(memory + sizeof(block));
    const uint32_t fours = r.norm.columns / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first_row = blockIdx.y * block::rows, first_expert = blockIdx.x * block::experts;
    /* Bits of the lane so that of any 16 lanes' 16 bytes those that are the same are read once. */
    const uint32_t own_row = (lane & 1) | (lane >> 1 & 2), own_expert = (lane >> 1 & 1) | (lane >> 2 & 6);
    launch_dependents();
    for (uint32_t i = threadIdx.x; i < fours; i += THREADS)
        norm[i] = ((const float4 *)r.norm.norm)[i];
    wait_for_predecessor();
    float factor[block::rows / GROUPS]; /* of the lines that this thread copies: `warp` and every eighth after it */
#pragma unroll
    for (uint32_t k = 0; k < block::rows / GROUPS; k++)
        factor[k] = r.norm.factors[min(first_row + warp + k * GROUPS, r.norm.rows - 1)];
    __syncthreads();

    place to_copy = {};
    uint32_t free_stage = 0;
    const auto copy = [&] { /* lines behind the last row or expert repeat it */
        const uint32_t i = to_copy.four(lane);
        if (to_copy.turn < TURNS && i < fours)
#pragma unroll
            for (uint32_t k = 0; k < block::lines / GROUPS; k++) {
                const uint32_t line = warp + k * GROUPS;
                const float4 *from =
                    k < block::rows / GROUPS
                        ? (const float4 *)r.norm.x + (uint64_t)min(first_row + line, r.norm.rows - 1) * fours
                        : (const float4 *)r.router +
                              (uint64_t)min(first_expert + line - block::rows, r.experts - 1) * fours;
                const uint32_t to =
                    (uint32_t)__cvta_generic_to_shared(&shared.ring[free_stage][line][swizzled(lane, warp)]);
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + i) : "memory");
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
        to_copy.advance(fours);
        free_stage = free_stage + 1 < block::stages ? free_stage + 1 : 0;
    };
    for (uint32_t s = 0; s + 1 < block::stages; s++)
        copy();

    float total[R][E] = {};
    uint32_t stage = 0;
    place at = {};
    for (uint32_t turn = 0; turn < TURNS; turn++) {
        float sum[R][E] = {};
        const auto add_step = [&](uint32_t step) {
            const uint32_t slot = step * GROUPS + warp;
            const auto &lines = shared.ring[stage];
            float4 x[R];
#pragma unroll
            for (uint32_t a = 0; a < R; a++)
                x[a] = lines[own_row + a * LANE_ROWS][swizzled(slot, own_row + a * LANE_ROWS)];
#pragma unroll
            for (uint32_t b = 0; b < E; b++) {
                const float4 w = lines[block::rows + own_expert + b * LANE_EXPERTS][swizzled(slot, own_expert)];
#pragma unroll
                for (uint32_t a = 0; a < R; a++)
                    sum[a][b] = dot4(w, x[a], sum[a][b]);
            }
        };
        for (; at.turn == turn; at.advance(fours)) {
            asm volatile("cp.async.wait_group %0;" ::"n"(block::stages - 2) : "memory");
            if (at.four(lane) < fours) {
                const float4 own_norm = norm[at.four(lane)];
#pragma unroll
                for (uint32_t k = 0; k < block::rows / GROUPS; k++) {
                    float4 &value = shared.ring[stage][warp + k * GROUPS][swizzled(lane, warp)];
                    value = normed(value, factor[k], own_norm);
                }
            }
            __syncthreads();
            copy();
            if (at.first + STEPS * CLASSES <= fours) {
#pragma unroll
                for (uint32_t step = 0; step < STEPS; step++)
                    add_step(step);
            } else {
                for (uint32_t step = 0; at.four(step * GROUPS + warp) < fours && step < STEPS; step++)
                    add_step(step);
            }
            stage = stage + 1 < block::stages ? stage + 1 : 0;
        }
#pragma unroll
        for (uint32_t a = 0; a < R; a++)
#pragma unroll
            for (uint32_t b = 0; b < E; b++)
                total[a][b] = turn == 0 ? sum[a][b] : total[a][b] + sum[a][b];
    }

    __syncthreads();
    float(*sums)[block::rows][block::sums_stride] = reinterpret_cast<float(*)[block::rows][block::sums_stride]>(memory);
#pragma unroll
    for (uint32_t a = 0; a < R; a++)
#pragma unroll
        for (uint32_t b = 0; b < E; b++)
            sums[warp][own_row + a * LANE_ROWS][own_expert + b * LANE_EXPERTS] = total[a][b];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < block::rows * block::experts; i += THREADS) {
        const uint32_t row = i / block::experts, expert = i % block::experts;
        const auto pair = [&](uint32_t g) { return sums[g][row][expert] + sums[g + 4][row][expert]; };
        if (first_row + row < r.norm.rows && first_expert + expert < r.experts)
            r.logits[(uint64_t)(first_row + row) * r.experts + first_expert + expert] =
                (pair(0) + pair(2)) + (pair(1) + pair(3));
    }
}

template <int R, int E> cudaError_t launch_tiles(const struct cuda_route *r, cudaStream_t stream) {
    using block = block_tile<R, E>;
    const size_t shared = sizeof(block) + r->norm.columns * sizeof(float);
    const dim3 grid((r->experts + block::experts - 1) / block::experts, (r->norm.rows + block::rows - 1) / block::rows);
    cudaError_t error =
        cudaFuncSetAttribute(tiles_kernel<R, E>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return error ? error : launch(tiles_kernel<R, E>, grid, dim3(THREADS), shared, stream, *r);
}

} // namespace

cudaError_t route_logits(const struct cuda_route *r, cudaStream_t stream) {
    const uint64_t logits = (uint64_t)r->norm.rows * r->experts;
    return logits <= SMALL_TILES    ? launch_tiles<4, 4>(r, stream)
           : logits <= MIDDLE_TILES ? launch_tiles<4, 8>(r, stream)
                                    : launch_tiles<8, 8>(r, stream);
}
