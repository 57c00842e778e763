/* What the CPU executor refuses at open and in a step, what it says of itself, where its memory limits come from. */
#include "tests/kernels/executor_test.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "common/log.h"
#include "kernels/cpu/attention.h"
#include "worker/host_memory.h"

static bool refused(const struct model *model, struct executor_options options, enum status_code code,
                    const char *word) {
    struct status status = {0};
    struct executor *executor = (struct executor *)&status;
    bool pass = executor_cpu.open(model, &options, &executor, &status) < 0 && !executor && status.code == code &&
                strstr(status.message, word);
    return tap_ok(pass, "refused: %s", status.message);
}

static void test_options(const struct model *model) {
    const struct executor_options good = options_make("auto", 1, "auto");
    struct executor_options bad = good;
    bad.max_sequences = 0;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "max_sequences");
    bad = good;
    bad.step_tokens = 1u << 30;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "step_tokens");
    bad = good;
    bad.context_length = model->config.context_length + 1;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "context_length");
    bad = good;
    bad.memory_fraction = NAN;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "memory_fraction");
    bad = good;
    bad.isa = "mmx";
    refused(model, bad, STATUS_INVALID_ARGUMENT, "mmx");
    bad = good;
    bad.repack = "maybe";
    refused(model, bad, STATUS_INVALID_ARGUMENT, "maybe");
    bad = good;
    bad.kv_type = "q4_0";
    refused(model, bad, STATUS_INVALID_ARGUMENT, "kv_type: \"q4_0\", allowed are f16 and q8_0");
    bad = good;
    bad.threads = 1u << 20;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "threads");
    bad = good;
    bad.kv_bytes = 1;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "kv_bytes");
    bad = good;
    bad.kv_bytes = 1 << 16;
    bad.context_length = model->config.context_length;
    refused(model, bad, STATUS_INVALID_ARGUMENT, "kv_bytes");
    bad = good;
    bad.kv_bytes = UINT64_MAX;
    refused(model, bad, STATUS_RESOURCE_EXHAUSTED, "MiB");
    bad = good;
    bad.memory_fraction = 1e-9;
    refused(model, bad, STATUS_RESOURCE_EXHAUSTED, "MiB");
}

static void test_info(const struct model *model) {
    const struct model_config *config = &model->config;
    const uint64_t heads = (uint64_t)config->block_count * config->head_count_kv;
    const uint64_t block_bytes = heads * cpu_kv_block_bytes(QUANT_F16, config->head_dim);
    const uint64_t block_bytes_q8_0 = heads * CPU_KV_BLOCK * 2 * (config->head_dim + config->head_dim / 32 * 2);
    struct executor_options options = options_make("auto", 2, "on");
    struct executor *executor = executor_make(&executor_cpu, model, &options);
    const struct executor_info *info = &executor->info;
    tap_ok(strcmp(info->backend, "cpu") == 0 && strstr(info->device, "2 threads"), "the device is \"%s\"",
           info->device);
    tap_ok(info->kv_blocks == options.kv_bytes / block_bytes && info->kv_block_tokens == CPU_KV_BLOCK,
           "kv_bytes makes %u blocks", info->kv_blocks);
    tap_ok(info->max_outputs >= options.max_sequences && info->max_outputs <= options.step_tokens,
           "a step has at most %u outputs", info->max_outputs);
    tap_ok(info->context_length == config->context_length, "the context is the model's");
    tap_ok(info->memory_used > options.kv_bytes - block_bytes && info->memory_used < info->memory_total,
           "%llu of %llu bytes are used", (unsigned long long)info->memory_used,
           (unsigned long long)info->memory_total);
    executor->ops->close(executor);

    options.kv_type = "q8_0";
    executor = executor_make(&executor_cpu, model, &options);
    tap_ok(executor->info.kv_blocks == options.kv_bytes / block_bytes_q8_0, "and %u of q8_0", executor->info.kv_blocks);
    executor->ops->close(executor);

    options.kv_type = NULL;
    options.kv_bytes = 4 * block_bytes;
    executor = executor_make(&executor_cpu, model, &options);
    tap_ok(executor->info.context_length == 4 * CPU_KV_BLOCK, "no context is longer than the KV cache: %u",
           executor->info.context_length);
    executor->ops->close(executor);

    options.kv_bytes = 0;
    options.context_length = 100;
    executor = executor_make(&executor_cpu, model, &options);
    tap_ok(executor->info.kv_blocks == options.max_sequences * 4,
           "by itself the KV cache is what all sequences can fill: %u", executor->info.kv_blocks);
    executor->ops->close(executor);
    executor_cpu.close(NULL);
}

