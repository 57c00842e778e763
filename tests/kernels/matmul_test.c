/* matmul_tile of every instruction set: against plain C to the bit, and plain C against sums in double. */
#include "tests/kernels/quant_blocks.h"
#include "tests/tap.h"

enum { TOKENS = 40 };

struct product {
    enum quant_type type;
    uint32_t k, rows;
    size_t row_bytes, x_bytes;
    uint8_t *weights;
    float *x;          /* [TOKENS][k] */
    uint8_t *tile, *q; /* q: [TOKENS] activations, or x again */
    const void *inputs[TOKENS];
    float y[TOKENS][CPU_TILE_ROWS];
    float *outputs[TOKENS];
};

static void product_create(struct product *p, struct random *random, enum quant_type type, uint32_t k, uint32_t rows,
                           bool extreme) {
    const struct cpu_kernels *c = cpu_kernels_select(CPU_ISA_C);
    const struct quant_format *format = quant_format(type);
    *p = (struct product){.type = type, .k = k, .rows = rows};
    p->row_bytes = (size_t)k / format->block_weights * format->block_bytes;
    p->weights = aligned_bytes(rows * p->row_bytes);
    p->x = aligned_bytes(TOKENS * k * sizeof(float));
    p->tile = aligned_bytes(cpu_tile_bytes(type, k));
    p->x_bytes = cpu_type_is_quantized(type) ? cpu_activation_bytes(k) : k * sizeof(float);
    p->q = aligned_bytes(TOKENS * p->x_bytes);
    for (uint32_t r = 0; r < rows; r++)
        random_row(random, type, k, extreme, p->weights + r * p->row_bytes);
    for (uint32_t i = 0; i < TOKENS * k; i++) {
        p->x[i] = random_float(random) * (i % 97 == 0 ? 30 : 1);
        if (extreme && i / k % 2 == 0)
            p->x[i] = p->x[i] < 0 ? -1 : 1;
    }
    c->pack(type, k, p->weights, p->row_bytes, rows, p->tile);
    for (uint32_t t = 0; t < TOKENS; t++) {
        if (cpu_type_is_quantized(type))
            c->quantize(p->x + t * k, k, (struct cpu_activation *)(p->q + t * p->x_bytes));
        else
            memcpy(p->q + t * p->x_bytes, p->x + t * k, p->x_bytes);
        p->inputs[t] = p->q + t * p->x_bytes;
        p->outputs[t] = p->y[t];
    }
}

static void product_destroy(struct product *p) {
    free(p->weights);
    free(p->x);
    free(p->tile);
    free(p->q);
}

static void product_run(struct product *p, const struct cpu_kernels *kernels, uint32_t first, uint32_t n) {
    for (uint32_t t = first; t < first + n; t++)
        for (uint32_t r = 0; r < CPU_TILE_ROWS; r++)
            p->y[t][r] = -12345;
    kernels->matmul_tile(p->type, p->k, p->tile, p->rows, p->inputs + first, p->outputs + first, n);
}

/* What is stored beside the tile's rows must stay untouched. */
static bool untouched(const struct product *p, uint32_t n) {
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t r = p->rows; r < CPU_TILE_ROWS; r++)
            if (p->y[t][r] != -12345)
                return false;
    return true;
}

/* x[i] as the product sees it, and how far that may be from the float. */
static double input(const struct product *p, uint32_t t, uint32_t i, double *distance) {
    if (!cpu_type_is_quantized(p->type)) {
        *distance = 0;
        return p->x[t * p->k + i];
    }
    const struct cpu_activation *a = (const struct cpu_activation *)p->inputs[t] + i / 32;
    *distance = (double)a->scale * 0.50001;
    return (double)a->scale * a->q[i % 32];
}

static bool near_reference(const struct product *p) {
    for (uint32_t t = 0; t < TOKENS; t += 7)
        for (uint32_t r = 0; r < p->rows; r++) {
            double exact = 0, quantized = 0, size = 0, slack = 0;
            for (uint32_t i = 0; i < p->k; i++) {
                double distance, x = input(p, t, i, &distance);
                double w = weight_reference(p->type, p->weights + r * p->row_bytes, i);
                exact += w * (double)p->x[t * p->k + i];
                quantized += w * x;
                size += fabs(w * x);
                slack += fabs(w) * distance;
            }
            double y = p->y[t][r];
            /* Minima are subtracted group by group, so that terms are larger than the weights they make. */
            double tight = 1e-5 * size + (p->type == QUANT_Q4_K || p->type == QUANT_Q5_K ? 1e-5 * slack : 0);
            if (!(fabs(y - quantized) <= tight) || !(fabs(y - exact) <= slack + tight)) {
                tap_note("%s k %u rows %u token %u row %u: %.9g, quantized %.9g, exact %.9g, size %.9g slack %.9g",
                         quant_format(p->type)->name, p->k, p->rows, t, r, y, quantized, exact, size, slack);
                return false;
            }
        }
    return true;
}

