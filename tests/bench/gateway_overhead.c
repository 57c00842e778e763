/*
 * What the gateway costs: the latency it adds to a first token while streams are open, processor time per token and per
 * request, and memory. The gateway is a process of its own; the worker is a thread here that speaks the wire protocol
 * and answers at once, and the callers are here too, so that one clock times both ends. The added latency is what
 * passes between the start of a call and its first token, less what the worker had the request for. It contains the
 * client's own share.
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include "client/rpc.h"
#include "common/clock.h"
#include "common/options.h"
#include "common/wire.h"
#include "moed.pb-c.h"
#include "worker.pb-c.h"

enum { VOCAB = 151936, PROMPT = 128, STREAMS_MAX = 1024, PROBE = 1 /* max_tokens, by which the worker knows it */ };

static const struct rpc_method generate_method = {"/moed.v1.Inference/Generate",
                                                  &moed__v1__generate_response__descriptor};

/* ---- the worker */

struct sequence {
    uint64_t id;
    uint32_t credit;
};

struct worker {
    void *context;
    const char *endpoint;
    uint64_t step_ns;
    atomic_bool stop;
    _Atomic uint64_t held_ns; /* for how long it had the last probe */
    pthread_t thread;
    void *dealer;
    struct sequence sequences[STREAMS_MAX];
    size_t count;
};

static void send_body(struct worker *worker, Moed__Worker__V1__ToGateway *message) {
    struct status status;
    wire_send(worker->dealer, NULL, &message->base, &status);
}

