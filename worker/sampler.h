#ifndef MOED_WORKER_SAMPLER_H
#define MOED_WORKER_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SAMPLER_LOGPROBS_MAX = 20 };

/* As moed.v1.Sampling, checked: no NaN, and zero means off. */
struct sampling {
    float temperature; /* 0: greedy */
    uint32_t top_k;
    float top_p, min_p;
    uint64_t seed;
    float repetition_penalty, presence_penalty, frequency_penalty;
};

struct sampled {
    uint32_t token;
    float logprob; /* natural logarithm, from the logits before penalties and temperature; 0 where logprobs is 0 */
    uint32_t top_count;
    uint32_t top_ids[SAMPLER_LOGPROBS_MAX];
    float top_logprobs[SAMPLER_LOGPROBS_MAX];
};

/* Bytes of scratch that sampler_sample needs for a vocabulary. */
size_t sampler_scratch_bytes(uint32_t vocab_size);

/* Whether the history matters, and not only its length. */
bool sampler_penalizes(const struct sampling *sampling);
/* The random bits of the token that follows so many. */
uint64_t sampler_random(const struct sampling *sampling, uint32_t history_length);

/*
 * Chooses a token from logits[vocab_size]: penalties, then greedy, or temperature, top-k, top-p, min-p and a draw.
 * The draw depends on (seed, history_length) alone, so a resumed sequence goes on as it would have. The repetition
 * penalty counts history[0 .. history_length), presence and frequency what follows the first prompt_length tokens.
 * `logprobs` alternatives are listed in falling order. Ties go to the lower token id. The logits are finite and history
 * ids below vocab_size. Equal inputs give equal outputs on every machine.
 */
void sampler_sample(const float *logits, uint32_t vocab_size, const struct sampling *sampling, const uint32_t *history,
                    uint32_t history_length, uint32_t prompt_length, uint32_t logprobs, void *scratch,
                    struct sampled *out);

#endif
