#include <stdio.h>
#include <string.h>

#include "client/client.h"
#include "config.h"

static const struct command {
    const char *name;
    const char *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"generate", "continue a prompt, token by token", command_generate},
    {"forward", "run the forward pass and print logits", command_forward},
    {"model", "tell which model is served", command_model},
    {"workers", "list the workers and their load", command_workers},
    {"load", "send many requests and measure the answers", command_load},
};

static void print_help(void) {
    puts("Usage: moed-client COMMAND [OPTION]... [TOKEN]...\n"
         "Calls a moed gateway.\n");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        printf("  %-10s %s\n", commands[i].name, commands[i].summary);
    puts("\nmoed-client COMMAND --help tells a command's options.\n"
         "Exit status: 0, 1 for a local error, 2 for wrong usage, 3 when requests of a load failed, 10 + the gRPC\n"
         "status code, 130 when interrupted.");
}

int main(int argc, char **argv) {
    if (argc < 2)
        return client_error(EXIT_USAGE, "a command is missing; see moed-client --help");
    if (strcmp(argv[1], "--help") == 0) {
        print_help();
        return client_flush();
    }
    if (strcmp(argv[1], "--version") == 0) {
        puts("moed-client " PACKAGE_VERSION);
        return client_flush();
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    return client_error(EXIT_USAGE, "no command '%s'; see moed-client --help", argv[1]);
}
