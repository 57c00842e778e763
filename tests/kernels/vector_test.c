#include "kernels/cpu/f16.h"
#include "tests/kernels/kernel_test.h"

/* Norm, rope, swiglu, axpy, f16, exp and routing against float64, and each instruction set against plain C. */

enum { LONGEST = 2100, ROUNDS = 60 };

static const struct cpu_kernels *kernels[3];
static int isas;
static const float canary = -12345.5f;

static uint32_t some_length(int round) {
    static const uint32_t borders[] = {1, 2, 15, 16, 17, 31, 32, 33, 128, 2048};
    return round < 10 ? borders[round] : 1 + random_below(LONGEST - 1);
}

static double distance(const float *got, const double *want, uint32_t n) {
    double worst = 0;
    for (uint32_t i = 0; i < n; i++) {
        double error = fabs(got[i] - want[i]) / (fabs(want[i]) + 1e-30);
        worst = error > worst || isnan(error) ? error : worst;
    }
    return worst;
}

static void test_rms_norm(void) {
    static float x[LONGEST], weight[LONGEST], first[LONGEST + 1], y[LONGEST + 1];
    static double want[LONGEST];
    double worst = 0;
    bool same = true, inside = true;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t n = some_length(round);
        random_floats(x, n);
        random_floats(weight, n);
        double sum = 0;
        for (uint32_t i = 0; i < n; i++)
            sum += (double)x[i] * x[i];
        for (uint32_t i = 0; i < n; i++)
            want[i] = x[i] / sqrt(sum / n + (double)1e-6f) * weight[i];
        for (int isa = 0; isa < isas; isa++) {
            y[n] = canary;
            kernels[isa]->rms_norm(x, weight, n, 1e-6f, y);
            if (isa == 0)
                memcpy(first, y, sizeof y);
            worst = fmax(worst, distance(y, want, n));
            same &= same_floats(first, y, n);
            inside &= y[n] == canary;
        }
    }
    tap_ok(worst < 1e-6, "rms_norm: relative error %.2g", worst);
    tap_ok(same && inside, "rms_norm: the same bits everywhere, and none beyond the end");
    float zero[5] = {0}, ones[5] = {1, 1, 1, 1, 1};
    kernels[isas - 1]->rms_norm(zero, ones, 5, 1e-6f, y);
    tap_ok(same_floats(y, zero, 5), "rms_norm: zeros stay zeros");
    zero[3] = NAN;
    kernels[isas - 1]->rms_norm(zero, ones, 5, 1e-6f, y);
    tap_ok(isnan(y[0]) && isnan(y[4]), "rms_norm: a NaN shows in the whole row");
}

static void test_rope(void) {
    float x[513], y[513], first[513], table[512];
    double worst = 0;
    bool same = true, inside = true;
    for (uint32_t dim = 2; dim <= 512; dim += dim < 70 ? 2 : 38) {
        uint32_t half = dim / 2;
        random_floats(x, dim);
        for (uint32_t i = 0; i < half; i++) {
            double angle = random_float() * 100;
            table[2 * i] = (float)cos(angle);
            table[2 * i + 1] = (float)sin(angle);
        }
        for (int isa = 0; isa < isas; isa++) {
            memcpy(y, x, sizeof x);
            y[dim] = canary;
            kernels[isa]->rope(y, dim, table);
            if (isa == 0)
                memcpy(first, y, sizeof y);
            same &= same_floats(first, y, dim);
            inside &= y[dim] == canary;
            for (uint32_t i = 0; i < half; i++) {
                double c = table[2 * i], s = table[2 * i + 1];
                worst = fmax(worst, fabs(y[i] - (x[i] * c - x[half + i] * s)));
                worst = fmax(worst, fabs(y[half + i] - (x[i] * s + x[half + i] * c)));
            }
        }
    }
    tap_ok(worst < 1e-6, "rope: error %.2g", worst);
    tap_ok(same && inside, "rope: the same bits everywhere, and none beyond the end");
}