#define SEND(worker, kind, field, value)                                                                               \
    send_body((worker), &(Moed__Worker__V1__ToGateway){                                                                \
                            PROTOBUF_C_MESSAGE_INIT(&moed__worker__v1__to_gateway__descriptor),                        \
                            .body_case = MOED__WORKER__V1__TO_GATEWAY__BODY_##kind, .field = (value)})

static void say_hello(struct worker *worker) {
    Moed__V1__Model model = MOED__V1__MODEL__INIT;
    Moed__Worker__V1__Hello hello = MOED__WORKER__V1__HELLO__INIT;
    model.fingerprint = "0123456789abcdef";
    model.vocab_size = VOCAB;
    model.context_length = hello.context_length = 40960;
    hello.worker_id = "bench";
    hello.model = &model;
    hello.state = MOED__V1__WORKER__STATE__READY;
    SEND(worker, HELLO, hello, &hello);
}

/* One token of each of these sequences; reason 0: they go on. */
static void send_step(struct worker *worker, const uint64_t *ids, size_t count, Moed__V1__FinishReason reason) {
    static Moed__Worker__V1__SequenceOutput outputs[STREAMS_MAX], *pointers[STREAMS_MAX];
    uint32_t token = 42;
    Moed__Worker__V1__StepOutput step = MOED__WORKER__V1__STEP_OUTPUT__INIT;
    for (size_t i = 0; i < count; i++) {
        moed__worker__v1__sequence_output__init(&outputs[i]);
        outputs[i].id = ids[i];
        outputs[i].n_token_ids = 1;
        outputs[i].token_ids = &token;
        outputs[i].finish_reason = reason;
        pointers[i] = &outputs[i];
    }
    step.n_outputs = count;
    step.outputs = pointers;
    if (count)
        SEND(worker, STEP_OUTPUT, step_output, &step);
}

static struct sequence *find(struct worker *worker, uint64_t id) {
    for (size_t i = 0; i < worker->count; i++)
        if (worker->sequences[i].id == id)
            return &worker->sequences[i];
    return NULL;
}

static void take_message(struct worker *worker, const Moed__Worker__V1__ToWorker *message, uint64_t received_ns) {
    struct sequence *sequence;
    switch (message->body_case) {
    case MOED__WORKER__V1__TO_WORKER__BODY_GENERATE:
        if (message->generate->max_tokens == PROBE) {
            atomic_store(&worker->held_ns, clock_now_ns() - received_ns);
            send_step(worker, &message->generate->id, 1, MOED__V1__FINISH_REASON__FINISH_REASON_LENGTH);
        } else if (worker->count < STREAMS_MAX) {
            worker->sequences[worker->count++] = (struct sequence){message->generate->id, message->generate->credit};
        }
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_CREDIT:
        for (size_t i = 0; i < message->credit->n_ids; i++)
            if ((sequence = find(worker, message->credit->ids[i])))
                sequence->credit += message->credit->tokens[i];
        break;
    case MOED__WORKER__V1__TO_WORKER__BODY_CANCEL:
        for (size_t i = 0; i < message->cancel->n_ids; i++)
            if ((sequence = find(worker, message->cancel->ids[i])))
                *sequence = worker->sequences[--worker->count];
        break;
    default:
        break;
    }
}

static void run_step(struct worker *worker) {
    uint64_t ids[STREAMS_MAX];
    size_t count = 0;
    for (size_t i = 0; i < worker->count; i++) {
        if (!worker->sequences[i].credit)
            continue;
        worker->sequences[i].credit--;
        ids[count++] = worker->sequences[i].id;
    }
    send_step(worker, ids, count, MOED__V1__FINISH_REASON__FINISH_REASON_UNSPECIFIED);
}

static void *run_worker(void *argument) {
    struct worker *worker = argument;
    Moed__Worker__V1__Heartbeat beat = MOED__WORKER__V1__HEARTBEAT__INIT;
    const int linger = 0;
    beat.state = MOED__V1__WORKER__STATE__READY;
    worker->dealer = zmq_socket(worker->context, ZMQ_DEALER);
    zmq_setsockopt(worker->dealer, ZMQ_LINGER, &linger, sizeof linger);
    zmq_connect(worker->dealer, worker->endpoint);
    say_hello(worker);
    uint64_t next_step = clock_now_ns(), next_beat = next_step;
    while (!atomic_load(&worker->stop)) {
        uint64_t now = clock_now_ns();
        if (now >= next_step) {
            next_step += worker->step_ns;
            run_step(worker);
        }
        if (now >= next_beat) {
            next_beat += UINT64_C(1000000000);
            SEND(worker, HEARTBEAT, heartbeat, &beat);
        }
        zmq_pollitem_t item = {.socket = worker->dealer, .events = ZMQ_POLLIN};
        zmq_poll(&item, 1, now < next_step ? (long)((next_step - now) / 1000000 + 1) : 0);
        ProtobufCMessage *message;
        struct status status;
        uint64_t received = clock_now_ns();
        while (wire_receive(worker->dealer, NULL, &moed__worker__v1__to_worker__descriptor, &message, &status) ==
               WIRE_OK) {
            take_message(worker, (Moed__Worker__V1__ToWorker *)message, received);
            protobuf_c_message_free_unpacked(message, NULL);
            received = clock_now_ns();
        }
    }
    zmq_close(worker->dealer);
    return NULL;
}

/* ---- the gateway */

struct gateway {
    pid_t process;
    FILE *log;
    char address[64];
};

/* Reads the log up to an event; `value` becomes what stands behind it. */
static int wait_event(struct gateway *gateway, const char *event, char *value, size_t size) {
    char line[512] = "its log is empty\n";
    while (fgets(line, sizeof line, gateway->log)) {
        char *found = strstr(line, event);
        if (found) {
            snprintf(value, size, "%.*s", (int)strcspn(found + strlen(event), " \n"), found + strlen(event));
            return 0;
        }
    }
    fprintf(stderr, "gateway_overhead: the gateway ended: %s", line);
    return -1;
}

static int start_gateway(const char *program, const char *endpoint, struct gateway *out) {
    int pipe_ends[2];
    if (pipe(pipe_ends))
        return -1;
    out->process = fork();
    if (out->process == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(pipe_ends[1], STDERR_FILENO);
        close(pipe_ends[0]);
        close(pipe_ends[1]);
        execl(program, program, "--listen", "127.0.0.1:0", "--worker-endpoint", endpoint, (char *)NULL);
        fprintf(stderr, "%s: %s\n", program, strerror(errno));
        _exit(127);
    }
    close(pipe_ends[1]);
    out->log = fdopen(pipe_ends[0], "r");
    return out->log ? wait_event(out, "listening address=", out->address, sizeof out->address) : -1;
}

static double cpu_seconds(pid_t process) {
    char path[64], text[1024];
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)process);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    const char *rest = strrchr(text, ')'); /* the name before it may hold anything */
    if (rest)
        sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static double resident_mib(pid_t process) {
    char path[64];
    unsigned long pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)process);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    if (fscanf(file, "%*u %lu", &pages) != 1)
        pages = 0;
    fclose(file);
    return (double)pages * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
}

/* ---- the callers */

struct bench {
    struct rpc_channel *channel;
    struct rpc_queue *queue;
    struct worker *worker;
    uint32_t prompt[PROMPT];
    uint64_t tokens; /* streamed so far */
};

