#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/bench/bench.h"
#include "worker/executor.h"

/*
 * The executor on a model: a batch of sequences, all of random tokens, prefilled in one step and then decoded. What a
 * decode step has to read: all matrices but the experts' once, each expert that some row chose once, and the keys and
 * values of the rows' contexts.
 */
enum { RUNS = 5 };

struct runner {
    struct model *model;
    struct executor *executor;
    uint64_t random;
    uint32_t prompt, decode; /* of each sequence: tokens of its prompt, and steps after it */
    uint32_t batch;
    uint32_t *tokens;        /* of a step */
    uint32_t *history;       /* [prompt + decode], of all sequences: without penalties only its length matters */
    uint32_t *blocks;        /* [batch][blocks_each] */
    uint32_t blocks_each;
    bool *chosen;            /* [experts] */
    struct batch_sequence *sequences;
    struct batch_output *outputs;
};

struct figures {
    double prefill, decode; /* seconds */
    double experts;         /* distinct ones of a layer, in the mean of all decode steps */
};

/* Bytes or weights of the matrices that a step always needs, and of one expert in each layer. */
struct sizes {
    double shared, experts;
};

static double matrix_bytes(const struct model_matrix *matrix) {
    return (double)matrix->row_bytes * matrix->rows;
}

static double matrix_weights(const struct model_matrix *matrix) {
    return (double)matrix->columns * matrix->rows;
}

static struct sizes model_sizes(const struct model *model, double (*size)(const struct model_matrix *)) {
    struct sizes sizes = {.shared = size(&model->output)};
    for (uint32_t i = 0; i < model->config.block_count; i++) {
        const struct model_layer *l = &model->layers[i];
        sizes.shared += size(&l->attn_q) + size(&l->attn_k) + size(&l->attn_v) + size(&l->attn_output) +
                        size(&l->ffn_gate_inp);
        sizes.experts += size(&l->ffn_gate_exps) + size(&l->ffn_up_exps) + size(&l->ffn_down_exps);
    }
    return sizes;
}

static uint32_t random_token(struct runner *runner) {
    runner->random = runner->random * 6364136223846793005 + 1442695040888963407;
    return (uint32_t)((runner->random >> 33) % runner->model->config.vocab_size);
}

/* One step of `rows` rows for each sequence. Returns its seconds, or -1. */
static double step(struct runner *runner, uint32_t position, uint32_t rows, struct batch_result *result,
                   struct status *status) {
    static const struct sampling greedy;
    for (uint32_t s = 0; s < runner->batch; s++) {
        runner->sequences[s] = (struct batch_sequence){
            .slot = s, .position = position, .rows = rows,
            .blocks = runner->blocks + s * runner->blocks_each, .block_count = runner->blocks_each,
        };
        runner->outputs[s] = (struct batch_output){
            .row = (s + 1) * rows - 1, .sampling = &greedy,
            .history = runner->history, .history_length = position + rows, .prompt_length = runner->prompt,
        };
    }
    for (uint32_t i = 0; i < runner->batch * rows; i++)
        runner->tokens[i] = random_token(runner);
    const struct batch batch = {
        .tokens = runner->tokens, .rows = runner->batch * rows,
        .sequences = runner->sequences, .sequence_count = runner->batch,
        .outputs = runner->outputs, .output_count = runner->batch,
        .routes = rows == 1,
    };
    uint64_t began = clock_now_ns();
    if (runner->executor->ops->step(runner->executor, &batch, result, status) < 0)
        return -1;
    return (double)(clock_now_ns() - began) / 1e9;
}

static double distinct_experts(struct runner *runner, const struct batch_result *result) {
    const struct model_config *config = &runner->model->config;
    uint32_t used = config->expert_used_count, count = 0;
    for (uint32_t layer = 0; layer < config->block_count; layer++) {
        memset(runner->chosen, 0, config->expert_count * sizeof *runner->chosen);
        for (uint32_t row = 0; row < runner->batch; row++)
            for (uint32_t u = 0; u < used; u++) {
                bool *chosen = &runner->chosen[result->route_experts[(row * config->block_count + layer) * used + u]];
                count += !*chosen;
                *chosen = true;
            }
    }
    return (double)count / config->block_count;
}

