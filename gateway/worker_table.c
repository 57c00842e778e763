#include "gateway/worker_table.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS_MAX = 256, SHAPE_MAX = 65536 };

struct worker_table {
    struct worker *workers[WORKERS_MAX];
    size_t count;
    struct model_facts model;
    uint64_t generation, placements;
};

struct worker_table *worker_table_create(void) {
    return calloc(1, sizeof(struct worker_table));
}

void worker_table_destroy(struct worker_table *table) {
    if (!table)
        return;
    for (size_t i = 0; i < table->count; i++)
        free(table->workers[i]);
    free(table);
}

static bool alive(const struct worker *worker) {
    return worker->state != MOED__V1__WORKER__STATE__LOST;
}

static bool ready(const struct worker *worker) {
    return worker->state == MOED__V1__WORKER__STATE__READY;
}

static bool state_allowed(Moed__V1__Worker__State state) {
    return state == MOED__V1__WORKER__STATE__LOADING || state == MOED__V1__WORKER__STATE__READY ||
           state == MOED__V1__WORKER__STATE__DRAINING;
}

const char *worker_state_name(Moed__V1__Worker__State state) {
    const ProtobufCEnumValue *value =
        protobuf_c_enum_descriptor_get_value(&moed__v1__worker__state__descriptor, (int)state);
    return value ? value->name : "UNKNOWN";
}

static int check_hello(const Moed__Worker__V1__Hello *hello, struct status *status) {
    const Moed__V1__Model *model = hello->model;
    size_t id_bytes = strlen(hello->worker_id);
    if (id_bytes == 0 || id_bytes >= sizeof((struct worker *)NULL)->id)
        return status_set(status, STATUS_INVALID_ARGUMENT, "worker_id: %zu bytes; 1 to %zu are allowed", id_bytes,
                          sizeof((struct worker *)NULL)->id - 1);
    if (!state_allowed(hello->state))
        return status_set(status, STATUS_INVALID_ARGUMENT, "state: %d; LOADING, READY or DRAINING is allowed",
                          (int)hello->state);
    if (!model)
        return status_set(status, STATUS_INVALID_ARGUMENT, "model: missing");
    size_t fingerprint_bytes = strlen(model->fingerprint);
    if (fingerprint_bytes == 0 || fingerprint_bytes >= sizeof((struct model_facts *)NULL)->fingerprint)
        return status_set(status, STATUS_INVALID_ARGUMENT, "model.fingerprint: %zu bytes; 1 to %zu are allowed",
                          fingerprint_bytes, sizeof((struct model_facts *)NULL)->fingerprint - 1);
    if (model->vocab_size == 0)
        return status_set(status, STATUS_INVALID_ARGUMENT, "model.vocab_size: 0; at least 1 is allowed");
    /* Sizes of answers are computed from these. */
    if (model->block_count > SHAPE_MAX || model->expert_count > SHAPE_MAX ||
        model->expert_used_count > model->expert_count)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "model: %" PRIu32 " blocks, %" PRIu32 " of %" PRIu32
                          " experts; at most %d of each are allowed",
                          model->block_count, model->expert_used_count, model->expert_count, SHAPE_MAX);
    if (hello->context_length == 0 || hello->context_length > model->context_length)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "context_length: %" PRIu32 "; 1 to the model's %" PRIu32 " are allowed",
                          hello->context_length, model->context_length);
    return 0;
}

static void set_model(struct worker_table *table, const Moed__V1__Model *model) {
    struct model_facts *facts = &table->model;
    *facts = (struct model_facts){
        .vocab_size = model->vocab_size,
        .context_length = model->context_length,
        .block_count = model->block_count,
        .embedding_length = model->embedding_length,
        .expert_count = model->expert_count,
        .expert_used_count = model->expert_used_count,
        .eos_token_id = model->eos_token_id,
        .tensor_bytes = model->tensor_bytes,
        .generation = ++table->generation,
    };
    snprintf(facts->name, sizeof facts->name, "%s", model->name);
    snprintf(facts->architecture, sizeof facts->architecture, "%s", model->architecture);
    snprintf(facts->fingerprint, sizeof facts->fingerprint, "%s", model->fingerprint);
}

/* All workers serve one model; when none is left, the next one may bring another. */
static int check_model(struct worker_table *table, const struct worker *self, const Moed__V1__Model *model,
                       struct status *status) {
    const struct worker *other = NULL;
    for (size_t i = 0; i < table->count && !other; i++)
        if (alive(table->workers[i]) && table->workers[i] != self)
            other = table->workers[i];
    if (other && strcmp(model->fingerprint, table->model.fingerprint) != 0)
        return status_set(status, STATUS_FAILED_PRECONDITION,
                          "the model's fingerprint is %s; this gateway serves %s (worker %s has it, for one)",
                          model->fingerprint, table->model.fingerprint, other->id);
    if (!table->model.generation || strcmp(model->fingerprint, table->model.fingerprint) != 0)
        set_model(table, model);
    return 0;
}

static struct worker *find_by_id(struct worker_table *table, const char *id) {
    for (size_t i = 0; i < table->count; i++)
        if (strcmp(table->workers[i]->id, id) == 0)
            return table->workers[i];
    return NULL;
}

