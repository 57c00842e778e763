#ifndef MOED_TESTS_INTEGRATION_SERVICE_H
#define MOED_TESTS_INTEGRATION_SERVICE_H

#include "client/methods.h"
#include "client/rpc.h"
#include "moed.pb-c.h"
#include "tests/integration/harness.h"

/* A gateway with its workers, and calls to it. */

#define WORKER_ENDPOINT "ipc://workers.sock"
#define MODEL_FILE "model.gguf"

struct service {
    struct process *gateway;
    char address[64]; /* "127.0.0.1:PORT", a port the kernel chose */
    struct rpc_channel *channel;
    struct rpc_queue *queue;
};

/* Writes a small model (2 layers, 512 tokens) with its weights drawn from `seed`. */
void model_write(const char *path, unsigned seed, unsigned context);

/* Starts a gateway whose workers connect to the endpoint, and connects to it. */
void service_start(struct service *service, const char *worker_endpoint);
/* The same with more arguments, NULL-terminated; may be NULL. */
void service_start_with(struct service *service, const char *worker_endpoint, const char *const *extra);
/* Frees what it holds here; the processes are the harness's. */
void service_close(struct service *service);
/* Starts a worker of MODEL_FILE at WORKER_ENDPOINT. `extra`: more arguments, NULL-terminated; may be NULL. */
struct process *worker_start(const char *id, const char *const *extra);
/* Waits until as many workers are ready, and no more. */
void service_wait_workers(struct service *service, size_t ready);
/* Waits until no worker runs anything or has a KV block in use. */
void service_wait_idle(struct service *service);

/* What a cmocka group set-up and tear-down do where tests start their own processes: the harness, and MODEL_FILE. */
int model_setup(void **state, unsigned context);
int model_teardown(void **state);
/* cmocka group set-up and tear-down with a model (context of 256), a gateway and one worker "w0"; *state is the struct
 * service. */
int service_setup(void **state);
int service_teardown(void **state);

/* A unary call. A response (rpc_message_free) for STATUS_OK, else NULL and its status. */
ProtobufCMessage *service_call(struct service *service, const struct rpc_method *method,
                               const ProtobufCMessage *request, struct status *status);
Moed__V1__ListWorkersResponse *service_workers(struct service *service);

/* ---- Generate */

struct generation {
    uint32_t *tokens;
    Moed__V1__TokenLogprobs **logprobs; /* [count] where asked for */
    size_t count, messages;
    struct rpc_call *call; /* NULL: ended, with: */
    struct status status;
    Moed__V1__GenerateResponse *last; /* the last message */
    Moed__V1__GenerateResponse **held; /* [messages]: what the others point into */
};

/* A request over the caller's tokens; it points into itself, so it is not to be copied. */
struct prompt {
    Moed__V1__GenerateRequest request;
    Moed__V1__Tokens tokens;
    Moed__V1__Sampling sampling;
};
void prompt_init(struct prompt *prompt, uint32_t *ids, size_t count, uint32_t max_tokens);

/* generation_free when it has ended. */
void generation_start(struct service *service, struct generation *generation, const struct prompt *prompt,
                      uint64_t timeout_ns);
/* Takes the next event of any of the service's generations; false: none within the time. */
bool generation_next(struct service *service, uint64_t timeout_ns);
/* Until this one has at least `count` tokens, or has ended. */
void generation_wait(struct service *service, struct generation *generation, size_t count);
void generation_finish(struct service *service, struct generation *generation);
void generation_free(struct generation *generation);
/* From start to an end with STATUS_OK. */
void generation_run(struct service *service, struct generation *generation, const struct prompt *prompt);
void assert_same_generation(const struct generation *a, const struct generation *b);

/* ---- Forward */

struct sequences {
    Moed__V1__ForwardRequest request;
    Moed__V1__Tokens tokens[160], *pointers[160];
};
/* A request over one sequence; sequences_add adds more. Points into itself, too. */
void sequences_init(struct sequences *sequences, uint32_t *ids, size_t count);
void sequences_add(struct sequences *sequences, uint32_t *ids, size_t count);
/* A response to rpc_message_free; the call must succeed. */
Moed__V1__ForwardResponse *forward_run(struct service *service, const struct sequences *sequences);

#endif
