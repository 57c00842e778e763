#include "client/load_plan.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a draw is for: draws of different purposes share nothing. */
enum purpose { DRAW_PROMPT_LENGTH = 1, DRAW_OUTPUT_LENGTH, DRAW_ARRIVAL, DRAW_TOKENS, DRAW_PREFIX };

/* The finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014). */
static uint64_t scramble(uint64_t z) {
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static const uint64_t golden = UINT64_C(0x9e3779b97f4a7c15);

static uint64_t draw_start(uint64_t seed, enum purpose purpose, uint64_t index) {
    return scramble(scramble(seed + golden * (uint64_t)purpose) + golden * (index + 1));
}

static uint64_t draw_next(uint64_t *state) {
    return scramble(*state += golden);
}

/* Above 0, at most 1: its logarithm is finite. */
static double draw_unit(uint64_t *state) {
    return ((double)(draw_next(state) >> 11) + 1) * 0x1p-53;
}

/* Below `bound`, which is small against 2^64. */
static uint32_t draw_below(uint64_t *state, uint32_t bound) {
    return (uint32_t)(((draw_next(state) >> 32) * bound) >> 32);
}

/* ---- lengths */

static bool parse_whole(const char *text, const char **end, uint32_t *out) {
    if (!isdigit((unsigned char)*text))
        return false;
    errno = 0;
    char *stop;
    unsigned long long value = strtoull(text, &stop, 10);
    *end = stop;
    *out = (uint32_t)value;
    return errno == 0 && value >= 1 && value <= LOAD_LENGTH_MAX;
}

static bool parse_real(const char *text, const char **end, double max, double *out) {
    if (!isdigit((unsigned char)*text) || strpbrk(text, "xX"))
        return false;
    char *stop;
    *out = strtod(text, &stop);
    *end = stop;
    return *out <= max;
}

int load_length_parse(const char *option, const char *text, struct load_length *out, struct status *status) {
    static const char lognormal[] = "lognormal:";
    const char *end = "?";
    bool fits;
    *out = (struct load_length){.kind = LENGTH_UNIFORM};
    if (strncmp(text, lognormal, strlen(lognormal)) == 0) {
        out->kind = LENGTH_LOGNORMAL;
        fits = parse_real(text + strlen(lognormal), &end, LOAD_LENGTH_MAX, &out->mean) && out->mean >= 1 &&
               *end == ':' && parse_real(end + 1, &end, 10, &out->sigma);
    } else {
        fits = parse_whole(text, &end, &out->min);
        out->max = out->min;
        if (fits && *end == ':')
            fits = parse_whole(end + 1, &end, &out->max) && out->min <= out->max;
    }
    if (fits && *end == '\0')
        return 0;
    return status_set(status, STATUS_INVALID_ARGUMENT,
                      "option --%s: \"%.100s\" is not N, MIN:MAX (tokens, 1 to %d) or lognormal:MEAN:SIGMA (SIGMA 0 to "
                      "10)",
                      option, text, LOAD_LENGTH_MAX);
}

static uint32_t length_draw(const struct load_length *length, uint64_t state) {
    if (length->kind == LENGTH_UNIFORM)
        return length->min + draw_below(&state, length->max - length->min + 1);
    /* Box and Muller; the logarithm's mean that gives the lengths theirs is ln(mean) - sigma^2 / 2. */
    double radius = sqrt(-2 * log(draw_unit(&state))), angle = 2 * acos(-1) * draw_unit(&state);
    double sigma = length->sigma;
    double value = round(exp(log(length->mean) - sigma * sigma / 2 + sigma * radius * cos(angle)));
    return (uint32_t)fmin(fmax(value, 1), LOAD_LENGTH_MAX);
}

static uint32_t length_sure(const struct load_length *length) {
    return length->kind == LENGTH_UNIFORM ? length->max : 1;
}

/* ---- requests */

int load_mix_check(const struct load_mix *mix, const char *source, struct status *status) {
    if (!mix->trace) {
        uint32_t prompt = length_sure(&mix->prompt), output = length_sure(&mix->output);
        if (prompt + output <= mix->context_length)
            return 0;
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "--prompt-tokens and --output-tokens: up to %" PRIu32 " and %" PRIu32
                          "; the model's context holds %" PRIu32 " together",
                          prompt, output, mix->context_length);
    }
    for (size_t i = 0; i < mix->trace->count; i++) {
        const struct load_trace_entry *entry = &mix->trace->entries[i];
        if (entry->prompt_tokens + entry->output_tokens > mix->context_length)
            return status_set(status, STATUS_INVALID_ARGUMENT,
                              "%s:%" PRIu32 ": prompt_tokens and output_tokens: %" PRIu32 " and %" PRIu32
                              "; the model's context holds %" PRIu32 " together",
                              source, entry->line, entry->prompt_tokens, entry->output_tokens, mix->context_length);
    }
    return 0;
}

static uint32_t smaller(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

void load_mix_request(const struct load_mix *mix, uint64_t index, struct load_request *out) {
    *out = (struct load_request){.index = index};
    if (mix->trace) {
        const struct load_trace_entry *entry = &mix->trace->entries[index];
        out->prompt_tokens = entry->prompt_tokens;
        out->output_tokens = entry->output_tokens;
        out->shared_prefix = entry->shared_prefix;
        out->prefix_id = entry->prefix_id;
        return;
    }
    uint32_t prompt = length_draw(&mix->prompt, draw_start(mix->seed, DRAW_PROMPT_LENGTH, index));
    uint32_t output = length_draw(&mix->output, draw_start(mix->seed, DRAW_OUTPUT_LENGTH, index));
    out->output_tokens = smaller(output, mix->context_length - length_sure(&mix->prompt));
    out->prompt_tokens = smaller(prompt, mix->context_length - out->output_tokens);
    out->shared_prefix = smaller(mix->shared_prefix, out->prompt_tokens);
}

void load_mix_prompt(const struct load_mix *mix, const struct load_request *request, uint32_t *ids) {
    uint64_t state = draw_start(mix->prefix_seed, DRAW_PREFIX, request->prefix_id);
    for (uint32_t i = 0; i < request->prompt_tokens; i++) {
        if (i == request->shared_prefix)
            state = draw_start(mix->seed, DRAW_TOKENS, request->index);
        ids[i] = draw_below(&state, mix->vocab_size);
    }
}

/* ---- arrivals */

bool load_arrivals_next(struct load_arrivals *arrivals, double *at_s) {
    uint64_t index = arrivals->next, state = draw_start(arrivals->seed, DRAW_ARRIVAL, index);
    switch (arrivals->kind) {
    case ARRIVALS_TRACE:
        if (index == arrivals->trace->count)
            return false;
        arrivals->at_s = arrivals->trace->entries[index].arrival_s;
        break;
    case ARRIVALS_CONSTANT:
        arrivals->at_s = (double)index / arrivals->rate;
        break;
    case ARRIVALS_POISSON:
        arrivals->at_s -= log(draw_unit(&state)) / arrivals->rate;
        break;
    }
    arrivals->next++;
    *at_s = arrivals->at_s;
    return true;
}
