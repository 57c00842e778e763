#ifndef MOED_TESTS_REFERENCE_REFERENCE_H
#define MOED_TESTS_REFERENCE_REFERENCE_H

#include <stdint.h>

#include "common/status.h"

/*
 * An independent forward pass of a qwen3moe GGUF in float64, written from the definition of the architecture and of the
 * block formats; it shares no code with kernels/ or worker/. Slow and simple: whole sequence at once, every weight
 * unpacked when it is used. For small models.
 */
struct reference;

struct reference_config {
    uint32_t layers, hidden, heads, kv_heads, head_dim, experts, topk, inter, vocab;
    double rope_freq_base, rms_epsilon;
};

struct reference_result {
    uint32_t tokens;
    double *logits;     /* [tokens][vocab] */
    double *router;     /* [tokens][layers][experts]: the router's logits */
    uint32_t *experts;  /* [tokens][layers][topk], the likeliest first */
    double *weights;    /* the same shape */
    double *residual;   /* [layers]: root mean square of the residual behind each layer, over all tokens */
    uint32_t followed;  /* of tokens times layers, where the choice of `follow` was taken */
    uint32_t outliers;  /* of these, beyond REFERENCE_TIE */
};

/*
 * Router logits no farther apart are a near-tie. Their deviation is about 2 in synthetic models; int8 activations move
 * them by a few hundredths in a layer. Rounding has a tail: of 1,500 random models of parity_test one had a route decided
 * at 0.31. So ties up to the outlier's width are followed, too, and counted: few may be.
 */
#define REFERENCE_TIE 0.3
#define REFERENCE_TIE_OUTLIER 0.4

/* On success *out is to be freed with reference_close. */
int reference_open(const char *path, struct reference **out, struct status *status);
void reference_close(struct reference *reference);
const struct reference_config *reference_config(const struct reference *reference);

/*
 * Runs tokens[count], each below the vocabulary's size. `follow` may hold the experts another implementation chose,
 * [tokens][layers][topk]: where they are another set than the reference's, but only by near-ties, the reference goes on
 * with them, so that what comes behind is compared with the same experts. NULL: its own choice always.
 * On success *result is for reference_result_free.
 */
int reference_forward(const struct reference *reference, const uint32_t *tokens, uint32_t count,
                      const uint32_t *follow, struct reference_result *result, struct status *status);
void reference_result_free(struct reference_result *result);

/* `count` weights of a GGUF type number, from the beginning of a block. 0, or -1 for a type it does not know. */
int reference_unpack(uint32_t type, const unsigned char *blocks, uint64_t count, double *out);

#endif
