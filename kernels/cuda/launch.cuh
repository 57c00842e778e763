#ifndef MOED_KERNELS_CUDA_LAUNCH_CUH
#define MOED_KERNELS_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

/*
 * Whether code is compiled with copies into rings in shared memory: from Hopper on, but not for compute capability 12, whose
 * 100 KB a multiprocessor are too little for them.
 */
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define LAUNCH_COPIES 1
#else
#define LAUNCH_COPIES 0
#endif

/* Lets the next kernel of the stream begin; what it reads of this one's results it reads after wait_for_predecessor. */
static __device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Waits until the kernel before has ended and its writes are seen. What no kernel of a step writes may be read before. */
static __device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Multiprocessors of the device; 0 where it does not say, and a grid of as many blocks fails. */
static inline uint32_t launch_processors(void) {
    int device = 0, count = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
                   cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess
               ? (uint32_t)count
               : 0;
}

/* Whether the device runs the kernel as compiled for Hopper alone (90a), with what no other GPU has. */
template <class KERNEL> static bool launch_is_hopper(KERNEL *kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.binaryVersion == 90 &&
           attributes.ptxVersion == 90;
}

/* Whether the kernel is compiled with LAUNCH_COPIES, and clusters. */
template <class KERNEL> static bool launch_has_copies(KERNEL *kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
           attributes.ptxVersion < 120;
}

/* Launches a kernel that may begin while its predecessor ends, with blocks along x in clusters of `cluster`, or in none: 1. */
template <class... PARAMETERS, class... ARGUMENTS>
static cudaError_t launch_clusters(uint32_t cluster, void (*kernel)(PARAMETERS...), dim3 grid, dim3 block, size_t shared,
                                   cudaStream_t stream, ARGUMENTS... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, PARAMETERS(arguments)...);
}

template <class... PARAMETERS, class... ARGUMENTS>
static cudaError_t launch(void (*kernel)(PARAMETERS...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                          ARGUMENTS... arguments) {
    return launch_clusters(1, kernel, grid, block, shared, stream, arguments...);
}

/* Bytes of one chunk: those of 16 rows of 256 columns in the format; 0 for a format moed does not run. */
static __host__ __device__ constexpr size_t launch_chunk_bytes(int type) {
    return type == QUANT_F32    ? 16384
           : type == QUANT_F16  ? 8192
           : type == QUANT_BF16 ? 8192
           : type == QUANT_Q8_0 ? 4352
           : type == QUANT_Q4_K ? 2304
           : type == QUANT_Q5_K ? 2816
           : type == QUANT_Q6_K ? 3360
                                : 0;
}

#endif
