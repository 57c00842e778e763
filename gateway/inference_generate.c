#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "gateway/inference_private.h"
#include "gateway/outbox.h"

enum { CREDIT_STEP = OUTBOX_TOKENS / 4 }; /* credit is granted in portions: a message for every token would be waste */

/* A Generate in flight. What follows `outbox` belongs to the call's lock. */
struct generation {
    struct work work; /* first */
    Moed__Worker__V1__GenerateWork message;
    Moed__V1__Sampling sampling;

    uint64_t first_token_ns, last_token_ns, tokens; /* for the metrics, the fleet thread's; 0: none yet */

    struct outbox outbox;
    uint32_t writing; /* tokens in the write in flight */
    uint32_t read;    /* tokens the caller has taken, for which no credit was granted yet */
    bool complete;    /* the worker has ended it; the rest is in the outbox and below */
    bool told;        /* the last message is on its way, or gone */
    Moed__V1__FinishReason finish_reason;
    Moed__V1__Usage usage;
    Moed__V1__Timing timing;
    char worker[sizeof((struct worker *)NULL)->id];
};

/* ---- on the fleet's thread */

static int check_output(const Moed__Worker__V1__SequenceOutput *output, struct status *status) {
    if (output->n_logprobs && output->n_logprobs != output->n_token_ids)
        return status_set(status, STATUS_INTERNAL, "the worker sent %zu logprobs for %zu tokens", output->n_logprobs,
                          output->n_token_ids);
    if (output->finish_reason != MOED__V1__FINISH_REASON__FINISH_REASON_UNSPECIFIED &&
        output->finish_reason != MOED__V1__FINISH_REASON__FINISH_REASON_STOP &&
        output->finish_reason != MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH)
        return status_set(status, STATUS_INTERNAL, "the worker sent the finish_reason %d", (int)output->finish_reason);
    return 0;
}

static void complete(struct generation *generation, const Moed__Worker__V1__SequenceOutput *output,
                     const struct worker *worker) {
    generation->complete = true;
    generation->finish_reason = output->finish_reason;
    if (output->usage) {
        generation->usage.prompt_tokens = output->usage->prompt_tokens;
        generation->usage.cached_tokens = output->usage->cached_tokens;
        generation->usage.completion_tokens = output->usage->completion_tokens;
    }
    if (output->timing) {
        generation->timing.queue_ns = output->timing->queue_ns;
        generation->timing.prefill_ns = output->timing->prefill_ns;
        generation->timing.decode_ns = output->timing->decode_ns;
    }
    snprintf(generation->worker, sizeof generation->worker, "%s", worker->id);
    generation->timing.worker = generation->worker;
}

/* Time ends where a token goes into the outbox: what it waits there, it waits for its reader. */
static void count_tokens(struct generation *generation, uint64_t tokens) {
    struct serving_metrics *metrics = generation->work.inference->metrics;
    uint64_t now_ns = clock_now_ns();
    if (generation->first_token_ns) {
        serving_metrics_next(metrics, now_ns - generation->last_token_ns, tokens);
    } else {
        generation->first_token_ns = now_ns;
        serving_metrics_first(metrics, now_ns - rpc_call_started_ns(generation->work.call),
                              generation->work.request.prompt_tokens, tokens);
    }
    generation->last_token_ns = now_ns;
    generation->tokens += tokens;
}

/* A call that its caller or its deadline ended is an abort; one that failed is none of the three ends. */
static void count_end(const struct generation *generation, enum status_code code) {
    struct serving_metrics *metrics = generation->work.inference->metrics;
    uint64_t total_ns = clock_now_ns() - rpc_call_started_ns(generation->work.call);
    uint64_t prompt_tokens = generation->work.request.prompt_tokens;
    /* The worker's word is taken as far as it can be true. */
    uint64_t queue_ns = generation->timing.queue_ns, cached_tokens = generation->usage.cached_tokens;
    if (code == STATUS_CANCELLED)
        metric_add(&metrics->ended[SERVING_ABORT], 1);
    if (code != STATUS_OK)
        return;
    const struct serving_request request = {
        .end = generation->finish_reason == MOED__V1__FINISH_REASON__FINISH_REASON_STOP ? SERVING_STOP : SERVING_LENGTH,
        .queue_ns = queue_ns < total_ns ? queue_ns : total_ns,
        .decode_ns = generation->last_token_ns - generation->first_token_ns,
        .total_ns = total_ns,
        .tokens = generation->tokens,
    };
    serving_metrics_finish(metrics, &request);
    metric_add(&metrics->prefix_queries, prompt_tokens);
    metric_add(&metrics->prefix_hits, cached_tokens < prompt_tokens ? cached_tokens : prompt_tokens);
}

