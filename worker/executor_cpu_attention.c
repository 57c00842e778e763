#include "worker/executor_cpu.h"

#include <assert.h>
#include <math.h>

/* The layer's part of KV head `head` of block 0. */
static unsigned char *kv_head(const struct executor_cpu *cpu, uint32_t head) {
    size_t index = (size_t)cpu->layer * cpu->model->config.head_count_kv + head;
    return cpu->kv + index * cpu->kv_block_bytes;
}

static size_t kv_block_stride(const struct executor_cpu *cpu) {
    const struct model_config *config = &cpu->model->config;
    return (size_t)config->block_count * config->head_count_kv * cpu->kv_block_bytes;
}

/* Queries of one row: norm of each head, then RoPE. */
static void turn_queries(struct executor_cpu *cpu, uint32_t row) {
    const struct model_config *config = &cpu->model->config;
    uint32_t dim = config->head_dim;
    const float *norm = cpu->weights.layers[cpu->layer].norms->attn_q_norm;
    for (uint32_t h = 0; h < config->head_count; h++) {
        float *q = cpu->q + ((size_t)row * config->head_count + h) * dim;
        cpu->kernels->rms_norm(q, norm, dim, config->rms_epsilon, q);
        cpu->kernels->rope(q, dim, cpu->rope + (size_t)row * dim);
    }
}

/* Keys of one row the same way, and into the cache with its values. */
static void store_keys(struct executor_cpu *cpu, uint32_t row) {
    const struct model_config *config = &cpu->model->config;
    uint32_t dim = config->head_dim, position = cpu->positions[row];
    const float *norm = cpu->weights.layers[cpu->layer].norms->attn_k_norm;
    uint32_t block = cpu->row_sequence[row]->blocks[position / CPU_KV_BLOCK];
    assert(block < cpu->base.info.kv_blocks);
    for (uint32_t h = 0; h < config->head_count_kv; h++) {
        size_t at = ((size_t)row * config->head_count_kv + h) * dim;
        cpu->kernels->rms_norm(cpu->k + at, norm, dim, config->rms_epsilon, cpu->k + at);
        cpu->kernels->rope(cpu->k + at, dim, cpu->rope + (size_t)row * dim);
        cpu->kernels->attention->store(cpu->kv_type, kv_head(cpu, h) + block * kv_block_stride(cpu),
                                       position % CPU_KV_BLOCK, dim, cpu->k + at, cpu->v + at);
    }
}

/* Items: the keys of every row of the batch, then the queries of the rows that go on. */
static void store_items(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    for (uint32_t i = first; i < end; i++) {
        if (i < cpu->batch->rows)
            store_keys(cpu, i);
        else
            turn_queries(cpu, cpu->rows[i - cpu->batch->rows]);
    }
}

void cpu_attention_store(struct executor_cpu *cpu) {
    thread_pool_run(cpu->pool, store_items, cpu, cpu->batch->rows + cpu->row_count);
}

size_t cpu_attention_row_floats(const struct model_config *config, uint32_t context_length) {
    return (size_t)config->head_count * cpu_attention_pieces(context_length - 1) *
           cpu_attention_partial_floats(config->head_dim);
}

/* Joins the pieces of the group's rows for one KV head; the last head to come also quantizes the rows. */
static void finish_head(struct executor_cpu *cpu, struct cpu_attention_group *group, uint32_t head,
                        const float *partial) {
    const struct model_config *config = &cpu->model->config;
    uint32_t heads = config->head_count / config->head_count_kv, dim = config->head_dim;
    size_t floats = cpu_attention_partial_floats(dim), width = (size_t)config->head_count * dim;
    for (uint32_t t = 0; t < group->tokens; t++)
        for (uint32_t h = 0; h < heads; h++)
            cpu->kernels->attention->combine(partial + (t * heads + h) * group->pieces * floats,
                                             cpu_attention_pieces(group->position + t), floats, dim,
                                             cpu->q + (group->row + t) * width + (head * heads + h) * dim);
    if (!cpu->weights.layers[cpu->layer].output.quantized || atomic_fetch_sub(&group->heads_left, 1) != 1)
        return;
    for (uint32_t row = group->row; row < group->row + group->tokens; row++)
        cpu->kernels->quantize(cpu->q + row * width, (uint32_t)width,
                               (struct cpu_activation *)(cpu->attended_q + row * cpu->attended_q_bytes));
}

