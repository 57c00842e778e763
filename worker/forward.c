#include "worker/forward.h"

#include <stdlib.h>

#include "worker/memory.h"

struct forward {
    struct forward_shape shape;
    uint32_t columns; /* values of a row of logits */
    uint32_t *lengths;
    Moed__V1__ForwardResponse response;
    Moed__V1__Timing timing;
};

static uint32_t varint_bytes(uint32_t greatest) {
    uint32_t bytes = 1;
    while (greatest >>= 7)
        bytes++;
    return bytes;
}

static uint32_t logits_columns(const struct forward_shape *shape) {
    return shape->top_logits ? shape->top_logits : shape->vocab_size;
}

uint64_t forward_bytes(const struct forward_shape *shape) {
    uint64_t value_bytes = sizeof(float) + (shape->top_logits ? varint_bytes(shape->vocab_size - 1) : 0);
    uint64_t row_bytes = logits_columns(shape) * value_bytes;
    uint64_t route_bytes = (uint64_t)shape->block_count * shape->expert_used_count *
                           (sizeof(float) + varint_bytes(shape->expert_count - 1));
    uint64_t bytes = 256;
    for (uint32_t i = 0; i < shape->sequence_count; i++) {
        bytes += 64 + (shape->all_positions ? shape->lengths[i] : 1) * row_bytes;
        bytes += shape->routes ? shape->lengths[i] * route_bytes : 0;
    }
    return bytes;
}

static int create_logits(struct forward *forward, Moed__V1__Logits *logits, uint32_t rows) {
    size_t count = (size_t)rows * forward->columns;
    logits->rows = rows;
    logits->values = malloc(count * sizeof(*logits->values));
    if (!logits->values)
        return -1;
    logits->n_values = count;
    if (forward->shape.top_logits == 0)
        return 0;
    logits->ids = malloc(count * sizeof(*logits->ids));
    if (!logits->ids)
        return -1;
    logits->n_ids = count;
    return 0;
}

static int create_routes(struct forward *forward, Moed__V1__ExpertRoutes *routes, uint32_t length) {
    size_t count = (size_t)length * forward->shape.block_count * forward->shape.expert_used_count;
    routes->experts = malloc(count * sizeof(*routes->experts));
    if (!routes->experts)
        return -1;
    routes->n_experts = count;
    routes->weights = malloc(count * sizeof(*routes->weights));
    if (!routes->weights)
        return -1;
    routes->n_weights = count;
    return 0;
}

int forward_create(const struct forward_shape *shape, struct forward **out, struct status *status) {
    struct forward *forward = memory_allocate(1, sizeof(*forward));
    uint32_t count = shape->sequence_count;
    forward->shape = *shape;
    forward->shape.lengths = NULL;
    forward->columns = logits_columns(shape);
    Moed__V1__ForwardResponse *response = &forward->response;
    moed__v1__forward_response__init(response);
    forward->lengths = calloc(count, sizeof(*forward->lengths));
    response->logits = calloc(count, sizeof(*response->logits));
    response->routes = calloc(count, sizeof(*response->routes));
    if (!forward->lengths || !response->logits || !response->routes)
        goto no_memory;
    for (uint32_t i = 0; i < count; i++) {
        forward->lengths[i] = shape->lengths[i];
        response->logits[response->n_logits] = memory_allocate(1, sizeof(**response->logits));
        moed__v1__logits__init(response->logits[response->n_logits++]);
        if (create_logits(forward, response->logits[i], shape->all_positions ? shape->lengths[i] : 1) != 0)
            goto no_memory;
        if (!shape->routes)
            continue;
        response->routes[response->n_routes] = memory_allocate(1, sizeof(**response->routes));
        moed__v1__expert_routes__init(response->routes[response->n_routes++]);
        if (create_routes(forward, response->routes[i], shape->lengths[i]) != 0)
            goto no_memory;
    }
    *out = forward;
    return 0;

no_memory:
    forward_destroy(forward);
    return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no memory for an answer of %llu bytes",
                      (unsigned long long)forward_bytes(shape));
}

