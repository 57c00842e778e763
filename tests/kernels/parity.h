#ifndef MOED_TESTS_KERNELS_PARITY_H
#define MOED_TESTS_KERNELS_PARITY_H

#include <stdbool.h>

#include "tests/kernels/executor_driver.h"
#include "tests/reference/reference.h"

/* How an executor's logits and routes of one sequence compare with the reference's. */
struct parity {
    bool finite;
    double cosine_worst, cosine_mean; /* of the positions' logits */
    uint32_t routes;                  /* tokens times layers */
    uint32_t near_ties;               /* of them decided in another way, and followed by the reference */
    uint32_t outliers;                /* of the near-ties, beyond REFERENCE_TIE */
    uint32_t wrong;                   /* of them with other experts */
    double sum_error;                 /* largest |sum of a token's weights - 1| */
    double weight_error;              /* largest difference of an expert's weight */
};

/* `reference` has followed the result's experts. */
void parity_measure(const struct reference_config *config, const struct reference_result *reference,
                    const struct driver_result *result, struct parity *parity);

enum { PARITY_TEXT = 256 };

/*
 * Whether the contract holds: cosine >= 0.99 everywhere and 0.999 on average, the same experts but for near-ties (outliers
 * among them at one route in a hundred, or one of fewer), sums of 1 +- 1e-6, finite. The figures go into text.
 */
bool parity_holds(const struct parity *parity, char text[PARITY_TEXT]);

/* The likeliest token of a row of the reference's logits, and by how much it leads. */
uint32_t parity_argmax(const double *logits, uint32_t count, double *lead);

/* A lead that no executor's rounding bridges, for logits whose deviation is about 1. */
extern const double parity_clear_lead;

#endif
