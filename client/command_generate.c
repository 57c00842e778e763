#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/client.h"
#include "client/json.h"
#include "common/clock.h"
#include "moed.pb-c.h"

/* The options that are not fields of the request as they are. */
struct generate {
    struct client client;
    const char *file, *stop_tokens;
    uint64_t max_tokens, top_k, logprobs;
    double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, priority;
};

/* What the summary tells. */
struct progress {
    uint64_t started_ns, first_token_ns;
    uint64_t decode_ns; /* the worker's: tokens may come here in fewer messages than steps made them */
    uint64_t tokens;
    uint32_t prompt_tokens, cached_tokens;
    char *worker;
    Moed__V1__FinishReason finish_reason;
};

static void print_tokens(const Moed__V1__GenerateResponse *response, const struct progress *progress) {
    for (size_t i = 0; i < response->n_token_ids; i++) {
        if (response->n_logprobs <= i) {
            printf("%s%" PRIu32, progress->tokens + i ? " " : "", response->token_ids[i]);
            continue;
        }
        const Moed__V1__TokenLogprobs *logprobs = response->logprobs[i];
        printf("%10" PRIu32 "  %10.5f ", response->token_ids[i], (double)logprobs->logprob);
        for (size_t j = 0; j < logprobs->n_top_ids && j < logprobs->n_top_logprobs; j++)
            printf("  %" PRIu32 ":%.5f", logprobs->top_ids[j], (double)logprobs->top_logprobs[j]);
        putchar('\n');
    }
}

static void print_summary(const struct progress *progress) {
    const double first_ms = (double)(progress->first_token_ns - progress->started_ns) / 1e6;
    fprintf(stderr, "%" PRIu64 " tokens", progress->tokens);
    if (progress->tokens > 0)
        fprintf(stderr, ", the first after %.1f ms", first_ms);
    if (progress->tokens > 1 && progress->decode_ns > 0)
        fprintf(stderr, ", then %.1f tokens/s", (double)(progress->tokens - 1) * 1e9 / (double)progress->decode_ns);
    if (progress->cached_tokens > 0)
        fprintf(stderr, "; %" PRIu32 " of %" PRIu32 " prompt tokens were cached", progress->cached_tokens,
                progress->prompt_tokens);
    const ProtobufCEnumValue *reason =
        protobuf_c_enum_descriptor_get_value(&moed__v1__finish_reason__descriptor, (int)progress->finish_reason);
    fprintf(stderr, "; %s, worker %s\n", reason ? reason->name : "?", progress->worker ? progress->worker : "?");
}

/* Prints the messages of the stream as they come. */
static int stream(struct generate *generate, struct rpc_call *call, struct progress *progress) {
    bool lines = generate->client.json || generate->logprobs > 0;
    struct rpc_event event;
    int exit_status;
    progress->started_ns = clock_now_ns();
    while ((exit_status = client_next(&generate->client, &event)) == 0 && event.type == RPC_MESSAGE) {
        const Moed__V1__GenerateResponse *response = (const Moed__V1__GenerateResponse *)event.message;
        if (response->n_token_ids && !progress->tokens)
            progress->first_token_ns = clock_now_ns();
        if (generate->client.json)
            json_print_line(stdout, event.message);
        else
            print_tokens(response, progress);
        progress->tokens += response->n_token_ids;
        if (response->finish_reason)
            progress->finish_reason = response->finish_reason;
        if (response->timing && !progress->worker) {
            progress->worker = strdup(response->timing->worker);
            progress->decode_ns = response->timing->decode_ns;
        }
        if (response->usage) {
            progress->prompt_tokens = response->usage->prompt_tokens;
            progress->cached_tokens = response->usage->cached_tokens;
        }
        rpc_message_free(event.message);
        if ((exit_status = client_flush()) != 0) {
            rpc_call_cancel(call);
            return exit_status;
        }
    }
    if (!lines && progress->tokens)
        putchar('\n');
    if (!exit_status)
        exit_status = client_flush();
    if (!exit_status && event.status.code != STATUS_OK)
        exit_status = client_rpc_error(&event.status);
    return exit_status;
}

static int parse_stop_tokens(const char *text, struct token_list *list) {
    struct status status = {0};
    if (token_list_add_text(list, "--stop-token", text, &status) < 0)
        return client_error(EXIT_USAGE, "%s", status.message);
    if (list->count > 1)
        return client_error(EXIT_USAGE, "--stop-token: ';' separates sequences, ',' token ids");
    return 0;
}

