/*
 * The golden cases of tests/data/golden: logits and routes of models that a script or moed-synth makes again. The
 * float64 reference must give them to the last digits, every executor within the contract's limits and with the same
 * greedy tokens.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/log.h"
#include "tests/kernels/parity.h"
#include "tests/tap.h"
#include "worker/backend.h"

enum { TOKENS_MAX = 64, LINE_MAX_BYTES = 2048 };

struct golden_case {
    char name[64], maker[64], options[256];
    uint32_t tokens[TOKENS_MAX], count;
    uint32_t greedy[TOKENS_MAX], greedy_count;
    float *logits;  /* [count][vocab] */
    double *routes; /* [layers][count]: the experts, then their weights */
};

static const char *source_directory, *build_directory;
static const struct executor_ops *cuda; /* where there is a device */

/* What stands behind "key": in a line of cases.jsonl, which make_golden.sh writes. */
static const char *field(const char *line, const char *key) {
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *found = strstr(line, quoted);
    return found ? found + strlen(quoted) : "";
}

static void parse_string(const char *line, const char *key, char *out, size_t size) {
    const char *value = field(line, key);
    if (*value == '"') snprintf(out, size, "%.*s", (int)strcspn(value + 1, "\""), value + 1);
}

static uint32_t parse_numbers(const char *line, const char *key, uint32_t out[TOKENS_MAX]) {
    const char *at = field(line, key);
    uint32_t count = 0;
    while (*at && *at != ']' && count < TOKENS_MAX) {
        char *end;
        unsigned long value = strtoul(at + 1, &end, 10); /* behind "[" or "," */
        if (end == at + 1) return 0;
        out[count++] = (uint32_t)value;
        at = end;
    }
    return count;
}

static bool parse_case(const char *line, struct golden_case *golden) {
    memset(golden, 0, sizeof *golden);
    parse_string(line, "name", golden->name, sizeof golden->name);
    parse_string(line, "maker", golden->maker, sizeof golden->maker);
    parse_string(line, "options", golden->options, sizeof golden->options);
    golden->count = parse_numbers(line, "tokens", golden->tokens);
    golden->greedy_count = parse_numbers(line, "greedy", golden->greedy);
    return *golden->name && *golden->maker && golden->count && golden->greedy_count &&
           golden->count + golden->greedy_count <= TOKENS_MAX;
}

static FILE *open_golden(const char *name, const char *suffix) {
    char path[1024];
    snprintf(path, sizeof path, "%s/tests/data/golden/%s%s", source_directory, name, suffix);
    FILE *file = fopen(path, "rb");
    if (!file) tap_note("%s cannot be opened", path);
    return file;
}

/* The next number of a JSON file that holds nothing but nested lists of numbers. */
static bool next_number(FILE *file, double *out) {
    while (fscanf(file, "%lf", out) != 1)
        if (fgetc(file) == EOF) return false;
    return true;
}

static bool load_results(struct golden_case *golden, const struct reference_config *c) {
    size_t logits = (size_t)golden->count * c->vocab, routes = (size_t)c->layers * golden->count * 2 * c->topk;
    FILE *logits_file = open_golden(golden->name, ".f32"), *routes_file = open_golden(golden->name, ".routes.json");
    golden->logits = malloc(logits * sizeof *golden->logits);
    golden->routes = malloc(routes * sizeof *golden->routes);
    bool good = logits_file && routes_file && golden->logits && golden->routes &&
                fread(golden->logits, sizeof *golden->logits, logits, logits_file) == logits &&
                fgetc(logits_file) == EOF;
    double surplus;
    for (size_t i = 0; i < routes && good; i++) good = next_number(routes_file, &golden->routes[i]);
    good = good && !next_number(routes_file, &surplus);
    if (logits_file) fclose(logits_file);
    if (routes_file) fclose(routes_file);
    return good;
}

static bool run(const char *command) {
    fflush(stdout);
    return system(command) == 0;
}

static const char *find_python(void) {
    static const char *const names[] = {"python3", "/usr/bin/python3"};
    const char *given = getenv("PYTHON");
    char command[512];
    for (size_t i = 0; i < 1 + sizeof names / sizeof names[0]; i++) {
        const char *name = i ? names[i - 1] : given;
        snprintf(command, sizeof command, "'%s' -c 'import numpy' >/dev/null 2>&1", name ? name : "");
        if (name && run(command)) return name;
    }
    return NULL;
}

static bool make_model(const struct golden_case *golden, const char *python, const char *path) {
    char command[2048];
    if (strcmp(golden->maker, "moed-synth") == 0)
        snprintf(command, sizeof command, "'%s/moed-synth' --quiet %s '%s'", build_directory, golden->options, path);
    else
        snprintf(command, sizeof command, "'%s' '%s/tests/data/%s' '%s' %s", python, source_directory, golden->maker,
                 path, golden->options);
    return run(command);
}

/* The file's logits are rounded to float, no more. */
static void check_reference(const struct golden_case *golden, const struct reference_config *c,
                            const struct reference_result *result) {
    double logit_error = 0, weight_error = 0;
    bool same_experts = true;
    for (size_t i = 0; i < (size_t)golden->count * c->vocab; i++) {
        double error = fabs(result->logits[i] - (double)golden->logits[i]) / fmax(1, fabs(result->logits[i]));
        if (!(error <= logit_error)) logit_error = error;
    }
    const double *next = golden->routes;
    for (uint32_t layer = 0; layer < c->layers; layer++) {
        for (uint32_t t = 0; t < golden->count; t++, next += 2 * c->topk) {
            size_t at = ((size_t)t * c->layers + layer) * c->topk;
            for (uint32_t k = 0; k < c->topk; k++) {
                same_experts &= (double)result->experts[at + k] == next[k];
                weight_error = fmax(weight_error, fabs(result->weights[at + k] - next[c->topk + k]));
            }
        }
    }
    tap_ok(logit_error <= 1e-6, "%s: the reference's logits, off by %.1e", golden->name, logit_error);
    tap_ok(same_experts && weight_error <= 1e-9, "%s: the reference's routes, off by %.1e", golden->name, weight_error);
}

