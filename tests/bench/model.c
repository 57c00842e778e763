#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/bench/bench.h"
#include "worker/executor.h"

/*
 * An executor on a model: a batch of sequences, all of random tokens, prefilled and then decoded. What a decode step has
 * to read: all matrices but the experts' once, each expert that some row chose once, and the keys and values of the
 * rows' contexts.
 */
enum { RUNS = 5 };

struct runner {
    struct model *model;
    struct executor *executor;
    uint64_t random;
    struct bench_case now;
    struct sampling sampling;
    uint32_t *tokens;        /* of a step */
    uint32_t *history;       /* of all sequences: without penalties only its length matters */
    uint32_t *blocks;        /* [batch][blocks_each] */
    uint32_t blocks_each;
    uint64_t position_bytes; /* that the KV cache takes of a position */
    bool *chosen;            /* [experts] */
    struct batch_sequence *sequences;
    struct batch_output *outputs;
};

struct figures {
    double prefill, decode; /* seconds */
    double experts;         /* distinct ones of a layer, in a decode step */
    double read;            /* bytes per second that memory gave between the runs */
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

/* What else is wanted of a step; neither goes with its time. */
enum extra { NOTHING, ROUTES, TIMINGS };

/* One step of `rows` rows for each sequence, with an output for each one's last row. Returns its seconds, or -1. */
static double step(struct runner *runner, uint32_t position, uint32_t rows, bool outputs, enum extra extra,
                   struct batch_result *result, struct status *status) {
    const uint32_t count = runner->now.batch;
    for (uint32_t s = 0; s < count; s++) {
        runner->sequences[s] = (struct batch_sequence){
            .slot = s, .position = position, .rows = rows,
            .blocks = runner->blocks + (size_t)s * runner->blocks_each, .block_count = runner->blocks_each,
        };
        runner->outputs[s] = (struct batch_output){
            .row = (s + 1) * rows - 1, .sampling = &runner->sampling,
            .history = runner->history, .history_length = position + rows, .prompt_length = runner->now.prompt,
        };
    }
    for (uint32_t i = 0; i < count * rows; i++)
        runner->tokens[i] = random_token(runner);
    const struct batch batch = {
        .tokens = runner->tokens, .rows = count * rows,
        .sequences = runner->sequences, .sequence_count = count,
        .outputs = runner->outputs, .output_count = outputs ? count : 0,
        .routes = extra == ROUTES, .profile = extra == TIMINGS,
    };
    uint64_t began = clock_now_ns();
    if (runner->executor->ops->step(runner->executor, &batch, result, status) < 0)
        return -1;
    return (double)(clock_now_ns() - began) / 1e9;
}

/* The prompts, in as few steps as they take; the first step's times go to a profile, if given. The seconds, or -1. */
static double prefill(struct runner *runner, struct profile *profile, struct status *status) {
    const uint32_t most = runner->executor->info.step_tokens / runner->now.batch;
    struct batch_result result;
    double seconds = 0;
    for (uint32_t position = 0; position < runner->now.prompt;) {
        uint32_t rows = runner->now.prompt - position < most ? runner->now.prompt - position : most;
        const bool profiled = profile && position == 0;
        double taken = step(runner, position, rows, position + rows == runner->now.prompt,
                            profiled ? TIMINGS : NOTHING, &result, status);
        if (taken < 0)
            return -1;
        if (profiled)
            profile_add(profile, &result);
        seconds += taken;
        position += rows;
    }
    return seconds;
}

static double distinct_experts(struct runner *runner, const struct batch_result *result) {
    const struct model_config *config = &runner->model->config;
    uint32_t used = config->expert_used_count, count = 0;
    for (uint32_t layer = 0; layer < config->block_count; layer++) {
        memset(runner->chosen, 0, config->expert_count * sizeof *runner->chosen);
        for (uint32_t row = 0; row < runner->now.batch; row++)
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
    *figures = (struct figures){.prefill = prefill(runner, NULL, status)};
    if (figures->prefill < 0)
        return -1;
    if (runner->now.decode > 0) {
        if (step(runner, runner->now.prompt, 1, true, ROUTES, &result, status) < 0)
            return -1;
        figures->experts = distinct_experts(runner, &result);
    }
    for (uint32_t i = 0; i < runner->now.decode; i++) {
        double seconds = step(runner, runner->now.prompt + i, 1, true, NOTHING, &result, status);
        if (seconds < 0)
            return -1;
        figures->decode += seconds;
    }
    return 0;
}

/* The times of operations, of the prompts' first step and of steps behind the prompts. */
static int run_profile(struct runner *runner, struct profile *prompts, struct profile *decode, struct status *status) {
    struct batch_result result;
    for (int i = 0; i < PROFILE_STEPS; i++)
        if (prefill(runner, prompts, status) < 0)
            return -1;
    for (int i = 0; i < PROFILE_STEPS && runner->now.decode > 0; i++) {
        if (step(runner, runner->now.prompt, 1, true, TIMINGS, &result, status) < 0)
            return -1;
        profile_add(decode, &result);
    }
    if (prompts->count == 0)
        return status_set(status, STATUS_UNIMPLEMENTED, "--profile: this executor does not time its operations");
    return 0;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/*
 * RUNS runs of one case: medians. With a pool the memory's rate is measured before each run, because neighbours on the
 * machine change it within seconds; without one it is what median->read holds.
 */
static int run_case(struct runner *runner, struct thread_pool *pool, struct figures *median, struct status *status) {
    double prefill[RUNS], decode[RUNS], read[RUNS], experts = 0;
    for (int run = 0; run < RUNS; run++) {
        struct figures figures;
        read[run] = median->read;
        if ((pool && machine_measure_read(pool, &read[run], status) < 0) || run_once(runner, &figures, status) < 0)
            return -1;
        prefill[run] = figures.prefill;
        decode[run] = figures.decode;
        experts += figures.experts / RUNS;
    }
    qsort(prefill, RUNS, sizeof *prefill, compare);
    qsort(decode, RUNS, sizeof *decode, compare);
    qsort(read, RUNS, sizeof *read, compare);
    *median = (struct figures){prefill[RUNS / 2], decode[RUNS / 2], experts, read[RUNS / 2]};
    return 0;
}

/* What a run says of the case in hand, against what the machine can do: a multiply_add of 0 is not known. */
static void print_case(const struct runner *runner, const struct figures *figures, const struct machine *machine,
                       bool json, bool first) {
    const struct model_config *config = &runner->model->config;
    const struct bench_case *now = &runner->now;
    struct sizes bytes = model_sizes(runner->model, matrix_bytes), weights = model_sizes(runner->model, matrix_weights);
    double context = now->prompt + (now->decode + 1) / 2.0, batch = now->batch;
    double kv = batch * context * runner->position_bytes;
    double step_bytes = bytes.shared + bytes.experts * figures->experts + kv;
    double token_weights = weights.shared + weights.experts * config->expert_used_count;
    /* Only the last row of each prompt goes through the head. */
    double head = matrix_weights(&runner->model->output), rows = batch * now->prompt;
    double prefill_rate = ((token_weights - head) * rows + head * batch) / figures->prefill;
    double decode = now->decode ? batch * now->decode / figures->decode : 0;
    double read = now->decode ? step_bytes * now->decode / figures->decode : 0;
    if (json) {
        printf("%s{\"batch\":%u,\"prompt\":%u,\"decode_steps\":%u,\"prefill\":%.5g,\"prefill_multiply_add\":%.4g",
               first ? "" : ",", now->batch, now->prompt, now->decode, rows / figures->prefill, prefill_rate);
        if (now->decode)
            printf(",\"decode\":%.5g,\"decode_multiply_add\":%.4g,\"step_bytes\":%.5g,\"decode_read\":%.4g,"
                   "\"read\":%.4g,\"experts\":%.4g",
                   decode, token_weights * decode, step_bytes, read, figures->read, figures->experts);
    } else {
        printf("%5u %6u | %8.1f tok/s", now->batch, now->prompt, rows / figures->prefill);
        if (machine->multiply_add > 0)
            printf(" %3.0f %%", 100 * prefill_rate / machine->multiply_add);
        else
            printf(" %5.1f T", 2 * prefill_rate / 1e12);
        if (now->decode)
            printf(" | %7.1f tok/s %8.1f MB/step %5.1f experts %6.1f GB/s %3.0f %%", decode, step_bytes / 1e6,
                   figures->experts, read / 1e9, 100 * read / figures->read);
        printf("\n");
    }
}

static int print_profiles(struct runner *runner, bool json, struct status *status) {
    struct profile prompts = {0}, decode = {0};
    if (run_profile(runner, &prompts, &decode, status) < 0)
        return -1;
    profile_print(&prompts, "prefill", json);
    if (decode.count > 0)
        profile_print(&decode, "decode", json);
    return 0;
}

/* Room for the largest of the cases. */
static int open_runner(struct runner *runner, const struct bench_options *options, struct status *status) {
    uint32_t most = 1, context = 1, rows = options->step_tokens;
    uint64_t positions = 0;
    for (uint32_t i = 0; i < options->case_count; i++) {
        const struct bench_case *each = &options->cases[i];
        uint64_t length = (uint64_t)each->prompt + each->decode;
        most = each->batch > most ? each->batch : most;
        context = length > context ? (uint32_t)length : context;
        positions = each->batch * (length + 64) > positions ? each->batch * (length + 64) : positions;
    }
    rows = most > rows ? most : rows;
    if (model_open(options->model, &runner->model, status) < 0)
        return -1;
    const struct model_config *config = &runner->model->config;
    const uint32_t padded = (config->head_dim + 31) / 32 * 32; /* q8_0: 32 bytes and a scale for a group of 32 */
    runner->position_bytes = (uint64_t)config->block_count * config->head_count_kv *
                             (strcmp(options->kv_type, "q8_0") == 0 ? 2 * (padded + padded / 16) : 4 * config->head_dim);
    const struct executor_options executor = {
        .device = options->device, .threads = options->threads, .max_sequences = most, .step_tokens = rows,
        .context_length = context, .memory_fraction = 0.95, .isa = cpu_kernels_select(options->isa)->name,
        .repack = options->repack,
        .kv_type = options->kv_type,
        .kv_bytes = positions * runner->position_bytes,
    };
    if (options->backend->open(runner->model, &executor, &runner->executor, status) < 0)
        return -1;
    if (options->sample)
        runner->sampling = (struct sampling){.temperature = 0.8f, .top_k = 50, .top_p = 0.95f, .seed = 1};
    const struct executor_info *info = &runner->executor->info;
    runner->tokens = calloc(rows, sizeof *runner->tokens);
    runner->history = calloc(context, sizeof *runner->history);
    runner->blocks = calloc(info->kv_blocks, sizeof *runner->blocks);
    runner->chosen = calloc(config->expert_count, sizeof *runner->chosen);
    runner->sequences = calloc(most, sizeof *runner->sequences);
    runner->outputs = calloc(most, sizeof *runner->outputs);
    if (!runner->tokens || !runner->history || !runner->blocks || !runner->chosen || !runner->sequences || !runner->outputs)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for %u sequences", most);
    for (uint32_t i = 0; i < info->kv_blocks; i++)
        runner->blocks[i] = i;
    return 0;
}

/* Takes up a case: every sequence gets blocks of its own. */
static int begin_case(struct runner *runner, const struct bench_case *now, struct status *status) {
    const struct executor_info *info = &runner->executor->info;
    runner->now = *now;
    runner->blocks_each = (now->prompt + now->decode + info->kv_block_tokens - 1) / info->kv_block_tokens;
    if ((uint64_t)now->batch * runner->blocks_each > info->kv_blocks || now->batch > info->max_outputs)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED,
                          "%u sequences of %u tokens take %llu KV blocks, there are %u", now->batch,
                          now->prompt + now->decode, (unsigned long long)now->batch * runner->blocks_each,
                          info->kv_blocks);
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
    struct runner runner = {0};
    struct machine now = *machine;
    bool on_cpu = options->backend == &executor_cpu;
    int result = -1;
    if (!on_cpu && machine_measure_device(options->device, &now, status) < 0)
        goto out;
    if (open_runner(&runner, options, status) < 0)
        goto out;
    if (options->json)
        printf(",\"device\":\"%s\",\"device_read\":%.4g,\"upload\":%.4g,\"cases\":[", runner.executor->info.device, now.read,
               now.upload);
    else if (on_cpu)
        printf("\n%s on %s, memory %.0f GB/s\n", options->model, runner.executor->info.device, now.read / 1e9);
    else
        printf("\n%s on %s, memory %.0f GB/s, copies from the host %.1f GB/s\n", options->model,
               runner.executor->info.device, now.read / 1e9, now.upload / 1e9);
    if (!options->json)
        printf("batch prompt | prefill, %s | decode, bytes to read, read rate\n",
               on_cpu ? "of the int8 rate" : "TFLOP/s of it");
    for (uint32_t i = 0; i < options->case_count; i++) {
        struct figures figures = {.read = now.read};
        if (begin_case(&runner, &options->cases[i], status) < 0 ||
            run_case(&runner, on_cpu ? pool : NULL, &figures, status) < 0)
            goto out;
        print_case(&runner, &figures, &now, options->json, i == 0);
        if (options->profile && print_profiles(&runner, options->json, status) < 0)
            goto out;
        if (options->json)
            printf("}");
        fflush(stdout);
    }
    if (options->json)
        printf("]");
    result = 0;

out:
    close_runner(&runner);
    return result;
}
