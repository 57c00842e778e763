/* The pieces of attention.cu's contexts joined, and their rows rounded: the second half of cuda_attention, split. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr int JOIN_THREADS = 256, JOIN_WARPS = JOIN_THREADS / 32, JOIN_PARTS = 8;

/*
 * One warp joins the pieces of a head, [piece][DIM] and {max, sum} of each, for OWN dimensions a lane: out[i] is
 * dimension lane + 32 i from `partial` on. Lane l makes the factors of a round's piece l: the maxima before and after it
 * are the greatest of the pieces until then.
 */
template <int DIM, int OWN>
__device__ __forceinline__ void join_pieces(const float *partial, const float2 *stats, uint32_t pieces,
                                            int lane, float *out) {
    constexpr int AT_ONCE = 32 / OWN;
    float max = -INFINITY, sum = 0;
#pragma unroll
    for (int d = 0; d < OWN; d++)
        out[d] = 0;
    for (uint32_t done = 0; done < pieces; done += AT_ONCE) {
        const int count = (int)min(pieces - done, (uint32_t)AT_ONCE);
        const float2 own = lane < count ? stats[done + lane] : make_float2(-INFINITY, 0.0f);
        float part[AT_ONCE][OWN];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int d = 0; d < OWN; d++)
                part[i][d] = i < count ? partial[(uint64_t)(done + i) * DIM + lane + 32 * d] : 0.0f;
        float after = next_maximum(max, own.x);
#pragma unroll
        for (int offset = 1; offset < AT_ONCE; offset *= 2) {
            const float other = __shfl_up_sync(0xffffffffu, after, offset);
            if (lane >= offset)
                after = next_maximum(other, after);
        }
        const float shifted = __shfl_up_sync(0xffffffffu, after, 1), before = lane ? shifted : max;
        const float keep = rescale(before, after), add = rescale(own.x, after);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (i < count) {
                const float k = __shfl_sync(0xffffffffu, keep, i), a = __shfl_sync(0xffffffffu, add, i);
                sum = join(sum, k, __shfl_sync(0xffffffffu, own.y, i), a);
#pragma unroll
                for (int d = 0; d < OWN; d++)
                    out[d] = join(out[d], k, part[i][d], a);
            }
        max = __shfl_sync(0xffffffffu, after, count - 1);
    }
#pragma unroll
    for (int d = 0; d < OWN; d++)
        out[d] = quotient(out[d], sum);
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

/* The greatest of `value` in all blocks of the cluster, which have arrived once; `shared` has a float for each. */
__device__ __forceinline__ float cluster_greatest(float value, float *shared) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    if (threadIdx.x < gridDim.x) {
        uint32_t to;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                     : "=r"(to)
                     : "r"(shared_address(shared + blockIdx.x)), "r"(threadIdx.x));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
    }
    cluster_arrive();
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    for (uint32_t i = 0; i < gridDim.x; i++)
        value = greater(value, shared[i]);
#endif
    return value;
}

template <int DIM> struct join_shape {
    static constexpr int own = DIM % 64 ? 1 : 2;       /* dimensions of a lane */
    static constexpr uint32_t units = DIM / (32 * own); /* of a head, a warp each */
};

/*
 * Joins the pieces of row blockIdx.y, a warp a unit, and rounds the row. Its blocks are a cluster, or one; each takes
 * block_units of the row's units.
 */
template <int DIM>
__global__ void __launch_bounds__(JOIN_THREADS) join_kernel(const attention_parameters p, uint32_t block_units) {
    constexpr int OWN = join_shape<DIM>::own, UNIT = 32 * OWN;
    constexpr uint32_t HEAD_UNITS = join_shape<DIM>::units;
    extern __shared__ __align__(16) float values[]; /* the block's part of the row */
    __shared__ float maxima[JOIN_WARPS], parts[JOIN_PARTS];
    const uint32_t row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = p.heads * HEAD_UNITS;
    const uint32_t first = min(blockIdx.x * block_units, units), end = min(first + block_units, units);
    const uint32_t pieces = p.position[row] / CUDA_KV_PIECE + 1;
    float greatest = 0;
    cluster_arrive();
    launch_dependents();
    wait_for_predecessor();
    for (uint32_t unit = first + warp; unit < end; unit += JOIN_WARPS) {
        const uint64_t at = ((uint64_t)row * p.heads + unit / HEAD_UNITS) * p.pieces;
        float *to = p.out.half ? values + (unit - first) * UNIT : p.y + ((uint64_t)row * units + unit) * UNIT;
        float y[OWN];
        join_pieces<DIM, OWN>(p.partial + at * DIM + unit % HEAD_UNITS * UNIT, p.stats + at, pieces, (int)lane, y);
#pragma unroll
        for (int d = 0; d < OWN; d++) {
            to[lane + 32 * d] = y[d];
            greatest = greater(greatest, fabsf(y[d]));
        }
    }
    float shrink;
    const float scale = rounding_scale(cluster_greatest(block_reduce(greatest, greater, maxima), parts), shrink);
    if (!p.out.half)
        return;
    const uint32_t padded = padded_columns(units * UNIT), columns = (end - first) * UNIT;
    const uint32_t own = blockIdx.x + 1 == gridDim.x ? padded - first * UNIT : columns; /* the last one pads */
    uint2 *to = (uint2 *)((half *)p.out.half + (uint64_t)row * padded + first * UNIT);
    for (uint32_t i = threadIdx.x; i - lane < own / 4; i += JOIN_THREADS) { /* whole warps: interleaved() */
        const uint2 four = i < columns / 4 ? rounded(((const float4 *)values)[i], shrink) : make_uint2(0, 0);
        const uint2 stored = p.out.interleaved ? interleaved(four) : four;
        if (i < own / 4)
            to[i] = stored;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        p.out.scale[row] = scale;
}

template <int DIM> cudaError_t launch_join(const attention_parameters &p, cudaStream_t stream) {
    const uint32_t parts = !launch_has_copies(join_kernel<DIM>) ? 1
                           : p.rows < 48                        ? JOIN_PARTS
                                                                : JOIN_PARTS / 2; /* some 200 blocks are enough */
    const uint32_t block_units = (p.heads * join_shape<DIM>::units + parts - 1) / parts;
    const size_t values = p.out.half ? block_units * 32 * join_shape<DIM>::own * sizeof(float) : 0;
    return launch_clusters(parts, join_kernel<DIM>, dim3(parts, p.rows), dim3(JOIN_THREADS), values, stream, p,
                           block_units);
}

} // namespace

cudaError_t attention_join(const attention_parameters &p, uint32_t head_dim, cudaStream_t stream) {
    switch (head_dim) {
    case 32: return launch_join<32>(p, stream);
    case 64: return launch_join<64>(p, stream);
    case 96: return launch_join<96>(p, stream);
    case 128: return launch_join<128>(p, stream);
    case 256: return launch_join<256>(p, stream);
    default: return cudaErrorInvalidValue;
    }
}
