#ifndef MOED_KERNELS_CUDA_STREAM_CUH
#define MOED_KERNELS_CUDA_STREAM_CUH

#include <stdint.h>

/*
 * A warp's own ring of shared memory, which the bulk copy engine fills in order while the warp works: compute capability
 * 9.0. All of a ring is the warp's; no other thread takes part. Sizes and addresses are multiples of 16 bytes.
 */
struct stream_ring {
    uint32_t slots, barriers;       /* addresses in shared memory: [count][slot_bytes], [count] of 8 bytes */
    uint32_t slot_bytes, count;
    uint32_t put, got, got_parity, filled; /* next slot to fill and to read; slots in flight or in use */
};

static __device__ __forceinline__ uint32_t stream_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

#if __CUDA_ARCH__ >= 900

/*
 * Barriers in shared memory, by their addresses. Who creates some calls stream_barriers_created before others use them;
 * a phase ends with that many arrivals and all bytes expected.
 */
static __device__ __forceinline__ void stream_barrier_create(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

static __device__ __forceinline__ void stream_barriers_created() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void stream_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and expects `bytes` of stream_copy. */
static __device__ __forceinline__ void stream_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void stream_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* One thread's copies of 16 bytes, and an arrival when all that it began before are there. */
static __device__ __forceinline__ void stream_copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

static __device__ __forceinline__ void stream_arrive_copied(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Whether the phase of this parity has ended. */
static __device__ __forceinline__ bool stream_done(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}\n"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

static __device__ __forceinline__ void stream_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* `slots` and `barriers` lie in shared memory. The whole warp calls this and what follows. */
static __device__ __forceinline__ stream_ring stream_create(const void *slots, const void *barriers,
                                                            uint32_t slot_bytes, uint32_t count, int lane) {
    stream_ring ring = {stream_address(slots), stream_address(barriers), slot_bytes, count, 0, 0, 0, 0};
    for (uint32_t i = lane; i < count; i += 32)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.barriers + 8 * i));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    return ring;
}

static __device__ __forceinline__ bool stream_full(const stream_ring &ring) {
    return ring.filled == ring.count;
}

/* Begins the copy of `bytes` at `from` into the next slot; the ring is not full. */
static __device__ __forceinline__ void stream_put(stream_ring &ring, const void *from, uint32_t bytes, int lane) {
    if (lane == 0) {
        const uint32_t barrier = ring.barriers + 8 * ring.put, to = ring.slots + ring.put * ring.slot_bytes;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                     "l"(from), "r"(bytes), "r"(barrier)
                     : "memory");
    }
    ring.put = ring.put + 1 == ring.count ? 0 : ring.put + 1;
    ring.filled++;
}

/* Two copies of `bytes` into one slot, one behind the other. */
static __device__ __forceinline__ void stream_put_two(stream_ring &ring, const void *first, const void *second,
                                                      uint32_t bytes, int lane) {
    if (lane == 0) {
        const uint32_t barrier = ring.barriers + 8 * ring.put, to = ring.slots + ring.put * ring.slot_bytes;
        stream_expect(barrier, 2 * bytes);
        stream_copy(to, first, bytes, barrier);
        stream_copy(to + bytes, second, bytes, barrier);
    }
    ring.put = ring.put + 1 == ring.count ? 0 : ring.put + 1;
    ring.filled++;
}

/* Waits for the oldest copy. What it returns is the warp's until stream_release. */
static __device__ __forceinline__ const uint8_t *stream_get(const stream_ring &ring) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(ring.barriers + 8 * ring.got),
                 "r"(ring.got_parity)
                 : "memory");
    return (const uint8_t *)__cvta_shared_to_generic(ring.slots + ring.got * ring.slot_bytes);
}

static __device__ __forceinline__ void stream_release(stream_ring &ring) {
    __syncwarp();
    if (++ring.got == ring.count) {
        ring.got = 0;
        ring.got_parity ^= 1;
    }
    ring.filled--;
}

#endif
#endif
