#include <stdio.h>
#include <stdlib.h>

#include "common/options.h"
#include "tests/bench/bench.h"
#include "worker/backend.h"

/* moed-bench: how close kernels and executor come to what the machine could do. */

enum { CASES_MAX = 32, BATCH_MAX = 4096 };

static int run(const struct bench_options *options, bool kernels, struct status *status) {
    struct thread_pool *pool = NULL;
    struct machine machine;
    int result = -1;
    if (thread_pool_create(options->threads, &pool, status) < 0 ||
        machine_measure(pool, options->isa, &machine, status) < 0)
        goto out;
    const char *isa = cpu_kernels_select(options->isa)->name;
    printf(options->json ? "{\"isa\":\"%s\",\"threads\":%u,\"read\":%.4g,\"multiply_add\":%.4g"
                         : "%s, %u threads: reads %.3g bytes/s, %.3g int8 multiply-adds/s\n",
           isa, thread_pool_size(pool), machine.read, machine.multiply_add);
    result = kernels ? bench_kernels(options, pool, &machine, status) : 0;
    if (result == 0 && *options->model != '\0')
        result = bench_model(options, pool, &machine, status);
    if (options->json)
        printf("}\n");

out:
    thread_pool_destroy(pool);
    return result;
}

/* What llama-bench and llama-batched-bench measure: prompts alone, batches behind short ones, and a few at depth. */
static const struct bench_case gpu_cases[] = {
    {1, 512, 0},    {1, 2048, 0},   {1, 4096, 0},    {1, 512, 128},   {2, 512, 128},  {4, 512, 128},   {8, 512, 128},
    {16, 512, 128}, {32, 512, 128}, {64, 512, 128}, {128, 512, 128}, {1, 8192, 128}, {16, 8192, 128},
};
static const uint32_t cpu_batches[] = {1, 2, 4, 8, 16};

/* Batch sizes to cases: prompts of so many tokens each, or that share a step of them. */
static int make_cases(const struct option_list *list, struct bench_options *bench, uint32_t prompt, uint32_t decode,
                      struct bench_case cases[CASES_MAX], struct status *status) {
    uint32_t batches[CASES_MAX];
    size_t count = list->count ? list->count : sizeof cpu_batches / sizeof *cpu_batches;
    if (count > CASES_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "--batch: %zu numbers, at most %d are allowed", count,
                          CASES_MAX);
    for (size_t i = 0; i < count; i++) {
        char *end = "";
        unsigned long value = list->count ? strtoul(list->items[i], &end, 10) : cpu_batches[i];
        if (*end != '\0' || value == 0 || value > BATCH_MAX)
            return status_set(status, STATUS_INVALID_ARGUMENT, "--batch: \"%s\", allowed are numbers from 1 to %d",
                              list->items[i], BATCH_MAX);
        batches[i] = (uint32_t)value;
    }
    for (size_t i = 0; i < count; i++) {
        uint32_t each = prompt ? prompt : bench->step_tokens / batches[i];
        if (each == 0)
            return status_set(status, STATUS_INVALID_ARGUMENT,
                              "--batch: %u sequences, but --prefill has %u tokens for them", batches[i],
                              bench->step_tokens);
        cases[i] = (struct bench_case){batches[i], each, decode};
    }
    bench->cases = cases;
    bench->case_count = (uint32_t)count;
    return 0;
}