static int step_once(struct executor *executor, struct status *status) {
    uint32_t tokens[3] = {1, 2, 3}, blocks[1] = {0};
    struct batch_sequence sequence = {.rows = 3, .blocks = blocks, .block_count = 1};
    struct batch_output output = {.row = 2, .logits = true};
    struct batch batch = {.tokens = tokens,
                          .rows = 3,
                          .sequences = &sequence,
                          .sequence_count = 1,
                          .outputs = &output,
                          .output_count = 1};
    struct batch_result result;
    return executor->ops->step(executor, &batch, &result, status);
}

/* A model in memory of its own: a broken weight must end the step, and repacking must leave the bytes alone. */
static void test_memory_model(const char *path) {
    int fd = open(path, O_RDONLY);
    struct stat about;
    unsigned char *bytes = fd >= 0 && fstat(fd, &about) == 0 ? malloc((size_t)about.st_size) : NULL;
    unsigned char *before = bytes ? malloc((size_t)about.st_size) : NULL;
    if (!tap_ok(before && read(fd, bytes, (size_t)about.st_size) == about.st_size, "the model is read"))
        return;
    close(fd);
    memcpy(before, bytes, (size_t)about.st_size);
    struct status status = {0};
    struct gguf *gguf;
    struct model *model;
    if (!tap_ok(gguf_open_memory(bytes, (size_t)about.st_size, "memory", &gguf, &status) == 0 &&
                    model_bind(gguf, &model, &status) == 0,
                "and bound"))
        return;
    struct executor_options options = options_make("auto", 2, "on");
    struct executor *executor = executor_make(&executor_cpu, model, &options);
    tap_ok(memcmp(bytes, before, (size_t)about.st_size) == 0, "repacking leaves a model in memory alone");
    tap_ok(step_once(executor, &status) == 0, "a sound model runs");

    float *weight = (float *)model->layers[1].ffn_norm, kept = *weight;
    *weight = NAN;
    tap_ok(step_once(executor, &status) < 0 && status.code == STATUS_INTERNAL, "one with a NaN does not: %s",
           status.message);
    *weight = kept;
    tap_ok(step_once(executor, &status) == 0, "the next step is sound again");
    executor->ops->close(executor);
    model_close(model);
    free(bytes);
    free(before);
}

static void write_text(const char *root, const char *path, const char *text) {
    char full[512];
    snprintf(full, sizeof full, "%s/%s", root, path);
    for (char *slash = strchr(full + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    if (file) {
        fputs(text, file);
        fclose(file);
    }
}

static void test_host_memory(void) {
    char root[] = "/tmp/executor_test.XXXXXX", command[64];
    struct host_memory memory;
    if (!tap_ok(mkdtemp(root) != NULL, "a directory for made-up limits"))
        return;
    host_memory_read(root, &memory);
    tap_ok(memory.total == UINT64_MAX && memory.available == UINT64_MAX, "nothing to read is no limit");

    write_text(root, "proc/meminfo", "MemTotal:       1000000 kB\nMemFree:  5 kB\nMemAvailable:    600000 kB\n");
    write_text(root, "proc/self/cgroup", "0::/a/b\n");
    write_text(root, "sys/fs/cgroup/a/b/memory.max", "max\n");
    host_memory_read(root, &memory);
    tap_ok(memory.total == 1000000u * 1024ull && memory.available == 600000u * 1024ull, "the machine's memory");

    write_text(root, "sys/fs/cgroup/a/memory.max", "104857600\n"); /* the parent's */
    write_text(root, "sys/fs/cgroup/a/memory.current", "83886080\n");
    write_text(root, "sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 1048576\nactive_file 2097152\n");
    host_memory_read(root, &memory);
    tap_ok(memory.total == 100 << 20 && memory.available == 23 << 20,
           "a control group's limit, version 2: %llu of %llu", (unsigned long long)memory.available,
           (unsigned long long)memory.total);

    write_text(root, "proc/self/cgroup", "9:cpu:/x\n4:memory:/not/mounted/here\n");
    write_text(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "52428800\n");
    write_text(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", "62914560\n");
    host_memory_read(root, &memory);
    tap_ok(memory.total == 50 << 20 && memory.available == 0, "version 1, seen from a container, overdrawn");

    write_text(root, "proc/self/cgroup", "no colon\n::\n0:\n4:memory\n\n");
    host_memory_read(root, &memory);
    tap_ok(memory.total == 1000000u * 1024ull, "lines that make no sense are passed over");
    snprintf(command, sizeof command, "rm -r %s", root);
    tap_ok(system(command) == 0, "the directory is gone");
}

int main(void) {
    log_setup("executor_limits_test", LOG_WARN, LOG_TEXT);
    char path[64];
    model_write(&shape_tiny, "q4_k_m", false, path);
    struct status status = {0};
    struct model *model;
    if (!tap_ok(model_open(path, &model, &status) == 0, "a model: %s", status.message))
        return tap_done();
    test_options(model);
    test_info(model);
    model_close(model);
    test_memory_model(path);
    unlink(path);
    test_host_memory();
    return tap_done();
}
