#include "worker/executor_cpu.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/log.h"
#include "worker/arena.h"
#include "worker/host_memory.h"

enum {
    ALIGNMENT = 64,
    TOUCH_BYTES = 2 << 20, /* a huge page */
    OUTPUTS_LEAST = 64,          /* rows of logits there is room for however few sequences there may be */
    PARTIAL_FLOATS = 8 << 20,    /* of attention; more where one row needs more */
    KV_POSITIONS_LEAST = 8192,   /* of which the KV cache should hold one sequence (or one as long as may be) */
    REPACK_RESERVE_PERCENT = 10, /* repacking by itself leaves this much of what it takes */
};

static size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Gives every buffer of a step its place, and the arena the size of them all. */
static void lay_out_scratch(struct executor_cpu *cpu, struct arena *arena) {
    const struct model_config *config = &cpu->model->config;
    size_t rows = cpu->base.info.step_tokens, outputs = cpu->base.info.max_outputs;
    size_t length = config->embedding_length, vocab = config->vocab_size, experts = config->expert_count;
    size_t width = (size_t)config->head_count * config->head_dim,
           kv_width = (size_t)config->head_count_kv * config->head_dim;
    size_t slots = rows * config->expert_used_count, routes = slots * config->block_count;

    /* A matrix that takes quantized activations has whole groups of columns. */
    cpu->normed_q_bytes = length % CPU_GROUP ? 0 : cpu_activation_bytes(config->embedding_length);
    cpu->attended_q_bytes = width % CPU_GROUP ? 0 : cpu_activation_bytes((uint32_t)width);
    size_t hidden_length = config->expert_feed_forward_length;
    cpu->hidden_bytes = hidden_length % CPU_GROUP ? 0 : cpu_activation_bytes((uint32_t)hidden_length);
    cpu->hidden_bytes =
        most(cpu->hidden_bytes, (hidden_length * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    size_t row_floats = cpu_attention_row_floats(config, cpu->base.info.context_length);
    cpu->partial_floats = most(row_floats, least(PARTIAL_FLOATS, rows * row_floats));

    cpu->rope_frequencies = arena_take(arena, config->head_dim / 2, sizeof(double));
    cpu->rope = arena_take(arena, rows * config->head_dim, sizeof(float));
    cpu->x = arena_take(arena, rows * length, sizeof(float));
    cpu->normed = arena_take(arena, rows * length, sizeof(float));
    cpu->normed_q = arena_take(arena, rows, cpu->normed_q_bytes);
    cpu->q = arena_take(arena, rows * width, sizeof(float));
    cpu->k = arena_take(arena, rows * kv_width, sizeof(float));
    cpu->v = arena_take(arena, rows * kv_width, sizeof(float));
    cpu->attended_q = arena_take(arena, rows, cpu->attended_q_bytes);
    cpu->delta = arena_take(arena, rows * length, sizeof(float));
    cpu->router_logits = arena_take(arena, rows * experts, sizeof(float));
    cpu->chosen = arena_take(arena, slots, sizeof(uint32_t));
    cpu->chosen_weights = arena_take(arena, slots, sizeof(float));
    cpu->slots = arena_take(arena, slots, sizeof(uint32_t));
    cpu->slot_rows = arena_take(arena, slots, sizeof(uint32_t));
    cpu->expert_ends = arena_take(arena, experts + 1, sizeof(uint32_t));
    cpu->expert_rows = arena_take(arena, experts + slots / CPU_TILE_ROWS, sizeof(struct cpu_expert_rows));
    cpu->hidden = arena_take(arena, slots, cpu->hidden_bytes);
    cpu->expert_out = arena_take(arena, slots * length, sizeof(float));
    cpu->logits = arena_take(arena, outputs * vocab, sizeof(float));
    cpu->partial = arena_take(arena, cpu->partial_floats, sizeof(float));
    cpu->groups = arena_take(arena, rows, sizeof(struct cpu_attention_group));
    cpu->group_pieces_left = arena_take(arena, rows * config->head_count_kv, sizeof(atomic_uint));
    cpu->rows = arena_take(arena, rows, sizeof(uint32_t));
    cpu->all_rows = arena_take(arena, rows, sizeof(uint32_t));
    cpu->positions = arena_take(arena, rows, sizeof(uint32_t));
    cpu->row_sequence = arena_take(arena, rows, sizeof(struct batch_sequence *));
    cpu->route_experts = arena_take(arena, routes, sizeof(uint32_t));
    cpu->route_weights = arena_take(arena, routes, sizeof(float));
    cpu->sampled = arena_take(arena, outputs, sizeof(struct sampled));
    cpu->logits_rows = arena_take(arena, outputs, sizeof(float *));

    uint32_t threads = thread_pool_size(cpu->pool);
    cpu->threads = arena_take(arena, threads, sizeof(struct cpu_thread));
    for (uint32_t t = 0; t < threads; t++) {
        size_t items = (size_t)CPU_ITEM_ROWS * CPU_GROUP;
        struct cpu_thread thread = {
            .tile = arena_take(arena, cpu->weights.tile_bytes_max, 1),
            .gate = arena_take(arena, items, sizeof(float)),
            .up = arena_take(arena, items, sizeof(float)),
            .sampler = arena_take(arena, sampler_scratch_bytes(config->vocab_size), 1),
        };
        if (cpu->kv_type == QUANT_Q8_0)
            thread.expanded = arena_take(arena, CPU_KV_PIECE / CPU_KV_BLOCK,
                                         cpu_kv_block_bytes(QUANT_F16, config->head_dim));
        if (arena->memory)
            cpu->threads[t] = thread;
    }
}

static int select_kernels(const char *name, const struct cpu_kernels **out, struct status *status) {
    enum cpu_isa isa;
    if (!cpu_isa_parse(name ? name : "auto", &isa))
        return status_set(status, STATUS_INVALID_ARGUMENT, "isa: \"%s\", allowed are auto, c, avx2 and avx512", name);
    *out = cpu_kernels_select(isa);
    if (name && strcmp(name, "auto") != 0 && (*out)->isa != isa)
        return status_set(status, STATUS_FAILED_PRECONDITION, "isa: %s, this processor has at most %s", name,
                          (*out)->name);
    return 0;
}

static bool enough_memory(uint64_t needed, uint64_t available, const char *what, struct status *status) {
    if (needed <= available)
        return true;
    status_set(status, STATUS_RESOURCE_EXHAUSTED, "%s need %llu MiB, there are %llu MiB of memory", what,
               (unsigned long long)(needed >> 20), (unsigned long long)(available >> 20));
    return false;
}

/*
 * Decides whether weights are repacked and how large the KV cache is. Without repacking the file's pages want to stay
 * in memory as well, but a step also runs, slowly, where they do not fit.
 */
static int plan_memory(struct executor_cpu *cpu, const struct executor_options *options, bool *repack,
                       struct status *status) {
    const struct model_config *config = &cpu->model->config;
    struct executor_info *info = &cpu->base.info;
    struct host_memory memory;
    host_memory_read("", &memory);
    info->memory_total = memory.total;
    uint64_t room = (uint64_t)(options->memory_fraction * (double)memory.available);

    uint64_t block_bytes = (uint64_t)config->block_count * config->head_count_kv * cpu->kv_block_bytes;
    uint64_t blocks_of_one = (info->context_length + CPU_KV_BLOCK - 1) / CPU_KV_BLOCK;
    if (!enough_memory(options->kv_bytes, room, "kv_bytes", status)) /* also keeps the sums below from wrapping */
        return -1;
    uint64_t kv_least =
        options->context_length ? blocks_of_one : least(blocks_of_one, KV_POSITIONS_LEAST / CPU_KV_BLOCK);
    if (options->kv_bytes)
        kv_least = options->kv_bytes / block_bytes;
    if (kv_least == 0 || (options->context_length && kv_least < blocks_of_one))
        return status_set(status, STATUS_INVALID_ARGUMENT, "kv_bytes: %llu, %s of %u positions takes %llu",
                          (unsigned long long)options->kv_bytes, kv_least ? "a sequence" : "a block",
                          kv_least ? info->context_length : CPU_KV_BLOCK,
                          (unsigned long long)((kv_least ? blocks_of_one : 1) * block_bytes));
    uint64_t base = cpu->scratch_bytes + kv_least * block_bytes;
    uint64_t packed = cpu_weights_packed_bytes(&cpu->weights, cpu->model);

    const char *wish = options->repack ? options->repack : "auto";
    if (strcmp(wish, "auto") == 0)
        *repack = (base + packed) * (100 + REPACK_RESERVE_PERCENT) / 100 <= room;
    else if (strcmp(wish, "on") == 0 || strcmp(wish, "off") == 0)
        *repack = strcmp(wish, "on") == 0;
    else
        return status_set(status, STATUS_INVALID_ARGUMENT, "repack: \"%s\", allowed are auto, on and off", wish);
    if (!enough_memory(base + (*repack ? packed : 0), room,
                       *repack ? "repacked weights, buffers and KV cache" : "buffers and KV cache", status))
        return -1;

    uint64_t blocks = kv_least;
    if (!options->kv_bytes) {
        uint64_t taken = cpu->scratch_bytes + (*repack ? packed : config->tensor_bytes);
        uint64_t fit = taken < room ? (room - taken) / block_bytes : 0;
        blocks = most(kv_least, least(fit, options->max_sequences * blocks_of_one));
    }
    if (blocks > UINT32_MAX / CPU_KV_BLOCK)
        blocks = UINT32_MAX / CPU_KV_BLOCK;
    info->kv_blocks = (uint32_t)blocks;
    if (info->context_length > blocks * CPU_KV_BLOCK)
        info->context_length = (uint32_t)blocks * CPU_KV_BLOCK;
    cpu->kv_bytes = blocks * block_bytes;
    info->memory_used = cpu->kv_bytes + cpu->scratch_bytes + (*repack ? packed : config->tensor_bytes);
    return 0;
}

/* Items: pages of the scratch. Touched at open, they cost the first steps nothing and cannot be missing in one. */
static void touch_pages(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    const struct executor_cpu *cpu = context;
    for (uint32_t page = first; page < end; page++) {
        size_t at = (size_t)page * TOUCH_BYTES;
        memset((unsigned char *)cpu->scratch + at, 0, least(TOUCH_BYTES, cpu->scratch_bytes - at));
    }
}

/* "AMD EPYC 9575F, avx512, 16 threads" */
static void name_device(const struct executor_cpu *cpu, char *out, size_t size) {
    char line[256], model[96] = "CPU";
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %95[^\n]", model) == 1)
            break;
    if (file)
        fclose(file);
    uint32_t threads = thread_pool_size(cpu->pool);
    snprintf(out, size, "%s, %s, %u thread%s", model, cpu->kernels->name, threads, threads == 1 ? "" : "s");
}

static void cpu_close(struct executor *executor) {
    struct executor_cpu *cpu = (struct executor_cpu *)executor;
    if (!cpu)
        return;
    thread_pool_destroy(cpu->pool);
    cpu_weights_free(&cpu->weights);
    host_memory_unmap(cpu->kv, cpu->kv_bytes);
    host_memory_unmap(cpu->scratch, cpu->scratch_bytes);
    free(cpu);
}

static int cpu_open(const struct model *model, const struct executor_options *options, struct executor **out,
                    struct status *status) {
    *out = NULL;
    const struct model_config *config = &model->config;
    enum quant_type kv_type;
    if (executor_check_options(config, options, 1, status) < 0 || executor_kv_type(options, &kv_type, status) < 0)
        return -1;
    struct executor_cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for an executor");
    struct executor_info *info = &cpu->base.info;
    cpu->base.ops = &executor_cpu;
    cpu->model = model;
    *info = (struct executor_info){
        .backend = "cpu",
        .kv_block_tokens = CPU_KV_BLOCK,
        .max_sequences = options->max_sequences,
        .step_tokens = options->step_tokens,
        .context_length = options->context_length ? options->context_length : config->context_length,
        .max_outputs = (uint32_t)least(options->step_tokens, most(options->max_sequences, OUTPUTS_LEAST)),
    };
    cpu->kv_type = kv_type;
    cpu->kv_block_bytes = cpu_kv_block_bytes(kv_type, config->head_dim);

    bool repack = false;
    struct arena arena = {.alignment = ALIGNMENT};
    if (select_kernels(options->isa, &cpu->kernels, status) < 0 ||
        thread_pool_create(options->threads, &cpu->pool, status) < 0 ||
        cpu_weights_create(&cpu->weights, model, status) < 0)
        goto fail;
    lay_out_scratch(cpu, &arena);
    cpu->scratch_bytes = arena.used;
    if (plan_memory(cpu, options, &repack, status) < 0)
        goto fail;

    cpu->scratch = arena.memory = host_memory_map(cpu->scratch_bytes);
    cpu->kv = host_memory_map(cpu->kv_bytes);
    if (!cpu->scratch || !cpu->kv) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu MiB of buffers and %zu MiB of KV cache",
                   cpu->scratch_bytes >> 20, cpu->kv_bytes >> 20);
        goto fail;
    }
    thread_pool_run(cpu->pool, touch_pages, cpu, (uint32_t)((cpu->scratch_bytes + TOUCH_BYTES - 1) / TOUCH_BYTES));
    arena.used = 0;
    lay_out_scratch(cpu, &arena);
    for (uint32_t i = 0; i < info->step_tokens; i++)
        cpu->all_rows[i] = i;
    for (uint32_t i = 0; i < config->head_dim / 2; i++)
        cpu->rope_frequencies[i] = pow(config->rope_freq_base, -2.0 * i / config->head_dim);
    if (repack && cpu_weights_pack(&cpu->weights, model, cpu->kernels, cpu->pool, status) < 0)
        goto fail;

    name_device(cpu, info->device, sizeof info->device);
    log_info("executor_ready", LOG_STR("device", info->device), LOG_STR("repacked", repack ? "yes" : "no"),
             LOG_UINT("weights_mib", (repack ? cpu->weights.bytes : config->tensor_bytes) >> 20),
             LOG_STR("kv_type", options->kv_type ? options->kv_type : "f16"),
             LOG_UINT("kv_mib", cpu->kv_bytes >> 20),
             LOG_UINT("kv_positions", (uint64_t)info->kv_blocks * CPU_KV_BLOCK),
             LOG_UINT("buffers_mib", cpu->scratch_bytes >> 20));
    *out = &cpu->base;
    return 0;
fail:
    cpu_close(&cpu->base);
    return -1;
}