static void start_call(struct bench *bench, uint32_t max_tokens, void *user) {
    Moed__V1__Tokens tokens = MOED__V1__TOKENS__INIT;
    Moed__V1__GenerateRequest request = MOED__V1__GENERATE_REQUEST__INIT;
    const struct rpc_options options = {.timeout_ns = RPC_FOREVER, .wait_for_ready = true, .user = user};
    tokens.ids = bench->prompt;
    tokens.n_ids = PROMPT;
    request.tokens = &tokens;
    request.max_tokens = max_tokens;
    rpc_call_start(bench->channel, bench->queue, &generate_method, &request.base, &options);
}

/* Takes one event; its user, and its time in *now. *ended tells the end of a call from a message. */
static void *take_event(struct bench *bench, uint64_t timeout_ns, bool *ended, uint64_t *now) {
    struct rpc_event event;
    rpc_queue_next(bench->queue, timeout_ns, &event);
    *now = clock_now_ns();
    *ended = event.type == RPC_END;
    if (event.type == RPC_TIMEOUT)
        return NULL;
    if (event.type == RPC_MESSAGE) {
        bench->tokens += ((Moed__V1__GenerateResponse *)event.message)->n_token_ids;
        rpc_message_free(event.message);
    } else if (event.status.code != STATUS_OK) {
        fprintf(stderr, "gateway_overhead: a call ended with %s: %s\n", status_code_name(event.status.code),
                event.status.message);
        exit(EXIT_FAILURE);
    }
    return event.user;
}

/* Waits so long while the streams run. */
static void run_streams(struct bench *bench, uint64_t duration_ns) {
    uint64_t now = clock_now_ns(), end = now + duration_ns;
    bool ended;
    while (now < end)
        take_event(bench, end - now, &ended, &now);
}

/* One request after the other, each of one token; fills added_us[count]. */
static void run_probes(struct bench *bench, double *added_us, size_t count) {
    static char probe; /* its address tells the probe's events from the streams' */
    for (size_t i = 0; i < count; i++) {
        uint64_t start = clock_now_ns(), first = 0, now;
        bool ended = false;
        start_call(bench, PROBE, &probe);
        for (;;) {
            void *user = take_event(bench, RPC_FOREVER, &ended, &now);
            if (user == &probe && !ended && !first)
                first = now;
            if (user == &probe && ended)
                break;
        }
        added_us[i] = (double)(first - start - atomic_load(&bench->worker->held_ns)) / 1e3;
    }
}

static int compare(const void *a, const void *b) {
    double difference = *(const double *)a - *(const double *)b;
    return (difference > 0) - (difference < 0);
}

/* ---- figures */

struct figures {
    uint64_t streams;
    double tokens_per_second, cpu_us_per_token, cpu_us_per_request;
    double idle_p50_us, idle_p99_us, open_p50_us, open_p99_us;
    double resident_idle_mib, resident_open_mib;
};

static void probe_latency(struct bench *bench, size_t probes, double *p50, double *p99) {
    double *added_us = calloc(probes, sizeof *added_us);
    if (!added_us)
        exit(EXIT_FAILURE);
    run_probes(bench, added_us, probes);
    qsort(added_us, probes, sizeof *added_us, compare);
    *p50 = added_us[probes / 2];
    *p99 = added_us[probes * 99 / 100];
    free(added_us);
}

static void measure(struct bench *bench, const struct gateway *gateway, size_t probes, uint64_t seconds,
                    struct figures *out) {
    double warm_up, cpu = 0;
    probe_latency(bench, 100, &warm_up, &warm_up);
    out->resident_idle_mib = resident_mib(gateway->process);
    cpu = cpu_seconds(gateway->process);
    probe_latency(bench, probes, &out->idle_p50_us, &out->idle_p99_us);
    out->cpu_us_per_request = (cpu_seconds(gateway->process) - cpu) * 1e6 / (double)probes;

    for (uint64_t i = 0; i < out->streams; i++)
        start_call(bench, 0, NULL);
    run_streams(bench, UINT64_C(500000000));
    uint64_t tokens = bench->tokens, begun = clock_now_ns();
    cpu = cpu_seconds(gateway->process);
    run_streams(bench, seconds * UINT64_C(1000000000));
    out->tokens_per_second = (double)(bench->tokens - tokens) * 1e9 / (double)(clock_now_ns() - begun);
    out->cpu_us_per_token = (cpu_seconds(gateway->process) - cpu) * 1e6 / (double)(bench->tokens - tokens);
    probe_latency(bench, probes, &out->open_p50_us, &out->open_p99_us);
    out->resident_open_mib = resident_mib(gateway->process);
}

