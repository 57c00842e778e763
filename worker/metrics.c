#include "worker/metrics.h"

#include "common/metrics_process.h"
#include "worker/engine.h"

void engine_metrics_init(struct engine_metrics *metrics) {
    serving_metrics_init(&metrics->serving);
    metrics->step_seconds.buckets = &metric_buckets_step;
    metrics->step_rows.buckets = metrics->step_sequences.buckets = &metric_buckets_rows;
    metrics->expert_imbalance.buckets = &metric_buckets_ratio;
}

void engine_metrics_step(struct engine_metrics *metrics, const struct batch *batch, const struct batch_result *result,
                         uint64_t elapsed_ns) {
    metric_observe(&metrics->step_seconds, elapsed_ns);
    metric_observe(&metrics->step_rows, batch->rows);
    metric_observe(&metrics->step_sequences, batch->sequence_count);
    if (result->expert_imbalance > 0)
        metric_observe(&metrics->expert_imbalance, (uint64_t)(result->expert_imbalance * 1000 + 0.5));
}

void engine_metrics_load(struct engine_metrics *metrics, const struct scheduler_load *load) {
    metric_counter_set(&metrics->preemptions, load->preemptions);
    metric_counter_set(&metrics->serving.prefix_queries, load->prefix_queries);
    metric_counter_set(&metrics->serving.prefix_hits, load->prefix_hits);
}

void engine_metrics_token(struct engine_metrics *metrics, const struct sequence *sequence, uint64_t now_ns) {
    if (sequence->first_token_ns)
        serving_metrics_next(&metrics->serving, now_ns - sequence->last_token_ns, 1);
    else
        serving_metrics_first(&metrics->serving, now_ns - sequence->request->submitted_ns, sequence->prompt_length, 1);
}

void engine_metrics_finish(struct engine_metrics *metrics, const struct sequence *sequence, enum sequence_end end,
                           uint64_t now_ns) {
    const struct request *request = sequence->request;
    const struct serving_request finished = {
        .end = end == SEQUENCE_STOPPED ? SERVING_STOP : SERVING_LENGTH,
        .queue_ns = sequence->started_ns - request->submitted_ns,
        .decode_ns = now_ns - sequence->first_token_ns,
        .total_ns = now_ns - request->submitted_ns,
        .tokens = sequence->token_count - sequence->prompt_length,
    };
    serving_metrics_finish(&metrics->serving, &finished);
}

void engine_metrics_answer(struct engine_metrics *metrics, const struct request *request) {
    for (uint32_t i = 0; i < request->sequence_count; i++)
        metric_add(&metrics->serving.prompt_tokens, request->sequences[i].prompt_length);
}

void engine_metrics_abort(struct engine_metrics *metrics, const struct request *request) {
    if (!request->forward)
        metric_add(&metrics->serving.ended[SERVING_ABORT], 1);
}

void worker_metrics_render(void *context, struct metrics_text *text) {
    const struct worker_metrics *worker = context;
    const struct engine_metrics *metrics = engine_get_metrics(worker->engine);
    const struct metric_label *labels = METRIC_LABELS({"model_name", worker->model_name});
    const struct {
        const char *name, *help;
        const struct metric_histogram *histogram;
    } histograms[] = {
        {"step_seconds", "How long the executor takes for a step.", &metrics->step_seconds},
        {"step_rows", "Rows of a step: tokens that generate, and tokens of prompts.", &metrics->step_rows},
        {"step_sequences", "Sequences that have rows in a step.", &metrics->step_sequences},
        {"expert_imbalance", "Rows of a layer's busiest expert over the mean of all, the mean of a step's layers.",
         &metrics->expert_imbalance},
    };
    struct engine_load load;
    engine_get_load(worker->engine, &load);
    const struct serving_gauges gauges = {
        .running = load.running,
        .waiting = load.waiting,
        .kv_usage = serving_kv_usage(worker->kv_blocks, load.kv_blocks_free),
    };
    serving_metrics_render(&metrics->serving, &gauges, worker->prefix, worker->model_name, text);
    for (size_t i = 0; i < sizeof histograms / sizeof *histograms; i++) {
        metrics_text_family(text, METRIC_HISTOGRAM, "moed_", histograms[i].name, histograms[i].help);
        metrics_text_histogram(text, labels, histograms[i].histogram);
    }
    metrics_text_family(text, METRIC_COUNTER, "moed_", "preemptions_total",
                        "Sequences that gave up their KV blocks, to be computed again.");
    metrics_text_sample(text, labels, (double)metric_count(&metrics->preemptions));
    metrics_process_render(text, worker->started);
}
