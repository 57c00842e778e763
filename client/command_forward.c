#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/client.h"
#include "client/json.h"
#include "moed.pb-c.h"

struct forward {
    struct client client;
    const char *file, *output;
    uint64_t top_logits;
    bool all_positions, routes;
};

/* A line for each position: its greatest logits, or all of them. */
static void print_logits(const struct forward *forward, const struct token_list *list,
                         const Moed__V1__ForwardResponse *response) {
    printf("SEQUENCE  POSITION  LOGITS\n");
    for (size_t i = 0; i < response->n_logits; i++) {
        const Moed__V1__Logits *logits = response->logits[i];
        const size_t columns = logits->rows ? logits->n_values / logits->rows : 0;
        const size_t first = forward->all_positions ? 0 : list->sequences[i].count - 1;
        for (size_t row = 0; row < logits->rows; row++) {
            printf("%8zu  %8zu ", i, first + row);
            for (size_t j = row * columns; j < (row + 1) * columns; j++)
                printf(" %" PRIu32 ":%.5f", j < logits->n_ids ? logits->ids[j] : (uint32_t)(j - row * columns),
                       (double)logits->values[j]);
            putchar('\n');
        }
    }
}

/* A line for each layer and token: its experts and their weights. */
static void print_routes(const struct token_list *list, const Moed__V1__ForwardResponse *response,
                         const Moed__V1__Model *model) {
    printf("SEQUENCE  LAYER  POSITION  EXPERTS\n");
    for (size_t i = 0; i < response->n_routes; i++) {
        const Moed__V1__ExpertRoutes *routes = response->routes[i];
        const size_t tokens = list->sequences[i].count, used = model->expert_used_count;
        for (size_t j = 0; j < routes->n_experts && j < routes->n_weights; j++) {
            if (j % used == 0)
                printf("%s%8zu  %5zu  %8zu ", j ? "\n" : "", i, j / used / tokens, j / used % tokens);
            printf(" %" PRIu32 ":%.6f", routes->experts[j], (double)routes->weights[j]);
        }
        putchar('\n');
    }
}

/* All logits as they are in memory: 32-bit floats, little-endian, row after row, sequence after sequence. */
static int write_logits(const char *path, const Moed__V1__ForwardResponse *response) {
    FILE *file = fopen(path, "we");
    bool good = file;
    for (size_t i = 0; good && i < response->n_logits; i++) {
        const Moed__V1__Logits *logits = response->logits[i];
        good = fwrite(logits->values, sizeof *logits->values, logits->n_values, file) == logits->n_values;
    }
    if (file && fclose(file) != 0)
        good = false;
    return good ? 0 : client_error(EXIT_LOCAL, "%s: %s", path, strerror(errno));
}

static int forward_print(struct forward *forward, const struct token_list *list,
                         const Moed__V1__ForwardResponse *response) {
    int exit_status = 0;
    if (response->n_logits != list->count || (forward->routes && response->n_routes != list->count))
        return client_error(EXIT_LOCAL, "the answer has %zu sequences, not %zu", response->n_logits, list->count);
    if (forward->output) {
        exit_status = write_logits(forward->output, response);
    } else if (!forward->client.json) {
        print_logits(forward, list, response);
    }
    if (!exit_status && forward->client.json) {
        json_print_line(stdout, &response->base);
    } else if (!exit_status && forward->routes) {
        Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
        ProtobufCMessage *model;
        exit_status = client_unary(&forward->client, &method_get_model, &request.base, &model);
        if (!exit_status && ((const Moed__V1__Model *)model)->expert_used_count)
            print_routes(list, response, (const Moed__V1__Model *)model);
        rpc_message_free(model);
    }
    int flushed = client_flush();
    return exit_status ? exit_status : flushed;
}

static int forward_run(struct forward *forward, char **operands, int count) {
    struct token_list list = {0};
    Moed__V1__ForwardRequest request = MOED__V1__FORWARD_REQUEST__INIT;
    Moed__V1__Tokens *sequences = NULL, **pointers = NULL;
    ProtobufCMessage *response = NULL;

    int exit_status = client_read_tokens(&list, operands, count, forward->file);
    if (exit_status)
        goto free_list;
    sequences = calloc(list.count, sizeof *sequences);
    pointers = calloc(list.count, sizeof *pointers);
    if (!sequences || !pointers) {
        exit_status = client_error(EXIT_LOCAL, "out of memory");
        goto free_list;
    }
    for (size_t i = 0; i < list.count; i++) {
        sequences[i] = (Moed__V1__Tokens)MOED__V1__TOKENS__INIT;
        sequences[i].ids = list.sequences[i].ids;
        sequences[i].n_ids = list.sequences[i].count;
        pointers[i] = &sequences[i];
    }
    request.sequences = pointers;
    request.n_sequences = list.count;
    request.all_positions = forward->all_positions;
    request.top_logits = forward->output ? 0 : (uint32_t)forward->top_logits;
    request.expert_routes = forward->routes;

    exit_status = client_open(&forward->client);
    if (!exit_status)
        exit_status = client_unary(&forward->client, &method_forward, &request.base, &response);
    if (!exit_status)
        exit_status = forward_print(forward, &list, (const Moed__V1__ForwardResponse *)response);
    rpc_message_free(response);
    client_close(&forward->client);
free_list:
    free(pointers);
    free(sequences);
    token_list_free(&list);
    return exit_status;
}

int command_forward(int argc, char **argv) {
    struct forward forward = {.client = CLIENT_DEFAULTS, .top_logits = 5};
    const struct option options[] = {
        CLIENT_OPTIONS(&forward.client),
        {.name = "file", .type = OPTION_STRING, .value = &forward.file, .argument = "FILE",
         .help = "Read the token ids from FILE; -: from standard input."},
        {.name = "all-positions", .type = OPTION_FLAG, .value = &forward.all_positions,
         .help = "Give the logits of every position, not of the last alone."},
        {.name = "top-logits", .type = OPTION_UINT, .value = &forward.top_logits, .argument = "K",
         .help = "Give the K greatest logits of a position, in falling order; 0: all, in the order of the vocabulary.",
         .max = UINT32_MAX},
        {.name = "routes", .type = OPTION_FLAG, .value = &forward.routes,
         .help = "Tell which experts each token took in each layer, and their weights."},
        {.name = "output", .type = OPTION_STRING, .value = &forward.output, .argument = "FILE",
         .help = "Write all logits to FILE instead of printing some: 32-bit floats, row after row."},
        {0},
    };
    const struct option_set set = {.program = "moed-client",
                                   .synopsis = "forward [OPTION]... [TOKEN]... [; TOKEN...]...",
                                   .summary = "Runs the forward pass over sequences of token ids and prints logits. "
                                              "The ids come from the operands, a file or standard input, with white "
                                              "space or commas between them and ';' between sequences.",
                                   .options = options};
    int operands, exit_status;
    if (client_parse(&set, argc, argv, &operands, &exit_status))
        return exit_status;
    return forward_run(&forward, argv + 1, operands);
}