/* Room for one more: if need be, that of the worker lost longest. */
static struct worker *add(struct worker_table *table) {
    if (table->count == WORKERS_MAX) {
        struct worker *oldest = NULL;
        for (size_t i = 0; i < table->count; i++)
            if (!alive(table->workers[i]) && (!oldest || table->workers[i]->seen_ns < oldest->seen_ns))
                oldest = table->workers[i];
        if (!oldest)
            return NULL;
        worker_table_remove(table, oldest);
    }
    struct worker *worker = calloc(1, sizeof *worker);
    if (worker)
        table->workers[table->count++] = worker;
    return worker;
}

struct worker *worker_table_hello(struct worker_table *table, const struct wire_identity *peer,
                                  const Moed__Worker__V1__Hello *hello, uint64_t now_ns, bool *back,
                                  struct worker **rival, struct status *status) {
    *rival = NULL;
    *back = false;
    if (check_hello(hello, status))
        return NULL;
    struct worker *worker = find_by_id(table, hello->worker_id);
    if (worker && alive(worker) && worker->incarnation != hello->incarnation) {
        *rival = worker;
        status_set(status, STATUS_ALREADY_EXISTS, "worker_id: \"%s\" is the name of another worker", hello->worker_id);
        return NULL;
    }
    if (check_model(table, worker, hello->model, status))
        return NULL;
    *back = worker && worker->incarnation == hello->incarnation;
    if (!worker && !(worker = add(table))) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "%d workers are connected; more are not taken", WORKERS_MAX);
        return NULL;
    }
    worker->peer = *peer;
    worker->incarnation = hello->incarnation;
    worker->state = hello->state;
    worker->context_length = hello->context_length;
    worker->kv_blocks_total = hello->kv_blocks_total;
    worker->memory_total_bytes = hello->memory_total_bytes;
    worker->seen_ns = now_ns;
    worker->foreign_load = 0;
    worker->beat = (Moed__Worker__V1__Heartbeat)MOED__WORKER__V1__HEARTBEAT__INIT;
    worker->beat.kv_blocks_free = hello->kv_blocks_total;
    snprintf(worker->id, sizeof worker->id, "%s", hello->worker_id);
    snprintf(worker->backend, sizeof worker->backend, "%s", hello->backend);
    snprintf(worker->device, sizeof worker->device, "%s", hello->device);
    return worker;
}

struct worker *worker_table_find(struct worker_table *table, const struct wire_identity *peer) {
    for (size_t i = 0; i < table->count; i++) {
        struct worker *worker = table->workers[i];
        if (alive(worker) && worker->peer.length == peer->length &&
            memcmp(worker->peer.bytes, peer->bytes, peer->length) == 0)
            return worker;
    }
    return NULL;
}

bool worker_beat(struct worker *worker, const Moed__Worker__V1__Heartbeat *beat, uint64_t now_ns) {
    if (!state_allowed(beat->state))
        return false;
    worker->beat = *beat;
    worker->beat.base.n_unknown_fields = 0;
    worker->beat.base.unknown_fields = NULL;
    worker->state = beat->state;
    worker->seen_ns = now_ns;
    uint64_t reported =
        beat->waiting_tokens > UINT64_MAX - beat->running ? UINT64_MAX : beat->waiting_tokens + beat->running;
    worker->foreign_load = reported > worker->own_load ? reported - worker->own_load : 0;
    return true;
}

struct worker *worker_table_place(struct worker_table *table, uint64_t sequence_tokens) {
    struct worker *best = NULL;
    uint64_t best_load = 0;
    for (size_t i = 0; i < table->count; i++) {
        struct worker *worker = table->workers[i];
        if (!ready(worker) || worker->context_length < sequence_tokens)
            continue;
        uint64_t load =
            worker->foreign_load > UINT64_MAX - worker->own_load ? UINT64_MAX : worker->foreign_load + worker->own_load;
        if (!best || load < best_load || (load == best_load && worker->placed_at < best->placed_at)) {
            best = worker;
            best_load = load;
        }
    }
    return best;
}

void worker_placed(struct worker_table *table, struct worker *worker, uint64_t load) {
    worker->own_load += load;
    worker->requests++;
    worker->placed_at = ++table->placements;
}

void worker_lose(struct worker *worker) {
    worker->state = MOED__V1__WORKER__STATE__LOST;
    worker->peer.length = 0;
    worker->foreign_load = 0;
}

void worker_table_remove(struct worker_table *table, struct worker *worker) {
    for (size_t i = 0; i < table->count; i++) {
        if (table->workers[i] != worker)
            continue;
        table->workers[i] = table->workers[--table->count];
        free(worker);
        return;
    }
}

void worker_table_expire(struct worker_table *table, uint64_t since_ns) {
    for (size_t i = table->count; i-- > 0;)
        if (!alive(table->workers[i]) && table->workers[i]->seen_ns < since_ns)
            worker_table_remove(table, table->workers[i]);
}

size_t worker_table_count(const struct worker_table *table) {
    return table->count;
}

struct worker *worker_table_at(struct worker_table *table, size_t index) {
    return table->workers[index];
}

size_t worker_table_ready(const struct worker_table *table) {
    size_t count = 0;
    for (size_t i = 0; i < table->count; i++)
        count += ready(table->workers[i]);
    return count;
}

uint32_t worker_table_context_length(const struct worker_table *table) {
    uint32_t longest = 0;
    for (size_t i = 0; i < table->count; i++)
        if (ready(table->workers[i]) && table->workers[i]->context_length > longest)
            longest = table->workers[i]->context_length;
    return longest;
}

const struct model_facts *worker_table_model(const struct worker_table *table) {
    return &table->model;
}
