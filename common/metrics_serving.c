#include "common/metrics_serving.h"

void serving_metrics_init(struct serving_metrics *metrics) {
    metrics->first_token.buckets = metrics->total.buckets = metrics->queue.buckets = &metric_buckets_request;
    metrics->token_gap.buckets = metrics->token_mean.buckets = &metric_buckets_step;
}

void serving_metrics_first(struct serving_metrics *metrics, uint64_t elapsed_ns, uint64_t prompt_tokens,
                           uint64_t tokens) {
    metric_observe(&metrics->first_token, elapsed_ns);
    metric_add(&metrics->prompt_tokens, prompt_tokens);
    metric_add(&metrics->generated_tokens, tokens);
}

void serving_metrics_next(struct serving_metrics *metrics, uint64_t elapsed_ns, uint64_t tokens) {
    metric_observe(&metrics->token_gap, elapsed_ns);
    metric_add(&metrics->generated_tokens, tokens);
}

void serving_metrics_finish(struct serving_metrics *metrics, const struct serving_request *request) {
    metric_observe(&metrics->queue, request->queue_ns);
    metric_observe(&metrics->total, request->total_ns);
    if (request->tokens > 1) /* of one token alone there is no time between tokens */
        metric_observe(&metrics->token_mean, request->decode_ns / (request->tokens - 1));
    metric_add(&metrics->ended[request->end], 1);
}

double serving_kv_usage(uint64_t total, uint64_t free) {
    return free < total ? (double)(total - free) / (double)total : 0;
}

void serving_metrics_render(const struct serving_metrics *metrics, const struct serving_gauges *gauges,
                            const char *prefix, const char *model_name, struct metrics_text *text) {
    static const char *const ends[SERVING_ENDS] = {"stop", "length", "abort"}; /* as enum serving_end */
    const struct metric_label *labels = METRIC_LABELS({"model_name", model_name});
    const struct {
        const char *name, *help;
        double value;
    } values[] = {
        {"num_requests_running", "Sequences that are being computed.", gauges->running},
        {"num_requests_waiting", "Sequences that wait to be computed.", gauges->waiting},
        {"kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.", gauges->kv_usage},
    };
    const struct {
        const char *name, *help;
        const struct metric_counter *counter;
    } counters[] = {
        {"prompt_tokens_total", "Prompt tokens computed.", &metrics->prompt_tokens},
        {"generation_tokens_total", "Tokens generated.", &metrics->generated_tokens},
        {"prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", &metrics->prefix_queries},
        {"prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", &metrics->prefix_hits},
    };
    const struct {
        const char *name, *help;
        const struct metric_histogram *histogram;
    } histograms[] = {
        {"time_to_first_token_seconds", "From a request's arrival to its first token.", &metrics->first_token},
        {"inter_token_latency_seconds", "Between a request's tokens.", &metrics->token_gap},
        {"request_time_per_output_token_seconds", "Mean time between the tokens of a finished request.",
         &metrics->token_mean},
        {"e2e_request_latency_seconds", "From a request's arrival to its last token.", &metrics->total},
        {"request_queue_time_seconds", "What a finished request waited in its worker's queue.", &metrics->queue},
    };
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        metrics_text_family(text, METRIC_GAUGE, prefix, values[i].name, values[i].help);
        metrics_text_sample(text, labels, values[i].value);
    }
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++) {
        metrics_text_family(text, METRIC_COUNTER, prefix, counters[i].name, counters[i].help);
        metrics_text_sample(text, labels, (double)metric_count(counters[i].counter));
    }
    metrics_text_family(text, METRIC_COUNTER, prefix, "request_success_total",
                        "Generate requests that ended at a stop token, for their length, or by being cancelled.");
    for (int end = 0; end < SERVING_ENDS; end++)
        metrics_text_sample(text, METRIC_LABELS({"model_name", model_name}, {"finished_reason", ends[end]}),
                            (double)metric_count(&metrics->ended[end]));
    for (size_t i = 0; i < sizeof histograms / sizeof *histograms; i++) {
        metrics_text_family(text, METRIC_HISTOGRAM, prefix, histograms[i].name, histograms[i].help);
        metrics_text_histogram(text, labels, histograms[i].histogram);
    }
}
