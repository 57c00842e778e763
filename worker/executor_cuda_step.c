#include <assert.h>
#include <string.h>

#include "worker/executor_cuda.h"

/* Puts the batch into the pinned input. Returns the step's shape. */
static struct cuda_shape fill_input(struct executor_cuda *cuda, const struct batch *batch) {
    const struct cuda_input *in = &cuda->host;
    const uint32_t tile_tokens = cuda_attention_tile_tokens(&cuda->heads);
    struct cuda_shape shape = {.rows = batch->rows, .outputs = batch->output_count};
    uint32_t row = 0, table = 0;
    memcpy(in->tokens, batch->tokens, batch->rows * sizeof *in->tokens);
    for (uint32_t s = 0; s < batch->sequence_count; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        const uint32_t end = sequence->position + sequence->rows;
        const uint32_t blocks = (end + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK;
        assert(table + blocks <= cuda->tables_capacity);
        memcpy(in->tables + table, sequence->blocks, blocks * sizeof *in->tables);
        for (uint32_t i = 0; i < sequence->rows; i++) {
            in->position[row + i] = sequence->position + i;
            in->table[row + i] = table;
        }
        for (uint32_t i = 0; i < sequence->rows; i += tile_tokens, shape.tiles++) {
            in->tiles[shape.tiles] = row + i;
            in->tile_rows[shape.tiles] = sequence->rows - i < tile_tokens ? sequence->rows - i : tile_tokens;
        }
        row += sequence->rows;
        table += blocks;
        shape.context_limit = end > shape.context_limit ? end : shape.context_limit;
    }
    for (uint32_t i = 0; i < batch->output_count; i++)
        in->select[i] = batch->outputs[i].row;
    shape.split = cuda_shape_splits(cuda, &shape);
    cuda->input_bytes = (size_t)((unsigned char *)(in->tables + table) - (unsigned char *)in->tokens);
    return shape;
}

/* Rows that fill a decode step up to its graph's size do what the first row does, again: no other weights are read. */
static void pad_input(const struct executor_cuda *cuda, uint32_t rows, uint32_t size) {
    const struct cuda_input *in = &cuda->host;
    for (uint32_t row = rows; row < size; row++) {
        in->tokens[row] = in->tokens[0];
        in->position[row] = in->position[0];
        in->table[row] = in->table[0];
        in->tiles[row] = in->select[row] = row;
        in->tile_rows[row] = 1;
    }
}

/* Whether the device's greatest logit is the token. */
static bool greatest_is_enough(const struct sampling *sampling) {
    return !(sampling->temperature > 0) && !sampler_penalizes(sampling);
}

/* Puts an output among the step's draws, with its history where it has penalties. */
static void add_draw(struct executor_cuda *cuda, const struct batch_output *output, uint32_t row, bool penalizes) {
    const struct sampling *sampling = output->sampling;
    struct cuda_draw draw = {
        .random = sampler_random(sampling, output->history_length),
        .temperature = sampling->temperature,
        .top_p = sampling->top_p,
        .min_p = sampling->min_p,
        .top_k = sampling->top_k,
        .row = row,
    };
    if (penalizes) {
        draw.repetition_penalty = sampling->repetition_penalty;
        draw.presence_penalty = sampling->presence_penalty;
        draw.frequency_penalty = sampling->frequency_penalty;
        draw.history = cuda->history_count;
        draw.history_length = output->history_length;
        draw.prompt_length = output->prompt_length;
        memcpy(cuda->host_history + cuda->history_count, output->history,
               output->history_length * sizeof *cuda->host_history);
        cuda->history_count += output->history_length;
        cuda->penalized_count++;
    }
    cuda->host_draws[cuda->draw_count++] = draw;
}

/* Puts an output among those that ask for log-probabilities, with the history that its draw has from `history` on. */
static void add_asked(struct executor_cuda *cuda, const struct batch_output *output, uint32_t row, uint32_t history) {
    const uint32_t vocab = cuda->model->config.vocab_size;
    const uint32_t count = output->logprobs < CUDA_LOGPROBS_MAX ? output->logprobs : CUDA_LOGPROBS_MAX;
    cuda->host_asked[cuda->asked_count++] = (struct cuda_asked){
        .row = row,
        .count = count < vocab ? count : vocab,
        .history = history,
        .history_length = cuda->history_count - history,
    };
}

/* Settles where each output is sampled. Those with penalties come first among the draws. */
static void plan_sampling(struct executor_cuda *cuda, const struct batch *batch) {
    cuda->draw_count = cuda->penalized_count = cuda->history_count = cuda->asked_count = 0;
    for (int penalizes = 1; penalizes >= 0; penalizes--)
        for (uint32_t i = 0; i < batch->output_count; i++) {
            const struct batch_output *output = &batch->outputs[i];
            if (!output->sampling || sampler_penalizes(output->sampling) != penalizes)
                continue;
            const uint32_t history = cuda->history_count;
            cuda->sample_on_host[i] = penalizes && output->history_length > CUDA_HISTORY_TOKENS - history;
            if (cuda->sample_on_host[i])
                continue;
            if (!greatest_is_enough(output->sampling))
                add_draw(cuda, output, i, penalizes);
            if (output->logprobs > 0)
                add_asked(cuda, output, i, history);
        }
}

/* Brings the inputs over and runs the forward pass. */
static cudaError_t run(struct executor_cuda *cuda, const struct batch *batch) {
    const struct cuda_shape shape = fill_input(cuda, batch);
    const bool decode = batch->rows == batch->sequence_count && batch->rows == batch->output_count;
    const struct cuda_graph *graph = decode ? cuda_graph_find(cuda, shape.rows, shape.context_limit) : NULL;
    if (graph)
        pad_input(cuda, shape.rows, graph->shape.rows);
    plan_sampling(cuda, batch);
    cuda->profiling = false;
    cudaError_t error = cudaMemcpyAsync(cuda->device.tokens, cuda->host.tokens, cuda->input_bytes,
                                        cudaMemcpyHostToDevice, cuda->stream);
    if (cuda->draw_count > 0)
        error = error ? error
                      : cudaMemcpyAsync(cuda->draws, cuda->host_draws, cuda->draw_count * sizeof *cuda->draws,
                                        cudaMemcpyHostToDevice, cuda->stream);
    if (cuda->history_count > 0)
        error = error ? error
                      : cudaMemcpyAsync(cuda->history, cuda->host_history, cuda->history_count * sizeof *cuda->history,
                                        cudaMemcpyHostToDevice, cuda->stream);
    if (cuda->asked_count > 0)
        error = error ? error
                      : cudaMemcpyAsync(cuda->asked, cuda->host_asked, cuda->asked_count * sizeof *cuda->asked,
                                        cudaMemcpyHostToDevice, cuda->stream);
    if (error != cudaSuccess)
        return error;
    if (batch->profile)
        return cuda_profile_forward(cuda, graph ? &graph->shape : &shape);
    return graph ? cudaGraphLaunch(graph->exec, cuda->stream) : cuda_forward(cuda, &shape);
}

/* The tokens of the draws, and log-probabilities. Penalties change logits: these must be on their way home before. */
static cudaError_t sample(struct executor_cuda *cuda) {
    const struct cuda_logprobs logprobs = {
        .logits = cuda->logits,
        .vocab = cuda->model->config.vocab_size,
        .asked = cuda->asked,
        .count = cuda->asked_count,
        .ranks = cuda->greatest_parts,
        .history = cuda->history,
        .ids = cuda->greatest,
        .plain = cuda->plain,
        .masses = cuda->asked_masses,
        .out = cuda->alternatives,
    };
    const struct cuda_sample draws = {
        .logits = cuda->logits,
        .vocab = cuda->model->config.vocab_size,
        .draws = cuda->draws,
        .count = cuda->draw_count,
        .penalized = cuda->penalized_count,
        .history = cuda->history,
        .plain = cuda->plain,
        .ranks = cuda->greatest_parts,
        .parts = cuda->draw_parts,
        .list = cuda->draw_list,
        .ids = cuda->greatest,
    };
    cudaError_t error = cudaSuccess;
    if (logprobs.count > 0)
        error = cuda_logprobs_begin(&logprobs, cuda->stream);
    if (draws.count > 0)
        error = error ? error : cuda_sample(&draws, cuda->stream);
    if (logprobs.count > 0)
        error = error ? error : cuda_logprobs_end(&logprobs, cuda->stream);
    return error || logprobs.count + draws.count == 0 ? error : cuda_mark(cuda, "sample");
}

/* Samples, and brings home what is wanted: of each output a token, of some more, and how experts were chosen. */
static cudaError_t fetch(struct executor_cuda *cuda, const struct batch *batch) {
    const struct model_config *config = &cuda->model->config;
    const uint32_t layers = config->block_count;
    const size_t stride = (size_t)cuda->base.info.step_tokens * config->expert_used_count; /* of a layer's routes */
    const size_t routes = (size_t)batch->rows * config->expert_used_count;
    cudaError_t error = cuda_busiest(cuda->route_experts, layers, stride, (uint32_t)routes, cuda->busiest, cuda->stream);
    error = error ? error : cuda_mark(cuda, "busiest");
    for (uint32_t i = 0; i < batch->output_count && error == cudaSuccess; i++) {
        const size_t at = (size_t)i * config->vocab_size;
        if (batch->outputs[i].logits || (batch->outputs[i].sampling && cuda->sample_on_host[i]))
            error = cudaMemcpyAsync(cuda->host_logits + at, cuda->logits + at, config->vocab_size * sizeof(float),
                                    cudaMemcpyDeviceToHost, cuda->stream);
    }
    error = error ? error : sample(cuda);
    error = error ? error
                  : cudaMemcpyAsync(cuda->host_busiest, cuda->busiest, (layers + batch->output_count) * sizeof(uint32_t),
                                    cudaMemcpyDeviceToHost, cuda->stream);
    if (cuda->asked_count > 0)
        error = error ? error
                      : cudaMemcpyAsync(cuda->host_alternatives, cuda->alternatives,
                                        cuda->asked_count * sizeof *cuda->alternatives, cudaMemcpyDeviceToHost,
                                        cuda->stream);
    if (batch->routes) {
        error = error ? error
                      : cudaMemcpy2DAsync(cuda->host_route_experts, routes * sizeof(uint32_t), cuda->route_experts,
                                          stride * sizeof(uint32_t), routes * sizeof(uint32_t), layers,
                                          cudaMemcpyDeviceToHost, cuda->stream);
        error = error ? error
                      : cudaMemcpy2DAsync(cuda->host_route_weights, routes * sizeof(float), cuda->route_weights,
                                          stride * sizeof(float), routes * sizeof(float), layers,
                                          cudaMemcpyDeviceToHost, cuda->stream);
    }
    return error ? error : cudaStreamSynchronize(cuda->stream);
}

static double imbalance(const struct executor_cuda *cuda, uint32_t rows) {
    const struct model_config *config = &cuda->model->config;
    const double mean = (double)rows * config->expert_used_count / config->expert_count;
    uint64_t sum = 0;
    for (uint32_t l = 0; l < config->block_count; l++)
        sum += cuda->host_busiest[l];
    return (double)sum / config->block_count / mean;
}

/* [layer][row][used] becomes [row][layer][used]. */
static void turn_routes(struct executor_cuda *cuda, uint32_t rows) {
    const uint32_t layers = cuda->model->config.block_count, used = cuda->model->config.expert_used_count;
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t l = 0; l < layers; l++) {
            const size_t from = ((size_t)l * rows + row) * used, to = ((size_t)row * layers + l) * used;
            memcpy(cuda->routes_of_rows + to, cuda->host_route_experts + from, used * sizeof(uint32_t));
            memcpy(cuda->route_weights_of_rows + to, cuda->host_route_weights + from, used * sizeof(float));
        }
}

