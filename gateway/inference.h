#ifndef MOED_GATEWAY_INFERENCE_H
#define MOED_GATEWAY_INFERENCE_H

#include "common/metrics_serving.h"
#include "common/status.h"
#include "gateway/admission.h"
#include "gateway/fleet.h"
#include "gateway/rpc_call.h"

/* The service moed.v1.Inference: checks requests, makes work of them, and answers of what the workers say. */
struct inference;

struct inference_options {
    struct admission *admission; /* these three outlive the service */
    struct fleet *fleet;
    struct serving_metrics *metrics; /* added to on the fleet's thread */
    unsigned pollers;
    uint64_t max_message_size;
};

int inference_create(const struct inference_options *options, struct inference **out, struct status *status);
/* After the server and the fleet have stopped. NULL-safe. */
void inference_destroy(struct inference *inference);

/* Handlers; their context is a struct inference. */
extern const struct rpc_handler inference_generate, inference_forward, inference_get_model, inference_list_workers;

#endif
