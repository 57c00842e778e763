#include "worker/executor_cuda.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/arena.h"

enum {
    ALIGNMENT = 256,
    OUTPUTS_LEAST = 64,        /* rows of logits there is room for however few sequences there may be */
    PARTIAL_FLOATS = 64 << 20, /* of attention; a step that would need more runs through its contexts unsplit */
};
static const uint64_t reserve_bytes = 256 << 20; /* for graphs and what the runtime allocates by itself */

int cuda_failed(struct status *status, cudaError_t error, const char *what) {
    enum status_code code = error == cudaErrorMemoryAllocation ? STATUS_RESOURCE_EXHAUSTED : STATUS_INTERNAL;
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorInvalidDevice)
        code = STATUS_FAILED_PRECONDITION;
    return status_set(status, code, "CUDA: %s: %s", what, cudaGetErrorString(error));
}

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

static struct cuda_activation take_activation(struct arena *arena, size_t rows, size_t columns) {
    const size_t padded = (columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
    return (struct cuda_activation){.half = arena_take(arena, rows * padded, 2),
                                    .scale = arena_take(arena, rows, sizeof(float))};
}

static void take_input(struct arena *arena, const struct executor_cuda *cuda, struct cuda_input *input) {
    const size_t rows = cuda->base.info.step_tokens;
    uint32_t **parts[] = {&input->tokens, &input->position,  &input->table,
                          &input->tiles,  &input->tile_rows, &input->select};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        *parts[i] = arena_take(arena, rows, sizeof(uint32_t));
    input->tables = arena_take(arena, cuda->tables_capacity, sizeof(uint32_t));
}

/* Gives every buffer of a step its place, and the arena the size of them all. */
static void lay_out_scratch(struct executor_cuda *cuda, struct arena *arena) {
    const struct model_config *config = &cuda->model->config;
    const struct executor_info *info = &cuda->base.info;
    const size_t rows = info->step_tokens, outputs = info->max_outputs, length = config->embedding_length;
    const size_t dim = config->head_dim, q_width = config->head_count * dim, kv_width = config->head_count_kv * dim;
    const size_t used = config->expert_used_count, hidden = config->expert_feed_forward_length;
    const size_t decode_rows = least(info->max_sequences, rows);

    cuda->partial_floats = cuda_attention_partial_floats(&cuda->heads, (uint32_t)decode_rows, info->context_length);
    cuda->partial_floats = most(least(cuda->partial_floats, PARTIAL_FLOATS),
                                cuda_attention_partial_floats(&cuda->heads, 1, info->context_length));
    take_input(arena, cuda, &cuda->device);
    cuda->x = arena_take(arena, rows * length, sizeof(float));
    cuda->norm_factors = arena_take(arena, rows, sizeof(float));
    cuda->normed = take_activation(arena, most(rows, outputs), length);
    cuda->qkv = arena_take(arena, rows * (q_width + 2 * kv_width), sizeof(float));
    cuda->q = arena_take(arena, rows * q_width, 2);
    cuda->attended = arena_take(arena, rows * q_width, sizeof(float));
    cuda->partial = arena_take(arena, cuda->partial_floats, sizeof(float));
    cuda->mixed = take_activation(arena, rows * used, most(hidden, (q_width + used - 1) / used + CUDA_CHUNK));
    cuda->hidden = arena_take(arena, rows * used * hidden, sizeof(float));
    cuda->expert_out = arena_take(arena, rows * used * length, sizeof(float));
    cuda->router_logits = arena_take(arena, rows * config->expert_count, sizeof(float));
    cuda->route_experts = arena_take(arena, rows * used * config->block_count, sizeof(uint32_t));
    cuda->route_weights = arena_take(arena, rows * used * config->block_count, sizeof(float));
    cuda->route_counts = arena_take(arena, (size_t)CUDA_SORT_BLOCKS * config->expert_count, sizeof(uint32_t));
    cuda->order = arena_take(arena, rows * used, sizeof(uint32_t));
    cuda->item_count = arena_take(arena, 1, sizeof(uint32_t));
    cuda->items =
        arena_take(arena, least(rows * used, rows * used / 8 + config->expert_count), sizeof(struct cuda_item));
    cuda->logits = arena_take(arena, outputs * config->vocab_size, sizeof(float));
    cuda->greatest_parts = arena_take(arena, outputs * CUDA_SAMPLE_RANKS, sizeof(uint64_t));
    cuda->busiest = arena_take(arena, config->block_count + outputs, sizeof(uint32_t));
    cuda->greatest = cuda->busiest + config->block_count;
    cuda->draws = arena_take(arena, outputs, sizeof *cuda->draws);
    cuda->history = arena_take(arena, CUDA_HISTORY_TOKENS, sizeof(uint32_t));
    cuda->plain = arena_take(arena, CUDA_HISTORY_TOKENS, sizeof(float));
    cuda->draw_parts = arena_take(arena, outputs * CUDA_SAMPLE_PARTS, sizeof *cuda->draw_parts);
    cuda->draw_list = arena_take(arena, outputs * config->vocab_size, sizeof(uint32_t));
    cuda->asked = arena_take(arena, outputs, sizeof *cuda->asked);
    cuda->asked_masses = arena_take(arena, outputs * CUDA_SAMPLE_PARTS, sizeof(uint64_t));
    cuda->alternatives = arena_take(arena, outputs, sizeof *cuda->alternatives);
    cuda->cos_sin = arena_take(arena, (size_t)info->context_length * dim, sizeof(float));
}

/* Shapes the kernels are written for; every published model of the architecture has them. */
static int check_model(const struct model_config *config, struct status *status) {
    const uint32_t dim = config->head_dim, group = config->head_count / config->head_count_kv;
    if (dim != 32 && dim != 64 && dim != 96 && dim != 128 && dim != 256)
        return status_set(status, STATUS_UNIMPLEMENTED, "attention.key_length: %u, on CUDA 32, 64, 96, 128 and 256 run",
                          dim);
    if (group > 16)
        return status_set(status, STATUS_UNIMPLEMENTED,
                          "attention.head_count: %u heads share a KV head, on CUDA at most 16", group);
    if (config->embedding_length % 4 || config->expert_feed_forward_length % 4)
        return status_set(status, STATUS_UNIMPLEMENTED,
                          "embedding_length, expert_feed_forward_length: %u, %u, on CUDA multiples of 4",
                          config->embedding_length, config->expert_feed_forward_length);
    if (config->embedding_length > 8192 || config->head_count * dim > 8192 || config->expert_feed_forward_length > 8192)
        return status_set(status, STATUS_UNIMPLEMENTED, "rows of more than 8192 activations do not run on CUDA");
    if (config->vocab_size > CUDA_SAMPLE_VOCAB_MAX)
        return status_set(status, STATUS_UNIMPLEMENTED, "vocab_size: %u, on CUDA at most %d", config->vocab_size,
                          CUDA_SAMPLE_VOCAB_MAX);
    if (config->expert_count > CUDA_EXPERTS_MAX || config->expert_used_count > CUDA_EXPERTS_USED_MAX)
        return status_set(status, STATUS_UNIMPLEMENTED,
                          "expert_count, expert_used_count: %u, %u, on CUDA at most %d, %d", config->expert_count,
                          config->expert_used_count, CUDA_EXPERTS_MAX, CUDA_EXPERTS_USED_MAX);
    return 0;
}

static int choose_device(struct executor_cuda *cuda, uint32_t device, struct status *status) {
    int count = 0;
    struct cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        return cuda_failed(status, error ? error : cudaErrorNoDevice, "devices");
    if (device >= (uint32_t)count)
        return status_set(status, STATUS_INVALID_ARGUMENT, "device: %u, there are %d", device, count);
    error = cudaSetDevice((int)device);
    error = error ? error : cudaGetDeviceProperties(&properties, (int)device);
    error = error ? error : cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess)
        return cuda_failed(status, error, "device");
    if (properties.major < 8)
        return status_set(status, STATUS_FAILED_PRECONDITION, "device: %s has compute capability %d.%d, 8.0 is wanted",
                          properties.name, properties.major, properties.minor);
    cuda->many_runs = cuda_matmul_many_runs();
    snprintf(cuda->base.info.device, sizeof cuda->base.info.device, "%s", properties.name);
    return 0;
}