static void test_swiglu(void) {
    static float gate[LONGEST], up[LONGEST], first[LONGEST + 1], y[LONGEST + 1];
    static double want[LONGEST];
    double worst = 0;
    bool same = true, inside = true;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t n = some_length(round);
        random_floats(gate, n);
        random_floats(up, n);
        for (uint32_t i = 0; i < n; i++) {
            gate[i] *= round % 3 == 0 ? 20 : 3;
            want[i] = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
        }
        for (int isa = 0; isa < isas; isa++) {
            y[n] = canary;
            kernels[isa]->swiglu(gate, up, n, y);
            if (isa == 0)
                memcpy(first, y, sizeof y);
            worst = fmax(worst, distance(y, want, n));
            same &= same_floats(first, y, n);
            inside &= y[n] == canary;
        }
    }
    tap_ok(worst < 1e-6, "swiglu: relative error %.2g", worst);
    tap_ok(same && inside, "swiglu: the same bits everywhere, and none beyond the end");
    const float edges[] = {0, -1000, 1000, NAN, -3e38f, 3e38f}, ones[] = {1, 1, 1, 1, 1, 1};
    kernels[isas - 1]->swiglu(edges, ones, 6, y);
    tap_ok(y[0] == 0 && y[1] == 0 && y[2] == 1000 && isnan(y[3]) && y[4] == 0 && y[5] == 3e38f,
           "swiglu: goes to 0 and to x at the ends, and keeps a NaN");
}

static void test_axpy(void) {
    static float x[LONGEST], start[LONGEST + 1], y[LONGEST + 1];
    bool exact = true;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t n = some_length(round);
        float scale = random_float();
        random_floats(x, n);
        random_floats(start, n);
        start[n] = canary;
        for (int isa = 0; isa < isas; isa++) {
            memcpy(y, start, sizeof y);
            kernels[isa]->axpy(scale, x, n, y);
            for (uint32_t i = 0; i < n; i++)
                exact &= y[i] == fmaf(scale, x[i], start[i]);
            exact &= y[n] == canary;
        }
    }
    tap_ok(exact, "axpy: one fused multiply-add each");
}

/* Rounds in float64, where a step of the f16 at x's size is a power of two. */
static uint16_t f16_by_rounding(float x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    double a = fabs((double)x);
    if (a == 0)
        return sign;
    int exponent;
    frexp(a, &exponent);
    double step = ldexp(1, (exponent < -13 ? -13 : exponent) - 11), rounded = nearbyint(a / step) * step;
    if (rounded >= 65536)
        return sign | 0x7c00;
    if (rounded < 0x1p-14)
        return sign | (uint16_t)(rounded * 0x1p24);
    double mantissa = frexp(rounded, &exponent);
    return (uint16_t)(sign | (exponent + 14) << 10 | ((int)(mantissa * 2048) - 1024));
}

static void test_f16(void) {
    enum { COUNT = 1 << 16 };
    float *x = test_memory(COUNT * sizeof *x);
    uint16_t *y = test_memory((COUNT + 1) * sizeof *y);
    bool back = true, quiet = true, rounded = true, inside = true;
    for (int h = 0; h < COUNT; h++) {
        x[h] = cpu_f16_to_f32((uint16_t)h);
        int exponent = h >> 10 & 31, mantissa = h & 1023;
        double want = ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
        want = exponent == 31 ? INFINITY : want;
        back &= exponent == 31 && mantissa ? isnan(x[h]) : x[h] == (h & 0x8000 ? -want : want);
    }
    tap_ok(back, "f16: all values to float");
    for (int isa = 0; isa < isas; isa++) {
        kernels[isa]->f32_to_f16(x, COUNT, y);
        for (int h = 0; h < COUNT; h++)
            quiet &= y[h] == (isnan(x[h]) ? h | 0x200 : h);
    }
    tap_ok(quiet, "f16: all values there and back");
    for (int round = 0; round < 20; round++) {
        uint32_t n = some_length(round);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)random_u64();
            if (round % 2) /* around the smallest, the halfway and the greatest values */
                bits = (bits & 0x80000fff) | (0x33000000 + (random_below(0x14900) << 12));
            if ((bits & 0x7fffffff) > 0x7f800000)
                bits = 0;
            memcpy(x + i, &bits, sizeof bits);
        }
        for (int isa = 0; isa < isas; isa++) {
            y[n] = 0x1234;
            kernels[isa]->f32_to_f16(x, n, y);
            for (uint32_t i = 0; i < n; i++)
                rounded &= y[i] == f16_by_rounding(x[i]);
            inside &= y[n] == 0x1234;
        }
    }
    tap_ok(rounded && inside, "f16: rounds to nearest even, subnormals included");
    free(x);
    free(y);
}

