/* The pieces of attention.cu's contexts joined, and their rows rounded: the second half of cuda_attention, split. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr uint32_t JOIN_PARTS = 8;   /* blocks that round a row together */
constexpr uint32_t JOIN_HEADS = 4;   /* a block's, where it does not round */
constexpr uint32_t JOIN_PIECES = 16; /* at a time; with more, blocks of the next kernel would not fit beside this one's */
constexpr uint32_t JOIN_STEP = 2;    /* of these without going round */

/* A warp's copy of pieces of its head, and of each the factors of what was before and of it, and its sum. */
template <int DIM> struct join_memory {
    float partial[JOIN_PIECES][DIM];
    float4 keep_add_sum[JOIN_PIECES];
};

/* The thread's copy of so many floats, seen after join_copied. */
template <int COUNT> __device__ __forceinline__ void join_copy(float *to, const float *from) {
    constexpr int WIDTH = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < COUNT; i += WIDTH) {
#if __CUDA_ARCH__ >= 900
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to + i)), "l"(from + i),
                     "n"(WIDTH * sizeof(float))
                     : "memory");
#else
        for (int k = 0; k < WIDTH; k++)
            to[i + k] = from[i + k];
#endif
    }
}

__device__ __forceinline__ void join_copied() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncwarp();
}

/*
 * One warp joins the pieces of a head, {max, sum} of each in `stats`, for DIM / 32 dimensions a lane, which begin at
 * `partial`. Lane l makes the factors of a round's piece l: the maxima before and after it are the greatest of the pieces
 * until then.
 */
template <int DIM>
__device__ __forceinline__ void join_pieces(const float *partial, const float2 *stats, uint32_t pieces, uint32_t lane,
                                            join_memory<DIM> &memory, float (&y)[DIM / 32]) {
    constexpr int OWN = DIM / 32;
    float max = -INFINITY, sum = 0;
#pragma unroll 1
    for (;;) {
        const uint32_t count = min(pieces, JOIN_PIECES);
        float *copy = memory.partial[0] + OWN * lane;
        uint32_t i = 0;
#pragma unroll 1
        do {
            join_copy<OWN>(copy + i * DIM, partial + i * DIM);
        } while (++i < count);
        const float2 own = lane < count ? stats[lane] : make_float2(-INFINITY, 0.0f);
        float after = next_maximum(max, own.x);
#pragma unroll 1
        for (uint32_t offset = 1; offset < count; offset *= 2) {
            const float other = __shfl_up_sync(0xffffffffu, after, offset);
            if (lane >= offset)
                after = next_maximum(other, after);
        }
        const float shifted = __shfl_up_sync(0xffffffffu, after, 1), before = lane ? shifted : max;
        if (lane < JOIN_PIECES)
            memory.keep_add_sum[lane] = make_float4(rescale(before, after), rescale(own.x, after), own.y, 0);
        join_copied();
        i = 0;
#pragma unroll 1
        do {
#pragma unroll
            for (uint32_t n = 0; n < JOIN_STEP; n++) {
                const float4 of = memory.keep_add_sum[i + n];
                float part[OWN];
#pragma unroll
                for (int k = 0; k < OWN; k++)
                    part[k] = copy[(i + n) * DIM + k];
                if (n == 0 || i + n < count) {
                    sum = join(sum, of.x, of.z, of.y);
#pragma unroll
                    for (int k = 0; k < OWN; k++)
                        y[k] = join(y[k], of.x, part[k], of.y);
                }
            }
        } while ((i += JOIN_STEP) < count);
        if (pieces == count)
            break;
        max = __shfl_sync(0xffffffffu, after, count - 1);
        __syncwarp(); /* all are done with the factors */
        pieces -= count;
        partial += count * DIM;
        stats += count;
    }
#pragma unroll
    for (int k = 0; k < OWN; k++)
        y[k] = quotient(y[k], sum);
}

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

/* Writes to the same place of block `part` of the cluster, and counts at its barrier. */
__device__ __forceinline__ void cluster_send(uint32_t *to, uint32_t value, uint64_t *barrier, uint32_t part) {
    asm volatile("{\n"
                 ".reg .u32 to, barrier;\n"
                 "mapa.shared::cluster.u32 to, %0, %3;\n"
                 "mapa.shared::cluster.u32 barrier, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %1, [barrier];\n"
                 "}\n" ::"r"(shared_address(to)),
                 "r"(value), "r"(shared_address(barrier)), "r"(part)
                 : "memory");
}

