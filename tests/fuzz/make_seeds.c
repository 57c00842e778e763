#include <stdio.h>
#include <stdlib.h>

#include "common/gguf.h"
#include "tests/gguf_builder.h"
#include "worker.pb-c.h"

/* make_seeds DIR writes the first seeds of the fuzz targets to DIR/gguf and DIR/wire; the others were found. */

static const char *directory;

static void write_seed(const char *name, const void *bytes, size_t length) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, length, file) != length || fclose(file)) {
        perror(path);
        exit(EXIT_FAILURE);
    }
}

static void write_gguf(const char *name, struct gguf_builder *builder) {
    write_seed(name, builder->bytes, builder->length);
    builder_free(builder);
}

/* ---- a model that binds: one layer of two experts, all lengths 1 or 2, F32 */

struct tensor {
    const char *name;
    uint32_t dimensions;
    uint64_t shape[3];
};

static void build_model(struct gguf_builder *builder) {
    static const struct {
        const char *key;
        uint32_t value;
    } keys[] = {
        {"general.alignment", 8},
        {"qwen3moe.block_count", 1},
        {"qwen3moe.context_length", 16},
        {"qwen3moe.embedding_length", 2},
        {"qwen3moe.attention.head_count", 1},
        {"qwen3moe.attention.head_count_kv", 1},
        {"qwen3moe.attention.key_length", 2},
        {"qwen3moe.attention.value_length", 2},
        {"qwen3moe.expert_count", 2},
        {"qwen3moe.expert_used_count", 1},
        {"qwen3moe.expert_feed_forward_length", 1},
        {"tokenizer.ggml.eos_token_id", 2},
    };
    static const struct tensor tensors[] = {
        {"token_embd.weight", 2, {2, 3}},
        {"output_norm.weight", 1, {2}},
        {"output.weight", 2, {2, 3}},
        {"blk.0.attn_norm.weight", 1, {2}},
        {"blk.0.attn_q.weight", 2, {2, 2}},
        {"blk.0.attn_k.weight", 2, {2, 2}},
        {"blk.0.attn_v.weight", 2, {2, 2}},
        {"blk.0.attn_q_norm.weight", 1, {2}},
        {"blk.0.attn_k_norm.weight", 1, {2}},
        {"blk.0.attn_output.weight", 2, {2, 2}},
        {"blk.0.ffn_norm.weight", 1, {2}},
        {"blk.0.ffn_gate_inp.weight", 2, {2, 2}},
        {"blk.0.ffn_gate_exps.weight", 3, {2, 1, 2}},
        {"blk.0.ffn_up_exps.weight", 3, {2, 1, 2}},
        {"blk.0.ffn_down_exps.weight", 3, {1, 2, 2}},
    };
    enum { KEYS = sizeof keys / sizeof *keys, TENSORS = sizeof tensors / sizeof *tensors };
    float epsilon = 1e-6f, base = 1e6f;
    builder_header(builder, 3, TENSORS, KEYS + 4);
    builder_key_string(builder, "general.architecture", "qwen3moe");
    for (size_t i = 0; i < KEYS; i++)
        builder_key_u32(builder, keys[i].key, keys[i].value);
    builder_key(builder, "qwen3moe.attention.layer_norm_rms_epsilon", GGUF_F32);
    builder_bytes(builder, &epsilon, sizeof epsilon);
    builder_key(builder, "qwen3moe.rope.freq_base", GGUF_F32);
    builder_bytes(builder, &base, sizeof base);
    builder_array(builder, "tokenizer.ggml.tokens", GGUF_STRING, 3);
    builder_string(builder, "a");
    builder_string(builder, "b");
    builder_string(builder, "c");
    for (size_t i = 0; i < TENSORS; i++)
        builder_tensor(builder, tensors[i].name, tensors[i].dimensions, tensors[i].shape, 0, 24 * i);
    builder_pad(builder, 8);
    builder_zeros(builder, 24 * TENSORS);
}

static void write_gguf_seeds(void) {
    struct gguf_builder builder = {0};
    builder_sample(&builder, 2);
    write_gguf("gguf/sample-v2", &builder);
    builder_sample(&builder, 3);
    write_gguf("gguf/sample-v3", &builder);
    builder_header(&builder, 3, 0, 0);
    write_gguf("gguf/empty", &builder);
    build_model(&builder);
    write_gguf("gguf/model", &builder);
}

/* ---- frames */