void forward_destroy(struct forward *forward) {
    if (!forward)
        return;
    for (size_t i = 0; i < forward->response.n_logits; i++)
        moed__v1__logits__free_unpacked(forward->response.logits[i], NULL);
    for (size_t i = 0; i < forward->response.n_routes; i++)
        moed__v1__expert_routes__free_unpacked(forward->response.routes[i], NULL);
    free(forward->response.logits);
    free(forward->response.routes);
    free(forward->lengths);
    free(forward);
}

/* ---- the greatest of a row: a heap whose root is the least of those kept, then taken apart from the end */

static bool ranks_before(const float *logits, uint32_t a, uint32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
}

static void sift_down(const float *logits, uint32_t *heap, uint32_t count, uint32_t place) {
    uint32_t id = heap[place];
    for (uint32_t child; (child = 2 * place + 1) < count; place = child) {
        if (child + 1 < count && ranks_before(logits, heap[child], heap[child + 1]))
            child++;
        if (ranks_before(logits, heap[child], id))
            break;
        heap[place] = heap[child];
    }
    heap[place] = id;
}

/* ids[0 .. count) become those of the greatest logits, in falling order, ties by the lower id. */
static void select_top(const float *logits, uint32_t vocab_size, uint32_t count, uint32_t *ids) {
    for (uint32_t i = 0; i < count; i++)
        ids[i] = i;
    for (uint32_t i = count / 2; i-- > 0;)
        sift_down(logits, ids, count, i);
    for (uint32_t id = count; id < vocab_size; id++)
        if (logits[id] > logits[ids[0]]) {
            ids[0] = id;
            sift_down(logits, ids, count, 0);
        }
    for (uint32_t left = count; left-- > 1;) {
        uint32_t least = ids[0];
        ids[0] = ids[left];
        ids[left] = least;
        sift_down(logits, ids, left, 0);
    }
}

void forward_take_logits(struct forward *forward, uint32_t sequence, uint32_t position, const float *logits) {
    Moed__V1__Logits *answer = forward->response.logits[sequence];
    size_t offset = forward->shape.all_positions ? (size_t)position * forward->columns : 0;
    float *values = answer->values + offset;
    if (forward->shape.top_logits == 0) {
        for (uint32_t i = 0; i < forward->columns; i++)
            values[i] = logits[i];
        return;
    }
    uint32_t *ids = answer->ids + offset;
    select_top(logits, forward->shape.vocab_size, forward->columns, ids);
    for (uint32_t i = 0; i < forward->columns; i++)
        values[i] = logits[ids[i]];
}

void forward_take_routes(struct forward *forward, uint32_t sequence, uint32_t position, uint32_t rows,
                         const uint32_t *experts, const float *weights) {
    Moed__V1__ExpertRoutes *answer = forward->response.routes[sequence];
    uint32_t layers = forward->shape.block_count, used = forward->shape.expert_used_count;
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t layer = 0; layer < layers; layer++) {
            size_t from = ((size_t)row * layers + layer) * used;
            size_t to = ((size_t)layer * forward->lengths[sequence] + position + row) * used;
            for (uint32_t i = 0; i < used; i++) {
                answer->experts[to + i] = experts[from + i];
                answer->weights[to + i] = weights[from + i];
            }
        }
}

size_t forward_route_width(const struct forward *forward) {
    return (size_t)forward->shape.block_count * forward->shape.expert_used_count;
}

void forward_set_timing(struct forward *forward, const Moed__V1__Timing *timing) {
    forward->timing = *timing;
    forward->response.timing = &forward->timing;
}

int forward_pack(const struct forward *forward, ProtobufCBinaryData *out) {
    size_t size = moed__v1__forward_response__get_packed_size(&forward->response);
    out->data = malloc(size);
    if (!out->data)
        return -1;
    out->len = moed__v1__forward_response__pack(&forward->response, out->data);
    return 0;
}
