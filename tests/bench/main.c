#include <stdio.h>
#include <stdlib.h>

#include "common/options.h"
#include "tests/bench/bench.h"

/* moed-bench: how close kernels and executor come to what the machine could do. */

enum { BATCHES_MAX = 16, BATCH_MAX = 4096 };

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

static int parse_batches(const struct option_list *list, uint32_t *batches, uint32_t *count, struct status *status) {
    for (size_t i = 0; i < list->count; i++) {
        char *end;
        unsigned long value = strtoul(list->items[i], &end, 10);
        if (*end != '\0' || value == 0 || value > BATCH_MAX || i == BATCHES_MAX)
            return status_set(status, STATUS_INVALID_ARGUMENT, "--batch: \"%s\", allowed are up to %d numbers from 1 to %d",
                              list->items[i], BATCHES_MAX, BATCH_MAX);
        batches[i] = (uint32_t)value;
        *count = (uint32_t)i + 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    struct status status = {0};
    uint32_t batches[BATCHES_MAX] = {1, 2, 4, 8, 16};
    struct bench_options bench = {.format = "", .model = "", .repack = "auto", .batches = batches, .batch_count = 5};
    const char *isa = "auto";
    static const char *const isas[] = {"auto", "c", "avx2", "avx512", NULL}, *const repacks[] = {"auto", "on", "off", NULL};
    struct option_list batch = {0};
    uint64_t threads = 0, prefill = 256, decode = 32;
    bool kernels = false;
    const struct option options[] = {
        {"kernels", OPTION_FLAG, &kernels, NULL, "Measure the matrix products of all formats; the default without --model.",
         .min = 0},
        {"format", OPTION_STRING, &bench.format, "NAME", "Only the products of this format, such as Q4_K.", .min = 0},
        {"model", OPTION_STRING, &bench.model, "FILE", "Measure the executor on this GGUF file (see moed-synth).", .min = 0},
        {"batch", OPTION_LIST, &batch, "N", "Numbers of sequences (1,2,4,8,16).", .min = 0},
        {"prefill", OPTION_UINT, &prefill, "N", "Tokens of a prefill step, shared out among the sequences.", .min = 1,
         .max = 65536},
        {"decode", OPTION_UINT, &decode, "N", "Steps after the prefill.", .min = 1, .max = 65536},
        {"repack", OPTION_CHOICE, &bench.repack, "WHEN", "Whether the executor repacks the weights.", .choices = repacks},
        {"threads", OPTION_UINT, &threads, "N", "Threads; 0: one per processor.", .max = 1024},
        {"isa", OPTION_CHOICE, &isa, "NAME", "Instruction set.", .choices = isas},
        {"json", OPTION_FLAG, &bench.json, NULL, "One JSON object instead of tables.", .min = 0},
        {0},
    };
    const struct option_set set = {
        .program = "moed-bench",
        .synopsis = "[OPTION]...",
        .summary = "Measures the CPU kernels and the executor beside the machine's memory bandwidth and int8 rate.",
        .options = options,
    };
    int operands, parsed = options_parse(&set, argc, argv, &operands, &status);
    if (parsed == OPTIONS_EXIT)
        return EXIT_SUCCESS;
    if (parsed == OPTIONS_RUN && operands != 0)
        parsed = status_set(&status, STATUS_INVALID_ARGUMENT, "unexpected operand %s", argv[1]);
    if (parsed == OPTIONS_RUN)
        parsed = parse_batches(&batch, batches, &bench.batch_count, &status);
    if (parsed == OPTIONS_RUN) {
        bench.threads = (uint32_t)threads;
        bench.prefill = (uint32_t)prefill;
        bench.decode = (uint32_t)decode;
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