static void print_figures(const struct figures *f, bool json) {
    if (json) {
        printf("{\"benchmark\": \"gateway_overhead\", \"streams\": %" PRIu64 ", \"tokens_per_second\": %.0f, "
               "\"cpu_us_per_token\": %.2f, \"cpu_us_per_request\": %.1f, "
               "\"added_us\": {\"idle\": {\"p50\": %.0f, \"p99\": %.0f}, \"open\": {\"p50\": %.0f, \"p99\": %.0f}}, "
               "\"resident_mib\": {\"idle\": %.1f, \"open\": %.1f}}\n",
               f->streams, f->tokens_per_second, f->cpu_us_per_token, f->cpu_us_per_request, f->idle_p50_us,
               f->idle_p99_us, f->open_p50_us, f->open_p99_us, f->resident_idle_mib, f->resident_open_mib);
        return;
    }
    printf("gateway                        no stream  %6" PRIu64 " streams\n", f->streams);
    printf("added to a first token, p50    %6.0f us       %6.0f us\n", f->idle_p50_us, f->open_p50_us);
    printf("added to a first token, p99    %6.0f us       %6.0f us\n", f->idle_p99_us, f->open_p99_us);
    printf("processor time per request     %6.1f us\n", f->cpu_us_per_request);
    printf("processor time per token                       %6.2f us (at %.0f tokens/s)\n", f->cpu_us_per_token,
           f->tokens_per_second);
    printf("resident memory                %6.1f MiB      %6.1f MiB\n", f->resident_idle_mib, f->resident_open_mib);
}

int main(int argc, char **argv) {
    const char *program = "./moed-gateway";
    bool json = false;
    uint64_t streams = 64, probes = 2000, seconds = 3, step_ms = 10;
    const struct option options[] = {
        {"gateway", OPTION_STRING, &program, "FILE", "The program.", .min = 0},
        {"streams", OPTION_UINT, &streams, "N", "Streams that are open.", .min = 1, .max = STREAMS_MAX},
        {"step-ms", OPTION_UINT, &step_ms, "MS", "Between the tokens of a stream.", .min = 1, .max = 10000},
        {"probes", OPTION_UINT, &probes, "N", "Requests whose first token is timed.", .min = 100, .max = 1000000},
        {"seconds", OPTION_UINT, &seconds, "N", "How long processor time per token is measured.", .min = 1,
         .max = 3600},
        {"json", OPTION_FLAG, &json, NULL, "Print JSON.", .min = 0},
        {0},
    };
    const struct option_set set = {.program = "gateway_overhead",
                                   .synopsis = "[OPTION]...",
                                   .summary = "Measures what the gateway adds to a worker that answers at once.",
                                   .options = options};
    struct status status;
    struct gateway gateway;
    char endpoint[64];
    int parsed = options_parse(&set, argc, argv, &(int){0}, &status);
    if (parsed != OPTIONS_RUN) {
        if (parsed < 0)
            fprintf(stderr, "gateway_overhead: %s\n", status.message);
        return parsed < 0 ? 2 : EXIT_SUCCESS;
    }
    snprintf(endpoint, sizeof endpoint, "ipc:///tmp/moed-overhead-%d.sock", (int)getpid());
    if (start_gateway(program, endpoint, &gateway))
        return EXIT_FAILURE;

    static struct worker worker;
    worker.context = zmq_ctx_new();
    worker.endpoint = endpoint;
    worker.step_ns = step_ms * 1000000;
    int result = EXIT_FAILURE;
    struct bench bench = {.worker = &worker};
    struct figures figures = {.streams = streams};
    rpc_init();
    if (pthread_create(&worker.thread, NULL, run_worker, &worker) == 0 &&
        rpc_channel_create(&(struct rpc_target){.address = gateway.address}, &bench.channel, &status) == 0 &&
        wait_event(&gateway, " ready", (char[2]){0}, 2) == 0) {
        bench.queue = rpc_queue_create();
        measure(&bench, &gateway, probes, seconds, &figures);
        print_figures(&figures, json);
        rpc_queue_destroy(bench.queue);
        rpc_channel_destroy(bench.channel);
        result = EXIT_SUCCESS;
    }
    atomic_store(&worker.stop, true);
    pthread_join(worker.thread, NULL);
    zmq_ctx_term(worker.context);
    rpc_shutdown();
    kill(gateway.process, SIGTERM);
    waitpid(gateway.process, NULL, 0);
    return result;
}
