#include "client/client.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/json.h"
#include "common/clock.h"
#include "grpc/health/v1/health.pb-c.h"

enum { POLL_NS = 100000000 }; /* how long an interrupt may go unseen */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal) {
    interrupted = 1;
}

bool client_interrupted(void) {
    return interrupted;
}

int client_error(int exit_status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("moed-client: ", stderr);
    vfprintf(stderr, format, arguments);
    putc('\n', stderr);
    va_end(arguments);
    return exit_status;
}

int client_rpc_error(const struct status *status) {
    return client_error(EXIT_RPC + (int)status->code, "%s: %s", status_code_name((int)status->code), status->message);
}

bool client_parse(const struct option_set *set, int argc, char **argv, int *operands, int *exit_status) {
    struct status status = {0};
    int result = options_parse(set, argc, argv, operands, &status);
    if (result == OPTIONS_RUN)
        return false;
    *exit_status = result == OPTIONS_EXIT ? client_flush() : client_error(EXIT_USAGE, "%s", status.message);
    return true;
}

bool client_parse_only(const struct option_set *set, int argc, char **argv, int *exit_status) {
    int operands;
    if (client_parse(set, argc, argv, &operands, exit_status))
        return true;
    if (operands == 0)
        return false;
    *exit_status = client_error(EXIT_USAGE, "operand '%s' where none is taken", argv[1]);
    return true;
}

static uint64_t seconds_to_ns(double seconds) {
    return (uint64_t)(seconds * 1e9);
}

int client_next(struct client *client, struct rpc_event *event) {
    do {
        if (interrupted)
            return EXIT_INTERRUPTED;
        rpc_queue_next(client->queue, POLL_NS, event);
    } while (event->type == RPC_TIMEOUT);
    return 0;
}

/* Watches the health of the service until it is ready; a gateway that is not there yet, or goes, is waited for too. */
static int wait_ready(struct client *client) {
    const uint64_t deadline = clock_now_ns() + seconds_to_ns(client->wait_ready);
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = "moed.v1.Inference";

    for (uint64_t now; (now = clock_now_ns()) < deadline;) {
        struct rpc_options options = {.timeout_ns = deadline - now, .wait_for_ready = true};
        struct rpc_call *call =
            rpc_call_start(client->channel, client->queue, &method_watch, &request.base, &options);
        struct rpc_event event;
        bool ready = false;
        do {
            int exit_status = client_next(client, &event);
            if (exit_status)
                return exit_status;
            if (event.type == RPC_MESSAGE) {
                const Grpc__Health__V1__HealthCheckResponse *health = (const void *)event.message;
                if (health->status == GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING) {
                    ready = true;
                    rpc_call_cancel(call);
                }
                rpc_message_free(event.message);
            }
        } while (event.type != RPC_END);
        if (ready)
            return 0;
        if (event.status.code != STATUS_UNAVAILABLE && event.status.code != STATUS_DEADLINE_EXCEEDED)
            return client_rpc_error(&event.status);
        rpc_queue_next(client->queue, POLL_NS, &event); /* no call is left: a pause */
    }
    struct status status;
    status_set(&status, STATUS_UNAVAILABLE, "%s was not ready within %g s", client->target.address, client->wait_ready);
    return client_rpc_error(&status);
}

int client_open(struct client *client) {
    setenv("GRPC_VERBOSITY", "NONE", 0); /* errors are told once, by the call's status */
    signal(SIGPIPE, SIG_IGN);            /* a closed standard output is seen when it is written to */
    struct sigaction action = {.sa_handler = on_interrupt};
    sigaction(SIGINT, &action, NULL);

    rpc_init();
    client->queue = rpc_queue_create();
    struct status status = {0};
    if (rpc_channel_create(&client->target, &client->channel, &status) < 0)
        return client_error(EXIT_LOCAL, "%s", status.message);
    return client->wait_ready > 0 ? wait_ready(client) : 0;
}

void client_close(struct client *client) {
    rpc_queue_destroy(client->queue);
    rpc_channel_destroy(client->channel);
    rpc_shutdown();
}

uint64_t client_timeout_ns(const struct client *client) {
    return client->timeout > 0 ? seconds_to_ns(client->timeout) : RPC_FOREVER;
}

struct rpc_call *client_start(struct client *client, const struct rpc_method *method, const ProtobufCMessage *request) {
    struct rpc_options options = {.timeout_ns = client_timeout_ns(client)};
    return rpc_call_start(client->channel, client->queue, method, request, &options);
}

int client_unary(struct client *client, const struct rpc_method *method, const ProtobufCMessage *request,
                 ProtobufCMessage **response) {
    *response = NULL;
    client_start(client, method, request);
    struct rpc_event event;
    int exit_status = 0;
    do {
        exit_status = client_next(client, &event);
        if (exit_status)
            break;
        if (event.type == RPC_MESSAGE) {
            rpc_message_free(*response);
            *response = event.message;
        }
    } while (event.type != RPC_END);
    if (!exit_status && event.status.code == STATUS_OK && !*response)
        status_set(&event.status, STATUS_INTERNAL, "%s ended without an answer", method->path);
    if (!exit_status && event.status.code != STATUS_OK)
        exit_status = client_rpc_error(&event.status);
    if (exit_status) {
        rpc_message_free(*response);
        *response = NULL;
    }
    return exit_status;
}

int client_show(struct client *client, const struct rpc_method *method, const ProtobufCMessage *request,
                void (*print)(const ProtobufCMessage *response)) {
    ProtobufCMessage *response = NULL;
    int exit_status = client_open(client);
    if (!exit_status)
        exit_status = client_unary(client, method, request, &response);
    if (!exit_status) {
        if (client->json)
            json_print_line(stdout, response);
        else
            print(response);
        exit_status = client_flush();
    }
    rpc_message_free(response);
    client_close(client);
    return exit_status;
}

int client_flush(void) {
    if (fflush(stdout) == 0 && !ferror(stdout))
        return 0;
    return client_error(EXIT_LOCAL, "standard output: %s", strerror(errno));
}

int client_read_tokens(struct token_list *list, char **operands, int count, const char *file) {
    struct status status = {0};
    if (file && count)
        return client_error(EXIT_USAGE, "token ids both as operands and from --file");
    if (!count && token_list_add_file(list, file ? file : "-", &status) < 0)
        return client_error(EXIT_LOCAL, "%s", status.message);

    /* The operands are one text, however the shell has cut it. */
    size_t size = 1;
    for (int i = 0; i < count; i++)
        size += strlen(operands[i]) + 1;
    char *text = calloc(1, size);
    if (!text)
        return client_error(EXIT_LOCAL, "out of memory");
    char *end = text;
    for (int i = 0; i < count; i++)
        end = stpcpy(stpcpy(end, operands[i]), " ");
    int result = count ? token_list_add_text(list, "operands", text, &status) : 0;
    free(text);
    return result < 0 ? client_error(EXIT_USAGE, "%s", status.message) : 0;
}
