#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/client.h"
#include "client/load_plot.h"
#include "client/load_report.h"
#include "client/load_run.h"
#include "common/clock.h"
#include "moed.pb-c.h"

enum { SWEEP_MAX = 256, CONNECTIONS_MAX = 1024, REQUESTS_DEFAULT = 100 };
#define RATE_MIN 1e-6
#define RATE_MAX 1e6

struct load {
    struct client client;
    const char *arrivals, *prompt_tokens, *output_tokens, *trace_path, *csv_path, *plot_path;
    struct option_list sweep, rate_sweep;
    uint64_t concurrency, requests, warmup, max_in_flight, shared_prefix, connections, seed;
    double rate, duration_s, slo_ttft_ms, slo_itl_ms;

    bool open_loop, traced_arrivals;
    struct load_trace trace;
    struct load_mix mix;
    struct load_config config;
    double loads[SWEEP_MAX]; /* streams, or requests a second; one run each */
    struct load_figures figures[SWEEP_MAX];
    size_t load_count, run_count; /* runs: begun */
    Moed__V1__Model *model;
    struct rpc_channel *channels[CONNECTIONS_MAX];
    FILE *csv, *plot;
    bool live; /* a line on the terminal that is written again each second */
    struct load_progress shown; /* in it */
};

/* ---- options */

static int parse_sweep(struct load *load, const char *option, const struct option_list *list) {
    if (list->count > SWEEP_MAX)
        return client_error(EXIT_USAGE, "option --%s: %zu values; at most %d are allowed", option, list->count,
                            SWEEP_MAX);
    for (size_t i = 0; i < list->count; i++) {
        char *end;
        const char *text = list->items[i];
        double value = strtod(text, &end), min = load->open_loop ? RATE_MIN : 1;
        double max = load->open_loop ? RATE_MAX : LOAD_IN_FLIGHT_MAX;
        if (strspn(text, "0123456789.e-") != strlen(text) || *end || !(value >= min && value <= max) ||
            (!load->open_loop && value != trunc(value)))
            return client_error(EXIT_USAGE, "option --%s: \"%.100s\" is not a %s from %g to %.0f", option, text,
                                load->open_loop ? "number" : "whole number", min, max);
        load->loads[load->load_count++] = value;
    }
    return 0;
}

/* What kind of loop, and how much of it. */
static int choose_loads(struct load *load) {
    unsigned given =
        (load->concurrency > 0) + (load->rate > 0) + (load->sweep.count > 0) + (load->rate_sweep.count > 0);
    if (given > 1)
        return client_error(EXIT_USAGE, "of --concurrency, --rate, --sweep and --rate-sweep only one is taken");
    if (load->rate > 0 && load->rate < RATE_MIN)
        return client_error(EXIT_USAGE, "--rate: %g; 0, or %g to %g, is allowed", load->rate, RATE_MIN, RATE_MAX);
    if (load->trace_path && (load->rate > 0 || load->rate_sweep.count > 0))
        return client_error(EXIT_USAGE, "--trace has its own arrivals: no --rate or --rate-sweep with it");
    if (load->plot_path && !load->sweep.count && !load->rate_sweep.count)
        return client_error(EXIT_USAGE, "--plot draws a --sweep or --rate-sweep: neither is given");
    load->traced_arrivals = load->trace_path && given == 0;
    load->open_loop = load->traced_arrivals || load->rate > 0 || load->rate_sweep.count > 0;
    if (load->sweep.count)
        return parse_sweep(load, "sweep", &load->sweep);
    if (load->rate_sweep.count)
        return parse_sweep(load, "rate-sweep", &load->rate_sweep);
    load->loads[load->load_count++] = load->open_loop ? load->rate : load->concurrency ? (double)load->concurrency : 1;
    return 0;
}

static int check_options(struct load *load) {
    struct status status = {0};
    int exit_status = choose_loads(load);
    if (exit_status)
        return exit_status;
    if (load_length_parse("prompt-tokens", load->prompt_tokens, &load->mix.prompt, &status) < 0 ||
        load_length_parse("output-tokens", load->output_tokens, &load->mix.output, &status) < 0)
        return client_error(EXIT_USAGE, "%s", status.message);
    if (!load->requests)
        load->requests = load->duration_s > 0 || load->trace_path ? UINT64_MAX : REQUESTS_DEFAULT;
    if (!load->seed)
        load->seed = clock_random_u64();
    return 0;
}

static int open_output(const char *path, FILE **out) {
    *out = path ? fopen(path, "we") : NULL;
    return path && !*out ? client_error(EXIT_LOCAL, "%s: %s", path, strerror(errno)) : 0;
}