static void write_frame(const char *name, const ProtobufCMessage *message) {
    size_t size = protobuf_c_message_get_packed_size(message);
    unsigned char *frame = calloc(1, 8 + size);
    if (!frame)
        abort();
    frame[0] = 'm', frame[1] = 'o', frame[2] = 'e', frame[3] = 'd', frame[4] = 1;
    protobuf_c_message_pack(message, frame + 8);
    write_seed(name, frame, 8 + size);
    free(frame);
}

static void write_wire_seeds(void) {
    uint32_t tokens[] = {1, 300, 70000};
    uint64_t ids[] = {1, UINT64_MAX};
    float values[] = {-0.5f, -1.5f, 0};

    Moed__V1__Model model = MOED__V1__MODEL__INIT;
    Moed__Worker__V1__Hello hello = MOED__WORKER__V1__HELLO__INIT;
    Moed__Worker__V1__ToGateway up = MOED__WORKER__V1__TO_GATEWAY__INIT;
    model.name = (char *)"model";
    model.vocab_size = 512;
    hello.worker_id = (char *)"host:1";
    hello.model = &model;
    hello.state = MOED__V1__WORKER__STATE__READY;
    up.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_HELLO;
    up.hello = &hello;
    write_frame("wire/hello", &up.base);

    Moed__V1__TokenLogprobs logprob = MOED__V1__TOKEN_LOGPROBS__INIT, *logprobs[] = {&logprob};
    Moed__V1__Usage usage = MOED__V1__USAGE__INIT;
    Moed__V1__Timing timing = MOED__V1__TIMING__INIT;
    Moed__Worker__V1__SequenceOutput output = MOED__WORKER__V1__SEQUENCE_OUTPUT__INIT, *outputs[] = {&output, &output};
    Moed__Worker__V1__StepOutput step = MOED__WORKER__V1__STEP_OUTPUT__INIT;
    logprob.n_top_ids = logprob.n_top_logprobs = 3;
    logprob.top_ids = tokens;
    logprob.top_logprobs = values;
    output.n_token_ids = 3;
    output.token_ids = tokens;
    output.n_logprobs = 1;
    output.logprobs = logprobs;
    output.usage = &usage;
    output.timing = &timing;
    usage.prompt_tokens = 7;
    timing.worker = (char *)"w";
    step.n_outputs = 2;
    step.outputs = outputs;
    up.body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_STEP_OUTPUT;
    up.step_output = &step;
    write_frame("wire/step-output", &up.base);

    Moed__V1__Sampling sampling = MOED__V1__SAMPLING__INIT;
    Moed__Worker__V1__GenerateWork generate = MOED__WORKER__V1__GENERATE_WORK__INIT;
    Moed__Worker__V1__ToWorker down = MOED__WORKER__V1__TO_WORKER__INIT;
    sampling.temperature = 0.7f;
    sampling.seed = UINT64_MAX;
    generate.id = 3;
    generate.n_tokens = generate.n_stop_token_ids = 3;
    generate.tokens = generate.stop_token_ids = tokens;
    generate.sampling = &sampling;
    generate.priority = -1;
    down.body_case = MOED__WORKER__V1__TO_WORKER__BODY_GENERATE;
    down.generate = &generate;
    write_frame("wire/generate", &down.base);

    Moed__V1__Tokens sequence = MOED__V1__TOKENS__INIT, *sequences[] = {&sequence, &sequence};
    Moed__V1__ForwardRequest request = MOED__V1__FORWARD_REQUEST__INIT;
    Moed__Worker__V1__ForwardWork forward = MOED__WORKER__V1__FORWARD_WORK__INIT;
    sequence.n_ids = 3;
    sequence.ids = tokens;
    request.n_sequences = 2;
    request.sequences = sequences;
    request.all_positions = 1;
    forward.request = &request;
    down.body_case = MOED__WORKER__V1__TO_WORKER__BODY_FORWARD;
    down.forward = &forward;
    write_frame("wire/forward", &down.base);

    Moed__Worker__V1__Credit credit = MOED__WORKER__V1__CREDIT__INIT;
    credit.n_ids = credit.n_tokens = 2;
    credit.ids = ids;
    credit.tokens = tokens;
    down.body_case = MOED__WORKER__V1__TO_WORKER__BODY_CREDIT;
    down.credit = &credit;
    write_frame("wire/credit", &down.base);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return EXIT_FAILURE;
    }
    directory = argv[1];
    write_gguf_seeds();
    write_wire_seeds();
    return EXIT_SUCCESS;
}
