#ifndef MOED_COMMON_METRICS_SERVING_H
#define MOED_COMMON_METRICS_SERVING_H

#include "common/metrics.h"

/*
 * What servers of language models count, under the names and in the units of vLLM, so that dashboards, autoscalers and
 * inference gateways made for it read moed, too. Gateway and worker both have it, each as it sees requests. Times are
 * those of Generate requests; the tokens of Forward requests count as prompt tokens.
 */
enum serving_end { SERVING_STOP, SERVING_LENGTH, SERVING_ABORT, SERVING_ENDS };

struct serving_metrics {
    struct metric_histogram first_token, token_gap, token_mean, total, queue;
    struct metric_counter prompt_tokens, generated_tokens, ended[SERVING_ENDS], prefix_queries, prefix_hits;
};

/* A finished request, in nanoseconds. */
struct serving_request {
    enum serving_end end;
    uint64_t queue_ns, decode_ns, total_ns; /* decode: from its first token to its last */
    uint64_t tokens;                        /* generated */
};

/* What is so now. */
struct serving_gauges {
    double running, waiting, kv_usage; /* requests, requests, 0 to 1 */
};

void serving_metrics_init(struct serving_metrics *metrics);

/* The first tokens of a request, so long after it came. */
void serving_metrics_first(struct serving_metrics *metrics, uint64_t elapsed_ns, uint64_t prompt_tokens,
                           uint64_t tokens);
/* More of them, so long after the last ones. */
void serving_metrics_next(struct serving_metrics *metrics, uint64_t elapsed_ns, uint64_t tokens);
/* The end of a request that was not aborted. Those are only counted, as `ended`: their times say nothing. */
void serving_metrics_finish(struct serving_metrics *metrics, const struct serving_request *request);

/* Blocks in use as a share of all; 0 where there are none. */
double serving_kv_usage(uint64_t total, uint64_t free);

void serving_metrics_render(const struct serving_metrics *metrics, const struct serving_gauges *gauges,
                            const char *prefix, const char *model_name, struct metrics_text *text);

#endif