/* Token for token as long as the reference's choice is clear; another choice at a near-tie ends the comparison. */
static void check_greedy(const struct golden_case *golden, struct executor_driver *driver,
                         const struct reference *reference) {
    const struct reference_config *c = reference_config(reference);
    struct reference_result result;
    struct status status = {0};
    uint32_t tokens[TOKENS_MAX], found[TOKENS_MAX], clear = 0;
    bool same = true;
    memcpy(tokens, golden->tokens, golden->count * sizeof *tokens);
    memcpy(tokens + golden->count, golden->greedy, golden->greedy_count * sizeof *tokens);
    if (reference_forward(reference, tokens, golden->count + golden->greedy_count, NULL, &result, &status) ||
        driver_greedy(driver, golden->tokens, golden->count, golden->greedy_count, found, &status)) {
        tap_ok(false, "%s: greedy: %s", golden->name, status.message);
        return;
    }
    for (uint32_t i = 0; i < golden->greedy_count && same; i++) {
        double lead;
        size_t row = golden->count - 1 + i;
        uint32_t best = parity_argmax(result.logits + row * c->vocab, c->vocab, &lead);
        if (best != golden->greedy[i]) same = false;
        if (found[i] != best && lead < parity_clear_lead) break;
        same &= found[i] == best;
        clear += same;
    }
    tap_ok(same, "%s: %" PRIu32 " of %" PRIu32 " greedy tokens, up to a near-tie", golden->name, clear,
           golden->greedy_count);
    reference_result_free(&result);
}

static void check_executor(const struct golden_case *golden, const struct executor_ops *ops, const char *path,
                           const struct reference *reference) {
    struct executor_driver *driver = NULL;
    struct driver_result result = {0};
    struct reference_result expected = {0};
    struct parity parity;
    struct status status = {0};
    char text[PARITY_TEXT];
    int opened = driver_open(ops, path, "auto", "auto", "f16", &driver, &status);
    if (opened && status.code == STATUS_UNIMPLEMENTED) {
        tap_skip("%s: %s: %s", golden->name, ops->name, status.message);
    } else if (opened || driver_forward(driver, golden->tokens, golden->count, 0, &result, &status) ||
        reference_forward(reference, golden->tokens, golden->count, result.experts, &expected, &status)) {
        tap_ok(false, "%s: %s: %s", golden->name, ops->name, status.message);
    } else {
        parity_measure(reference_config(reference), &expected, &result, &parity);
        bool holds = parity_holds(&parity, text);
        tap_ok(holds, "%s: %s: %s", golden->name, ops->name, text);
        check_greedy(golden, driver, reference);
    }
    reference_result_free(&expected);
    driver_result_free(&result);
    driver_close(driver);
}

static void check_case(struct golden_case *golden, const char *path) {
    struct reference *reference = NULL;
    struct reference_result result = {0};
    struct status status = {0};
    if (reference_open(path, &reference, &status)) {
        tap_ok(false, "%s: %s", golden->name, status.message);
    } else if (!load_results(golden, reference_config(reference))) {
        tap_ok(false, "%s: the golden results do not fit the model", golden->name);
    } else if (reference_forward(reference, golden->tokens, golden->count, NULL, &result, &status)) {
        tap_ok(false, "%s: %s", golden->name, status.message);
    } else {
        check_reference(golden, reference_config(reference), &result);
        check_executor(golden, &executor_cpu, path, reference);
        if (cuda)
            check_executor(golden, cuda, path, reference);
    }
    reference_result_free(&result);
    reference_close(reference);
    free(golden->logits);
    free(golden->routes);
}

int main(void) {
    char directory[] = "/tmp/moed-golden-test-XXXXXX", path[64], line[LINE_MAX_BYTES];
    log_setup("golden_test", LOG_WARN, LOG_TEXT);
    source_directory = getenv("top_srcdir") ? getenv("top_srcdir") : ".";
    build_directory = getenv("top_builddir") ? getenv("top_builddir") : ".";
    struct status status = {0};
    cuda = backend_find("cuda", &status);
    if (cuda && !cuda->answers())
        cuda = NULL;
    const char *python = find_python();
    FILE *cases = open_golden("cases", ".jsonl");
    if (!cases || !mkdtemp(directory)) return EXIT_FAILURE;
    snprintf(path, sizeof path, "%s/m.gguf", directory);

    while (fgets(line, sizeof line, cases)) {
        struct golden_case golden;
        if (!parse_case(line, &golden)) tap_ok(false, "cases.jsonl: %.60s", line);
        else if (!python && strcmp(golden.maker, "moed-synth") != 0)
            tap_skip("%s: needs python3 with numpy", golden.name);
        else if (tap_ok(make_model(&golden, python, path), "%s: the model is made again", golden.name))
            check_case(&golden, path);
        unlink(path);
    }
    fclose(cases);
    rmdir(directory);
    return tap_done();
}