static void test_exp(void) {
    double worst = 0;
    for (uint32_t step = 0; step < 2000000; step++) {
        float x = -87 + (float)step * (175.0f / 2000000);
        double want = exp((double)x);
        int exponent;
        frexp(want, &exponent);
        worst = fmax(worst, fabs(cpu_exp(x) - want) / ldexp(1, exponent - 24));
    }
    tap_ok(worst < 1, "exp: %.3f units in the last place", worst);
    tap_ok(cpu_exp(0) == 1 && cpu_exp(-87.001f) == 0 && cpu_exp(-INFINITY) == 0 && isinf(cpu_exp(88.001f)) &&
               isinf(cpu_exp(INFINITY)) && isnan(cpu_exp(NAN)) && cpu_exp(1e-40f) == 1,
           "exp: 1 at 0, its ends, and NaN");
    float x[64], ones[64], y[64];
    bool same = true;
    for (int round = 0; round < 2000; round++) {
        for (int i = 0; i < 64; i++) {
            uint32_t bits = (uint32_t)random_u64();
            memcpy(x + i, &bits, sizeof bits);
            if (round % 2)
                x[i] = random_float() * 40;
            ones[i] = 1;
        }
        for (int isa = 0; isa < isas; isa++) {
            kernels[isa]->swiglu(x, ones, 64, y);
            for (int i = 0; i < 64; i++) {
                float want = x[i] / (1 + cpu_exp(0 - x[i]));
                same &= same_floats(y + i, &want, 1);
            }
        }
    }
    tap_ok(same, "exp: the same bits inside the kernels, of any float");
}

static void test_route(void) {
    enum { MOST = 300 };
    float logits[MOST], weights[3][MOST + 1];
    uint32_t chosen[3][MOST + 1];
    double worst = 0;
    bool same = true, right = true, inside = true;
    for (int round = 0; round < 300; round++) {
        uint32_t experts = 1 + random_below(MOST), used = 1 + random_below(experts < 16 ? experts : 16);
        if (round % 10 == 0)
            used = experts;
        random_floats(logits, experts);
        for (uint32_t i = 0; i < experts; i++)
            logits[i] = round % 3 ? logits[i] * 4 : roundf(logits[i] * 2); /* ties */
        for (int isa = 0; isa < isas; isa++) {
            chosen[isa][used] = 77;
            weights[isa][used] = canary;
            kernels[isa]->route(logits, experts, used, chosen[isa], weights[isa]);
            inside &= chosen[isa][used] == 77 && weights[isa][used] == canary;
            same &= memcmp(chosen[0], chosen[isa], used * sizeof **chosen) == 0;
            same &= same_floats(weights[0], weights[isa], used);
        }
        double total = 0, sum = 0;
        for (uint32_t j = 0; j < used; j++)
            total += exp((double)logits[chosen[0][j]]);
        for (uint32_t j = 0; j < used; j++) {
            uint32_t id = chosen[0][j], before = 0;
            for (uint32_t i = 0; i < experts; i++)
                before += logits[i] > logits[id] || (logits[i] == logits[id] && i < id);
            right &= before == j;
            worst = fmax(worst, fabs(weights[0][j] - exp((double)logits[id]) / total));
            sum += weights[0][j];
        }
        right &= fabs(sum - 1) < 1e-6;
    }
    tap_ok(right, "route: the likeliest experts in order, lower ids first, weights that sum to 1");
    tap_ok(worst < 1e-6, "route: error of the weights %.2g", worst);
    tap_ok(same && inside, "route: the same bits everywhere, and none beyond the end");

    bool distinct = true, shows = true;
    for (int round = 0; round < 100; round++) {
        uint32_t experts = 8 + random_below(100);
        random_floats(logits, experts);
        for (uint32_t i = 0, bad = 1 + random_below(experts); i < bad; i++)
            logits[random_below(experts)] = round % 2 ? NAN : INFINITY;
        for (int isa = 0; isa < isas; isa++) {
            kernels[isa]->route(logits, experts, 8, chosen[isa], weights[isa]);
            for (int j = 0; j < 8; j++) {
                shows &= isnan(weights[isa][j]) && chosen[isa][j] < experts;
                for (int i = 0; i < j; i++)
                    distinct &= chosen[isa][i] != chosen[isa][j];
            }
        }
    }
    tap_ok(distinct && shows, "route: NaN or Inf makes all weights NaN and repeats no expert");
}

int main(void) {
    random_begin();
    isas = kernels_here(kernels);
    for (int isa = 0; isa < isas; isa++)
        tap_note("kernels: %s", kernels[isa]->name);
    test_rms_norm();
    test_rope();
    test_swiglu();
    test_axpy();
    test_f16();
    test_exp();
    test_route();
    return tap_done();
}
