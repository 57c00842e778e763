#include "worker/executor_cpu.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/*
 * One step, phase by phase. A layer has six phases that stream weights or the KV cache, and between them short ones
 * over rows; for a single row those run on the caller's thread without waking anybody.
 */

/* The residual stream's next row: what each expert of the layer before said, weighted, in the order of their rank. */
static void add_experts(const struct executor_cpu *cpu, uint32_t row) {
    uint32_t used = cpu->model->config.expert_used_count, length = cpu->model->config.embedding_length;
    for (uint32_t u = 0; u < used; u++) {
        size_t at = (size_t)row * used + u;
        cpu->kernels->axpy(cpu->chosen_weights[at], cpu->expert_out + (size_t)cpu->slots[at] * length, length,
                           cpu->x + (size_t)row * length);
    }
}

/* Norm of a row of x into entry `to` of normed and, where asked for, of normed_q. */
static void norm_row(const struct executor_cpu *cpu, uint32_t row, const float *weight, bool quantized, uint32_t to) {
    uint32_t length = cpu->model->config.embedding_length;
    float *normed = cpu->normed + (size_t)to * length;
    cpu->kernels->rms_norm(cpu->x + (size_t)row * length, weight, length, cpu->model->config.rms_epsilon, normed);
    if (quantized)
        cpu->kernels->quantize(normed, length, (struct cpu_activation *)(cpu->normed_q + to * cpu->normed_q_bytes));
}

static void embed_rows(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    const struct model_matrix *embeddings = &cpu->model->token_embd;
    uint32_t dim = cpu->model->config.head_dim;
    for (uint32_t row = first; row < end; row++) {
        uint32_t token = cpu->batch->tokens[row];
        assert(token < embeddings->rows);
        cpu->kernels->dequantize(embeddings->type,
                                 (const unsigned char *)embeddings->data + token * embeddings->row_bytes,
                                 embeddings->columns, cpu->x + (size_t)row * embeddings->columns);
        float *rope = cpu->rope + (size_t)row * dim;
        for (uint32_t i = 0; i < dim / 2; i++) {
            double angle = cpu->positions[row] * cpu->rope_frequencies[i];
            rope[2 * i] = (float)cos(angle);
            rope[2 * i + 1] = (float)sin(angle);
        }
    }
}

static void begin_layer_rows(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    const struct cpu_layer *layer = &cpu->weights.layers[cpu->layer];
    for (uint32_t row = first; row < end; row++) {
        if (cpu->layer > 0)
            add_experts(cpu, row);
        norm_row(cpu, row, layer->norms->attn_norm, layer->q.quantized || layer->k.quantized || layer->v.quantized,
                 row);
    }
}

static void begin_experts_rows(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    const struct cpu_layer *layer = &cpu->weights.layers[cpu->layer];
    uint32_t length = cpu->model->config.embedding_length;
    for (uint32_t i = first; i < end; i++) {
        uint32_t row = cpu->rows[i];
        cpu->kernels->axpy(1, cpu->delta + (size_t)row * length, length, cpu->x + (size_t)row * length);
        norm_row(cpu, row, layer->norms->ffn_norm, layer->gate.quantized || layer->up.quantized, row);
    }
}

static void begin_head_rows(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    for (uint32_t i = first; i < end; i++) {
        uint32_t row = cpu->rows[i];
        add_experts(cpu, row);
        norm_row(cpu, row, cpu->model->output_norm, cpu->weights.head.quantized, i);
    }
}

static void sample_outputs(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    uint32_t vocab_size = cpu->model->config.vocab_size;
    for (uint32_t i = first; i < end; i++) {
        const struct batch_output *output = &cpu->batch->outputs[i];
        if (output->sampling)
            sampler_sample(cpu->logits + (size_t)i * vocab_size, vocab_size, output->sampling, output->history,
                           output->history_length, output->prompt_length, output->logprobs,
                           cpu->threads[thread].sampler, &cpu->sampled[i]);
    }
}