static bool equal(const struct product *p, const float (*y)[CPU_TILE_ROWS], uint32_t first, uint32_t n) {
    for (uint32_t t = first; t < first + n; t++)
        for (uint32_t r = 0; r < p->rows; r++)
            if (!same_float(p->y[t][r], y[t][r])) {
                tap_note("%s k %u rows %u n %u token %u row %u: %.9g, plain C %.9g", quant_format(p->type)->name, p->k,
                         p->rows, n, t, r, p->y[t][r], y[t][r]);
                return false;
            }
    return true;
}

static bool same_at_every_n(struct product *p, const struct cpu_kernels *kernels, const float (*y)[CPU_TILE_ROWS],
                            struct random *random) {
    for (uint32_t n = 1; n <= TOKENS; n++) {
        uint32_t first = random_below(random, TOKENS - n + 1);
        product_run(p, kernels, first, n);
        if (!equal(p, y, first, n))
            return false;
    }
    return true;
}

static void test_type(struct random *random, enum quant_type type) {
    static const uint32_t float_k[] = {1, 2, 3, 5, 64, 127, 257}, q8_0_k[] = {32, 64, 96, 352}, k_k[] = {256, 512, 768};
    const char *name = quant_format(type)->name;
    const uint32_t *ks = type == QUANT_Q8_0 ? q8_0_k : cpu_type_is_quantized(type) ? k_k : float_k;
    uint32_t count = type == QUANT_Q8_0 ? 4 : cpu_type_is_quantized(type) ? 3 : 7;
    bool close = true, same[3] = {true, true, true}, invariant[3] = {true, true, true}, inside[3] = {true, true, true};
    for (uint32_t round = 0; round < 24; round++) {
        struct product p;
        uint32_t rows = round < 16 ? round + 1 : 16;
        bool extreme = round % 4 == 3 && cpu_type_is_quantized(type);
        float y[TOKENS][CPU_TILE_ROWS];
        product_create(&p, random, type, ks[round % count], rows, extreme);
        product_run(&p, cpu_kernels_select(CPU_ISA_C), 0, TOKENS);
        memcpy(y, p.y, sizeof y);
        close = close && near_reference(&p);
        for (int isa = CPU_ISA_C; isa <= CPU_ISA_AVX512; isa++) {
            const struct cpu_kernels *kernels = cpu_kernels_select(isa);
            product_run(&p, kernels, 0, TOKENS);
            same[isa] = same[isa] && equal(&p, y, 0, TOKENS);
            inside[isa] = inside[isa] && untouched(&p, TOKENS);
            invariant[isa] = invariant[isa] && same_at_every_n(&p, kernels, y, random);
        }
        product_destroy(&p);
    }
    tap_ok(close, "%s: plain C is within the bounds of int8 activations, and of their exact product", name);
    for (int isa = CPU_ISA_C; isa <= CPU_ISA_AVX512; isa++) {
        const struct cpu_kernels *kernels = cpu_kernels_select(isa);
        if ((int)kernels->isa != isa) {
            tap_skip("%s: this processor has no instruction set %d", name, isa);
            continue;
        }
        tap_ok(same[isa], "%s %s: the bits of plain C", name, kernels->name);
        tap_ok(invariant[isa], "%s %s: the same bits for any number of tokens", name, kernels->name);
        tap_ok(inside[isa], "%s %s: stores no row but the tile's", name, kernels->name);
    }
}

/* A NaN or Inf among the activations, or a NaN scale among the weights, must reach the output, and only there. */
static void test_not_finite(struct random *random, enum quant_type type) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    bool shows = true, contained = true;
    for (int isa = CPU_ISA_C; isa <= CPU_ISA_AVX512; isa++)
        for (int b = 0; b < 3; b++) {
            const struct cpu_kernels *kernels = cpu_kernels_select(isa);
            struct product p;
            product_create(&p, random, type, 512, 16, false);
            float *x = p.x + 3 * p.k;
            x[random_below(random, p.k)] = bad[b];
            if (cpu_type_is_quantized(type))
                kernels->quantize(x, p.k, (struct cpu_activation *)(p.q + 3 * p.x_bytes));
            else
                memcpy(p.q + 3 * p.x_bytes, x, p.x_bytes);
            product_run(&p, kernels, 0, TOKENS);
            for (uint32_t t = 0; t < TOKENS; t++)
                for (uint32_t r = 0; r < 16; r++) {
                    shows = shows && (t != 3 || !isfinite(p.y[t][r]));
                    contained = contained && (t == 3 || isfinite(p.y[t][r]));
                }
            product_destroy(&p);
        }
    tap_ok(shows, "%s: NaN and Inf in a token's activations show in its output", quant_format(type)->name);
    tap_ok(contained, "%s: and in no other token's", quant_format(type)->name);
}

int main(void) {
    struct random random = {0};
    const char *seed = getenv("MOED_TEST_SEED");
    random.state = seed != NULL ? strtoull(seed, NULL, 0) : 20;
    tap_note("seed %llu (MOED_TEST_SEED)", (unsigned long long)random.state);
    for (int i = 0; i < QUANT_TYPES; i++)
        test_type(&random, quant_types[i]);
    for (int i = 0; i < QUANT_TYPES; i++)
        test_not_finite(&random, quant_types[i]);
    return tap_done();
}
