#ifndef MOED_KERNELS_CUDA_WGMMA_CUH
#define MOED_KERNELS_CUDA_WGMMA_CUH

#include <stdint.h>

/*
 * Hopper's matrix unit: a warpgroup's sums += a b of 64 rows, 16 columns, 2 * size of sums right columns, asynchronously.
 * Warp w has rows 16 w to 16 w + 15 of a and of the sums, in mma.m16n8k16's order (mma.cuh); it sums as that does.
 */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define WGMMA_SUMS_8(s, i)                                                                                             \
    "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]),        \
        "+f"(s[i + 7])
#define WGMMA_SUMS_16(s, i) WGMMA_SUMS_8(s, i), WGMMA_SUMS_8(s, i + 8)
#define WGMMA_SUMS_32(s, i) WGMMA_SUMS_16(s, i), WGMMA_SUMS_16(s, i + 16)
#define WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"

/* For each number of tokens; ADD: false for sums = a b. b: see wgmma_descriptor. */
#define WGMMA_MULTIPLY(TOKENS, NAMES, A0, A1, A2, A3, B, ADDS, ...)                                                    \
    template <bool ADD>                                                                                                \
    static __device__ __forceinline__ void wgmma_multiply(float(&s)[TOKENS / 2], const uint32_t *a, uint64_t b) {      \
        asm volatile("{\n"                                                                                             \
                     ".reg .pred add;\n"                                                                               \
                     "setp.ne.b32 add, %" #ADDS ", 0;\n"                                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32.f16.f16 {" NAMES "}, {%" #A0 ", %" #A1       \
                     ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 0;\n"                                                 \
                     "}\n"                                                                                             \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)ADD));                             \
    }
WGMMA_MULTIPLY(32, WGMMA_NAMES_16, 16, 17, 18, 19, 20, 21, WGMMA_SUMS_16(s, 0))
WGMMA_MULTIPLY(48, WGMMA_NAMES_24, 24, 25, 26, 27, 28, 29, WGMMA_SUMS_16(s, 0), WGMMA_SUMS_8(s, 16))
WGMMA_MULTIPLY(64, WGMMA_NAMES_32, 32, 33, 34, 35, 36, 37, WGMMA_SUMS_32(s, 0))
WGMMA_MULTIPLY(80, WGMMA_NAMES_40, 40, 41, 42, 43, 44, 45, WGMMA_SUMS_32(s, 0), WGMMA_SUMS_8(s, 32))
WGMMA_MULTIPLY(96, WGMMA_NAMES_48, 48, 49, 50, 51, 52, 53, WGMMA_SUMS_32(s, 0), WGMMA_SUMS_16(s, 32))
WGMMA_MULTIPLY(128, WGMMA_NAMES_64, 64, 65, 66, 67, 68, 69, WGMMA_SUMS_32(s, 0), WGMMA_SUMS_32(s, 32))

static __device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until all groups but the last PENDING are complete. The sums of those may be used then. */
template <int PENDING, int N> static __device__ __forceinline__ void wgmma_wait(float (&sums)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) /* no use of them moves up */
        asm volatile("" : "+f"(sums[i])::"memory");
}

/*
 * b, by its address in shared memory: a right column a row of 128 bytes, its sixteens swizzled by wgmma_offset; it begins
 * at a multiple of 1024 bytes.
 */
static __device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (address & 0x3ffff) >> 4;
}

static __device__ __forceinline__ uint32_t wgmma_offset(uint32_t row, uint32_t sixteen) {
    return row * 128 + ((sixteen ^ (row & 7)) << 4);
}

#endif
#endif
