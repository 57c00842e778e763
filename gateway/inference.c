#include "gateway/inference.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/wire.h"
#include "gateway/inference_private.h"

int inference_create(const struct inference_options *options, struct inference **out, struct status *status) {
    struct inference *inference = calloc(1, sizeof *inference + options->pollers * sizeof *inference->ports);
    *out = NULL;
    if (!inference)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for the service");
    inference->admission = options->admission;
    inference->fleet = options->fleet;
    inference->metrics = options->metrics;
    inference->max_message_size = options->max_message_size;
    for (; inference->pollers < options->pollers; inference->pollers++) {
        inference->ports[inference->pollers] = fleet_port_open(options->fleet, status);
        if (!inference->ports[inference->pollers]) {
            inference_destroy(inference);
            return -1;
        }
    }
    *out = inference;
    return 0;
}

void inference_destroy(struct inference *inference) {
    if (!inference)
        return;
    for (unsigned p = 0; p < inference->pollers; p++)
        fleet_port_close(inference->ports[p]);
    free(inference);
}

static struct fleet_port *port_of(const struct rpc_call *call) {
    struct inference *inference = rpc_call_context(call);
    return inference->ports[rpc_call_poller(call)];
}

/* ---- what Generate and Forward share */

static void refuse(struct rpc_call *call, enum status_code code, const char *message) {
    struct status status;
    status_set(&status, code, "%s", message);
    rpc_call_finish(call, &status);
}

ProtobufCMessage *inference_decode(struct rpc_call *call, const ProtobufCMessageDescriptor *descriptor,
                                   const uint8_t *bytes, size_t size, struct fleet_limits *limits) {
    struct inference *inference = rpc_call_context(call);
    *limits = fleet_get_limits(inference->fleet);
    if (!limits->ready) {
        refuse(call, STATUS_UNAVAILABLE,
               admission_draining(inference->admission) ? "the gateway is shutting down" : "no worker is ready");
        return NULL;
    }
    ProtobufCMessage *decoded;
    struct status status;
    if (wire_unpack(bytes, size, descriptor, &decoded, &status))
        rpc_call_finish(call, &status);
    return decoded;
}

void work_submit(struct work *work, const char *request_id, const struct fleet_limits *limits) {
    struct status status;
    if (request_id[0])
        snprintf(work->request_id, sizeof work->request_id, "%s", request_id);
    else
        snprintf(work->request_id, sizeof work->request_id, "moed-%016" PRIx64, clock_random_u64());
    work->request.request_id = work->request_id;
    work->request.model_generation = limits->generation;
    if (admission_enter(work->inference->admission, work->request.prompt_tokens, &status))
        rpc_call_finish(work->call, &status);
    else
        fleet_submit(port_of(work->call), &work->request);
}

void work_leave(struct work *work) {
    admission_leave(work->inference->admission, work->request.prompt_tokens);
}

void work_retain(struct fleet_request *request) {
    rpc_call_ref(WORK_OF(request)->call);
}

void work_release(struct fleet_request *request) {
    rpc_call_unref(WORK_OF(request)->call);
}

void work_closed(struct rpc_call *call, bool cancelled) {
    struct work *work = rpc_call_state(call);
    if (work && cancelled)
        fleet_cancel(port_of(call), &work->request);
}

/* ---- GetModel and ListWorkers */

struct inspection {
    struct fleet_query query;
    struct rpc_call *call;
};

static void inspect(struct rpc_call *call,
                    void (*answer)(struct fleet_query *query, struct worker_table *workers, uint64_t now_ns)) {
    struct inspection *inspection = calloc(1, sizeof *inspection);
    if (!inspection) {
        rpc_call_reply(call, NULL);
        return;
    }
    inspection->query.answer = answer;
    inspection->call = call;
    rpc_call_ref(call);
    fleet_ask(port_of(call), &inspection->query);
}

/* The query is the inspection's first member. */
static struct rpc_call *end_inspection(struct fleet_query *query) {
    struct inspection *inspection = (struct inspection *)query;
    struct rpc_call *call = inspection->call;
    free(inspection);
    return call;
}

static void answer_model(struct fleet_query *query, struct worker_table *workers, uint64_t now_ns) {
    struct rpc_call *call = end_inspection(query);
    const struct model_facts *facts = worker_table_model(workers);
    if (!facts->generation) {
        refuse(call, STATUS_UNAVAILABLE, "no worker has brought a model yet");
    } else {
        Moed__V1__Model model = MOED__V1__MODEL__INIT;
        model.name = (char *)facts->name;
        model.architecture = (char *)facts->architecture;
        model.fingerprint = (char *)facts->fingerprint;
        model.vocab_size = facts->vocab_size;
        model.context_length = facts->context_length;
        model.block_count = facts->block_count;
        model.embedding_length = facts->embedding_length;
        model.expert_count = facts->expert_count;
        model.expert_used_count = facts->expert_used_count;
        model.tensor_bytes = facts->tensor_bytes;
        model.eos_token_id = facts->eos_token_id;
        rpc_call_reply(call, rpc_pack(&model.base));
    }
    rpc_call_unref(call);
}

static void describe_worker(struct worker *worker, uint64_t now_ns, Moed__V1__Worker *out) {
    const Moed__Worker__V1__Heartbeat *beat = &worker->beat;
    *out = (Moed__V1__Worker)MOED__V1__WORKER__INIT;
    out->id = worker->id;
    out->backend = worker->backend;
    out->device = worker->device;
    out->state = worker->state;
    out->running = beat->running;
    out->waiting = beat->waiting;
    out->kv_blocks_total = worker->kv_blocks_total;
    out->kv_blocks_free = beat->kv_blocks_free;
    out->memory_used_bytes = beat->memory_used_bytes;
    out->memory_total_bytes = worker->memory_total_bytes;
    out->generated_tokens = beat->generated_tokens;
    /* A step that was under way at the last beat has grown older since. */
    if (beat->last_step_age_ns)
        out->last_step_age_ns = beat->last_step_age_ns + (now_ns - worker->seen_ns);
}

static void answer_workers(struct fleet_query *query, struct worker_table *workers, uint64_t now_ns) {
    struct rpc_call *call = end_inspection(query);
    size_t count = worker_table_count(workers);
    Moed__V1__Worker *descriptions = calloc(count + 1, sizeof *descriptions);
    Moed__V1__Worker **pointers = calloc(count + 1, sizeof *pointers);
    if (descriptions && pointers) {
        Moed__V1__ListWorkersResponse response = MOED__V1__LIST_WORKERS_RESPONSE__INIT;
        for (size_t i = 0; i < count; i++) {
            describe_worker(worker_table_at(workers, i), now_ns, &descriptions[i]);
            pointers[i] = &descriptions[i];
        }
        response.n_workers = count;
        response.workers = pointers;
        rpc_call_reply(call, rpc_pack(&response.base));
    } else {
        rpc_call_reply(call, NULL);
    }
    free(descriptions);
    free(pointers);
    rpc_call_unref(call);
}

static void get_model(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    inspect(call, answer_model);
}

static void list_workers(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    inspect(call, answer_workers);
}

const struct rpc_handler inference_get_model = {.message = get_model};
const struct rpc_handler inference_list_workers = {.message = list_workers};
