#include <inttypes.h>
#include <jansson.h>
#include <math.h>

#include "client/load_report.h"

/* The report as JSON. jansson's setters take the value over and pass its absence on, so only the ends are checked. */

/* Names of files and what a server says need not be UTF-8, which JSON wants. */
static json_t *string_json(const char *text) {
    json_t *string = json_string(text);
    char ascii[512];
    size_t length = 0;
    if (string)
        return string;
    for (; text[length] && length < sizeof ascii - 1; length++)
        ascii[length] = (unsigned char)text[length] < 0x80 ? text[length] : '?';
    return json_stringn(ascii, length);
}

static json_t *optional_string(const char *text) {
    return text ? string_json(text) : json_null();
}

/* Zero stands for "none". */
static json_t *optional_real(double value) {
    return value > 0 && isfinite(value) ? json_real(value) : json_null();
}

static json_t *optional_whole(uint64_t value, uint64_t none) {
    return value == none ? json_null() : json_integer((json_int_t)value);
}

static json_t *summary_json(const struct load_summary *summary) {
    if (!summary->count)
        return json_pack("{s:i, s:n, s:n, s:n, s:n, s:n, s:n}", "count", 0, "mean", "p50", "p90", "p95", "p99", "max");
    return json_pack("{s:I, s:f, s:f, s:f, s:f, s:f, s:f}", "count", (json_int_t)summary->count, "mean",
                     summary->mean_ms, "p50", summary->p50_ms, "p90", summary->p90_ms, "p95", summary->p95_ms, "p99",
                     summary->p99_ms, "max", summary->max_ms);
}

static json_t *config_json(const struct load_config *config) {
    /* A seed may need all 64 bits, which JSON's numbers do not promise. */
    char seed[24];
    snprintf(seed, sizeof seed, "%" PRIu64, config->seed);
    return json_pack("{s:o, s:s, s:o, s:o, s:o, s:o, s:I, s:s, s:I, s:o, s:o, s:I, s:o, s:o, s:o, s:o}", "target",
                     string_json(config->target), "loop", config->open_loop ? "open" : "closed", "arrivals",
                     optional_string(config->open_loop ? config->arrivals : NULL), "prompt_tokens",
                     optional_string(config->trace ? NULL : config->prompt_tokens), "output_tokens",
                     optional_string(config->trace ? NULL : config->output_tokens), "trace",
                     optional_string(config->trace), "shared_prefix", (json_int_t)config->shared_prefix, "seed", seed,
                     "connections", (json_int_t)config->connections, "max_in_flight",
                     optional_whole(config->max_in_flight, config->open_loop ? 0 : config->max_in_flight), "requests",
                     optional_whole(config->requests, UINT64_MAX), "warmup", (json_int_t)config->warmup, "duration_s",
                     optional_real(config->duration_s), "timeout_s", optional_real(config->timeout_s), "slo_ttft_ms",
                     optional_real(config->slo_ttft_ms), "slo_itl_ms", optional_real(config->slo_itl_ms));
}

static json_t *errors_json(const struct load_figures *figures) {
    json_t *errors = json_object();
    for (int code = 0; code < STATUS_CODES; code++)
        if (figures->errors[code] && json_object_set_new(errors, code ? status_code_name(code) : "WRONG_LENGTH",
                                                         json_integer((json_int_t)figures->errors[code])) < 0) {
            json_decref(errors);
            return NULL;
        }
    return errors;
}

static json_t *goodput_json(const struct load_figures *figures) {
    if (!figures->limited)
        return json_null();
    return json_pack("{s:I, s:f, s:f}", "requests", (json_int_t)figures->good, "share", figures->good_share,
                     "requests_per_s", figures->good_per_s);
}

static json_t *run_json(const struct load_config *config, const struct load_figures *figures) {
    const char *load = config->open_loop ? "rate" : "concurrency";
    bool traced = config->open_loop && config->trace;
    json_t *latency = json_pack("{s:o, s:o, s:o, s:o, s:o}", "ttft_ms", summary_json(&figures->ttft), "itl_ms",
                                summary_json(&figures->itl), "tpot_ms", summary_json(&figures->tpot), "e2e_ms",
                                summary_json(&figures->e2e), "late_starts_ms", summary_json(&figures->delay));
    json_t *tokens = json_pack("{s:I, s:I, s:I, s:I, s:I}", "in", (json_int_t)figures->tokens_in, "out",
                               (json_int_t)figures->tokens_out, "messages", (json_int_t)figures->messages,
                               "prompts_succeeded", (json_int_t)figures->prompt_tokens, "cached",
                               (json_int_t)figures->cached_tokens);
    return json_pack("{s:o, s:I, s:I, s:I, s:I, s:o, s:o, s:f, s:f, s:f, s:f, s:o, s:o, s:I, s:o}", load,
                     traced ? json_null() : json_real(figures->load), "succeeded", (json_int_t)figures->succeeded,
                     "failed", (json_int_t)figures->failed, "unfinished", (json_int_t)figures->unfinished, "warmup",
                     (json_int_t)figures->warmup, "errors", errors_json(figures), "first_error",
                     optional_string(figures->failed ? figures->first_error.message : NULL), "seconds",
                     figures->seconds, "requests_per_s", figures->requests_per_s, "tokens_in_per_s",
                     figures->tokens_in_per_s, "tokens_out_per_s", figures->tokens_out_per_s, "goodput",
                     goodput_json(figures), "tokens", tokens, "resumptions", (json_int_t)figures->resumptions,
                     "latency", latency);
}

int load_print_json(FILE *out, const struct load_config *config, const struct load_figures *figures, size_t count) {
    json_t *runs = json_array();
    int result = runs ? 0 : -1;
    for (size_t i = 0; result == 0 && i < count; i++)
        result = json_array_append_new(runs, run_json(config, &figures[i]));
    json_t *report = json_pack("{s:o, s:o, s:b, s:o}", "model", string_json(config->model), "config",
                               config_json(config), "interrupted", config->interrupted, "runs", runs);
    if (report && result == 0) {
        json_dumpf(report, out, JSON_COMPACT | JSON_REAL_PRECISION(9));
        putc('\n', out);
    }
    result = report ? result : -1;
    json_decref(report);
    return result;
}
