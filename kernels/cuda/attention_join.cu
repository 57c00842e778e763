/* The pieces of attention.cu's contexts joined, and their rows rounded: the second half of cuda_attention, split. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace {

constexpr uint32_t JOIN_PARTS = 8; /* blocks that round a row together */

/* A warp's copy of 32 dimensions of 32 pieces, and of each piece the factors of what was before and of it, and its sum. */
struct join_piece {
    float partial[32];
    float keep, add, sum, unused;
};
constexpr uint32_t JOIN_PIECES = 32;

/* Copies 16 bytes, seen by the warp after join_copied. */
__device__ __forceinline__ void join_copy(float *to, const float *from) {
#if __CUDA_ARCH__ >= 900
    copy_sixteen(to, from);
#else
    *(float4 *)to = *(const float4 *)from;
#endif
}

__device__ __forceinline__ void join_copied() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncwarp();
}

/*
 * One warp joins the pieces of a head, {max, sum} of each in `stats`, for dimension `lane` from `partial` on, where rows
 * are DIM apart. Lane l makes the factors of a round's piece l: the maxima before and after it are the greatest of the
 * pieces until then.
 */
template <int DIM>
__device__ __forceinline__ float join_pieces(const float *partial, const float2 *stats, uint32_t pieces, uint32_t lane,
                                             join_piece *copies) {
    float max = -INFINITY, sum = 0, out = 0;
#pragma unroll 1
    for (uint32_t left = pieces;;) {
        const uint32_t count = min(left, JOIN_PIECES);
#pragma unroll 1
        for (uint32_t i = lane / 8; i < count; i += 4)
            join_copy(copies[i].partial + lane % 8 * 4, partial + i * DIM + lane % 8 * 4);
        const float2 own = lane < count ? stats[lane] : make_float2(-INFINITY, 0.0f);
        float after = next_maximum(max, own.x);
#pragma unroll 1
        for (uint32_t offset = 1; offset < count; offset *= 2) {
            const float other = __shfl_up_sync(0xffffffffu, after, offset);
            if (lane >= offset)
                after = next_maximum(other, after);
        }
        const float shifted = __shfl_up_sync(0xffffffffu, after, 1), before = lane ? shifted : max;
        *(float4 *)&copies[lane].keep = make_float4(rescale(before, after), rescale(own.x, after), own.y, 0);
        join_copied();
#pragma unroll 1
        for (uint32_t i = 0; i < count; i += 4) {
            float4 of[4];
            float part[4];
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                of[k] = *(const float4 *)&copies[i + k].keep;
                part[k] = copies[i + k].partial[lane];
            }
#pragma unroll
            for (uint32_t k = 0; k < 4; k++)
                if (i + k < count) {
                    sum = join(sum, of[k].x, of[k].z, of[k].y);
                    out = join(out, of[k].x, part[k], of[k].y);
                }
        }
        if (left == count)
            return quotient(out, sum);
        max = __shfl_sync(0xffffffffu, after, count - 1); /* and all are done with the copies */
        left -= count;
        partial += count * DIM;
        stats += count;
    }
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/* Writes to the same place of block `part` of the cluster, and counts at its barrier. */
__device__ __forceinline__ void cluster_send(uint32_t *to, uint32_t value, uint64_t *barrier, uint32_t part) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .u32 to, barrier;\n"
                 "mapa.shared::cluster.u32 to, %0, %3;\n"
                 "mapa.shared::cluster.u32 barrier, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %1, [barrier];\n"
                 "}\n" ::"r"(shared_address(to)),
                 "r"(value), "r"(shared_address(barrier)), "r"(part)
                 : "memory");
#endif
}

/*
 * Joins the pieces of row blockIdx.y, whose blocks share its padded columns, a thread each. Where p.out.half is given these
 * are JOIN_PARTS, a cluster, and round the row.
 */
template <int DIM> __global__ void __launch_bounds__(1024) join_kernel(const attention_parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ uint32_t greatest[32], parts[JOIN_PARTS]; /* of warps, of blocks: bits of absolute values; a NaN's are greatest */
    __shared__ uint64_t barrier;
    const uint32_t thread = threadIdx.x, lane = thread % 32, row = blockIdx.y;
    const uint32_t column = blockIdx.x * blockDim.x + thread, head = column / DIM;
    const uint32_t pieces = p.position[row] / CUDA_KV_PIECE + 1;
#if __CUDA_ARCH__ >= 900
    if (p.out.half) {
        if (thread == 0) {
            barrier_create(&barrier, 1);
            barriers_created();
            barrier_expect(&barrier, sizeof parts);
        }
        cluster_arrive();
    }
#endif
    launch_dependents();
    wait_for_predecessor();
    float y = 0;
    if (head < p.heads) {
        const uint32_t at = (row * p.heads + head) * p.pieces;
        y = join_pieces<DIM>(p.partial + (uint64_t)at * DIM + (column - lane) % DIM, p.stats + at, pieces, lane,
                             (join_piece *)memory + thread - lane);
    }
    if (!p.out.half) {
        if (head < p.heads)
            p.y[(uint64_t)row * p.heads * DIM + column] = y;
        return;
    }
#if __CUDA_ARCH__ >= 900
    const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(y)));
    if (lane == 0)
        greatest[thread / 32] = bits;
    cluster_wait();
    __syncthreads();
    if (thread < 32) {
        const uint32_t all = __reduce_max_sync(0xffffffffu, thread < blockDim.x / 32 ? greatest[thread] : 0);
        if (thread < JOIN_PARTS)
            cluster_send(parts + blockIdx.x, all, &barrier, thread);
    }
    barrier_wait(&barrier, 0);
    float shrink;
    const float scale =
        rounding_scale(__uint_as_float(__reduce_max_sync(0xffffffffu, parts[lane % JOIN_PARTS])), shrink);
    const uint32_t order = column & ~30u | column << 2 & 24u | column >> 2 & 6u; /* interleaved() */
    ((half *)p.out.half)[(uint64_t)row * JOIN_PARTS * blockDim.x + (p.out.interleaved ? order : column)] =
        __float2half_rn(y * shrink);
    if (column == 0)
        p.out.scale[row] = scale;
#endif
}

template <int DIM> cudaError_t launch_join(const attention_parameters &p, cudaStream_t stream) {
    const bool rounds = p.out.half && launch_has_copies(join_kernel<DIM>);
    const uint32_t columns = padded_columns(p.heads * DIM), parts = rounds ? JOIN_PARTS : columns / CUDA_CHUNK;
    const size_t shared = columns / parts * sizeof(join_piece);
    attention_parameters joined = p;
    if (!rounds)
        joined.out.half = NULL;
    cudaError_t error =
        cudaFuncSetAttribute(join_kernel<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    error = error ? error
                  : launch_clusters(rounds ? JOIN_PARTS : 1, join_kernel<DIM>, dim3(parts, p.rows), dim3(columns / parts),
                                    shared, stream, joined);
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