static int run_once(struct runner *runner, struct figures *figures, struct status *status) {
    struct batch_result result;
    *figures = (struct figures){.prefill = step(runner, 0, runner->prompt, &result, status)};
    if (figures->prefill < 0)
        return -1;
    for (uint32_t i = 0; i < runner->decode; i++) {
        double seconds = step(runner, runner->prompt + i, 1, &result, status);
        if (seconds < 0)
            return -1;
        figures->decode += seconds;
        figures->experts += distinct_experts(runner, &result) / runner->decode;
    }
    return 0;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* RUNS runs at one batch size: medians. */
static int run_batch(struct runner *runner, struct figures *median, struct status *status) {
    double prefill[RUNS], decode[RUNS], experts = 0;
    for (int run = 0; run < RUNS; run++) {
        struct figures figures;
        if (run_once(runner, &figures, status) < 0)
            return -1;
        prefill[run] = figures.prefill;
        decode[run] = figures.decode;
        experts += figures.experts / RUNS;
    }
    qsort(prefill, RUNS, sizeof *prefill, compare);
    qsort(decode, RUNS, sizeof *decode, compare);
    *median = (struct figures){prefill[RUNS / 2], decode[RUNS / 2], experts};
    return 0;
}

static void print_batch(const struct runner *runner, const struct figures *figures, const struct machine *machine,
                        bool json, bool first) {
    const struct model_config *config = &runner->model->config;
    struct sizes bytes = model_sizes(runner->model, matrix_bytes), weights = model_sizes(runner->model, matrix_weights);
    double context = runner->prompt + (runner->decode + 1) / 2.0, batch = runner->batch;
    double kv = 4.0 * batch * context * config->block_count * config->head_count_kv * config->head_dim;
    double step_bytes = bytes.shared + bytes.experts * figures->experts + kv;
    double token_weights = weights.shared + weights.experts * config->expert_used_count;
    /* Only the last row of each prompt goes through the head. */
    double head = matrix_weights(&runner->model->output), rows = batch * runner->prompt;
    double prefill = rows / figures->prefill, decode = batch * runner->decode / figures->decode;
    double read = step_bytes * runner->decode / figures->decode;
    double decode_rate = token_weights * decode;
    double prefill_rate = ((token_weights - head) * rows + head * batch) / figures->prefill;
    if (json)
        printf("%s{\"batch\":%u,\"prompt\":%u,\"prefill\":%.5g,\"prefill_multiply_add\":%.4g,\"decode\":%.5g,"
               "\"decode_multiply_add\":%.4g,\"step_bytes\":%.5g,\"decode_read\":%.4g,\"read\":%.4g,\"experts\":%.4g}",
               first ? "" : ",", runner->batch, runner->prompt, prefill, prefill_rate, decode, decode_rate, step_bytes,
               read, machine->read, figures->experts);
    else
        printf("%5u | %8.1f tok/s %3.0f %% | %7.1f tok/s %6.1f MB/step %5.1f experts %5.1f GB/s %3.0f %% | %3.0f %%\n",
               runner->batch, prefill, 100 * prefill_rate / machine->multiply_add, decode, step_bytes / 1e6,
               figures->experts, read / 1e9, 100 * read / machine->read, 100 * decode_rate / machine->multiply_add);
    fflush(stdout);
}

static int open_runner(struct runner *runner, const struct bench_options *options, uint32_t most, struct status *status) {
    uint32_t context = options->prefill + options->decode;
    const struct executor_options executor = {
        .threads = options->threads, .max_sequences = most, .step_tokens = options->prefill, .context_length = context,
        .memory_fraction = 0.95, .isa = cpu_kernels_select(options->isa)->name, .repack = options->repack,
    };
    if (model_open(options->model, &runner->model, status) < 0)
        return -1;
    if (executor_cpu.open(runner->model, &executor, &runner->executor, status) < 0)
        return -1;
    const struct executor_info *info = &runner->executor->info;
    runner->blocks_each = (context + info->kv_block_tokens - 1) / info->kv_block_tokens;
    if ((uint64_t)most * runner->blocks_each > info->kv_blocks)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "%u sequences of %u tokens take %u KV blocks, there are %u",
                          most, context, most * runner->blocks_each, info->kv_blocks);
    runner->tokens = calloc(options->prefill, sizeof *runner->tokens);
    runner->history = calloc(context, sizeof *runner->history);
    runner->blocks = calloc((size_t)most * runner->blocks_each, sizeof *runner->blocks);
    runner->chosen = calloc(runner->model->config.expert_count, sizeof *runner->chosen);
    runner->sequences = calloc(most, sizeof *runner->sequences);
    runner->outputs = calloc(most, sizeof *runner->outputs);
    if (!runner->tokens || !runner->history || !runner->blocks || !runner->chosen || !runner->sequences || !runner->outputs)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %u sequences", most);
    for (uint32_t i = 0; i < most * runner->blocks_each; i++)
        runner->blocks[i] = i;
    return 0;
}

static void close_runner(struct runner *runner) {
    if (runner->executor != NULL)
        runner->executor->ops->close(runner->executor);
    model_close(runner->model);
    free(runner->tokens);
    free(runner->history);
    free(runner->blocks);
    free(runner->chosen);
    free(runner->sequences);
    free(runner->outputs);
}

int bench_model(const struct bench_options *options, struct thread_pool *pool, const struct machine *machine,
                struct status *status) {
    struct runner runner = {.decode = options->decode};
    uint32_t most = 0;
    int result = -1;
    for (uint32_t i = 0; i < options->batch_count; i++)
        most = options->batches[i] > most ? options->batches[i] : most;
    if (most > options->prefill)
        return status_set(status, STATUS_INVALID_ARGUMENT, "--batch: %u sequences, but --prefill has %u tokens for them",
                          most, options->prefill);
    if (open_runner(&runner, options, most, status) < 0)
        goto out;
    if (options->json)
        printf(",\"device\":\"%s\",\"batches\":[", runner.executor->info.device);
    else
        printf("\n%s on %s\nbatch | prefill of %u, int8 rate | decode, bytes to read, read rate%*s| int8 rate\n",
               options->model, runner.executor->info.device, options->prefill, 36, "");
    for (uint32_t i = 0; i < options->batch_count; i++) {
        struct figures figures;
        struct machine now = *machine;
        runner.batch = options->batches[i];
        runner.prompt = options->prefill / runner.batch;
        if (machine_measure_read(pool, &now.read, status) < 0 || run_batch(&runner, &figures, status) < 0)
            goto out;
        print_batch(&runner, &figures, &now, options->json, i == 0);
    }
    if (options->json)
        printf("]");
    result = 0;

out:
    close_runner(&runner);
    return result;
}
