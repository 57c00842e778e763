#include "worker/engine.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/memory.h"
#include "worker/output.h"
#include "worker/scheduler.h"

enum command_type { COMMAND_SUBMIT, COMMAND_APPLY, COMMAND_DROP_PEER, COMMAND_DRAIN, COMMAND_STOP };

/* Travels as the bytes of a frame, link to engine. */
struct command {
    enum command_type type;
    uint32_t peer;
    struct request *request;
    Moed__Worker__V1__ToWorker *message;
};

enum { REQUEST_BUCKETS = 1024, REQUESTS_MAX = 1 << 16 };

struct engine {
    void *link_socket; /* the link's end */
    pthread_t thread;
    /* Messages sent: added to before sending and read after receiving, which orders the memory that pointers in them
     * lead to in C's terms (and a race detector's), not only in those of ZeroMQ's queue. */
    _Atomic uint64_t commands_sent, reports_sent;

    /* The engine thread's. */
    void *socket;
    struct executor *executor;
    struct scheduler *scheduler;
    char *worker_id;
    struct request *requests[REQUEST_BUCKETS]; /* chains by id */
    uint32_t request_count;
    bool draining, stopping;
    uint64_t preemptions; /* logged */
    struct report *step_reports; /* [max_sequences]: StepOutputs of the step in hand, one a peer */
    uint32_t step_report_count;
    struct request **failed; /* [max_sequences] */
    struct status lost;      /* STATUS_OK as long as there is a device; read by the link once it is reported */

    /* Written by the engine thread, read by others. */
    struct engine_metrics metrics;
    struct {
        _Atomic uint32_t running, waiting, kv_blocks_free;
        _Atomic uint64_t waiting_tokens;
        _Atomic uint64_t busy_since_ns; /* the last step's end, or when there was something to do again; 0: idle */
    } load;
};

/* ---- requests by id */

static struct request **bucket_of(struct engine *engine, uint64_t id) {
    return &engine->requests[(id * 0x9E3779B97F4A7C15u) >> 32 & (REQUEST_BUCKETS - 1)];
}

static struct request *request_find(struct engine *engine, uint32_t peer, uint64_t id) {
    struct request *request = *bucket_of(engine, id);
    while (request && (request->id != id || request->peer != peer))
        request = request->next;
    return request;
}

static void request_insert(struct engine *engine, struct request *request) {
    struct request **bucket = bucket_of(engine, request->id);
    request->previous = NULL;
    request->next = *bucket;
    if (*bucket)
        (*bucket)->previous = request;
    *bucket = request;
    engine->request_count++;
}

/* Ends a request: its sequences leave the scheduler, with their KV blocks. */
static void request_end(struct engine *engine, struct request *request) {
    *(request->previous ? &request->previous->next : bucket_of(engine, request->id)) = request->next;
    if (request->next)
        request->next->previous = request->previous;
    engine->request_count--;
    for (uint32_t i = 0; i < request->sequence_count; i++)
        scheduler_remove(engine->scheduler, &request->sequences[i]);
    request_destroy(request);
}

/* ---- reports */

static void report_send(struct engine *engine, struct report *report) {
    atomic_fetch_add_explicit(&engine->reports_sent, 1, memory_order_release);
    while (zmq_send(engine->socket, report, sizeof(*report), 0) < 0)
        if (zmq_errno() != EINTR) {
            log_error("engine_report_lost", LOG_STR("error", zmq_strerror(zmq_errno())));
            report_clear(report);
            return;
        }
}

static void fail(struct engine *engine, struct request *request, enum status_code code, const char *message) {
    report_send(engine, &(struct report){.peer = request->peer, .message = output_failure(request->id, code, message)});
    request_end(engine, request);
}

void report_clear(struct report *report) {
    if (report->message)
        moed__worker__v1__to_gateway__free_unpacked(report->message, NULL);
    forward_destroy(report->forward);
    *report = (struct report){0};
}

/* ---- commands */

