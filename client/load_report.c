#include "client/load_report.h"

#include <inttypes.h>

static void print_config(FILE *out, const struct load_config *config, const struct load_figures *figures) {
    fprintf(out, "%s, model %s\n", config->target, config->model);
    if (!config->open_loop)
        fprintf(out, "closed loop: %.0f streams", figures->load);
    else if (config->trace)
        fputs("open loop: arrivals of the trace", out);
    else
        fprintf(out, "open loop: %g requests/s, %s arrivals", figures->load, config->arrivals);
    fprintf(out, "; %" PRIu64 " connection%s, seed %" PRIu64 "\n", config->connections,
            config->connections == 1 ? "" : "s", config->seed);
    if (config->trace)
        fprintf(out, "lengths of %s\n", config->trace);
    else
        fprintf(out, "prompts of %s tokens, %" PRIu64 " of them shared; outputs of %s\n", config->prompt_tokens,
                config->shared_prefix, config->output_tokens);
}

static void print_summary(FILE *out, const char *name, const struct load_summary *summary) {
    if (summary->count)
        fprintf(out, "%-14s %10.3f %10.3f %10.3f %10.3f %10.3f %10.3f\n", name, summary->mean_ms, summary->p50_ms,
                summary->p90_ms, summary->p95_ms, summary->p99_ms, summary->max_ms);
    else
        fprintf(out, "%-14s %10s %10s %10s %10s %10s %10s\n", name, "-", "-", "-", "-", "-", "-");
}

static void print_errors(FILE *out, const struct load_figures *figures) {
    if (!figures->failed)
        return;
    for (int code = 0; code < STATUS_CODES; code++)
        if (figures->errors[code])
            fprintf(out, "failed         %" PRIu64 " x %s\n", figures->errors[code],
                    code == STATUS_OK ? "OK, but not as many tokens as asked for" : status_code_name(code));
    fprintf(out, "the first was  %s\n", figures->first_error.message);
}

static void print_goodput(FILE *out, const struct load_config *config, const struct load_figures *figures) {
    if (!figures->limited)
        return;
    fprintf(out, "goodput        %.1f %% of the requests, %.2f requests/s (", figures->good_share * 100,
            figures->good_per_s);
    if (config->slo_ttft_ms > 0)
        fprintf(out, "TTFT at most %g ms", config->slo_ttft_ms);
    if (config->slo_itl_ms > 0)
        fprintf(out, "%severy ITL at most %g ms", config->slo_ttft_ms > 0 ? ", " : "", config->slo_itl_ms);
    fputs(")\n", out);
}

static double share(uint64_t part, uint64_t whole) {
    return whole ? 100 * (double)part / (double)whole : 0;
}

void load_print_report(FILE *out, const struct load_config *config, const struct load_figures *figures) {
    print_config(out, config, figures);
    fprintf(out, "\nrequests       %" PRIu64 " succeeded, %" PRIu64 " failed", figures->succeeded, figures->failed);
    if (config->interrupted)
        fprintf(out, ", %" PRIu64 " cut off by the interrupt", figures->unfinished);
    fprintf(out, ", in %.2f s; before them %" PRIu64 " to warm up\n", figures->seconds, figures->warmup);
    print_errors(out, figures);
    fprintf(out, "throughput     %.2f requests/s, %.1f tokens/s in, %.1f tokens/s out\n", figures->requests_per_s,
            figures->tokens_in_per_s, figures->tokens_out_per_s);
    print_goodput(out, config, figures);
    fprintf(out, "tokens         %" PRIu64 " in (%.1f %% cached), %" PRIu64 " out in %" PRIu64 " messages\n",
            figures->tokens_in, share(figures->cached_tokens, figures->prompt_tokens), figures->tokens_out,
            figures->messages);
    fprintf(out, "resumptions    %" PRIu64 "\n", figures->resumptions);
    fprintf(out, "\n%-14s %10s %10s %10s %10s %10s %10s\n", "ms", "mean", "p50", "p90", "p95", "p99", "max");
    print_summary(out, "TTFT", &figures->ttft);
    print_summary(out, "ITL", &figures->itl);
    print_summary(out, "TPOT", &figures->tpot);
    print_summary(out, "E2E", &figures->e2e);
    if (config->open_loop)
        print_summary(out, "late starts", &figures->delay);
}

void load_print_sweep_header(FILE *out, const struct load_config *config) {
    fprintf(out, "%9s  %7s  %6s  %9s  %10s  %10s  %17s  %17s  %19s  %6s\n", "", "", "", "", "TOKENS/S", "TOKENS/S",
            "TTFT ms", "ITL ms", "E2E ms", "GOOD");
    fprintf(out, "%9s  %7s  %6s  %9s  %10s  %10s  %8s %8s  %8s %8s  %9s %9s  %6s\n",
            config->open_loop ? "RATE" : "STREAMS", "OK", "FAILED", "REQUEST/S", "IN", "OUT", "p50", "p99", "p50",
            "p99", "p50", "p99", "%");
}

void load_print_sweep_row(FILE *out, const struct load_figures *figures) {
    char good[16] = "-";
    if (figures->limited)
        snprintf(good, sizeof good, "%.1f", figures->good_share * 100);
    fprintf(out,
            "%9g  %7" PRIu64 "  %6" PRIu64 "  %9.2f  %10.1f  %10.1f  %8.2f %8.2f  %8.2f %8.2f  %9.2f %9.2f  %6s\n",
            figures->load, figures->succeeded, figures->failed, figures->requests_per_s, figures->tokens_in_per_s,
            figures->tokens_out_per_s, figures->ttft.p50_ms, figures->ttft.p99_ms, figures->itl.p50_ms,
            figures->itl.p99_ms, figures->e2e.p50_ms, figures->e2e.p99_ms, good);
}

void load_print_sweep_errors(FILE *out, const struct load_config *config, const struct load_figures *figures) {
    if (!figures->failed)
        return;
    fprintf(out, "\n%-14s %g\n", config->open_loop ? "rate" : "streams", figures->load);
    print_errors(out, figures);
}

void load_print_csv_header(FILE *out) {
    fputs("load,index,warmup,intended_s,started_s,ttft_ms,tpot_ms,itl_max_ms,e2e_ms,prompt_tokens,cached_tokens,"
          "asked_tokens,tokens,resumptions,status\n",
          out);
}

void load_print_csv_row(FILE *out, double load, const struct load_sample *sample) {
    uint64_t tpot_ns;
    fprintf(out, "%g,%" PRIu64 ",%d,%.6f,%.6f,", load, sample->index, sample->warmup,
            (double)sample->intended_ns / 1e9, (double)sample->started_ns / 1e9);
    if (sample->first_ns)
        fprintf(out, "%.3f", (double)sample_ttft_ns(sample) / 1e6);
    putc(',', out);
    if (sample_tpot_ns(sample, &tpot_ns))
        fprintf(out, "%.3f", (double)tpot_ns / 1e6);
    putc(',', out);
    if (sample->last_ns > sample->first_ns)
        fprintf(out, "%.3f", (double)sample->gap_max_ns / 1e6);
    fprintf(out, ",%.3f,%" PRIu32 ",%" PRIu32 ",%" PRIu32 ",%" PRIu64 ",%" PRIu32 ",%s\n",
            (double)sample_e2e_ns(sample) / 1e6, sample->prompt_tokens, sample->cached_tokens, sample->asked_tokens,
            sample->tokens, sample->resumptions, status_code_name((int)sample->status.code));
}