/* How many KV blocks fit beside weights and scratch. */
static int plan_memory(struct executor_cuda *cuda, const struct executor_options *options, size_t scratch,
                       struct status *status) {
    struct executor_info *info = &cuda->base.info;
    size_t free_bytes = 0, total = 0;
    cudaError_t error = cudaMemGetInfo(&free_bytes, &total);
    if (error != cudaSuccess)
        return cuda_failed(status, error, "memory");
    info->memory_total = total;
    const uint64_t taken = total - free_bytes, limit = (uint64_t)(options->memory_fraction * (double)total);
    const uint64_t fixed = taken + cuda->weights.bytes + scratch + reserve_bytes;
    const uint64_t block = cuda_kv_block_bytes(&cuda->heads) * cuda->model->config.block_count;
    const uint64_t of_one = (info->context_length + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK;
    const uint64_t room = fixed < limit ? (limit - fixed) / block : 0;
    uint64_t blocks = options->kv_bytes ? options->kv_bytes / block : least(room, of_one * info->max_sequences);
    if (blocks > room || blocks == 0)
        return status_set(
            status, STATUS_RESOURCE_EXHAUSTED,
            "device memory: weights of %llu MiB, buffers of %zu MiB and a KV cache of %llu MiB are wanted, "
            "%llu MiB are left under memory_fraction %g",
            (unsigned long long)(cuda->weights.bytes >> 20), scratch >> 20,
            (unsigned long long)(most(blocks, 1) * block >> 20),
            (unsigned long long)((limit > taken ? limit - taken : 0) >> 20), options->memory_fraction);
    info->kv_blocks = (uint32_t)least(blocks, UINT32_MAX / CUDA_KV_BLOCK);
    if (info->context_length > (uint64_t)info->kv_blocks * CUDA_KV_BLOCK)
        info->context_length = info->kv_blocks * CUDA_KV_BLOCK;
    cuda->kv_layer_bytes = cuda_kv_block_bytes(&cuda->heads) * info->kv_blocks;
    return 0;
}

static int fill_cos_sin(struct executor_cuda *cuda, struct status *status) {
    const struct model_config *config = &cuda->model->config;
    const uint32_t half = config->head_dim / 2, positions = cuda->base.info.context_length;
    const size_t bytes = (size_t)positions * config->head_dim * sizeof(float);
    float *table = malloc(bytes);
    if (!table)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %u rotations", positions);
    for (uint32_t i = 0; i < half; i++) {
        const double frequency = pow(config->rope_freq_base, -2.0 * i / config->head_dim);
        for (uint32_t p = 0; p < positions; p++) {
            table[((size_t)p * half + i) * 2] = (float)cos(p * frequency);
            table[((size_t)p * half + i) * 2 + 1] = (float)sin(p * frequency);
        }
    }
    cudaError_t error = cudaMemcpy(cuda->cos_sin, table, bytes, cudaMemcpyHostToDevice);
    free(table);
    return error == cudaSuccess ? 0 : cuda_failed(status, error, "rotations");
}

static int allocate(struct executor_cuda *cuda, size_t scratch, struct status *status) {
    const struct model_config *config = &cuda->model->config;
    const struct executor_info *info = &cuda->base.info;
    const size_t outputs = info->max_outputs,
                 routes = (size_t)info->step_tokens * config->expert_used_count * config->block_count;
    const size_t kv_bytes = cuda->kv_layer_bytes * config->block_count;
    struct arena arena = {.alignment = ALIGNMENT};
    cudaError_t error = cudaMalloc((void **)&cuda->scratch, scratch);
    error = error ? error : cudaMalloc((void **)&cuda->kv, kv_bytes);
    error = error ? error : cudaMemset(cuda->kv, 0, kv_bytes);
    if (error != cudaSuccess)
        return cuda_failed(status, error, "buffers and KV cache");
    arena.memory = cuda->scratch;
    lay_out_scratch(cuda, &arena);

    struct arena input = {.alignment = ALIGNMENT};
    take_input(&input, cuda, &cuda->host);
    error = cudaHostAlloc((void **)&input.memory, input.used, cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_logits, outputs * config->vocab_size * sizeof(float),
                                  cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_busiest, (config->block_count + outputs) * sizeof(uint32_t),
                                  cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_draws, outputs * sizeof *cuda->host_draws, cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_history, CUDA_HISTORY_TOKENS * sizeof(uint32_t),
                                  cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_asked, outputs * sizeof *cuda->host_asked, cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_alternatives, outputs * sizeof *cuda->host_alternatives,
                                  cudaHostAllocDefault);
    error = error ? error
                  : cudaHostAlloc((void **)&cuda->host_route_experts, routes * sizeof(uint32_t), cudaHostAllocDefault);
    error =
        error ? error : cudaHostAlloc((void **)&cuda->host_route_weights, routes * sizeof(float), cudaHostAllocDefault);
    if (error != cudaSuccess)
        return cuda_failed(status, error, "pinned memory");
    cuda->host_greatest = cuda->host_busiest + config->block_count;
    input.used = 0;
    take_input(&input, cuda, &cuda->host);
    cuda->routes_of_rows = calloc(routes, sizeof *cuda->routes_of_rows);
    cuda->route_weights_of_rows = calloc(routes, sizeof *cuda->route_weights_of_rows);
    cuda->sampled = calloc(outputs, sizeof *cuda->sampled);
    cuda->logits_rows = calloc(outputs, sizeof *cuda->logits_rows);
    cuda->sample_on_host = calloc(outputs, sizeof *cuda->sample_on_host);
    cuda->sampler_scratch = malloc(thread_pool_size(cuda->pool) * sampler_scratch_bytes(config->vocab_size));
    if (!cuda->routes_of_rows || !cuda->route_weights_of_rows || !cuda->sampled || !cuda->logits_rows ||
        !cuda->sample_on_host || !cuda->sampler_scratch)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for a step's results");
    return fill_cos_sin(cuda, status);
}

static void cuda_close(struct executor *executor) {
    struct executor_cuda *cuda = (struct executor_cuda *)executor;
    if (!cuda)
        return;
    cuda_graphs_free(cuda);
    cuda_profile_free(cuda->profile);
    cuda_weights_free(&cuda->weights);
    cudaFree(cuda->kv);
    cudaFree(cuda->scratch);
    cudaFreeHost(cuda->host.tokens);
    cudaFreeHost(cuda->host_logits);
    cudaFreeHost(cuda->host_busiest);
    cudaFreeHost(cuda->host_draws);
    cudaFreeHost(cuda->host_history);
    cudaFreeHost(cuda->host_asked);
    cudaFreeHost(cuda->host_alternatives);
    cudaFreeHost(cuda->host_route_experts);
    cudaFreeHost(cuda->host_route_weights);
    free(cuda->routes_of_rows);
    free(cuda->route_weights_of_rows);
    free(cuda->sampled);
    free(cuda->logits_rows);
    free(cuda->sample_on_host);
    free(cuda->sampler_scratch);
    if (cuda->stream)
        cudaStreamDestroy(cuda->stream);
    thread_pool_destroy(cuda->pool);
    free(cuda);
}

static int cuda_open(const struct model *model, const struct executor_options *options, struct executor **out,
                     struct status *status) {
    *out = NULL;
    const struct model_config *config = &model->config;
    enum quant_type kv_type;
    if (executor_check_options(config, options, 0.95, status) < 0 ||
        executor_kv_type(options, &kv_type, status) < 0 || check_model(config, status) < 0)
        return -1;
    struct executor_cuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for an executor");
    struct executor_info *info = &cuda->base.info;
    cuda->base.ops = &executor_cuda;
    cuda->model = model;
    cuda->heads = (struct cuda_heads){config->head_count, config->head_count_kv, config->head_dim, kv_type};
    *info = (struct executor_info){
        .backend = "cuda",
        .kv_block_tokens = CUDA_KV_BLOCK,
        .max_sequences = options->max_sequences,
        .step_tokens = options->step_tokens,
        .context_length = options->context_length ? options->context_length : config->context_length,
        .max_outputs = (uint32_t)least(options->step_tokens, most(options->max_sequences, OUTPUTS_LEAST)),
    };
    cuda->tables_capacity = (uint32_t)(least(options->max_sequences, options->step_tokens) *
                                       ((info->context_length + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK));
    struct arena arena = {.alignment = ALIGNMENT};
    const uint64_t start = clock_now_ns();
    if (choose_device(cuda, options->device, status) < 0 ||
        thread_pool_create(options->threads, &cuda->pool, status) < 0 ||
        cuda_weights_create(&cuda->weights, model, status) < 0)
        goto fail;
    lay_out_scratch(cuda, &arena);
    cuda->row_runs = cuda_row_runs(cuda);
    cuda->few_rows = cuda_few_rows(cuda);
    if (plan_memory(cuda, options, arena.used, status) < 0 ||
        cuda_weights_upload(&cuda->weights, model, cuda->pool, status) < 0 || allocate(cuda, arena.used, status) < 0 ||
        cuda_graphs_capture(cuda, status) < 0)
        goto fail;

    size_t free_bytes = 0, total = 0;
    if (cudaMemGetInfo(&free_bytes, &total) == cudaSuccess)
        info->memory_used = total - free_bytes;
    log_info("executor_ready", LOG_STR("device", info->device), LOG_UINT("weights_mib", cuda->weights.bytes >> 20),
             LOG_STR("kv_type", options->kv_type ? options->kv_type : "f16"),
             LOG_UINT("kv_mib", cuda->kv_layer_bytes * config->block_count >> 20),
             LOG_UINT("kv_positions", (uint64_t)info->kv_blocks * CUDA_KV_BLOCK),
             LOG_UINT("buffers_mib", arena.used >> 20), LOG_UINT("graphs", cuda->graph_count),
             LOG_UINT("memory_used_mib", info->memory_used >> 20),
             LOG_REAL("seconds", (double)(clock_now_ns() - start) * 1e-9));
    *out = &cuda->base;
    return 0;
fail:
    cuda_close(&cuda->base);
    return -1;
}

static bool cuda_answers(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

const struct executor_ops executor_cuda = {
    .name = "cuda", .max_sequences = 256, .step_tokens = 2048,
    .answers = cuda_answers, .open = cuda_open, .close = cuda_close, .step = cuda_step};