static int close_output(const char *path, FILE **file) {
    if (!*file)
        return 0;
    bool failed = ferror(*file);
    failed = fclose(*file) != 0 || failed;
    *file = NULL;
    return failed ? client_error(EXIT_LOCAL, "%s: cannot be written: %s", path, strerror(errno)) : 0;
}

static int open_files(struct load *load) {
    struct status status = {0};
    if (load->trace_path && load_trace_read(&load->trace, load->trace_path, &status) < 0)
        return client_error(EXIT_LOCAL, "%s", status.message);
    if (load->trace_path && load->warmup >= load->trace.count)
        return client_error(EXIT_USAGE, "--warmup: %" PRIu64 " requests, but %s has only %zu", load->warmup,
                            load->trace_path, load->trace.count);
    int exit_status = open_output(load->csv_path, &load->csv);
    return exit_status ? exit_status : open_output(load->plot_path, &load->plot);
}

/* ---- what is told */

static void erase_live(struct load *load) {
    if (load->live)
        fputs("\r\033[K", stderr);
}

static void show_progress(void *user, const struct load_progress *progress) {
    struct load *load = user;
    double seconds = (double)(progress->now_ns - load->shown.now_ns) / 1e9;
    fprintf(stderr, "\r%.0f s", (double)progress->now_ns / 1e9);
    if (load->load_count > 1)
        fprintf(stderr, ", run %zu of %zu", load->run_count, load->load_count);
    fprintf(stderr, ": %" PRIu64 " requests done, %" PRIu64 " failed, %" PRIu64 " in flight; %.1f requests/s, "
            "%.0f tokens/s\033[K",
            progress->ended, progress->failed, progress->in_flight,
            (double)(progress->ended - load->shown.ended) / seconds,
            (double)(progress->tokens - load->shown.tokens) / seconds);
    load->shown = *progress;
}

static void take_sample(void *user, const struct load_sample *sample) {
    struct load *load = user;
    load_print_csv_row(load->csv, load->loads[load->run_count - 1], sample);
}

static void describe(struct load *load) {
    load->config = (struct load_config){
        .target = load->client.target.address,
        .model = load->model->name,
        .open_loop = load->open_loop,
        .arrivals = load->traced_arrivals ? "trace" : load->arrivals,
        .prompt_tokens = load->prompt_tokens,
        .output_tokens = load->output_tokens,
        .trace = load->trace_path,
        .shared_prefix = load->shared_prefix,
        .seed = load->seed,
        .connections = load->connections,
        .requests = load->requests,
        .max_in_flight = load->max_in_flight,
        .warmup = load->warmup,
        .duration_s = load->duration_s,
        .timeout_s = load->client.timeout,
        .slo_ttft_ms = load->slo_ttft_ms,
        .slo_itl_ms = load->slo_itl_ms,
    };
}

static int tell_results(struct load *load) {
    load->config.interrupted = client_interrupted();
    if (load->client.json) {
        if (load_print_json(stdout, &load->config, load->figures, load->run_count) < 0)
            return client_error(EXIT_LOCAL, "out of memory");
    } else if (load->load_count == 1) {
        load_print_report(stdout, &load->config, &load->figures[0]);
    } else {
        for (size_t i = 0; i < load->run_count; i++)
            load_print_sweep_errors(stdout, &load->config, &load->figures[i]);
    }
    if (load->plot) {
        char title[256];
        snprintf(title, sizeof title, "%.80s: prompts of %.60s tokens, outputs of %.60s", load->model->name,
                 load->trace_path ? "the trace's" : load->prompt_tokens,
                 load->trace_path ? "the trace's" : load->output_tokens);
        load_plot(load->plot, title, load->open_loop ? "requests/s started (log)" : "streams (log)",
                  load->figures, load->run_count);
    }
    return client_flush();
}

/* ---- runs */

/* One connection each: see rpc_channel_create. */
static int open_channels(struct load *load) {
    struct status status = {0};
    load->channels[0] = load->client.channel;
    for (size_t i = 1; i < load->connections; i++)
        if (rpc_channel_create(&load->client.target, &load->channels[i], &status) < 0)
            return client_error(EXIT_LOCAL, "%s", status.message);
    return 0;
}

static void close_channels(struct load *load) {
    for (size_t i = 1; i < load->connections; i++)
        rpc_channel_destroy(load->channels[i]);
}

