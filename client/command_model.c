#include <inttypes.h>
#include <stdio.h>

#include "client/client.h"
#include "moed.pb-c.h"

static void print_model(const ProtobufCMessage *response) {
    const Moed__V1__Model *model = (const Moed__V1__Model *)response;
    printf("name               %s\n", model->name);
    printf("architecture       %s\n", model->architecture);
    printf("fingerprint        %s\n", model->fingerprint);
    printf("vocab_size         %" PRIu32 "\n", model->vocab_size);
    printf("context_length     %" PRIu32 "\n", model->context_length);
    printf("block_count        %" PRIu32 "\n", model->block_count);
    printf("embedding_length   %" PRIu32 "\n", model->embedding_length);
    printf("expert_count       %" PRIu32 "\n", model->expert_count);
    printf("expert_used_count  %" PRIu32 "\n", model->expert_used_count);
    printf("tensor_bytes       %" PRIu64 "\n", model->tensor_bytes);
    if (model->eos_token_id == UINT32_MAX)
        printf("eos_token_id       none\n");
    else
        printf("eos_token_id       %" PRIu32 "\n", model->eos_token_id);
}

int command_model(int argc, char **argv) {
    struct client client = CLIENT_DEFAULTS;
    const struct option options[] = {CLIENT_OPTIONS(&client), {0}};
    const struct option_set set = {.program = "moed-client",
                                   .synopsis = "model [OPTION]...",
                                   .summary = "Tells which model is served.",
                                   .options = options};
    int exit_status;
    if (client_parse_only(&set, argc, argv, &exit_status))
        return exit_status;

    Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
    return client_show(&client, &method_get_model, &request.base, print_model);
}
