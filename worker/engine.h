#ifndef MOED_WORKER_ENGINE_H
#define MOED_WORKER_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "worker.pb-c.h"
#include "worker/executor.h"
#include "worker/metrics.h"
#include "worker/request.h"

/*
 * The engine thread owns scheduler, KV cache and executor and runs step after step; it sleeps while nothing can run.
 * All functions here are for one other thread, the link's: they pass messages and share nothing but counters, which any
 * thread may read (engine_get_load, engine_get_metrics). Commands take effect between steps, in the order they were given.
 */
struct engine;

/* What the engine has for a gateway. */
struct report {
    uint32_t peer;                        /* as in the request */
    Moed__Worker__V1__ToGateway *message; /* the receiver's, to be freed with protobuf_c_message_free_unpacked */
    struct forward *forward;              /* an answer to pack into `message`, then to be destroyed; or NULL */
    bool drained; /* no message: engine_drain was called and all work has ended */
    const struct status *lost; /* no message: the device is, and no work goes on; the engine's */
};

/* What heartbeats tell. */
struct engine_load {
    uint32_t running, waiting, kv_blocks_free;
    uint64_t waiting_tokens, generated_tokens;
    uint64_t last_step_age_ns; /* 0: nothing to do */
};

/* The executor stays the caller's and must outlive the engine, which alone uses it meanwhile. `worker_id` stands in
 * Timing. On success *out is to be freed with engine_destroy. */
int engine_create(struct executor *executor, void *zmq_context, const char *worker_id, bool prefix_cache,
                  struct engine **out, struct status *status);
/* Ends all work without a word once the step that is running has ended. */
void engine_destroy(struct engine *engine);

/* The request becomes the engine's. Its id must be new to the peer; if it is not, both requests of that id fail. */
void engine_submit(struct engine *engine, struct request *request);
/* Cancel and Credit messages of a peer, which become the engine's. */
void engine_apply(struct engine *engine, uint32_t peer, Moed__Worker__V1__ToWorker *message);
/* Ends all work of a peer. Reports made before that may still come. */
void engine_drop_peer(struct engine *engine, uint32_t peer);
/* Asks for a report with `drained` once there is no work left. */
void engine_drain(struct engine *engine);

/* The ZeroMQ socket to poll for reports. */
void *engine_socket(struct engine *engine);
/* Takes the next report without waiting. False: there is none. */
bool engine_receive(struct engine *engine, struct report *report);
/* Frees what a report holds. */
void report_clear(struct report *report);

void engine_get_load(const struct engine *engine, struct engine_load *load);
const struct engine_metrics *engine_get_metrics(const struct engine *engine);

#endif