static void submit(struct engine *engine, struct request *request) {
    struct request *other = request_find(engine, request->peer, request->id);
    request_insert(engine, request);
    for (uint32_t i = 0; i < request->sequence_count; i++) {
        request->sequences[i].submitted_ns = request->submitted_ns;
        scheduler_add(engine->scheduler, &request->sequences[i]);
    }
    if (other) {
        log_error("duplicate_id", LOG_UINT("id", request->id));
        request_end(engine, other);
        fail(engine, request, STATUS_ALREADY_EXISTS, "id: in use; both requests of this id have been ended");
    } else if (engine->request_count > REQUESTS_MAX) {
        fail(engine, request, STATUS_RESOURCE_EXHAUSTED, "the worker's queue is full");
    }
}

static void apply_message(struct engine *engine, uint32_t peer, const Moed__Worker__V1__ToWorker *message) {
    if (message->body_case == MOED__WORKER__V1__TO_WORKER__BODY_CANCEL) {
        for (size_t i = 0; i < message->cancel->n_ids; i++) {
            struct request *request = request_find(engine, peer, message->cancel->ids[i]);
            if (request) {
                engine_metrics_abort(&engine->metrics, request);
                request_end(engine, request);
            }
        }
        return;
    }
    assert(message->body_case == MOED__WORKER__V1__TO_WORKER__BODY_CREDIT);
    for (size_t i = 0; i < message->credit->n_ids; i++) {
        struct request *request = request_find(engine, peer, message->credit->ids[i]);
        if (request)
            sequence_add_credit(&request->sequences[0], message->credit->tokens[i]);
    }
}

/* Ends the requests of one peer, or of all. */
static void drop(struct engine *engine, bool all, uint32_t peer) {
    for (uint32_t i = 0; i < REQUEST_BUCKETS; i++)
        for (struct request *request = engine->requests[i], *next; request; request = next) {
            next = request->next;
            if (all || request->peer == peer) {
                engine_metrics_abort(&engine->metrics, request);
                request_end(engine, request);
            }
        }
}

static void execute(struct engine *engine, struct command *command) {
    switch (command->type) {
    case COMMAND_SUBMIT:
        submit(engine, command->request);
        break;
    case COMMAND_APPLY:
        apply_message(engine, command->peer, command->message);
        moed__worker__v1__to_worker__free_unpacked(command->message, NULL);
        break;
    case COMMAND_DROP_PEER:
        drop(engine, false, command->peer);
        break;
    case COMMAND_DRAIN:
        engine->draining = true;
        break;
    case COMMAND_STOP:
        engine->stopping = true;
        break;
    }
}

/* Executes the next command; waits for one if asked to. False: there is none. */
static bool receive_command(struct engine *engine, bool wait) {
    struct command command;
    while (zmq_recv(engine->socket, &command, sizeof(command), wait ? 0 : ZMQ_DONTWAIT) < 0) {
        int error = zmq_errno();
        if (error == EINTR)
            continue;
        if (error != EAGAIN) {
            log_error("engine_socket_failed", LOG_STR("error", zmq_strerror(error)));
            engine->stopping = true;
        }
        return false;
    }
    (void)atomic_load_explicit(&engine->commands_sent, memory_order_acquire);
    execute(engine, &command);
    return true;
}

/* ---- a step */

/* The StepOutput of this step for a sequence's gateway. */
static Moed__Worker__V1__ToGateway *step_message(struct engine *engine, uint32_t peer, uint32_t capacity) {
    for (uint32_t i = 0; i < engine->step_report_count; i++)
        if (engine->step_reports[i].peer == peer)
            return engine->step_reports[i].message;
    struct report *report = &engine->step_reports[engine->step_report_count++];
    *report = (struct report){.peer = peer, .message = output_step(capacity)};
    return report->message;
}

