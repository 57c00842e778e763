#include "tests/kernels/parity.h"

#include <math.h>
#include <stdio.h>

const double parity_clear_lead = 0.1;

/* An expert's weight may be off by this much. */
static const double weight_width = 0.1;

static double cosine(const double *a, const float *b, uint32_t n) {
    double ab = 0, aa = 0, bb = 0;
    for (uint32_t i = 0; i < n; i++) {
        ab += a[i] * (double)b[i];
        aa += a[i] * a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return ab / sqrt(aa * bb);
}

/* One token in one layer. Experts of equal weight may stand in another order. */
static void measure_route(const struct reference_config *c, const uint32_t *expected, const double *expected_weights,
                          const uint32_t *found, const float *found_weights, struct parity *parity) {
    double sum = 0;
    uint32_t same = 0;
    for (uint32_t k = 0; k < c->topk; k++) {
        sum += (double)found_weights[k];
        for (uint32_t j = 0; j < c->topk; j++) {
            if (found[j] != expected[k]) continue;
            double error = fabs((double)found_weights[j] - expected_weights[k]);
            if (!(error <= parity->weight_error)) parity->weight_error = error;
            same++;
            break;
        }
    }
    parity->routes++;
    parity->wrong += same != c->topk;
    if (!(fabs(sum - 1) <= parity->sum_error)) parity->sum_error = fabs(sum - 1);
}

void parity_measure(const struct reference_config *c, const struct reference_result *reference,
                    const struct driver_result *result, struct parity *parity) {
    *parity = (struct parity){
        .finite = true, .cosine_worst = 1, .near_ties = reference->followed, .outliers = reference->outliers};
    for (uint32_t t = 0; t < reference->tokens; t++) {
        const float *row = result->logits + (size_t)t * c->vocab;
        for (uint32_t i = 0; i < c->vocab; i++) parity->finite &= isfinite(row[i]) != 0;
        double similarity = cosine(reference->logits + (size_t)t * c->vocab, row, c->vocab);
        if (!(similarity >= parity->cosine_worst)) parity->cosine_worst = similarity;
        parity->cosine_mean += similarity / reference->tokens;
    }
    for (size_t i = 0; i < (size_t)reference->tokens * c->layers; i++)
        measure_route(c, reference->experts + i * c->topk, reference->weights + i * c->topk,
                      result->experts + i * c->topk, result->weights + i * c->topk, parity);
}

bool parity_holds(const struct parity *parity, char text[PARITY_TEXT]) {
    snprintf(text, PARITY_TEXT,
             "cosine %.6f at least, %.6f on average; of %u routes %u near-ties, %u of them outliers, %u wrong; "
             "weights off by %.4f, sums by %.1e%s",
             parity->cosine_worst, parity->cosine_mean, parity->routes, parity->near_ties, parity->outliers,
             parity->wrong, parity->weight_error, parity->sum_error, parity->finite ? "" : "; not finite");
    return parity->finite && parity->cosine_worst >= 0.99 && parity->cosine_mean >= 0.999 && parity->wrong == 0 &&
           parity->outliers <= (parity->routes < 100 ? 1 : parity->routes / 100) &&
           parity->sum_error <= 1e-6 && parity->weight_error <= weight_width;
}

uint32_t parity_argmax(const double *logits, uint32_t count, double *lead) {
    uint32_t best = 0;
    double second = -INFINITY;
    for (uint32_t i = 1; i < count; i++) {
        if (logits[i] > logits[best]) {
            second = logits[best];
            best = i;
        } else if (logits[i] > second) {
            second = logits[i];
        }
    }
    *lead = logits[best] - second;
    return best;
}
