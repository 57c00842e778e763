#ifndef MOED_KERNELS_CUDA_MATMUL_CUH
#define MOED_KERNELS_CUDA_MATMUL_CUH

#include <stdint.h>

#include "kernels/cuda/cuda.h"

/*
 * What cuda_matmul chooses between where the device and the build have Hopper's bulk copies, all with the bits of
 * matmul.cu. A *_takes says whether the product is one for that kernel.
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

static inline matmul_part matmul_part_of(const struct cuda_matmul *m) {
    const struct cuda_matrix *w = m->w;
    matmul_part part = {};
    part.tiles = (const uint8_t *)w->tiles;
    part.y = m->y;
    part.expert_bytes = cuda_matrix_expert_bytes(w->type, w->columns, w->rows);
    part.row_tiles = (w->rows + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
    part.rows = m->epilogue == CUDA_SWIGLU ? w->rows / 2 : w->rows;
    part.y_stride = m->y_stride;
    part.type = w->type;
    part.scale = w->scale;
    part.inverse_scale = 1.0f / w->scale;
    part.epilogue = m->epilogue;
    return part;
}

static __device__ __forceinline__ float matmul_silu(float x) {
    return x / (1.0f + expf(-x));
}

/* Puts a row's sum, and with CUDA_SWIGLU its pair's, into the result. */
static __device__ __forceinline__ void matmul_finish(enum cuda_epilogue epilogue, float sum, float pair, float *y) {
    *y = epilogue == CUDA_SWIGLU  ? matmul_silu(sum) * pair
         : epilogue == CUDA_GATED ? matmul_silu(*y) * sum
         : epilogue == CUDA_ADD   ? *y + sum
                                  : sum;
}

#endif
