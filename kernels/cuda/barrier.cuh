#ifndef MOED_KERNELS_CUDA_BARRIER_CUH
#define MOED_KERNELS_CUDA_BARRIER_CUH

#include <stdint.h>

/*
 * Barriers in shared memory, of 8 bytes each, and copies that arrive at them: compute capability 9.0. A phase ends with
 * as many arrivals as its barrier was created for, and all bytes expected.
 */
static __device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* Something in shared memory: a pointer to it, or its address there. */
struct shared_place {
    uint32_t address;

    __device__ __forceinline__ shared_place(uint32_t address) : address(address) {}
    __device__ __forceinline__ shared_place(const void *pointer) : address(shared_address(pointer)) {}
};

/* A place in a ring of COUNT, and the parity of the phase in which it becomes full; of that before for who fills it. */
template <int COUNT> struct ring_place {
    uint32_t at = 0, parity = 0;

    __device__ __forceinline__ void step() {
        at = at + 1 == COUNT ? 0 : at + 1;
        parity ^= at == 0;
    }
};

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ void barrier_create(shared_place barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.address), "r"(arrivals));
}

/* Who has created some calls this before the others are let at them. */
static __device__ __forceinline__ void barriers_created() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void barrier_arrive(shared_place barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier.address) : "memory");
}

/* Arrives when all cp.async of the thread until now have written. */
static __device__ __forceinline__ void barrier_arrive_copied(shared_place barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier.address) : "memory");
}

/* Arrives, and lets the phase end only when `bytes` have been copied too. */
static __device__ __forceinline__ void barrier_expect(shared_place barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier.address), "r"(bytes)
                 : "memory");
}

/* Lets the phase end only when `bytes` more have been copied; who calls it arrives later. */
static __device__ __forceinline__ void barrier_expect_more(shared_place barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier.address), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(shared_place barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(barrier.address),
                 "r"(parity)
                 : "memory");
}

/* Whether the phase of this parity has ended. */
static __device__ __forceinline__ bool barrier_done(shared_place barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}\n"
                 : "=r"(done)
                 : "r"(barrier.address), "r"(parity)
                 : "memory");
    return done;
}

/* Begins a copy by the copy engine of `bytes`, a multiple of 16, that counts at the barrier. */
static __device__ __forceinline__ void barrier_copy(shared_place to, const void *from, uint32_t bytes,
                                                    shared_place barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     to.address),
                 "l"(from), "r"(bytes), "r"(barrier.address)
                 : "memory");
}

/* The thread's cp.async of 16 bytes, for barrier_arrive_copied. */
static __device__ __forceinline__ void copy_sixteen(shared_place to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to.address), "l"(from) : "memory");
}

/*
 * What ordinary stores and cp.async have written until now is seen by wgmma and the copy engine, whose accesses come after.
 * Who waited at a barrier says so; those who copy by cp.async had better not: they would wait for all their copies.
 */
static __device__ __forceinline__ void shared_seen_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif
#endif
