#include "gateway/metrics.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/metrics_process.h"

enum { METHODS_MAX = 16, STATES = 4 };

static const struct {
    Moed__V1__Worker__State state;
    const char *name;
} states[STATES] = {
    {MOED__V1__WORKER__STATE__LOADING, "loading"},
    {MOED__V1__WORKER__STATE__READY, "ready"},
    {MOED__V1__WORKER__STATE__DRAINING, "draining"},
    {MOED__V1__WORKER__STATE__LOST, "lost"},
};

struct gateway_metrics {
    const char *prefix;
    double started;
    struct serving_metrics serving;

    const char *methods[METHODS_MAX];
    size_t method_count;
    struct metric_counter calls[METHODS_MAX][STATUS_CODES];

    /* Of the last look at the workers. */
    struct metric_gauge workers[STATES], running, waiting, kv_usage;
    pthread_mutex_t name_lock; /* the fleet's thread takes it a few times a second, for a copy */
    char model_name[sizeof((struct model_facts *)NULL)->name];
    bool has_model;
};

struct gateway_metrics *gateway_metrics_create(const char *prefix) {
    struct gateway_metrics *metrics = calloc(1, sizeof *metrics);
    if (!metrics)
        return NULL;
    metrics->prefix = prefix;
    metrics->started = metrics_process_now();
    serving_metrics_init(&metrics->serving);
    pthread_mutex_init(&metrics->name_lock, NULL);
    return metrics;
}

void gateway_metrics_destroy(struct gateway_metrics *metrics) {
    if (!metrics)
        return;
    pthread_mutex_destroy(&metrics->name_lock);
    free(metrics);
}

struct serving_metrics *gateway_metrics_serving(struct gateway_metrics *metrics) {
    return &metrics->serving;
}

struct metric_counter *gateway_metrics_method(struct gateway_metrics *metrics, const char *method) {
    if (metrics->method_count == METHODS_MAX)
        return NULL;
    metrics->methods[metrics->method_count] = method;
    return metrics->calls[metrics->method_count++];
}

void gateway_metrics_see_workers(void *context, struct worker_table *workers) {
    struct gateway_metrics *metrics = context;
    uint64_t running = 0, waiting = 0, blocks = 0, blocks_free = 0, count[STATES] = {0};
    for (size_t i = 0; i < worker_table_count(workers); i++) {
        const struct worker *worker = worker_table_at(workers, i);
        for (int s = 0; s < STATES; s++)
            count[s] += worker->state == states[s].state;
        if (worker->state == MOED__V1__WORKER__STATE__LOST)
            continue;
        running += worker->beat.running;
        waiting += worker->beat.waiting;
        blocks += worker->kv_blocks_total;
        /* No more than there are: a worker's word must not hide what others use. */
        blocks_free += worker->beat.kv_blocks_free < worker->kv_blocks_total ? worker->beat.kv_blocks_free
                                                                             : worker->kv_blocks_total;
    }
    for (int s = 0; s < STATES; s++)
        metric_set(&metrics->workers[s], (double)count[s]);
    metric_set(&metrics->running, (double)running);
    metric_set(&metrics->waiting, (double)waiting);
    metric_set(&metrics->kv_usage, serving_kv_usage(blocks, blocks_free));

    const struct model_facts *model = worker_table_model(workers);
    pthread_mutex_lock(&metrics->name_lock);
    metrics->has_model = model->generation != 0;
    memcpy(metrics->model_name, model->name, sizeof metrics->model_name);
    pthread_mutex_unlock(&metrics->name_lock);
}

/* Codes that have not come up are left out, but for OK: a rate of errors wants something to be a part of. */
static void render_calls(const struct gateway_metrics *metrics, struct metrics_text *text) {
    metrics_text_family(text, METRIC_COUNTER, "moed_", "requests_total", "gRPC calls that have ended, by status.");
    for (size_t m = 0; m < metrics->method_count; m++)
        for (int code = 0; code < STATUS_CODES; code++) {
            uint64_t count = metric_count(&metrics->calls[m][code]);
            if (count > 0 || code == STATUS_OK)
                metrics_text_sample(text,
                                    METRIC_LABELS({"method", metrics->methods[m]}, {"code", status_code_name(code)}),
                                    (double)count);
        }
}

void gateway_metrics_render(void *context, struct metrics_text *text) {
    struct gateway_metrics *metrics = context;
    char model_name[sizeof metrics->model_name];
    pthread_mutex_lock(&metrics->name_lock);
    bool has_model = metrics->has_model;
    memcpy(model_name, metrics->model_name, sizeof model_name);
    pthread_mutex_unlock(&metrics->name_lock);
    const struct serving_gauges gauges = {
        .running = metric_value(&metrics->running),
        .waiting = metric_value(&metrics->waiting),
        .kv_usage = metric_value(&metrics->kv_usage),
    };
    if (has_model) /* before the first worker nothing is served that could be named */
        serving_metrics_render(&metrics->serving, &gauges, metrics->prefix, model_name, text);
    metrics_text_family(text, METRIC_GAUGE, "moed_", "workers", "Workers by state; lost ones for a few minutes.");
    for (int s = 0; s < STATES; s++)
        metrics_text_sample(text, METRIC_LABELS({"state", states[s].name}), metric_value(&metrics->workers[s]));
    render_calls(metrics, text);
    metrics_process_render(text, metrics->started);
}
