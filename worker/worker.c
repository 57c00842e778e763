#include "worker/worker.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "common/log.h"
#include "common/metrics_http.h"
#include "common/metrics_process.h"
#include "worker/engine.h"
#include "worker/link.h"
#include "worker/metrics.h"
#include "worker/scheduler.h"

enum { WORKER_ID_MAX = 127 }; /* bytes; as a gateway takes it */

static int choose_id(const char *wanted, char id[WORKER_ID_MAX + 1], struct status *status) {
    if (wanted && strlen(wanted) > WORKER_ID_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "worker-id: %zu bytes, at most %d are allowed",
                          strlen(wanted), WORKER_ID_MAX);
    char host[100];
    if (gethostname(host, sizeof(host)) != 0)
        snprintf(host, sizeof(host), "localhost");
    host[sizeof(host) - 1] = '\0';
    if (wanted)
        snprintf(id, WORKER_ID_MAX + 1, "%s", wanted);
    else
        snprintf(id, WORKER_ID_MAX + 1, "%s:%ld", host, (long)getpid());
    return 0;
}

static void log_ready(const char *id, const struct executor_info *info) {
    log_info("worker_ready", LOG_STR("worker", id), LOG_STR("backend", info->backend), LOG_STR("device", info->device),
             LOG_UINT("max_sequences", info->max_sequences), LOG_UINT("step_tokens", info->step_tokens),
             LOG_UINT("context_length", scheduler_context_length(info)), LOG_UINT("kv_blocks", info->kv_blocks),
             LOG_UINT("kv_block_tokens", info->kv_block_tokens), LOG_UINT("memory_used", info->memory_used),
             LOG_UINT("memory_total", info->memory_total));
}

int worker_run(const struct worker_setup *setup, int stop_fd, struct status *status) {
    char id[WORKER_ID_MAX + 1];
    struct executor *executor = NULL;
    void *zmq_context = NULL;
    struct engine *engine = NULL;
    struct link *link = NULL;
    struct metrics_http *metrics_http = NULL;
    struct worker_metrics metrics = {.prefix = setup->metrics_prefix, .started = metrics_process_now()};
    int result = -1;
    if (choose_id(setup->worker_id, id, status) != 0)
        return -1;
    if (!(zmq_context = zmq_ctx_new())) {
        status_set(status, STATUS_INTERNAL, "ZeroMQ: %s", zmq_strerror(zmq_errno()));
        goto out;
    }
    /* Sockets first: loading takes long, and a wrong endpoint shows at once. */
    const struct link_options options = {setup->gateways, setup->gateway_count, setup->heartbeat_ms * 1000000};
    if (link_create(&options, zmq_context, &link, status) != 0 ||
        (setup->metrics_listen && metrics_http_open(setup->metrics_listen, &metrics_http, status) != 0) ||
        setup->backend->open(setup->model, &setup->executor, &executor, status) != 0 ||
        engine_create(executor, zmq_context, id, setup->prefix_cache, &engine, status) != 0)
        goto out;
    metrics.engine = engine;
    metrics.model_name = setup->model->config.name;
    metrics.kv_blocks = executor->info.kv_blocks;
    if (metrics_http && metrics_http_serve(metrics_http, worker_metrics_render, &metrics, status) != 0)
        goto out;
    log_ready(id, &executor->info);
    const struct link_worker worker = {id, &setup->model->config, &executor->info, engine};
    result = link_run(link, &worker, stop_fd, status);

out:
    metrics_http_close(metrics_http);
    link_destroy(link);
    engine_destroy(engine);
    if (executor)
        setup->backend->close(executor);
    if (zmq_context)
        while (zmq_ctx_term(zmq_context) != 0 && zmq_errno() == EINTR)
            ;
    return result;
}
