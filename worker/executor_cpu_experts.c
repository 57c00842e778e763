#include "worker/executor_cpu.h"

#include <string.h>

static void route_rows(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    const struct model_config *config = &cpu->model->config;
    uint32_t used = config->expert_used_count;
    for (uint32_t i = first; i < end; i++) {
        uint32_t row = cpu->rows[i];
        uint32_t *chosen = cpu->chosen + (size_t)row * used;
        float *weights = cpu->chosen_weights + (size_t)row * used;
        cpu->kernels->route(cpu->router_logits + (size_t)row * config->expert_count, config->expert_count, used, chosen,
                            weights);
        if (cpu->batch->routes) {
            size_t at = ((size_t)row * config->block_count + cpu->layer) * used;
            memcpy(cpu->route_experts + at, chosen, used * sizeof *chosen);
            memcpy(cpu->route_weights + at, weights, used * sizeof *weights);
        }
    }
}

/* Gives every choice a slot, those of an expert side by side (a counting sort), and lists the experts' rows. */
static void group_by_expert(struct executor_cpu *cpu) {
    const struct model_config *config = &cpu->model->config;
    uint32_t used = config->expert_used_count, *ends = cpu->expert_ends;
    memset(ends, 0, (config->expert_count + 1) * sizeof *ends);
    for (uint32_t i = 0; i < cpu->row_count; i++)
        for (uint32_t u = 0; u < used; u++)
            ends[cpu->chosen[(size_t)cpu->rows[i] * used + u] + 1]++;
    uint32_t most = cpu_item_rows(&cpu->weights.layers[cpu->layer].gate);
    cpu->expert_rows_count = 0;
    uint32_t busiest = 0;
    for (uint32_t e = 0; e < config->expert_count; e++) {
        uint32_t slot = ends[e];
        if (ends[e + 1] > busiest)
            busiest = ends[e + 1];
        ends[e + 1] += slot;
        for (; slot < ends[e + 1]; slot += most) {
            uint32_t count = ends[e + 1] - slot < most ? ends[e + 1] - slot : most;
            cpu->expert_rows[cpu->expert_rows_count++] = (struct cpu_expert_rows){e, slot, count};
        }
    }
    if (cpu->row_count == cpu->batch->rows) {
        cpu->busiest_rows += busiest;
        cpu->full_layers++;
    }
    /* ends[e] is still where expert e begins; each choice moves it on. */
    for (uint32_t i = 0; i < cpu->row_count; i++) {
        for (uint32_t u = 0; u < used; u++) {
            size_t at = (size_t)cpu->rows[i] * used + u;
            cpu->slots[at] = ends[cpu->chosen[at]]++;
            cpu->slot_rows[cpu->slots[at]] = cpu->rows[i];
        }
    }
}

/* Puts CPU_GROUP values of silu(gate) * up of each slot where down takes them. */
static void keep_hidden(const struct executor_cpu *cpu, const float *values, const struct cpu_expert_rows *rows,
                        uint32_t group) {
    const struct cpu_matrix *down = &cpu->weights.layers[cpu->layer].down;
    uint32_t n = down->columns - group * CPU_GROUP;
    for (uint32_t i = 0; i < rows->count; i++, values += CPU_GROUP) {
        unsigned char *hidden = cpu->hidden + (rows->slot + i) * cpu->hidden_bytes;
        if (down->quantized)
            cpu->kernels->quantize(values, CPU_GROUP, (struct cpu_activation *)hidden + group);
        else
            memcpy((float *)hidden + group * CPU_GROUP, values, (n < CPU_GROUP ? n : CPU_GROUP) * sizeof(float));
    }
}

/* Items: CPU_GROUP rows of gate and up of an expert, for its rows of the batch. */
static void gate_up_items(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    struct cpu_thread *own = &cpu->threads[thread];
    const struct cpu_layer *layer = &cpu->weights.layers[cpu->layer];
    const struct cpu_matrix *const matrices[2] = {&layer->gate, &layer->up};
    float *const results[2] = {own->gate, own->up};
    uint32_t groups = (layer->gate.rows + CPU_GROUP - 1) / CPU_GROUP, tiles = CPU_GROUP / CPU_TILE_ROWS;
    for (uint32_t i = first; i < end; i++) {
        const struct cpu_expert_rows *rows = &cpu->expert_rows[i / groups];
        uint32_t group = i % groups;
        for (int m = 0; m < 2; m++) {
            const struct cpu_matrix *matrix = matrices[m];
            for (uint32_t r = 0; r < rows->count; r++) {
                size_t row = cpu->slot_rows[rows->slot + r];
                own->in[r] = matrix->quantized ? (const void *)(cpu->normed_q + row * cpu->normed_q_bytes)
                                               : (const void *)(cpu->normed + row * matrix->columns);
            }
            for (uint32_t t = group * tiles; t < (group + 1) * tiles && t < matrix->tiles; t++) {
                for (uint32_t r = 0; r < rows->count; r++)
                    own->out[r] = results[m] + r * CPU_GROUP + (t - group * tiles) * CPU_TILE_ROWS;
                uint32_t n = matrix->rows - t * CPU_TILE_ROWS;
                cpu->kernels->matmul_tile(matrix->type, matrix->columns,
                                          cpu_matrix_tile(cpu, matrix, rows->expert, t, thread),
                                          n < CPU_TILE_ROWS ? n : CPU_TILE_ROWS, own->in, own->out, rows->count);
            }
        }
        cpu->kernels->swiglu(own->gate, own->up, rows->count * CPU_GROUP, own->gate);
        keep_hidden(cpu, own->gate, rows, group);
    }
}

/* Items: tiles of down of an expert, for its rows of the batch. */
static void down_items(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    struct executor_cpu *cpu = context;
    struct cpu_thread *own = &cpu->threads[thread];
    const struct cpu_matrix *down = &cpu->weights.layers[cpu->layer].down;
    for (uint32_t i = first; i < end; i++) {
        const struct cpu_expert_rows *rows = &cpu->expert_rows[i / down->tiles];
        uint32_t tile = i % down->tiles, n = down->rows - tile * CPU_TILE_ROWS;
        for (uint32_t r = 0; r < rows->count; r++) {
            own->in[r] = cpu->hidden + (rows->slot + r) * cpu->hidden_bytes;
            own->out[r] = cpu->expert_out + (size_t)(rows->slot + r) * down->rows + tile * CPU_TILE_ROWS;
        }
        cpu->kernels->matmul_tile(down->type, down->columns, cpu_matrix_tile(cpu, down, rows->expert, tile, thread),
                                  n < CPU_TILE_ROWS ? n : CPU_TILE_ROWS, own->in, own->out, rows->count);
    }
}

void cpu_experts_run(struct executor_cpu *cpu) {
    const struct cpu_layer *layer = &cpu->weights.layers[cpu->layer];
    struct cpu_product router = {
        .matrix = &layer->router,
        .in = cpu->normed,
        .in_stride = layer->router.columns * sizeof(float),
        .out = cpu->router_logits,
        .out_stride = layer->router.rows,
        .rows = cpu->rows,
        .count = cpu->row_count,
    };
    cpu_multiply(cpu, &router, 1);
    thread_pool_run(cpu->pool, route_rows, cpu, cpu->row_count);
    group_by_expert(cpu);
    thread_pool_run(cpu->pool, gate_up_items, cpu,
                    cpu->expert_rows_count * ((layer->gate.rows + CPU_GROUP - 1) / CPU_GROUP));
    thread_pool_run(cpu->pool, down_items, cpu, cpu->expert_rows_count * layer->down.tiles);
}