struct sampling_job {
    struct executor_cuda *cuda;
    const struct batch *batch;
};

static void sample_outputs(void *context, uint32_t first, uint32_t end, uint32_t thread) {
    const struct sampling_job *job = context;
    struct executor_cuda *cuda = job->cuda;
    const uint32_t vocab = cuda->model->config.vocab_size;
    for (uint32_t i = first; i < end; i++) {
        const struct batch_output *output = &job->batch->outputs[i];
        if (!output->sampling)
            continue;
        if (!cuda->sample_on_host[i])
            cuda->sampled[i] = (struct sampled){.token = cuda->host_greatest[i]};
        else
            sampler_sample(cuda->host_logits + (size_t)i * vocab, vocab, output->sampling, output->history,
                           output->history_length, output->prompt_length, output->logprobs,
                           cuda->sampler_scratch + thread * sampler_scratch_bytes(vocab), &cuda->sampled[i]);
    }
}

/* The log-probabilities of those that asked the device for them. */
static void add_alternatives(struct executor_cuda *cuda) {
    static_assert((int)CUDA_LOGPROBS_MAX == SAMPLER_LOGPROBS_MAX, "all that may be asked for");
    for (uint32_t i = 0; i < cuda->asked_count; i++) {
        const struct cuda_alternatives *from = &cuda->host_alternatives[i];
        struct sampled *to = &cuda->sampled[cuda->host_asked[i].row];
        to->logprob = from->logprob;
        to->top_count = cuda->host_asked[i].count;
        memcpy(to->top_ids, from->ids, to->top_count * sizeof *to->top_ids);
        memcpy(to->top_logprobs, from->logprobs, to->top_count * sizeof *to->top_logprobs);
    }
}