/* Numbers rows by sequence, and gives every row its position. */
static void lay_out_rows(struct executor_cpu *cpu) {
    const struct batch *batch = cpu->batch;
    uint32_t row = 0;
    for (uint32_t s = 0; s < batch->sequence_count; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        assert(sequence->rows > 0 && sequence->rows <= batch->rows - row);
        assert(sequence->position + sequence->rows <= cpu->base.info.context_length);
        assert((uint64_t)sequence->block_count * CPU_KV_BLOCK >= (uint64_t)sequence->position + sequence->rows);
        for (uint32_t i = 0; i < sequence->rows; i++, row++) {
            cpu->row_sequence[row] = sequence;
            cpu->positions[row] = sequence->position + i;
        }
    }
    assert(row == batch->rows);
}

static struct cpu_product product(const struct executor_cpu *cpu, const struct cpu_matrix *matrix, float *out,
                                  const uint32_t *rows, uint32_t count) {
    return (struct cpu_product){
        .matrix = matrix,
        .in = matrix->quantized ? (const void *)cpu->normed_q : cpu->normed,
        .in_stride = matrix->quantized ? cpu->normed_q_bytes : matrix->columns * sizeof(float),
        .out = out,
        .out_stride = matrix->rows,
        .rows = rows,
        .count = count,
    };
}

static void attention_layer(struct executor_cpu *cpu) {
    const struct cpu_layer *layer = &cpu->weights.layers[cpu->layer];
    const struct cpu_product qkv[3] = {
        product(cpu, &layer->q, cpu->q, cpu->rows, cpu->row_count),
        product(cpu, &layer->k, cpu->k, cpu->all_rows, cpu->batch->rows),
        product(cpu, &layer->v, cpu->v, cpu->all_rows, cpu->batch->rows),
    };
    cpu_multiply(cpu, qkv, 3);
    cpu_attention_store(cpu);
    cpu_attention_run(cpu);

    struct cpu_product output = product(cpu, &layer->output, cpu->delta, cpu->rows, cpu->row_count);
    output.in = layer->output.quantized ? (const void *)cpu->attended_q : cpu->q;
    output.in_stride = layer->output.quantized ? cpu->attended_q_bytes : layer->output.columns * sizeof(float);
    cpu_multiply(cpu, &output, 1);
}

void cpu_forward(struct executor_cpu *cpu) {
    const struct batch *batch = cpu->batch;
    uint32_t layers = cpu->model->config.block_count;
    lay_out_rows(cpu);
    thread_pool_run(cpu->pool, embed_rows, cpu, batch->rows);

    memcpy(cpu->rows, cpu->all_rows, batch->rows * sizeof *cpu->rows);
    cpu->row_count = batch->rows;
    for (cpu->layer = 0; cpu->layer < layers; cpu->layer++) {
        thread_pool_run(cpu->pool, begin_layer_rows, cpu, batch->rows);
        if (cpu->layer == layers - 1 && !batch->routes) {
            /* Of the others only keys and values are still wanted. */
            for (uint32_t i = 0; i < batch->output_count; i++)
                cpu->rows[i] = batch->outputs[i].row;
            cpu->row_count = batch->output_count;
        }
        attention_layer(cpu);
        thread_pool_run(cpu->pool, begin_experts_rows, cpu, cpu->row_count);
        cpu_experts_run(cpu);
    }

    for (uint32_t i = 0; i < batch->output_count; i++)
        cpu->rows[i] = batch->outputs[i].row;
    thread_pool_run(cpu->pool, begin_head_rows, cpu, batch->output_count);
    struct cpu_product head = product(cpu, &cpu->weights.head, cpu->logits, cpu->all_rows, batch->output_count);
    head.not_finite = &cpu->not_finite;
    cpu_multiply(cpu, &head, 1);
    if (!atomic_load_explicit(&cpu->not_finite, memory_order_relaxed))
        thread_pool_run(cpu->pool, sample_outputs, cpu, batch->output_count);
}