static int generate_run(struct generate *generate, Moed__V1__GenerateRequest *request, char **operands, int count) {
    struct token_list list = {0}, stop_list = {0};
    struct progress progress = {0};
    Moed__V1__Tokens tokens = MOED__V1__TOKENS__INIT;
    Moed__V1__Sampling *sampling = request->sampling;
    bool opened = false;

    int exit_status = generate->stop_tokens ? parse_stop_tokens(generate->stop_tokens, &stop_list) : 0;
    if (!exit_status && generate->priority != trunc(generate->priority))
        exit_status = client_error(EXIT_USAGE, "--priority: %g is no whole number", generate->priority);
    if (!exit_status)
        exit_status = client_read_tokens(&list, operands, count, generate->file);
    if (!exit_status && list.count != 1)
        exit_status = client_error(EXIT_USAGE, "%zu prompts, one is taken", list.count);
    if (exit_status)
        goto out;

    tokens.ids = list.sequences[0].ids;
    tokens.n_ids = list.sequences[0].count;
    request->tokens = &tokens;
    request->max_tokens = (uint32_t)generate->max_tokens;
    if (stop_list.count) {
        request->stop_token_ids = stop_list.sequences[0].ids;
        request->n_stop_token_ids = stop_list.sequences[0].count;
    }
    request->logprobs = (uint32_t)generate->logprobs;
    request->priority = (int32_t)generate->priority;
    sampling->temperature = (float)generate->temperature;
    sampling->top_k = (uint32_t)generate->top_k;
    sampling->top_p = (float)generate->top_p;
    sampling->min_p = (float)generate->min_p;
    sampling->repetition_penalty = (float)generate->repetition_penalty;
    sampling->presence_penalty = (float)generate->presence_penalty;
    sampling->frequency_penalty = (float)generate->frequency_penalty;

    opened = true;
    exit_status = client_open(&generate->client);
    if (exit_status)
        goto out;
    exit_status = stream(generate, client_start(&generate->client, &method_generate, &request->base), &progress);
    if (!exit_status && !generate->client.json)
        print_summary(&progress);
out:
    if (opened)
        client_close(&generate->client);
    free(progress.worker);
    token_list_free(&stop_list);
    token_list_free(&list);
    return exit_status;
}

int command_generate(int argc, char **argv) {
    struct generate generate = {.client = CLIENT_DEFAULTS};
    Moed__V1__Sampling sampling = MOED__V1__SAMPLING__INIT;
    Moed__V1__GenerateRequest request = MOED__V1__GENERATE_REQUEST__INIT;
    const char *request_id = "";
    bool ignore_eos = false;
    /* What the gateway takes is its own to say: the limits here are those of the types. */
    const double real_max = 3.4e38;
    const struct option options[] = {
        CLIENT_OPTIONS(&generate.client),
        {.name = "file", .type = OPTION_STRING, .value = &generate.file, .argument = "FILE",
         .help = "Read the prompt's token ids from FILE; -: from standard input."},
        {.name = "max-tokens", .type = OPTION_UINT, .value = &generate.max_tokens, .argument = "N",
         .help = "End after N tokens; 0: at the end of the context.", .max = UINT32_MAX},
        {.name = "temperature", .type = OPTION_REAL, .value = &generate.temperature, .argument = "T",
         .help = "Divide the logits by T before drawing; 0: always take the likeliest token.",
         .real_min = -real_max, .real_max = real_max},
        {.name = "top-k", .type = OPTION_UINT, .value = &generate.top_k, .argument = "K",
         .help = "Draw from the K likeliest tokens; 0: off.", .max = UINT32_MAX},
        {.name = "top-p", .type = OPTION_REAL, .value = &generate.top_p, .argument = "P",
         .help = "Draw from the smallest set of tokens whose probability reaches P; 0: off.",
         .real_min = -real_max, .real_max = real_max},
        {.name = "min-p", .type = OPTION_REAL, .value = &generate.min_p, .argument = "P",
         .help = "Draw from the tokens at least P times as likely as the likeliest; 0: off.",
         .real_min = -real_max, .real_max = real_max},
        {.name = "seed", .type = OPTION_UINT, .value = &sampling.seed, .argument = "N",
         .help = "The same seed gives the same tokens again; 0: a fresh one."},
        {.name = "repetition-penalty", .type = OPTION_REAL, .value = &generate.repetition_penalty, .argument = "X",
         .help = "Divide positive and multiply negative logits of tokens seen so far by X; 0: off.",
         .real_min = -real_max, .real_max = real_max},
        {.name = "presence-penalty", .type = OPTION_REAL, .value = &generate.presence_penalty, .argument = "X",
         .help = "Subtract X from the logits of tokens generated so far.", .real_min = -real_max, .real_max = real_max},
        {.name = "frequency-penalty", .type = OPTION_REAL, .value = &generate.frequency_penalty, .argument = "X",
         .help = "Subtract X for every time a token was generated.", .real_min = -real_max, .real_max = real_max},
        {.name = "stop-token", .type = OPTION_STRING, .value = &generate.stop_tokens, .argument = "ID[,ID]...",
         .help = "End at any of these tokens, which is still sent."},
        {.name = "ignore-eos", .type = OPTION_FLAG, .value = &ignore_eos,
         .help = "Go on behind the model's end-of-sequence token."},
        {.name = "logprobs", .type = OPTION_UINT, .value = &generate.logprobs, .argument = "N",
         .help = "Give the log probability of each token and of the N likeliest.", .max = UINT32_MAX},
        {.name = "request-id", .type = OPTION_STRING, .value = &request_id, .argument = "ID",
         .help = "Name of the request, unique among those in flight."},
        {.name = "priority", .type = OPTION_REAL, .value = &generate.priority, .argument = "N",
         .help = "Requests of higher priority go first: a level is worth ten seconds of waiting.", .real_min = INT32_MIN, .real_max = INT32_MAX},
        {0},
    };
    const struct option_set set = {.program = "moed-client",
                                   .synopsis = "generate [OPTION]... [TOKEN]...",
                                   .summary = "Continues a prompt. Its token ids come from the operands, a file or "
                                              "standard input, with white space or commas between them.",
                                   .options = options};
    int operands, exit_status;
    if (client_parse(&set, argc, argv, &operands, &exit_status))
        return exit_status;
    request.sampling = &sampling;
    request.request_id = (char *)request_id;
    request.ignore_eos = ignore_eos;
    return generate_run(&generate, &request, argv + 1, operands);
}
