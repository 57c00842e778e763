#ifndef MOED_KERNELS_CUDA_MATMUL_CUH
#define MOED_KERNELS_CUDA_MATMUL_CUH

#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/silu.cuh"

/*
 * What the kernels of cuda_matmul and cuda_matmul_many share, and what cuda_matmul chooses between where the device and
 * the build have Hopper's bulk copies, all with the bits of matmul.cu. A *_takes says whether the product is one for that
 * kernel.
 */
bool matmul_stream_takes(const struct cuda_matmul *m);
cudaError_t matmul_stream(const struct cuda_matmul *m, cudaStream_t stream);
/* count: at most CUDA_PARTS, all of the same x and tokens. */
bool matmul_cluster_takes(const struct cuda_matmul *m, uint32_t count);
cudaError_t matmul_cluster(const struct cuda_matmul *m, uint32_t count, cudaStream_t stream);

/* One of the matrices of a launch. */
struct matmul_part {
    const uint8_t *tiles;
    float *y;
    uint64_t expert_bytes;
    uint32_t first_block, row_tiles, rows, y_stride; /* rows: of the result */
    int type;
    float scale, inverse_scale;
    enum cuda_epilogue epilogue;
};

/* Whether kernels that copy chunks to shared memory take the format. */
static constexpr bool matmul_is_quantized(int type) {
    return type == QUANT_Q4_K || type == QUANT_Q5_K || type == QUANT_Q6_K || type == QUANT_Q8_0;
}

/* Tiles of 16 rows, and chunks of 256 columns, which also make up a row of x. */
static inline uint32_t matmul_row_tiles(const struct cuda_matmul *m) {
    return (m->w->rows + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
}

static inline uint32_t matmul_chunks(const struct cuda_matmul *m) {
    return (m->w->columns + CUDA_CHUNK - 1) / CUDA_CHUNK;
}

/* From a token's halves in shared memory to the next's: what eight lanes read of two tokens lies in different banks. */
static __host__ __device__ constexpr uint32_t matmul_token_stride(uint32_t halves) {
    return halves + 32;
}
static __host__ __device__ constexpr uint32_t matmul_token_bytes(uint32_t halves) {
    return 2 * matmul_token_stride(halves);
}

static inline matmul_part matmul_part_of(const struct cuda_matmul *m) {
    const struct cuda_matrix *w = m->w;
    matmul_part part = {};
    part.tiles = (const uint8_t *)w->tiles;
    part.y = m->y;
    part.expert_bytes = cuda_matrix_expert_bytes(w->type, w->columns, w->rows);
    part.row_tiles = matmul_row_tiles(m);
    part.rows = m->epilogue == CUDA_SWIGLU ? w->rows / 2 : w->rows;
    part.y_stride = m->y_stride;
    part.type = w->type;
    part.scale = w->scale;
    part.inverse_scale = 1.0f / w->scale;
    part.epilogue = m->epilogue;
    return part;
}

/* A row's sum from those of its chains, of which only the first `chains` have chunks. */
template <class SUM> static __device__ __forceinline__ float matmul_join(uint32_t chains, SUM sum_of) {
    return ((sum_of(0) + (chains > 1 ? sum_of(1) : 0.0f)) + (chains > 2 ? sum_of(2) : 0.0f)) +
           (chains > 3 ? sum_of(3) : 0.0f);
}

/*
 * Puts a row's sum, and with CUDA_SWIGLU its pair's, into the result. A sum is rounded before it is added, whatever of it the
 * compiler sees: no fma with its factor.
 */
static __device__ __forceinline__ void matmul_finish(enum cuda_epilogue epilogue, float sum, float pair, float *y) {
    *y = epilogue == CUDA_SWIGLU  ? silu(sum) * pair
         : epilogue == CUDA_GATED ? silu(*y) * sum
         : epilogue == CUDA_ADD   ? __fadd_rn(*y, sum)
                                  : sum;
}

#endif