static double imbalance(const struct executor_cpu *cpu) {
    const struct model_config *config = &cpu->model->config;
    double mean = (double)cpu->batch->rows * config->expert_used_count / config->expert_count;
    return cpu->full_layers ? (double)cpu->busiest_rows / cpu->full_layers / mean : 0;
}

static int cpu_step(struct executor *executor, const struct batch *batch, struct batch_result *result,
                    struct status *status) {
    struct executor_cpu *cpu = (struct executor_cpu *)executor;
    assert(batch->rows > 0 && batch->rows <= cpu->base.info.step_tokens);
    assert(batch->output_count <= cpu->base.info.max_outputs && batch->output_count <= batch->rows);
    cpu->batch = batch;
    cpu->busiest_rows = cpu->full_layers = 0;
    atomic_store_explicit(&cpu->not_finite, false, memory_order_relaxed);
    cpu_forward(cpu);
    if (atomic_load_explicit(&cpu->not_finite, memory_order_relaxed))
        return status_set(status, STATUS_INTERNAL, "logits are not finite");

    for (uint32_t i = 0; i < batch->output_count; i++)
        cpu->logits_rows[i] = batch->outputs[i].logits ? cpu->logits + (size_t)i * cpu->model->config.vocab_size : NULL;
    *result = (struct batch_result){
        .sampled = cpu->sampled,
        .logits = cpu->logits_rows,
        .route_experts = batch->routes ? cpu->route_experts : NULL,
        .route_weights = batch->routes ? cpu->route_weights : NULL,
        .expert_imbalance = imbalance(cpu),
    };
    return 0;
}

/* Of Qwen3-30B-A3B on two cores this is about a second. */
const struct executor_ops executor_cpu = {
    .name = "cpu", .max_sequences = 16, .step_tokens = 128, .open = cpu_open, .close = cpu_close, .step = cpu_step};