static int on_output(struct fleet_request *request, Moed__Worker__V1__SequenceOutput *output,
                     const struct worker *worker, struct status *status) {
    struct generation *generation = (struct generation *)WORK_OF(request);
    struct rpc_call *call = generation->work.call;
    if (check_output(output, status))
        return -1;
    if (output->n_token_ids)
        count_tokens(generation, output->n_token_ids);
    rpc_call_lock(call);
    int full = output->n_token_ids > OUTBOX_TOKENS ||
               outbox_push(&generation->outbox, output->token_ids, output->n_logprobs ? output->logprobs : NULL,
                           (uint32_t)output->n_token_ids);
    if (full) {
        rpc_call_unlock(call);
        return status_set(status, STATUS_INTERNAL, "the worker sent %zu tokens without credit", output->n_token_ids);
    }
    output->n_logprobs = 0; /* they have moved to the outbox; the array goes with the message */
    if (output->finish_reason == MOED__V1__FINISH_REASON__FINISH_REASON_UNSPECIFIED) {
        rpc_call_pump_unlock(call);
    } else {
        complete(generation, output, worker);
        rpc_call_unlock(call); /* sent with the status, at the end that follows */
    }
    return 0;
}

static void on_end(struct fleet_request *request, const struct status *status) {
    struct work *work = WORK_OF(request);
    count_end((struct generation *)work, status->code);
    work_leave(work);
    rpc_call_finish(work->call, status);
}

static const struct fleet_request_ops generate_ops = {
    .retain = work_retain, .release = work_release, .output = on_output, .end = on_end};

/* ---- on the poller's thread, or with the call locked */

static void on_message(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    struct inference *inference = rpc_call_context(call);
    struct fleet_limits limits;
    struct status status;
    Moed__V1__GenerateRequest *request = (Moed__V1__GenerateRequest *)inference_decode(
        call, &moed__v1__generate_request__descriptor, bytes, size, &limits);
    if (!request)
        return;
    struct generation *generation = calloc(1, sizeof *generation);
    if (!generation || inference_check_generate(request, &limits, &status)) {
        if (!generation)
            status_set(&status, STATUS_RESOURCE_EXHAUSTED, "no memory for the request");
        free(generation);
        moed__v1__generate_request__free_unpacked(request, NULL);
        rpc_call_finish(call, &status);
        return;
    }
    moed__v1__sampling__init(&generation->sampling);
    moed__v1__usage__init(&generation->usage);
    moed__v1__timing__init(&generation->timing);
    if (request->sampling) {
        generation->sampling = *request->sampling;
        generation->sampling.base.n_unknown_fields = 0;
    }
    if (!generation->sampling.seed)
        generation->sampling.seed = clock_random_u64() | 1;

    Moed__Worker__V1__GenerateWork *message = &generation->message;
    moed__worker__v1__generate_work__init(message);
    message->n_tokens = request->tokens->n_ids;
    message->tokens = request->tokens->ids;
    message->max_tokens = request->max_tokens;
    message->sampling = &generation->sampling;
    message->n_stop_token_ids = request->n_stop_token_ids;
    message->stop_token_ids = request->stop_token_ids;
    message->ignore_eos = request->ignore_eos;
    message->logprobs = request->logprobs;
    message->priority = request->priority;
    message->credit = OUTBOX_TOKENS;

    struct work *work = &generation->work;
    work->inference = inference;
    work->call = call;
    work->decoded = &request->base;
    work->request.ops = &generate_ops;
    work->request.generate = message;
    work->request.prompt_tokens = request->tokens->n_ids;
    work->request.longest_sequence = request->tokens->n_ids;
    rpc_call_set_state(call, generation);
    work_submit(work, request->request_id, &limits);
}

static grpc_byte_buffer *next_message(struct rpc_call *call) {
    struct generation *generation = rpc_call_state(call);
    if (!generation || generation->told || (generation->outbox.count == 0 && !generation->complete))
        return NULL;
    uint32_t ids[OUTBOX_TOKENS];
    Moed__V1__TokenLogprobs *logprobs[OUTBOX_TOKENS];
    Moed__V1__GenerateResponse response = MOED__V1__GENERATE_RESPONSE__INIT;
    uint32_t count = outbox_take(&generation->outbox, ids, logprobs);
    response.n_token_ids = count;
    response.token_ids = ids;
    if (count && logprobs[0]) {
        response.n_logprobs = count;
        response.logprobs = logprobs;
    }
    if (generation->complete) { /* maybe before its status: a write that ends calls here, too */
        generation->told = true;
        generation->timing.total_ns = clock_now_ns() - rpc_call_started_ns(call);
        response.finish_reason = generation->finish_reason;
        response.usage = &generation->usage;
        response.timing = &generation->timing;
    }
    grpc_byte_buffer *message = rpc_pack(&response.base);
    for (uint32_t i = 0; i < response.n_logprobs; i++)
        moed__v1__token_logprobs__free_unpacked(logprobs[i], NULL);
    generation->writing = count;
    return message;
}

static void on_written(struct rpc_call *call) {
    struct generation *generation = rpc_call_state(call);
    generation->read += generation->writing;
    generation->writing = 0;
    if (generation->read < CREDIT_STEP || generation->complete)
        return;
    struct inference *inference = generation->work.inference;
    fleet_credit(inference->ports[rpc_call_poller(call)], &generation->work.request, generation->read);
    generation->read = 0;
}

static void destroy(void *state) {
    struct generation *generation = state;
    outbox_clear(&generation->outbox);
    protobuf_c_message_free_unpacked(generation->work.decoded, NULL);
    free(generation);
}

const struct rpc_handler inference_generate = {
    .message = on_message,
    .next = next_message,
    .written = on_written,
    .closed = work_closed,
    .destroy = destroy,
};