static void take_token(struct engine *engine, struct sequence *sequence, const struct sampled *sampled,
                       uint32_t capacity, uint64_t now_ns) {
    enum sequence_end end;
    engine_metrics_token(&engine->metrics, sequence, now_ns);
    if (sequence->first_token_ns == 0)
        sequence->first_token_ns = now_ns;
    sequence->last_token_ns = now_ns;
    if (sequence_append(sequence, sampled->token, &end) != 0) {
        fail(engine, sequence->request, STATUS_RESOURCE_EXHAUSTED, "the worker has no memory for more tokens");
        return;
    }
    Moed__Worker__V1__SequenceOutput *output =
        output_add(step_message(engine, sequence->request->peer, capacity), sequence, sampled);
    if (end == SEQUENCE_GOES_ON)
        return;
    output_finish(output, sequence, end, now_ns, engine->worker_id);
    engine_metrics_finish(&engine->metrics, sequence, end, now_ns);
    request_end(engine, sequence->request);
}

/* Sends the answer of a Forward whose sequences have all ended. */
static void answer(struct engine *engine, struct request *request, uint64_t now_ns) {
    struct report report = {.peer = request->peer, .message = output_forward(request->id), .forward = request->forward};
    Moed__V1__Timing timing;
    output_timing(&timing, request, now_ns, engine->worker_id);
    forward_set_timing(request->forward, &timing);
    engine_metrics_answer(&engine->metrics, request);
    request->forward = NULL;
    report_send(engine, &report);
    request_end(engine, request);
}

static void take_logits(struct engine *engine, const struct plan *plan, uint32_t member, uint32_t first_row,
                        const struct batch_result *result, uint64_t now_ns) {
    struct sequence *sequence = plan->sequences[member];
    struct request *request = sequence->request;
    const struct batch_sequence *rows = &plan->batch.sequences[member];
    for (uint32_t i = 0; i < plan->output_count[member]; i++) {
        uint32_t output = plan->first_output[member] + i;
        uint32_t position = rows->position + plan->batch.outputs[output].row - first_row;
        forward_take_logits(request->forward, sequence->index, position, result->logits[output]);
    }
    if (sequence->routes) {
        size_t offset = (size_t)first_row * forward_route_width(request->forward);
        forward_take_routes(request->forward, sequence->index, rows->position, rows->rows,
                            result->route_experts + offset, result->route_weights + offset);
    }
    if (sequence_remaining(sequence) > 0)
        return;
    scheduler_remove(engine->scheduler, sequence);
    if (--request->unfinished == 0)
        answer(engine, request, now_ns);
}

static void take_results(struct engine *engine, const struct plan *plan, const struct batch_result *result) {
    uint64_t now_ns = clock_now_ns();
    uint32_t count = plan->batch.sequence_count, row = 0;
    scheduler_advance(engine->scheduler, plan);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t rows = plan->batch.sequences[i].rows;
        struct sequence *sequence = plan->sequences[i];
        if (!sequence->generate)
            take_logits(engine, plan, i, row, result, now_ns);
        else if (plan->output_count[i] > 0)
            take_token(engine, sequence, &result->sampled[plan->first_output[i]], count, now_ns);
        row += rows;
    }
    for (uint32_t i = 0; i < engine->step_report_count; i++)
        report_send(engine, &engine->step_reports[i]);
    engine->step_report_count = 0;
}

/* A failed step ends the requests that had rows in it; the engine goes on with the others. */
static void fail_step(struct engine *engine, const struct plan *plan, const struct status *status) {
    log_error("step_failed", LOG_STR("error", status->message), LOG_UINT("rows", plan->batch.rows),
              LOG_UINT("sequences", plan->batch.sequence_count));
    uint32_t count = 0;
    for (uint32_t i = 0; i < plan->batch.sequence_count; i++) {
        uint32_t known = 0;
        while (known < count && engine->failed[known] != plan->sequences[i]->request)
            known++;
        if (known == count)
            engine->failed[count++] = plan->sequences[i]->request;
    }
    char message[600];
    snprintf(message, sizeof(message), "the forward pass failed: %s", status->message);
    for (uint32_t i = 0; i < count; i++)
        fail(engine, engine->failed[i], STATUS_INTERNAL, message);
}