static int ask_model(struct load *load) {
    Moed__V1__GetModelRequest request = MOED__V1__GET_MODEL_REQUEST__INIT;
    struct status status = {0};
    ProtobufCMessage *response;
    int exit_status = client_unary(&load->client, &method_get_model, &request.base, &response);
    if (exit_status)
        return exit_status;
    load->model = (Moed__V1__Model *)response;
    load->mix.vocab_size = load->model->vocab_size;
    load->mix.context_length = load->model->context_length;
    load->mix.shared_prefix = (uint32_t)load->shared_prefix;
    load->mix.prefix_seed = load->seed;
    load->mix.trace = load->trace_path ? &load->trace : NULL;
    if (load_mix_check(&load->mix, load->trace_path, &status) < 0)
        return client_error(EXIT_USAGE, "%s", status.message);
    return 0;
}

static int run_one(struct load *load, double amount) {
    struct status status = {0};
    struct load_stats *stats = calloc(1, sizeof *stats);
    if (!stats)
        return client_error(EXIT_LOCAL, "out of memory");
    stats->slo_ttft_ns = (uint64_t)(load->slo_ttft_ms * 1e6);
    stats->slo_itl_ns = (uint64_t)(load->slo_itl_ms * 1e6);
    bool poisson = strcmp(load->arrivals, "poisson") == 0;
    const struct load_run run = {
        .mix = &load->mix,
        .concurrency = load->open_loop ? 0 : (uint64_t)amount,
        .arrivals = load->traced_arrivals ? ARRIVALS_TRACE : poisson ? ARRIVALS_POISSON : ARRIVALS_CONSTANT,
        .rate = amount,
        .max_in_flight = load->max_in_flight,
        .warmup = load->warmup,
        .requests = load->requests,
        .duration_s = load->duration_s,
        .timeout_ns = client_timeout_ns(&load->client),
        .channels = load->channels,
        .channel_count = load->connections,
        .queue = load->client.queue,
        .user = load,
        .ended = load->csv ? take_sample : NULL,
        .progress = load->live ? show_progress : NULL,
        .interrupted = client_interrupted,
    };
    /* Fresh prompts for each run of a sweep: what a server has cached of the last one's must not help it. */
    load->mix.seed = load->seed + load->run_count * UINT64_C(0x9e3779b97f4a7c15);
    load->shown = (struct load_progress){0};
    struct load_figures *figures = &load->figures[load->run_count++];
    int result = load_run(&run, stats, &status);
    erase_live(load);
    load_figures_compute(stats, amount, figures);
    free(stats);
    return result < 0 ? client_error(EXIT_LOCAL, "%s", status.message) : 0;
}

static int run_all(struct load *load) {
    const bool table = load->load_count > 1 && !load->client.json;
    int exit_status = 0;
    if (table)
        load_print_sweep_header(stdout, &load->config);
    for (size_t i = 0; !exit_status && i < load->load_count && !client_interrupted(); i++) {
        exit_status = run_one(load, load->loads[i]);
        if (!exit_status && table) {
            load_print_sweep_row(stdout, &load->figures[i]);
            exit_status = client_flush();
        }
    }
    return exit_status;
}

/* The exit status of a load that was carried out. */
static int judge(const struct load *load) {
    if (client_interrupted())
        return EXIT_INTERRUPTED;
    for (size_t i = 0; i < load->run_count; i++)
        if (load->figures[i].failed)
            return EXIT_REQUESTS;
    return 0;
}

static int load_carry_out(struct load *load) {
    int exit_status = open_files(load);
    if (exit_status)
        goto out;
    exit_status = client_open(&load->client);
    if (!exit_status)
        exit_status = open_channels(load);
    if (!exit_status)
        exit_status = ask_model(load);
    if (!exit_status) {
        describe(load);
        load->live = isatty(STDERR_FILENO);
        if (load->csv)
            load_print_csv_header(load->csv);
        exit_status = run_all(load);
    }
    if (!exit_status)
        exit_status = tell_results(load);
    rpc_message_free((ProtobufCMessage *)load->model);
    close_channels(load);
    client_close(&load->client);
out:;
    int csv_status = close_output(load->csv_path, &load->csv), plot_status = close_output(load->plot_path, &load->plot);
    load_trace_free(&load->trace);
    if (!exit_status)
        exit_status = csv_status ? csv_status : plot_status ? plot_status : judge(load);
    return exit_status;
}

