#ifndef MOED_WORKER_OUTPUT_H
#define MOED_WORKER_OUTPUT_H

#include "common/status.h"
#include "worker.pb-c.h"
#include "worker/request.h"
#include "worker/sampler.h"

/* Messages to the gateway about work; all are to be freed with protobuf_c_message_free_unpacked. */

Moed__Worker__V1__ToGateway *output_failure(uint64_t id, enum status_code code, const char *message);

/* A ForwardOutput whose response is still empty. */
Moed__Worker__V1__ToGateway *output_forward(uint64_t id);

/* A StepOutput with room for `capacity` sequences. */
Moed__Worker__V1__ToGateway *output_step(size_t capacity);

/* Adds what a sequence sampled in the step. */
Moed__Worker__V1__SequenceOutput *output_add(Moed__Worker__V1__ToGateway *step, const struct sequence *sequence,
                                             const struct sampled *sampled);

/* Makes it the last output of its sequence: why it ended, usage and timing. */
void output_finish(Moed__Worker__V1__SequenceOutput *output, const struct sequence *sequence, enum sequence_end end,
                   uint64_t now_ns, const char *worker_id);

/* The times of a request that has ended; `worker_id` is borrowed. */
void output_timing(Moed__V1__Timing *timing, const struct request *request, uint64_t now_ns, char *worker_id);

#endif
