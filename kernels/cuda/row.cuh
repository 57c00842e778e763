#ifndef MOED_KERNELS_CUDA_ROW_CUH
#define MOED_KERNELS_CUDA_ROW_CUH

#include <stdint.h>

#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/tile.cuh"

/*
 * What the products of a step of one row share: row.cu, and row_mix.cu behind it.
 *
 * In such a step most of the time goes to latency, and to fetching instructions. So weights are copied to shared memory
 * before the predecessor has ended, wherever it is known by then which, and expanded in a rolled loop; and the norm
 * before a product, the choice of experts and the rounding of their hidden rows are done by each block for itself, in
 * place of a kernel that all would wait for. The order of every sum is that of the kernels for any number of rows.
 */
namespace {

constexpr uint32_t USED_MOST = 8, EXPERTS_A_LANE = 4;
constexpr uint32_t SHARED_MOST = 227 << 10; /* of Hopper's shared memory, what a block can have */

#if __CUDA_ARCH__ >= 900

/* sums (mma.cuh) += two groups of weights times x: the lane's part of the row that its column of b is. */
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

__device__ __forceinline__ void fetch(void *to, const void *from, uint32_t bytes, uint64_t *full) {
    barrier_expect(full, bytes);
    barrier_copy(to, from, bytes, full);
}

#endif

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

} // namespace

#endif