int command_load(int argc, char **argv) {
    static const char *const arrivals[] = {"poisson", "constant", NULL};
    static struct load load = {
        .client = CLIENT_DEFAULTS,
        .arrivals = "poisson",
        .prompt_tokens = "128",
        .output_tokens = "64",
        .max_in_flight = 16384,
        .connections = 1,
    };
    const double ms_max = 1e9;
    const struct option options[] = {
        CLIENT_OPTIONS(&load.client),
        {.name = "concurrency", .type = OPTION_UINT, .value = &load.concurrency, .argument = "N",
         .max = LOAD_IN_FLIGHT_MAX,
         .help = "Closed loop: keep N requests in flight; 0: 1, unless another load is given."},
        {.name = "rate", .type = OPTION_REAL, .value = &load.rate, .argument = "R", .real_min = 0,
         .real_max = RATE_MAX,
         .help = "Open loop: start R requests a second, whatever the server does. Latency counts from the time at "
                 "which a request was to start. 0: off."},
        {.name = "arrivals", .type = OPTION_CHOICE, .value = &load.arrivals, .argument = "poisson|constant",
         .choices = arrivals, .help = "Times between the starts of an open loop: exponentially distributed, or equal."},
        {.name = "sweep", .type = OPTION_LIST, .value = &load.sweep, .argument = "N[,N]...",
         .help = "A closed loop with each of these numbers of requests in flight, one after the other, as a table."},
        {.name = "rate-sweep", .type = OPTION_LIST, .value = &load.rate_sweep, .argument = "R[,R]...",
         .help = "The same for open loops with these rates."},
        {.name = "max-in-flight", .type = OPTION_UINT, .value = &load.max_in_flight, .argument = "N", .min = 1,
         .max = LOAD_IN_FLIGHT_MAX,
         .help = "Open loop: so many requests at once; what is due beyond them starts late, and counts as late."},
        {.name = "requests", .type = OPTION_UINT, .value = &load.requests, .argument = "N",
         .max = INT64_MAX, .help = "End after N requests; 0: 100, unless --duration or --trace gives an end."},
        {.name = "duration", .type = OPTION_REAL, .value = &load.duration_s, .argument = "SECONDS",
         .real_min = 0, .real_max = 1e7,
         .help = "Start no request after so long; those in flight are waited for. 0: no such end."},
        {.name = "warmup", .type = OPTION_UINT, .value = &load.warmup, .argument = "N", .max = INT64_MAX,
         .help = "Requests that come first and are left out of all figures."},
        {.name = "prompt-tokens", .type = OPTION_STRING, .value = &load.prompt_tokens, .argument = "LENGTH",
         .help = "Length of the prompts: N, MIN:MAX, or lognormal:MEAN:SIGMA."},
        {.name = "output-tokens", .type = OPTION_STRING, .value = &load.output_tokens, .argument = "LENGTH",
         .help = "Length of the outputs, in the same way."},
        {.name = "shared-prefix", .type = OPTION_UINT, .value = &load.shared_prefix, .argument = "N",
         .max = LOAD_LENGTH_MAX, .help = "So many leading tokens are the same in all prompts."},
        {.name = "trace", .type = OPTION_STRING, .value = &load.trace_path, .argument = "FILE",
         .help = "Take arrivals and lengths from lines of JSON; -: from standard input. With --concurrency or --sweep "
                 "the lengths alone."},
        {.name = "seed", .type = OPTION_UINT, .value = &load.seed, .argument = "N",
         .help = "The same seed sends the same requests, at the same times; 0: a fresh one."},
        {.name = "connections", .type = OPTION_UINT, .value = &load.connections, .argument = "N", .min = 1,
         .max = CONNECTIONS_MAX, .help = "Spread the requests over so many connections."},
        {.name = "slo-ttft", .type = OPTION_REAL, .value = &load.slo_ttft_ms, .argument = "MS", .real_min = 0,
         .real_max = ms_max, .help = "Goodput: the first token comes within MS; 0: no limit."},
        {.name = "slo-itl", .type = OPTION_REAL, .value = &load.slo_itl_ms, .argument = "MS", .real_min = 0,
         .real_max = ms_max, .help = "Goodput: no later one takes longer than MS; 0: no limit."},
        {.name = "csv", .type = OPTION_STRING, .value = &load.csv_path, .argument = "FILE",
         .help = "Write a row for each request."},
        {.name = "plot", .type = OPTION_STRING, .value = &load.plot_path, .argument = "FILE.svg",
         .help = "Draw a sweep's latency and throughput over its load."},
        {0},
    };
    const struct option_set set = {.program = "moed-client",
                                   .synopsis = "load [OPTION]...",
                                   .summary = "Sends many requests of random tokens and reports how they were served.",
                                   .options = options};
    int exit_status;
    if (!client_parse_only(&set, argc, argv, &exit_status)) {
        exit_status = check_options(&load);
        if (!exit_status)
            exit_status = load_carry_out(&load);
    }
    options_free_list(&load.sweep);
    options_free_list(&load.rate_sweep);
    return exit_status;
}
