#ifndef MOED_CLIENT_CLIENT_H
#define MOED_CLIENT_CLIENT_H

#include <stdbool.h>

#include "client/methods.h"
#include "client/rpc.h"
#include "client/tokens.h"
#include "common/options.h"

/* What the commands of moed-client share: the options that lead to a target, running a call, the exit status. */

enum {
    EXIT_LOCAL = 1, /* a file, or standard output */
    EXIT_USAGE = 2,
    EXIT_REQUESTS = 3, /* requests of a load failed */
    EXIT_RPC = 10, /* and the gRPC status code: 11 to 26 */
    EXIT_INTERRUPTED = 130,
};

struct client {
    struct rpc_target target;
    double timeout;    /* seconds; 0: none */
    double wait_ready; /* seconds */
    bool json;
    struct rpc_channel *channel;
    struct rpc_queue *queue;
};

#define CLIENT_DEFAULTS {.target.address = "127.0.0.1:50051"}

/* The options of every command, for its table. */
#define CLIENT_OPTIONS(client) \
    {.name = "target", .type = OPTION_STRING, .value = &(client)->target.address, .argument = "ADDR:PORT", \
     .help = "The gateway."}, \
    {.name = "timeout", .type = OPTION_REAL, .value = &(client)->timeout, .argument = "SECONDS", \
     .help = "Deadline of a call; 0: none.", .real_min = 0, .real_max = 1e9}, \
    {.name = "wait-ready", .type = OPTION_REAL, .value = &(client)->wait_ready, .argument = "SECONDS", \
     .help = "Wait so long for the service to be ready before calling it.", .real_min = 0, .real_max = 1e9}, \
    {.name = "json", .type = OPTION_FLAG, .value = &(client)->json, \
     .help = "Print JSON: one object in one line for each message, or for the report."}, \
    {.name = "tls", .type = OPTION_FLAG, .value = &(client)->target.tls, \
     .help = "Use TLS, also without the options below."}, \
    {.name = "tls-ca", .type = OPTION_STRING, .value = &(client)->target.ca_file, .argument = "FILE", \
     .help = "Certificates that may sign the gateway's, instead of the system's."}, \
    {.name = "tls-cert", .type = OPTION_STRING, .value = &(client)->target.cert_file, .argument = "FILE", \
     .help = "Certificate to show the gateway."}, \
    {.name = "tls-key", .type = OPTION_STRING, .value = &(client)->target.key_file, .argument = "FILE", \
     .help = "Private key of --tls-cert."}

/* The commands: exit status of the process. argv[0] is the command's name. */
int command_generate(int argc, char **argv);
int command_forward(int argc, char **argv);
int command_model(int argc, char **argv);
int command_workers(int argc, char **argv);
int command_load(int argc, char **argv);

/* Parses a command's options. True: *exit_status is all there is left to do. */
bool client_parse(const struct option_set *set, int argc, char **argv, int *operands, int *exit_status);
/* The same for a command without operands. */
bool client_parse_only(const struct option_set *set, int argc, char **argv, int *exit_status);

/* Prints "moed-client: message" to standard error; returns the exit status given. */
int client_error(int exit_status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for a call that failed. */
int client_rpc_error(const struct status *status);

/* Connects, takes SIGINT over, waits for readiness where asked for. 0 or an exit status, the error printed.
 * client_close in any case. */
int client_open(struct client *client);
void client_close(struct client *client);

/* True since a SIGINT. */
bool client_interrupted(void);
/* As a time-out of calls: RPC_FOREVER for 0. */
uint64_t client_timeout_ns(const struct client *client);
struct rpc_call *client_start(struct client *client, const struct rpc_method *method, const ProtobufCMessage *request);
/* The next message or end of the call. 0 or EXIT_INTERRUPTED. */
int client_next(struct client *client, struct rpc_event *event);
/* A whole unary call: 0 and *response to free with rpc_message_free, or an exit status, the error printed. */
int client_unary(struct client *client, const struct rpc_method *method, const ProtobufCMessage *request,
                 ProtobufCMessage **response);
/* All of a command that is one unary call: opens, calls, prints as JSON or with `print`, closes. Exit status. */
int client_show(struct client *client, const struct rpc_method *method, const ProtobufCMessage *request,
                void (*print)(const ProtobufCMessage *response));

/* Writes out what standard output holds. 0 or EXIT_LOCAL, the error printed. */
int client_flush(void);

/* Reads the token ids of the operands, or of `file` (NULL: standard input where there are no operands).
 * 0 or an exit status, the error printed; the list is to be freed in any case. */
int client_read_tokens(struct token_list *list, char **operands, int count, const char *file);

#endif