/* Items: for each group, for each KV head, the pieces. Whoever ends the last piece of a head joins them. */
static void attend_items(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    const struct model_config *config = &cpu->model->config;
    uint32_t heads_kv = config->head_count_kv, heads = config->head_count / heads_kv, dim = config->head_dim;
    size_t floats = cpu_attention_partial_floats(dim);

    uint32_t low = 0, high = cpu->group_count; /* the group of the first item */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (cpu->groups[middle].item <= first)
            low = middle;
        else
            high = middle;
    }
    struct cpu_attention_group *group = &cpu->groups[low];
    for (uint32_t i = first; i < end; i++) {
        if (i - group->item >= group->pieces * heads_kv)
            group++;
        uint32_t head = (i - group->item) / group->pieces, piece = (i - group->item) % group->pieces;
        float *partial = cpu->partial + group->partial + (size_t)head * group->tokens * heads * group->pieces * floats;
        struct cpu_attention_rows rows = {
            .head_dim = dim,
            .type = cpu->kv_type,
            .scale = 1.0f / sqrtf((float)dim),
            .q = cpu->q + ((size_t)group->row * config->head_count + head * heads) * dim,
            .token_stride = (size_t)config->head_count * dim,
            .tokens = group->tokens,
            .heads = heads,
            .position = group->position,
            .cache = kv_head(cpu, head),
            .block_stride = kv_block_stride(cpu),
            .blocks = group->sequence->blocks,
            .expanded = cpu->threads[thread].expanded,
        };
        cpu->kernels->attention->run(&rows, piece, partial + piece * floats, group->pieces * floats);
        atomic_uint *left = &cpu->group_pieces_left[(size_t)(group - cpu->groups) * heads_kv + head];
        if (atomic_fetch_sub(left, 1) == 1)
            finish_head(cpu, group, head, partial);
    }
}

/*
 * Attention of all rows of the phase, in as many runs as the room for partial results asks for. How rows are grouped
 * has no part in their results.
 */
void cpu_attention_run(struct executor_cpu *cpu) {
    const struct model_config *config = &cpu->model->config;
    uint32_t heads_kv = config->head_count_kv;
    size_t floats = cpu_attention_partial_floats(config->head_dim);
    size_t used = 0;
    uint32_t items = 0, count = 0;
    for (uint32_t i = 0; i < cpu->row_count;) {
        uint32_t row = cpu->rows[i], position = cpu->positions[row], tokens = 1;
        const struct batch_sequence *sequence = cpu->row_sequence[row];
        while (tokens < CPU_ATTENTION_TOKENS && i + tokens < cpu->row_count && cpu->rows[i + tokens] == row + tokens &&
               cpu->row_sequence[row + tokens] == sequence)
            tokens++;
        uint32_t pieces = cpu_attention_pieces(position + tokens - 1);
        size_t row_floats = (size_t)config->head_count * pieces * floats;
        if (tokens * row_floats > cpu->partial_floats) /* at least one row has room */
            tokens = (uint32_t)(cpu->partial_floats / row_floats);
        if (used + tokens * row_floats > cpu->partial_floats) {
            cpu->group_count = count;
            thread_pool_run(cpu->pool, attend_items, cpu, items);
            used = items = count = 0;
        }
        struct cpu_attention_group *group = &cpu->groups[count];
        group->sequence = sequence;
        group->row = row;
        group->tokens = tokens;
        group->position = position;
        group->pieces = pieces;
        group->item = items;
        group->partial = used;
        atomic_store_explicit(&group->heads_left, heads_kv, memory_order_relaxed);
        for (uint32_t h = 0; h < heads_kv; h++)
            atomic_store_explicit(&cpu->group_pieces_left[(size_t)count * heads_kv + h], pieces, memory_order_relaxed);
        used += tokens * row_floats;
        items += heads_kv * pieces;
        count++;
        i += tokens;
    }
    cpu->group_count = count;
    thread_pool_run(cpu->pool, attend_items, cpu, items);
}