static void publish(struct engine *engine, bool busy, bool stepped) {
    struct scheduler_load load;
    scheduler_get_load(engine->scheduler, &load);
    if (load.preemptions != engine->preemptions)
        log_debug("preempted", LOG_UINT("so_far", load.preemptions), LOG_UINT("running", load.running),
                  LOG_UINT("waiting", load.waiting));
    engine->preemptions = load.preemptions;
    engine_metrics_load(&engine->metrics, &load);
    atomic_store_explicit(&engine->load.running, load.running, memory_order_relaxed);
    atomic_store_explicit(&engine->load.waiting, load.waiting, memory_order_relaxed);
    atomic_store_explicit(&engine->load.kv_blocks_free, load.kv_blocks_free, memory_order_relaxed);
    atomic_store_explicit(&engine->load.waiting_tokens, load.waiting_tokens, memory_order_relaxed);
    if (!busy)
        atomic_store_explicit(&engine->load.busy_since_ns, 0, memory_order_relaxed);
    else if (stepped || atomic_load_explicit(&engine->load.busy_since_ns, memory_order_relaxed) == 0)
        atomic_store_explicit(&engine->load.busy_since_ns, clock_now_ns(), memory_order_relaxed);
}

static void run_step(struct engine *engine, const struct plan *plan) {
    publish(engine, true, false);
    uint64_t now_ns = clock_now_ns();
    for (uint32_t i = 0; i < plan->batch.sequence_count; i++)
        if (plan->sequences[i]->started_ns == 0)
            plan->sequences[i]->started_ns = now_ns;
    struct batch_result result = {0};
    struct status status = {0};
    int failed = engine->executor->ops->step(engine->executor, &plan->batch, &result, &status);
    engine_metrics_step(&engine->metrics, &plan->batch, &result, clock_now_ns() - now_ns);
    if (failed == 0)
        take_results(engine, plan, &result);
    else if (status.code == STATUS_UNAVAILABLE)
        engine->lost = status;
    else
        fail_step(engine, plan, &status);
    publish(engine, true, true);
}

static void *engine_run(void *argument) {
    struct engine *engine = argument;
    bool drained = false;
    while (!engine->stopping) {
        struct plan plan;
        while (receive_command(engine, false))
            ;
        if (engine->stopping)
            break;
        if (engine->lost.code == STATUS_OK && scheduler_plan(engine->scheduler, &plan)) {
            run_step(engine, &plan);
            if (engine->lost.code != STATUS_OK) /* what comes until the link has stopped is taken, and dropped */
                report_send(engine, &(struct report){.lost = &engine->lost});
            continue;
        }
        publish(engine, false, false);
        if (engine->draining && !drained && engine->request_count == 0) {
            report_send(engine, &(struct report){.drained = true});
            drained = true;
        }
        receive_command(engine, true);
    }
    drop(engine, true, 0);
    return NULL;
}

/* ---- the link's side */

static int pair_create(struct engine *engine, void *zmq_context, struct status *status) {
    char endpoint[64];
    const int no_limit = 0; /* commands and reports are bounded by the work the gateways submit */
    snprintf(endpoint, sizeof(endpoint), "inproc://engine-%p", (void *)engine);
    engine->link_socket = zmq_socket(zmq_context, ZMQ_PAIR);
    engine->socket = zmq_socket(zmq_context, ZMQ_PAIR);
    if (!engine->link_socket || !engine->socket ||
        zmq_setsockopt(engine->link_socket, ZMQ_SNDHWM, &no_limit, sizeof(no_limit)) != 0 ||
        zmq_setsockopt(engine->link_socket, ZMQ_RCVHWM, &no_limit, sizeof(no_limit)) != 0 ||
        zmq_setsockopt(engine->socket, ZMQ_SNDHWM, &no_limit, sizeof(no_limit)) != 0 ||
        zmq_setsockopt(engine->socket, ZMQ_RCVHWM, &no_limit, sizeof(no_limit)) != 0 ||
        zmq_bind(engine->link_socket, endpoint) != 0 || zmq_connect(engine->socket, endpoint) != 0)
        return status_set(status, STATUS_INTERNAL, "%s: %s", endpoint, zmq_strerror(zmq_errno()));
    return 0;
}

