#include "gateway/health.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_status;

enum {
    UNKNOWN_SERVICE = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN,
    SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING,
    NOT_SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING,
};

enum service { SERVICE_GATEWAY, SERVICE_INFERENCE, SERVICE_UNKNOWN };

struct watch {
    struct rpc_call *call; /* held */
    struct watch *next, **link;
    enum service service;
    int last_sent; /* -1: nothing yet; the call's lock */
};

struct health {
    atomic_bool ready, draining;
    pthread_mutex_t lock; /* of the list; taken before a call's lock */
    struct watch *watches;
};

struct health *health_create(void) {
    struct health *health = calloc(1, sizeof *health);
    if (health)
        pthread_mutex_init(&health->lock, NULL);
    return health;
}

void health_destroy(struct health *health) {
    if (!health)
        return;
    pthread_mutex_destroy(&health->lock);
    free(health);
}

static int status_of(const struct health *health, enum service service) {
    switch (service) {
    case SERVICE_GATEWAY:
        return SERVING;
    case SERVICE_INFERENCE:
        return atomic_load(&health->ready) && !atomic_load(&health->draining) ? SERVING : NOT_SERVING;
    default:
        return UNKNOWN_SERVICE;
    }
}

static grpc_byte_buffer *pack_status(int status) {
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = (serving_status)status;
    return rpc_pack(&response.base);
}

/* Which service is asked for. -1: the call has been answered. */
static int decode(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    Grpc__Health__V1__HealthCheckRequest *request = grpc__health__v1__health_check_request__unpack(NULL, size, bytes);
    if (!request) {
        struct status status;
        status_set(&status, STATUS_INVALID_ARGUMENT, "%zu bytes are no grpc.health.v1.HealthCheckRequest", size);
        rpc_call_finish(call, &status);
        return -1;
    }
    enum service service = request->service[0] == '\0'                          ? SERVICE_GATEWAY
                           : strcmp(request->service, "moed.v1.Inference") == 0 ? SERVICE_INFERENCE
                                                                                : SERVICE_UNKNOWN;
    grpc__health__v1__health_check_request__free_unpacked(request, NULL);
    return (int)service;
}

static void check(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    struct status status;
    int service = decode(call, bytes, size);
    if (service < 0)
        return;
    if (service != SERVICE_UNKNOWN) {
        rpc_call_reply(call, pack_status(status_of(rpc_call_context(call), (enum service)service)));
        return;
    }
    status_set(&status, STATUS_NOT_FOUND, "service: unknown; \"\" or \"moed.v1.Inference\" is allowed");
    rpc_call_finish(call, &status);
}

static void pump(struct rpc_call *call) {
    rpc_call_lock(call);
    rpc_call_pump_unlock(call);
}

/* The end of a watch: what is new goes out before the status. */
static void end_watch(struct rpc_call *call) {
    static const struct status draining = {STATUS_UNAVAILABLE, "the gateway is shutting down"};
    rpc_call_finish(call, &draining);
}

static void watch(struct rpc_call *call, const uint8_t *bytes, size_t size) {
    struct health *health = rpc_call_context(call);
    int service = decode(call, bytes, size);
    if (service < 0)
        return;
    struct watch *self = calloc(1, sizeof *self);
    if (!self) {
        rpc_call_reply(call, NULL);
        return;
    }
    self->call = call;
    self->service = (enum service)service;
    self->last_sent = -1;
    rpc_call_set_state(call, self);
    rpc_call_ref(call);
    pthread_mutex_lock(&health->lock);
    self->next = health->watches;
    self->link = &health->watches;
    health->watches = self;
    if (self->next)
        self->next->link = &self->next;
    pthread_mutex_unlock(&health->lock);
    if (atomic_load(&health->draining))
        end_watch(call);
    else
        pump(call);
}

/* Only what is new: a status that came and went while a write was under way is not worth a message. */
static grpc_byte_buffer *next_status(struct rpc_call *call) {
    struct watch *self = rpc_call_state(call);
    if (!self)
        return NULL;
    int status = status_of(rpc_call_context(call), self->service);
    if (status == self->last_sent)
        return NULL;
    self->last_sent = status;
    return pack_status(status);
}

static void closed(struct rpc_call *call, bool cancelled) {
    struct health *health = rpc_call_context(call);
    struct watch *self = rpc_call_state(call);
    if (!self)
        return;
    pthread_mutex_lock(&health->lock);
    *self->link = self->next;
    if (self->next)
        self->next->link = self->link;
    pthread_mutex_unlock(&health->lock);
    rpc_call_unref(call);
}

static void tell_all(struct health *health, void (*tell)(struct rpc_call *call)) {
    pthread_mutex_lock(&health->lock);
    for (struct watch *self = health->watches; self; self = self->next)
        tell(self->call);
    pthread_mutex_unlock(&health->lock);
}

void health_set_ready(struct health *health, bool ready) {
    atomic_store(&health->ready, ready);
    tell_all(health, pump);
}

void health_drain(struct health *health) {
    atomic_store(&health->draining, true);
    tell_all(health, end_watch);
}

const struct rpc_handler health_check = {.message = check};
const struct rpc_handler health_watch = {.message = watch, .next = next_status, .closed = closed, .destroy = free};
