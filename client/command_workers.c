#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "client/client.h"
#include "moed.pb-c.h"

static const char *state_name(Moed__V1__Worker__State state) {
    const ProtobufCEnumValue *value = protobuf_c_enum_descriptor_get_value(&moed__v1__worker__state__descriptor, state);
    return value ? value->name : "?";
}

static int longer(int width, const char *text) {
    int length = (int)strlen(text);
    return length > width ? length : width;
}

static void print_workers(const ProtobufCMessage *message) {
    const Moed__V1__ListWorkersResponse *response = (const Moed__V1__ListWorkersResponse *)message;
    int id_width = longer(0, "ID"), device_width = longer(0, "DEVICE");
    for (size_t i = 0; i < response->n_workers; i++) {
        id_width = longer(id_width, response->workers[i]->id);
        device_width = longer(device_width, response->workers[i]->device);
    }
    printf("%-*s  %-8s  %-8s  %7s  %7s  %17s  %15s  %9s  %10s  %s\n", id_width, "ID", "STATE", "BACKEND", "RUNNING",
           "WAITING", "KV BLOCKS FREE", "MEMORY MiB", "STEP ms", "TOKENS", "DEVICE");
    for (size_t i = 0; i < response->n_workers; i++) {
        const Moed__V1__Worker *worker = response->workers[i];
        printf("%-*s  %-8s  %-8s  %7" PRIu32 "  %7" PRIu32 "  %8" PRIu32 "/%8" PRIu32 "  %7" PRIu64 "/%7" PRIu64
               "  %9.1f  %10" PRIu64 "  %s\n",
               id_width, worker->id, state_name(worker->state), worker->backend, worker->running, worker->waiting,
               worker->kv_blocks_free, worker->kv_blocks_total, worker->memory_used_bytes >> 20,
               worker->memory_total_bytes >> 20, (double)worker->last_step_age_ns / 1e6, worker->generated_tokens,
               worker->device);
    }
}

int command_workers(int argc, char **argv) {
    struct client client = CLIENT_DEFAULTS;
    const struct option options[] = {CLIENT_OPTIONS(&client), {0}};
    const struct option_set set = {.program = "moed-client",
                                   .synopsis = "workers [OPTION]...",
                                   .summary = "Lists the workers and their load.",
                                   .options = options};
    int exit_status;
    if (client_parse_only(&set, argc, argv, &exit_status))
        return exit_status;

    Moed__V1__ListWorkersRequest request = MOED__V1__LIST_WORKERS_REQUEST__INIT;
    return client_show(&client, &method_list_workers, &request.base, print_workers);
}
