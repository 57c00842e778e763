/* dequantize, quantize and pack, and the formats' sizes. */
#include <float.h>

#include "tests/kernels/quant_blocks.h"
#include "tests/tap.h"

static void test_dequantize(struct random *random, enum quant_type type) {
    uint32_t block = quant_format(type)->block_weights, k = block == 1 ? 37 : 5 * block;
    size_t bytes = (size_t)k / block * quant_format(type)->block_bytes;
    uint8_t *row = malloc(bytes); /* exactly as long as the row, for the sanitizers */
    float *x = malloc(k * sizeof *x);
    bool exact = true;
    for (int round = 0; round < 20; round++) {
        random_row(random, type, k, round % 2, row);
        cpu_kernels_select(CPU_ISA_C)->dequantize(type, row, k, x);
        for (uint32_t i = 0; i < k; i++)
            exact = exact && same_float(x[i], (float)weight_reference(type, row, i));
    }
    tap_ok(exact, "%s: dequantized weights are the exact ones, rounded once", quant_format(type)->name);
    free(row);
    free(x);
}

static void test_pack(struct random *random, enum quant_type type) {
    uint32_t block = quant_format(type)->block_weights;
    bool same = true, zero = true;
    for (uint32_t rows = 1; rows <= CPU_TILE_ROWS; rows++)
        for (uint32_t count = 1; count <= 35; count += block == 256 ? 9 : 1) {
            uint32_t k = block == 256 ? block * (1 + count / 9) : block * count;
            size_t row_bytes = (size_t)k / block * quant_format(type)->block_bytes, bytes = cpu_tile_bytes(type, k);
            uint8_t *data = malloc(rows * row_bytes), *plain = aligned_bytes(bytes), *tile = aligned_bytes(bytes);
            for (uint32_t r = 0; r < rows; r++)
                random_row(random, type, k, false, data + r * row_bytes);
            memset(plain, 0, bytes);
            memset(tile, 0, bytes);
            cpu_kernels_select(CPU_ISA_C)->pack(type, k, data, row_bytes, rows, plain);
            cpu_kernels_select(CPU_ISA_AVX512)->pack(type, k, data, row_bytes, rows, tile);
            same = same && memcmp(plain, tile, bytes) == 0;
            zero = zero && bytes % 64 == 0 && bytes >= CPU_TILE_ROWS * row_bytes && bytes < CPU_TILE_ROWS * row_bytes + 64;
            free(data);
            free(plain);
            free(tile);
        }
    tap_ok(same, "%s: the best pack makes the tile of plain C", quant_format(type)->name);
    tap_ok(zero, "%s: a tile is 16 rows, rounded up to 64 bytes", quant_format(type)->name);
}

static void fill_group(struct random *random, int kind, float *x) {
    static const float scales[] = {1, 1e-3f, 3e30f, 1e-30f, FLT_MIN, FLT_TRUE_MIN, FLT_MAX, 0};
    float scale = scales[kind % 8];
    for (int i = 0; i < 32; i++) {
        x[i] = random_float(random) * scale;
        if (kind / 8 == 1) /* halfway between two steps of 127ths */
            x[i] = (float)((int)random_below(random, 254) - 127 + 0.5) / 127 * scale;
        if (kind / 8 == 2)
            x[i] = (random_below(random, 2) ? 1 : -1) * scale;
    }
}

static bool group_is_sound(const struct cpu_activation *a, const float *x) {
    int32_t sums[2] = {0, 0};
    float max = 0;
    for (int i = 0; i < 32; i++) {
        sums[i / 16] += a->q[i];
        max = fmaxf(max, fabsf(x[i]));
        /* Half a step, and the roundings of scale and inverse. */
        double distance = fabs((double)x[i] - (double)a->scale * a->q[i]);
        if (a->q[i] < -127 || (a->scale != 0 && distance > (double)a->scale * 0.50002))
            return false;
    }
    bool zero = a->scale == 0 && max / 127 < FLT_MIN && sums[0] == 0 && sums[1] == 0;
    return (zero || a->scale == max / 127) && a->negated[0] == -sums[0] && a->negated[1] == -sums[1] &&
           a->sum == a->scale * (float)(sums[0] + sums[1]);
}

static void test_quantize(struct random *random) {
    bool sound = true, same = true, nan = true;
    for (int round = 0; round < 2000; round++) {
        float x[96];
        struct cpu_activation plain[3], best[3];
        for (int g = 0; g < 3; g++)
            fill_group(random, (round + g) % 24, x + 32 * g);
        float bad = ((const float[]){NAN, INFINITY, -INFINITY, -NAN})[round % 4];
        uint32_t at = random_below(random, 32);
        if (round % 5 == 0)
            x[32 + at] = bad;
        memset(plain, 0, sizeof plain);
        memset(best, 0xff, sizeof best);
        cpu_kernels_select(CPU_ISA_C)->quantize(x, 96, plain);
        cpu_kernels_select(CPU_ISA_AVX512)->quantize(x, 96, best);
        for (int g = 0; g < 3; g++) {
            same = same && memcmp(plain[g].q, best[g].q, 32) == 0 && same_float(plain[g].scale, best[g].scale) &&
                   same_float(plain[g].sum, best[g].sum) && memcmp(plain[g].negated, best[g].negated, 8) == 0;
            if (g == 1 && round % 5 == 0) {
                nan = nan && isnan(plain[g].scale) && isnan(plain[g].sum);
                for (int i = 0; i < 32; i++)
                    nan = nan && plain[g].q[i] == 0;
            } else {
                sound = sound && group_is_sound(&plain[g], x + 32 * g);
            }
        }
    }
    tap_ok(sound, "quantized activations are within half a step, their scale and sums exact");
    tap_ok(same, "the best quantize gives the bits of plain C");
    tap_ok(nan, "NaN and Inf make the group's scale and sum NaN and its q zero");
}

static void test_sizes(void) {
    enum cpu_isa isa;
    tap_ok(quant_format(2) == NULL && cpu_tile_bytes(2, 256) == 0, "a format moed does not run has no size");
    tap_ok(cpu_tile_bytes(QUANT_Q4_K, 255) == 0 && cpu_tile_bytes(QUANT_Q8_0, 16) == 0, "nor has part of a block");
    tap_ok(cpu_activation_bytes(32) == 64 && cpu_activation_bytes(2048) == 64 * 48, "activations: 48 bytes a group");
    tap_ok(cpu_isa_parse("auto", &isa) && isa == CPU_ISA_AVX512 && cpu_isa_parse("c", &isa) && isa == CPU_ISA_C &&
               cpu_isa_parse("avx2", &isa) && isa == CPU_ISA_AVX2 && !cpu_isa_parse("AVX2", &isa) &&
               !cpu_isa_parse("", &isa), "instruction sets by name");
    bool at_most = true;
    for (int most = CPU_ISA_C; most <= CPU_ISA_AVX512; most++)
        at_most = at_most && cpu_kernels_select(most) != NULL && (int)cpu_kernels_select(most)->isa <= most;
    tap_ok(at_most, "select gives at most what was asked for");
}

int main(void) {
    struct random random = {0};
    const char *seed = getenv("MOED_TEST_SEED");
    random.state = seed != NULL ? strtoull(seed, NULL, 0) : 20;
    tap_note("seed %llu (MOED_TEST_SEED)", (unsigned long long)random.state);
    for (int i = 0; i < QUANT_TYPES; i++) {
        test_dequantize(&random, quant_types[i]);
        test_pack(&random, quant_types[i]);
    }
    test_quantize(&random);
    test_sizes();
    return tap_done();
}