static void engine_free(struct engine *engine) {
    if (engine->link_socket)
        zmq_close(engine->link_socket);
    if (engine->socket)
        zmq_close(engine->socket);
    scheduler_destroy(engine->scheduler);
    free(engine->step_reports);
    free(engine->failed);
    free(engine->worker_id);
    free(engine);
}

int engine_create(struct executor *executor, void *zmq_context, const char *worker_id, bool prefix_cache,
                  struct engine **out, struct status *status) {
    struct engine *engine = memory_allocate(1, sizeof(*engine));
    engine->executor = executor;
    engine_metrics_init(&engine->metrics);
    engine->worker_id = memory_copy_string(worker_id);
    engine->step_reports = memory_allocate(executor->info.max_sequences, sizeof(*engine->step_reports));
    engine->failed = memory_allocate(executor->info.max_sequences, sizeof(*engine->failed));
    engine->scheduler = scheduler_create(&executor->info, prefix_cache);
    if (!engine->scheduler) {
        engine_free(engine);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the scheduler");
    }
    if (pair_create(engine, zmq_context, status) != 0) {
        engine_free(engine);
        return -1;
    }
    publish(engine, false, false);
    int error = pthread_create(&engine->thread, NULL, engine_run, engine);
    if (error != 0) {
        engine_free(engine);
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "engine thread: %s", strerror(error));
    }
    *out = engine;
    return 0;
}

static void command_send(struct engine *engine, const struct command *command) {
    atomic_fetch_add_explicit(&engine->commands_sent, 1, memory_order_release);
    while (zmq_send(engine->link_socket, command, sizeof(*command), 0) < 0)
        if (zmq_errno() != EINTR) {
            log_error("engine_command_lost", LOG_STR("error", zmq_strerror(zmq_errno())));
            return;
        }
}

void engine_destroy(struct engine *engine) {
    if (!engine)
        return;
    command_send(engine, &(struct command){.type = COMMAND_STOP});
    pthread_join(engine->thread, NULL);
    struct report report;
    while (engine_receive(engine, &report))
        report_clear(&report);
    engine_free(engine);
}

void engine_submit(struct engine *engine, struct request *request) {
    command_send(engine, &(struct command){.type = COMMAND_SUBMIT, .request = request});
}

void engine_apply(struct engine *engine, uint32_t peer, Moed__Worker__V1__ToWorker *message) {
    command_send(engine, &(struct command){.type = COMMAND_APPLY, .peer = peer, .message = message});
}

void engine_drop_peer(struct engine *engine, uint32_t peer) {
    command_send(engine, &(struct command){.type = COMMAND_DROP_PEER, .peer = peer});
}

void engine_drain(struct engine *engine) {
    command_send(engine, &(struct command){.type = COMMAND_DRAIN});
}

void *engine_socket(struct engine *engine) {
    return engine->link_socket;
}

bool engine_receive(struct engine *engine, struct report *report) {
    int size;
    do
        size = zmq_recv(engine->link_socket, report, sizeof(*report), ZMQ_DONTWAIT);
    while (size < 0 && zmq_errno() == EINTR);
    (void)atomic_load_explicit(&engine->reports_sent, memory_order_acquire);
    return size == (int)sizeof(*report);
}

const struct engine_metrics *engine_get_metrics(const struct engine *engine) {
    return &engine->metrics;
}

void engine_get_load(const struct engine *engine, struct engine_load *load) {
    uint64_t busy_since_ns = atomic_load_explicit(&engine->load.busy_since_ns, memory_order_relaxed);
    uint64_t now_ns = clock_now_ns();
    *load = (struct engine_load){
        .running = atomic_load_explicit(&engine->load.running, memory_order_relaxed),
        .waiting = atomic_load_explicit(&engine->load.waiting, memory_order_relaxed),
        .kv_blocks_free = atomic_load_explicit(&engine->load.kv_blocks_free, memory_order_relaxed),
        .waiting_tokens = atomic_load_explicit(&engine->load.waiting_tokens, memory_order_relaxed),
        .generated_tokens = metric_count(&engine->metrics.serving.generated_tokens),
        .last_step_age_ns = busy_since_ns && now_ns > busy_since_ns ? now_ns - busy_since_ns : 0,
    };
}
