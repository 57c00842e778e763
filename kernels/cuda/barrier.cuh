#ifndef MOED_KERNELS_CUDA_BARRIER_CUH
#define MOED_KERNELS_CUDA_BARRIER_CUH

#include <stdint.h>

/* Barriers in shared memory, and copies that arrive at them: compute capability 9.0. */
static __device__ __forceinline__ uint32_t barrier_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ void barrier_create(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier_address(barrier)), "r"(arrivals));
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier_address(barrier)) : "memory");
}

/* Arrives when all cp.async of the thread until now have written. */
static __device__ __forceinline__ void barrier_arrive_copied(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier_address(barrier)) : "memory");
}

/* Arrives, and lets the phase end only when `bytes` have been copied too. */
static __device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_address(barrier)), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(barrier_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Begins a copy of `bytes`, a multiple of 16, that counts at the barrier. */
static __device__ __forceinline__ void barrier_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     barrier_address(to)),
                 "l"(from), "r"(bytes), "r"(barrier_address(barrier))
                 : "memory");
}

/*
 * Behind a barrier that cp.async arrived at: wgmma sees what those wrote. Those who copy had better not say so: they
 * would wait for all their copies.
 */
static __device__ __forceinline__ void barrier_see_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif
#endif
