#include <float.h>
#include <math.h>

#include "kernels/cpu/internal.h"
#include "kernels/cpu/tile.h"

/* To the nearest integer, ties to even, for |x| < 2^22: the sum with 1.5 * 2^23 has no room for a fraction. */
static int32_t round_to_even(float x) {
    return (int32_t)(f32_to_bits(x + 0x1.8p23f) - f32_to_bits(0x1.8p23f));
}

static void quantize_group(const float *x, struct cpu_activation *out) {
    /* The largest magnitude by its bits: that order is the floats' own, with Inf above all numbers and NaN above Inf. */
    uint32_t largest = 0;
    for (int i = 0; i < 32; i++) {
        uint32_t bits = f32_to_bits(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float max = f32_from_bits(largest);
    *out = (struct cpu_activation){.scale = max / 127};
    if (largest >= 0x7f800000) {
        out->scale = out->sum = NAN;
        return;
    }
    if (out->scale < FLT_MIN) {
        out->scale = 0;
        return;
    }
    float inverse = 127 / max;
    for (int i = 0; i < 32; i++) {
        out->q[i] = (int8_t)round_to_even(x[i] * inverse);
        out->negated[i / 16] -= out->q[i];
    }
    out->sum = out->scale * (float)-(out->negated[0] + out->negated[1]);
}

void cpu_quantize_c(const float *x, uint32_t k, struct cpu_activation *activations) {
    for (uint32_t g = 0; g < k / 32; g++)
        quantize_group(x + 32 * g, activations + g);
}