int main(int argc, char **argv) {
    struct status status = {0};
    struct bench_case cases[CASES_MAX];
    struct bench_options bench = {.format = "", .model = "", .repack = "auto", .kv_type = "f16"};
    const char *isa = "auto", *backend = "cpu";
    static const char *const isas[] = {"auto", "c", "avx2", "avx512", NULL}, *const repacks[] = {"auto", "on", "off", NULL},
                      *const backends[] = {"auto", "cpu", "cuda", NULL}, *const kv_types[] = {"f16", "q8_0", NULL};
    struct option_list batch = {0};
    uint64_t threads = 0, device = 0, prompt = 0, prefill = 0, decode = 0;
    bool kernels = false;
    const struct option options[] = {
        {"kernels", OPTION_FLAG, &kernels, NULL,
         "Measure the matrix products of all formats on the CPU; the default without --model.", .min = 0},
        {"format", OPTION_STRING, &bench.format, "NAME", "Only the products of this format, such as Q4_K.", .min = 0},
        {"model", OPTION_STRING, &bench.model, "FILE", "Measure an executor on this GGUF file (see moed-synth).",
         .min = 0},
        {"backend", OPTION_CHOICE, &backend, "NAME", "Which executor.", .choices = backends},
        {"device", OPTION_UINT, &device, "N", "Which GPU.", .max = 1023},
        {"batch", OPTION_LIST, &batch, "N",
         "Numbers of sequences (cpu: 1,2,4,8,16; cuda: those of llama-bench and llama-batched-bench).", .min = 0},
        {"prompt", OPTION_UINT, &prompt, "N", "Tokens of each prompt; 0: all prompts together fill a step.",
         .max = 1 << 20},
        {"prefill", OPTION_UINT, &prefill, "N", "Most rows of a step (cpu: 256; cuda: 4096).", .max = 65536},
        {"decode", OPTION_UINT, &decode, "N", "Steps after the prompts (cpu: 32; cuda: 128).", .max = 65536},
        {"sample", OPTION_FLAG, &bench.sample, NULL,
         "Draw tokens (temperature 0.8, top-k 50, top-p 0.95) instead of taking the likeliest.", .min = 0},
        {"profile", OPTION_FLAG, &bench.profile, NULL,
         "Time each operation of a step too (cuda), one at a time: on their own they take longer than in a row.",
         .min = 0},
        {"kv-type", OPTION_CHOICE, &bench.kv_type, "TYPE", "What the KV cache is held in.", .choices = kv_types},
        {"repack", OPTION_CHOICE, &bench.repack, "WHEN", "Whether the CPU executor repacks the weights.",
         .choices = repacks},
        {"threads", OPTION_UINT, &threads, "N", "Threads; 0: one per processor.", .max = 1024},
        {"isa", OPTION_CHOICE, &isa, "NAME", "Instruction set.", .choices = isas},
        {"json", OPTION_FLAG, &bench.json, NULL, "One JSON object instead of tables.", .min = 0},
        {0},
    };
    const struct option_set set = {
        .program = "moed-bench",
        .synopsis = "[OPTION]...",
        .summary = "Measures kernels and executors beside what the machine's memory and arithmetic can do.",
        .options = options,
    };
    int operands, parsed = options_parse(&set, argc, argv, &operands, &status);
    if (parsed == OPTIONS_EXIT)
        return EXIT_SUCCESS;
    if (parsed == OPTIONS_RUN && operands != 0)
        parsed = status_set(&status, STATUS_INVALID_ARGUMENT, "unexpected operand %s", argv[1]);
    if (parsed == OPTIONS_RUN && !(bench.backend = backend_find(backend, &status)))
        parsed = -1;
    if (parsed == OPTIONS_RUN) {
        bool on_cpu = bench.backend == &executor_cpu;
        bench.step_tokens = prefill ? (uint32_t)prefill : on_cpu ? 256 : 4096;
        bench.cases = gpu_cases;
        bench.case_count = sizeof gpu_cases / sizeof *gpu_cases;
        if (on_cpu || batch.count)
            parsed = make_cases(&batch, &bench, (uint32_t)prompt, decode ? (uint32_t)decode : on_cpu ? 32 : 128, cases,
                                &status);
    }
    if (parsed == OPTIONS_RUN) {
        bench.threads = (uint32_t)threads;
        bench.device = (uint32_t)device;
        cpu_isa_parse(isa, &bench.isa);
        bench.isa = cpu_kernels_select(bench.isa)->isa;
        parsed = run(&bench, kernels || *bench.model == '\0', &status);
    }
    options_free_list(&batch);
    if (parsed < 0) {
        fprintf(stderr, "moed-bench: %s\n", status.message);
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
