/* The operations of struct cpu_kernels that are no matrix product, for one instruction set; see cpu.h. */

#include "kernels/cpu/internal.h"
#include "kernels/cpu/vector_lanes.h"

void VECTOR_NAME(cpu_rms_norm)(const float *x, const float *weight, uint32_t n, float epsilon, float *y) {
    uint32_t whole = n & ~15u, rest = n & 15;
    struct lanes sum = lanes_set(0);
    for (uint32_t i = 0; i < whole; i += 16)
        sum = lanes_fma(lanes_load(x + i), lanes_load(x + i), sum);
    if (rest) {
        struct lanes part = lanes_load_part(x + whole, rest);
        sum = lanes_fma(part, part, sum);
    }
    struct lanes scale = lanes_set(1 / sqrtf(lanes_sum(sum) / (float)n + epsilon));
    for (uint32_t i = 0; i < whole; i += 16)
        lanes_store(y + i, lanes_mul(lanes_mul(lanes_load(x + i), scale), lanes_load(weight + i)));
    if (rest) {
        struct lanes part = lanes_mul(lanes_load_part(x + whole, rest), scale);
        lanes_store_part(y + whole, lanes_mul(part, lanes_load_part(weight + whole, rest)), rest);
    }
}

static inline void rotate(struct lanes *a, struct lanes *b, struct lanes cos, struct lanes sin) {
    struct lanes x = *a, y = *b;
    *a = lanes_fma(x, cos, lanes_sub(lanes_set(0), lanes_mul(y, sin)));
    *b = lanes_fma(x, sin, lanes_mul(y, cos));
}

void VECTOR_NAME(cpu_rope)(float *x, uint32_t dim, const float *cos_sin) {
    uint32_t half = dim / 2, whole = half & ~15u, rest = half & 15;
    float *high = x + half;
    struct lanes a, b, cos, sin;
    for (uint32_t i = 0; i < whole; i += 16) {
        a = lanes_load(x + i);
        b = lanes_load(high + i);
        lanes_load_pairs(cos_sin + 2 * i, &cos, &sin);
        rotate(&a, &b, cos, sin);
        lanes_store(x + i, a);
        lanes_store(high + i, b);
    }
    if (rest) {
        float table[32] = {0};
        memcpy(table, cos_sin + 2 * whole, 2 * rest * sizeof *table);
        a = lanes_load_part(x + whole, rest);
        b = lanes_load_part(high + whole, rest);
        lanes_load_pairs(table, &cos, &sin);
        rotate(&a, &b, cos, sin);
        lanes_store_part(x + whole, a, rest);
        lanes_store_part(high + whole, b, rest);
    }
}

static inline struct lanes gated(struct lanes gate, struct lanes up) {
    struct lanes sigmoid = lanes_add(lanes_set(1), lanes_exp(lanes_sub(lanes_set(0), gate)));
    return lanes_mul(lanes_div(gate, sigmoid), up);
}

void VECTOR_NAME(cpu_swiglu)(const float *gate, const float *up, uint32_t n, float *y) {
    uint32_t whole = n & ~15u, rest = n & 15;
    for (uint32_t i = 0; i < whole; i += 16)
        lanes_store(y + i, gated(lanes_load(gate + i), lanes_load(up + i)));
    if (rest) {
        struct lanes part = gated(lanes_load_part(gate + whole, rest), lanes_load_part(up + whole, rest));
        lanes_store_part(y + whole, part, rest);
    }
}

void VECTOR_NAME(cpu_axpy)(float scale, const float *x, uint32_t n, float *y) {
    uint32_t whole = n & ~15u, rest = n & 15;
    struct lanes factor = lanes_set(scale);
    for (uint32_t i = 0; i < whole; i += 16)
        lanes_store(y + i, lanes_fma(factor, lanes_load(x + i), lanes_load(y + i)));
    if (rest) {
        struct lanes part = lanes_fma(factor, lanes_load_part(x + whole, rest), lanes_load_part(y + whole, rest));
        lanes_store_part(y + whole, part, rest);
    }
}

void VECTOR_NAME(cpu_f32_to_f16)(const float *x, uint32_t n, uint16_t *y) {
    uint32_t whole = n & ~15u, rest = n & 15;
    for (uint32_t i = 0; i < whole; i += 16)
        lanes_store_f16(y + i, lanes_load(x + i));
    if (rest) {
        uint16_t part[16];
        lanes_store_f16(part, lanes_load_part(x + whole, rest));
        memcpy(y + whole, part, rest * sizeof *part);
    }
}

/* The first lanes of a row of logits; behind its end -Inf, which no softmax counts. */
static inline struct lanes logits_at(const float *logits, uint32_t experts, uint32_t i) {
    if (experts - i >= 16)
        return lanes_load(logits + i);
    float part[16];
    for (int j = 0; j < 16; j++)
        part[j] = -INFINITY;
    memcpy(part, logits + i, (experts - i) * sizeof *part);
    return lanes_load(part);
}

void VECTOR_NAME(cpu_route)(const float *logits, uint32_t experts, uint32_t used, uint32_t *chosen, float *weights) {
    struct lanes greatest = lanes_set(-INFINITY), sum = lanes_set(0);
    for (uint32_t i = 0; i < experts; i += 16)
        greatest = lanes_max(logits_at(logits, experts, i), greatest);
    float max = lanes_greatest(greatest);
    for (uint32_t i = 0; i < experts; i += 16)
        sum = lanes_add(sum, lanes_exp(lanes_sub(logits_at(logits, experts, i), lanes_set(max))));
    float total = lanes_sum(sum);

    /* Insertion into the list of the best so far; nothing is greater than a NaN, so none is ever taken twice. */
    uint32_t count = 0;
    for (uint32_t i = 0; i < experts; i++) {
        uint32_t at = count;
        while (at > 0 && logits[i] > logits[chosen[at - 1]])
            at--;
        if (at == used)
            continue;
        count += count < used;
        memmove(chosen + at + 1, chosen + at, (count - 1 - at) * sizeof *chosen);
        chosen[at] = i;
    }

    double chosen_sum = 0; /* in double, so that many experts' weights still sum to 1 */
    for (uint32_t j = 0; j < used; j++) {
        weights[j] = lanes_first(lanes_exp(lanes_set(logits[chosen[j]] - max))) / total;
        chosen_sum += weights[j];
    }
    for (uint32_t j = 0; j < used; j++)
        weights[j] = (float)(weights[j] / chosen_sum);
}