/* Where a column stands once every 32 are interleaved (cuda_activation). */
__device__ __forceinline__ uint32_t interleaved_column(uint32_t column) {
    return column & ~30u | column << 2 & 24u | column >> 2 & 6u;
}

#endif

/*
 * Joins the pieces of row blockIdx.y, a warp a head, warps behind the last head none. Where p.out.half is given the row's
 * blocks are a cluster of JOIN_PARTS, and round it.
 */
template <int DIM> __global__ void __launch_bounds__(1024) join_kernel(const attention_parameters p) {
    constexpr int OWN = DIM / 32;
    extern __shared__ __align__(16) unsigned char memory[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.y;
    const uint32_t head = blockIdx.x * (blockDim.x / 32) + warp, column = head * DIM + OWN * lane;
    const uint32_t pieces = p.position[row] / CUDA_KV_PIECE + 1;
#if __CUDA_ARCH__ >= 900
    __shared__ uint32_t greatest[32], parts[JOIN_PARTS]; /* of warps and of blocks: bits of an absolute value, NaN's the greatest */
    __shared__ uint64_t barrier;
    if (p.out.half) {
        if (threadIdx.x == 0) {
            barrier_create(&barrier, 1);
            barriers_created();
            barrier_expect(&barrier, sizeof parts);
        }
        cluster_arrive();
    }
#endif
    launch_dependents();
    wait_for_predecessor();
    float y[OWN] = {};
    if (head < p.heads) {
        const uint32_t at = (row * p.heads + head) * p.pieces;
        join_pieces<DIM>(p.partial + (uint64_t)at * DIM + OWN * lane, p.stats + at, pieces, lane,
                         ((join_memory<DIM> *)memory)[warp], y);
    }
    if (!p.out.half) {
        if (head < p.heads)
#pragma unroll
            for (int k = 0; k < OWN; k++)
                p.y[(uint64_t)row * p.heads * DIM + column + k] = y[k];
        return;
    }
#if __CUDA_ARCH__ >= 900
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < OWN; k++)
        bits = max(bits, __float_as_uint(fabsf(y[k])));
    bits = __reduce_max_sync(0xffffffffu, bits);
    if (lane == 0)
        greatest[warp] = bits;
    cluster_wait();
    __syncthreads();
    if (warp == 0) {
        const uint32_t all = __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? greatest[lane] : 0);
        if (lane < JOIN_PARTS)
            cluster_send(parts + blockIdx.x, all, &barrier, lane);
    }
    barrier_wait(&barrier, 0);
    float shrink;
    const float scale =
        rounding_scale(__uint_as_float(__reduce_max_sync(0xffffffffu, parts[lane % JOIN_PARTS])), shrink);
    const uint32_t padded = padded_columns(p.heads * DIM);
    half *to = (half *)p.out.half + (uint64_t)row * padded;
    constexpr int PAIR = OWN % 2 ? 1 : 2;
#pragma unroll
    for (int k = 0; k < OWN; k += PAIR) {
        half *at = to + (p.out.interleaved ? interleaved_column(column + k) : column + k);
        if (column + k < padded) {
            if constexpr (PAIR == 2)
                *(half2 *)at = __floats2half2_rn(y[k] * shrink, y[k + 1] * shrink);
            else
                *at = __float2half_rn(y[k] * shrink);
        }
    }
    if (column == 0)
        p.out.scale[row] = scale;
#endif
}

template <int DIM> cudaError_t launch_join(const attention_parameters &p, cudaStream_t stream) {
    const bool rounds = p.out.half && launch_has_copies(join_kernel<DIM>);
    const uint32_t all = rounds ? (padded_columns(p.heads * DIM) + DIM - 1) / DIM : p.heads;
    const uint32_t heads = rounds ? (all + JOIN_PARTS - 1) / JOIN_PARTS : JOIN_HEADS, parts = (all + heads - 1) / heads;
    const size_t shared = heads * sizeof(join_memory<DIM>);
    attention_parameters joined = p;
    if (!rounds)
        joined.out.half = NULL;
    cudaError_t error =
        cudaFuncSetAttribute(join_kernel<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    error = error ? error
                  : launch_clusters(rounds ? JOIN_PARTS : 1, join_kernel<DIM>, dim3(rounds ? JOIN_PARTS : parts, p.rows),
                                    dim3(32 * heads), shared, stream, joined);
    return error || rounds || !p.out.half ? error : cuda_round(p.y, p.heads * DIM, p.rows, &p.out, stream);
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
