#ifndef MOED_CLIENT_LOAD_PLAN_H
#define MOED_CLIENT_LOAD_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/load_trace.h"
#include "common/status.h"

/*
 * What a load consists of, and when it is due. Everything is a function of the seed and a request's index alone, so
 * neither the server's speed nor the number of streams changes what is sent.
 */

/* A length in tokens: "N", "MIN:MAX" (each as likely as any other) or "lognormal:MEAN:SIGMA" (MEAN: of the lengths;
 * SIGMA: standard deviation of their natural logarithm; rounded, and at least 1). */
struct load_length {
    enum { LENGTH_UNIFORM, LENGTH_LOGNORMAL } kind;
    uint32_t min, max; /* uniform; N is N:N */
    double mean, sigma;
};

enum { LOAD_LENGTH_MAX = 1 << 24 };

/* `option` names the text in errors. */
int load_length_parse(const char *option, const char *text, struct load_length *out, struct status *status);

/* What the requests hold. Plain data; the trace is borrowed. */
struct load_mix {
    uint64_t seed;        /* of lengths, arrivals and token ids */
    uint64_t prefix_seed; /* of the tokens that prompts share */
    uint32_t vocab_size, context_length;
    struct load_length prompt, output; /* unless there is a trace */
    uint32_t shared_prefix;
    const struct load_trace *trace; /* NULL: none */
};

/* One request. */
struct load_request {
    uint64_t index;
    uint32_t prompt_tokens, output_tokens; /* at least 1 each, together within the context */
    uint32_t shared_prefix;                /* at most prompt_tokens */
    uint64_t prefix_id;
};

/* Refuses lengths that do not fit the context, naming `source` (the trace's file) and its line, or the options. Draws
 * of a lognormal length are not refused but cut. */
int load_mix_check(const struct load_mix *mix, const char *source, struct status *status);
/* With a trace, index must be below its count. */
void load_mix_request(const struct load_mix *mix, uint64_t index, struct load_request *out);
/* Fills ids[prompt_tokens]. */
void load_mix_prompt(const struct load_mix *mix, const struct load_request *request, uint32_t *ids);

enum load_arrivals_kind { ARRIVALS_POISSON, ARRIVALS_CONSTANT, ARRIVALS_TRACE };

/* The intended times of an open loop: set kind, rate and seed, or kind and trace, and zero the rest. */
struct load_arrivals {
    enum load_arrivals_kind kind;
    double rate; /* a second */
    uint64_t seed;
    const struct load_trace *trace;
    uint64_t next; /* index of the next one */
    double at_s;
};

/* Seconds from the first possible one to the next one, never falling. False: the trace has ended. */
bool load_arrivals_next(struct load_arrivals *arrivals, double *at_s);

#endif
