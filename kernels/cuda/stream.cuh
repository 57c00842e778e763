#ifndef MOED_KERNELS_CUDA_STREAM_CUH
#define MOED_KERNELS_CUDA_STREAM_CUH

#include <stdint.h>

#include "kernels/cuda/barrier.cuh"

/*
 * A warp's own ring of shared memory, which the bulk copy engine fills in order while the warp works: compute capability
 * 9.0. All of a ring is the warp's; no other thread takes part. Sizes and addresses are multiples of 16 bytes.
 */
struct stream_ring {
    uint32_t slots, barriers; /* addresses in shared memory: [count][slot_bytes], [count] of 8 bytes */
    uint32_t slot_bytes, count;
    uint32_t put, got, got_parity, filled; /* next slot to fill and to read; slots in flight or in use */
};

#if __CUDA_ARCH__ >= 900

/* `slots` and `barriers` lie in shared memory. The whole warp calls this and what follows. */
static __device__ __forceinline__ stream_ring stream_create(const void *slots, const void *barriers,
                                                            uint32_t slot_bytes, uint32_t count, int lane) {
    stream_ring ring = {shared_address(slots), shared_address(barriers), slot_bytes, count, 0, 0, 0, 0};
    for (uint32_t i = lane; i < count; i += 32)
        barrier_create(ring.barriers + 8 * i, 1);
    barriers_created();
    __syncwarp();
    return ring;
}

static __device__ __forceinline__ bool stream_full(const stream_ring &ring) {
    return ring.filled == ring.count;
}

/* Begins the copy of `bytes` at each of `parts`, one behind the other, into the next slot; the ring is not full. */
template <int PARTS>
static __device__ __forceinline__ void stream_put(stream_ring &ring, const void *const (&parts)[PARTS], uint32_t bytes,
                                                  int lane) {
    if (lane == 0) {
        const uint32_t barrier = ring.barriers + 8 * ring.put, to = ring.slots + ring.put * ring.slot_bytes;
        barrier_expect(barrier, PARTS * bytes);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            barrier_copy(to + i * bytes, parts[i], bytes, barrier);
    }
    ring.put = ring.put + 1 == ring.count ? 0 : ring.put + 1;
    ring.filled++;
}

/*
 * Waits for the oldest copy. What it returns is the warp's until stream_release; a thread that stores there calls
 * shared_seen_async before that.
 */
static __device__ __forceinline__ const uint8_t *stream_get(const stream_ring &ring) {
    barrier_wait(ring.barriers + 8 * ring.got, ring.got_parity);
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