/* An error that stays is the end of what the process has on the device. */
static int fail_step(struct executor_cuda *cuda, cudaError_t error, struct status *status) {
    cudaGetLastError();
    if (cudaStreamSynchronize(cuda->stream) == cudaSuccess)
        return cuda_failed(status, error, "step");
    return status_set(status, STATUS_UNAVAILABLE, "CUDA: device %s is lost: %s", cuda->base.info.device,
                      cudaGetErrorString(error));
}

int cuda_step(struct executor *executor, const struct batch *batch, struct batch_result *result,
              struct status *status) {
    struct executor_cuda *cuda = (struct executor_cuda *)executor;
    assert(batch->rows > 0 && batch->rows <= cuda->base.info.step_tokens);
    assert(batch->output_count <= cuda->base.info.max_outputs && batch->output_count <= batch->rows);
    const struct executor_timing *timings = NULL;
    uint32_t timing_count = 0;
    cudaError_t error = run(cuda, batch);
    error = error ? error : fetch(cuda, batch);
    if (batch->profile)
        error = error ? error : cuda_profile_read(cuda, &timings, &timing_count);
    if (error != cudaSuccess)
        return fail_step(cuda, error, status);
    for (uint32_t i = 0; i < batch->output_count; i++) {
        if (cuda->host_greatest[i] == UINT32_MAX)
            return status_set(status, STATUS_INTERNAL, "logits are not finite");
        cuda->logits_rows[i] =
            batch->outputs[i].logits ? cuda->host_logits + (size_t)i * cuda->model->config.vocab_size : NULL;
    }
    struct sampling_job job = {cuda, batch};
    thread_pool_run(cuda->pool, sample_outputs, &job, batch->output_count);
    add_alternatives(cuda);
    if (batch->routes)
        turn_routes(cuda, batch->rows);
    *result = (struct batch_result){
        .sampled = cuda->sampled,
        .logits = cuda->logits_rows,
        .route_experts = batch->routes ? cuda->routes_of_rows : NULL,
        .route_weights = batch->routes ? cuda->route_weights_of_rows : NULL,
        .expert_imbalance = imbalance(cuda, batch->rows),
        .timings = timings,
        .timing_count = timing_count,
    };
    return 0;
}
