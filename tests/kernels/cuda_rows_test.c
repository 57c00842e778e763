#include <math.h>
#include <stdbool.h>
#include <time.h>

#include "kernels/cuda/cuda.h"
#include "tests/kernels/cuda_test.h"

/*
 * What stands between the products: cuda_norm, cuda_round and cuda_route on random shapes, against float64 on some rows.
 * However many rows there are, and interleaved or not, a row must get the same bits.
 */

static float *random_floats(struct random *random, size_t n, float size) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = random_float(random) * size;
    return x;
}

static uint32_t random_columns(struct random *random) {
    const uint32_t limits[] = {1, 300, 512, 2048}, kind = random_below(random, 4);
    return kind == 0 ? 2048 : 4 * (1 + random_below(random, limits[kind]));
}

static uint32_t padded(uint32_t columns) {
    return (columns + CUDA_CHUNK - 1) / CUDA_CHUNK * CUDA_CHUNK;
}

static struct cuda_activation activation_make(uint32_t rows, uint32_t columns, bool interleaved) {
    return (struct cuda_activation){cuda_test_buffer(NULL, sizeof(uint16_t) * rows * padded(columns)),
                                    cuda_test_buffer(NULL, sizeof(float) * rows), interleaved};
}

/* Relative error of a row of `out` against its values. Infinite where the scale or the padding is wrong. */
static double row_error(const struct cuda_activation *out, uint32_t row, uint32_t columns, const double *want) {
    const uint32_t width = padded(columns);
    uint16_t halves[8192], plain[8192];
    float scale;
    double greatest = 0, error = 0, norm = 0;
    cuda_test_fetch(halves, (uint16_t *)out->half + (size_t)row * width, sizeof *halves * width);
    cuda_test_fetch(&scale, out->scale + row, sizeof scale);
    for (uint32_t i = 0; i < width; i++) {
        const uint32_t pair = i % 32 / 2, at = i / 32 * 32 + 2 * (4 * (pair % 4) + pair / 4) + i % 2;
        plain[i] = halves[out->interleaved ? at : i];
    }
    for (uint32_t i = 0; i < width; i++) {
        const double value = i < columns ? want[i] : 0, difference = double_from_f16(plain[i]) * scale - value;
        if (i >= columns && plain[i] != 0)
            return INFINITY;
        greatest = fmax(greatest, fabs(value));
        error += difference * difference;
        norm += value * value;
    }
    const bool scaled = greatest / scale > 127.9 && greatest / scale < 256.1;
    return scaled ? sqrt(error / norm) : INFINITY;
}

/* Whether row `row` of `a` has the bits of row 0 of `b`, which is not interleaved. */
static bool row_is_same(const struct cuda_activation *a, uint32_t row, const struct cuda_activation *b,
                        uint32_t columns) {
    const uint32_t width = padded(columns);
    uint16_t of_a[8192], of_b[8192];
    float scales[2];
    cuda_test_fetch(of_a, (uint16_t *)a->half + (size_t)row * width, sizeof *of_a * width);
    cuda_test_fetch(of_b, b->half, sizeof *of_b * width);
    cuda_test_fetch(&scales[0], a->scale + row, sizeof *scales);
    cuda_test_fetch(&scales[1], b->scale, sizeof *scales);
    if (a->interleaved)
        cuda_test_interleave(of_b, width);
    return memcmp(of_a, of_b, sizeof *of_a * width) == 0 && memcmp(&scales[0], &scales[1], sizeof *scales) == 0;
}

static void activation_free(struct cuda_activation *a) {
    cudaFree(a->half);
    cudaFree(a->scale);
}

static void test_norm(struct random *random, bool many) {
    const uint32_t columns = random_columns(random), rows = (many ? 512 : 1) + random_below(random, 40);
    const uint32_t used = random_below(random, 2) ? 1 + random_below(random, many ? 3 : 20) : 0;
    float *x = random_floats(random, (size_t)rows * columns, 3), *norm = random_floats(random, columns, 2);
    float *experts = random_floats(random, (size_t)rows * used * columns, 2),
          *weights = random_floats(random, (size_t)rows * used, 1);
    float *device_x = cuda_test_buffer(x, sizeof *x * rows * columns),
          *again = cuda_test_buffer(x, sizeof *x * rows * columns);
    struct cuda_norm n = {.x = device_x,
                          .columns = columns,
                          .rows = rows,
                          .norm = cuda_test_buffer(norm, sizeof *norm * columns),
                          .epsilon = 1e-6f,
                          .used = used,
                          .out = activation_make(rows, columns, random_below(random, 2)),
                          .factors = cuda_test_buffer(NULL, sizeof(float) * rows)};
    const float *device_experts = cuda_test_buffer(experts, sizeof *experts * rows * used * columns);
    const float *device_weights = cuda_test_buffer(weights, sizeof *weights * rows * used);
    n.experts = used ? device_experts : NULL;
    n.weights = device_weights;
    CUDA_CHECK(cuda_norm(&n, 0));

    struct cuda_norm one = n;
    one.rows = 1;
    one.out = activation_make(1, columns, false);
    one.factors = cuda_test_buffer(NULL, sizeof(float));
    double error = 0, want[8192];
    bool same = true;
    for (int trial = 0; trial < 4; trial++) {
        const uint32_t row = trial ? random_below(random, rows) : rows - 1;
        double squares = 0;
        for (uint32_t i = 0; i < columns; i++) {
            want[i] = x[(size_t)row * columns + i];
            for (uint32_t k = 0; k < used; k++)
                want[i] += (double)weights[row * used + k] * experts[((size_t)row * used + k) * columns + i];
            squares += want[i] * want[i];
        }
        const double factor = 1 / sqrt(squares / columns + 1e-6);
        for (uint32_t i = 0; i < columns; i++)
            want[i] *= factor * norm[i];
        float factors[2];
        CUDA_CHECK(cudaMemcpy(again, x + (size_t)row * columns, sizeof *x * columns, cudaMemcpyHostToDevice));
        one.x = again;
        one.experts = used ? n.experts + (size_t)row * used * columns : NULL;
        one.weights = n.weights + (size_t)row * used;
        CUDA_CHECK(cuda_norm(&one, 0));
        cuda_test_fetch(&factors[0], n.factors + row, sizeof *factors);
        cuda_test_fetch(&factors[1], one.factors, sizeof *factors);
        error = fmax(error, fmax(row_error(&n.out, row, columns, want), fabs(factors[0] / factor - 1)));
        same = same && factors[0] == factors[1] && row_is_same(&n.out, row, &one.out, columns);
    }
    tap_ok(error < 1e-3 && same, "norm: %u rows of %u, %u experts, %s: relative error %.1e, alone %s", rows, columns,
           used, n.out.interleaved ? "interleaved" : "plain", error, same ? "the same" : "DIFFERENT");
    activation_free(&n.out);
    activation_free(&one.out);
    void *device[] = {device_x,  again,      (void *)n.norm, (void *)device_experts, (void *)device_weights,
                      n.factors, one.factors};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        cudaFree(device[i]);
    free(x);
    free(norm);
    free(experts);
    free(weights);
}

static void test_round(struct random *random) {
    const uint32_t columns = random_columns(random), rows = 1 + random_below(random, 90);
    float *x = random_floats(random, (size_t)rows * columns, ldexpf(1, (int)random_below(random, 30) - 15));
    float *device_x = cuda_test_buffer(x, sizeof *x * rows * columns);
    struct cuda_activation out = activation_make(rows, columns, random_below(random, 2));
    CUDA_CHECK(cuda_round(device_x, columns, rows, &out, 0));
    double error = 0, want[8192];
    for (uint32_t row = 0; row < rows; row++) {
        for (uint32_t i = 0; i < columns; i++)
            want[i] = x[(size_t)row * columns + i];
        error = fmax(error, row_error(&out, row, columns, want));
    }
    tap_ok(error < 1e-3, "round: %u rows of %u, %s: relative error %.1e", rows, columns,
           out.interleaved ? "interleaved" : "plain", error);
    activation_free(&out);
    cudaFree(device_x);
    free(x);
}

struct routed {
    float *logits, *weights;
    uint32_t *chosen;
};

static struct routed routed_make(const struct cuda_route *r, uint32_t rows) {
    return (struct routed){calloc((size_t)rows * r->experts, sizeof(float)),
                           calloc((size_t)rows * r->used, sizeof(float)),
                           calloc((size_t)rows * r->used, sizeof(uint32_t))};
}

/* Routes the rows from `first` on, as many as r->norm.rows, and fetches what comes of them. */
static void route(struct cuda_route *r, float *x, uint32_t first, struct routed *to) {
    r->norm.x = x + (size_t)first * r->norm.columns;
    CUDA_CHECK(cudaMemset(r->logits, 0xff, sizeof(float) * r->norm.rows * r->experts));
    CUDA_CHECK(cuda_route(r, 0));
    cuda_test_fetch(to->logits + (size_t)first * r->experts, r->logits, sizeof(float) * r->norm.rows * r->experts);
    cuda_test_fetch(to->weights + (size_t)first * r->used, r->weights, sizeof(float) * r->norm.rows * r->used);
    cuda_test_fetch(to->chosen + (size_t)first * r->used, r->chosen, sizeof(uint32_t) * r->norm.rows * r->used);
}

/* Whether the items hold every assignment once, with its expert, and are not too many. */
static bool items_are_right(const struct cuda_route *r, const uint32_t *chosen) {
    const uint32_t assignments = r->norm.rows * r->used;
    const uint32_t limit = cuda_route_item_limit(r->norm.rows, r->experts, r->used, r->item_tokens);
    uint32_t count, *order = calloc(assignments, sizeof *order), seen = 0;
    struct cuda_item *items = calloc(limit, sizeof *items);
    unsigned char *taken = calloc(assignments, 1);
    cuda_test_fetch(&count, r->item_count, sizeof count);
    cuda_test_fetch(order, r->order, sizeof *order * assignments);
    cuda_test_fetch(items, r->items, sizeof *items * limit);
    bool ok = count <= limit;
    for (uint32_t i = 0; ok && i < count; i++) {
        ok = items[i].count >= 1 && items[i].count <= r->item_tokens && items[i].first + items[i].count <= assignments;
        for (uint32_t j = 0; ok && j < items[i].count; j++, seen++) {
            const uint32_t a = order[items[i].first + j];
            ok = a < assignments && !taken[a] && chosen[a] == items[i].expert;
            if (ok)
                taken[a] = 1;
        }
    }
    free(order);
    free(items);
    free(taken);
    return ok && seen == assignments;
}

static void test_route(struct random *random, uint32_t rows) {
    const uint32_t columns = random_columns(random);
    struct cuda_route r = {.experts = random_below(random, 2) ? 128 : 1 + random_below(random, 300)};
    const uint32_t experts = r.experts, used = 1 + random_below(random, experts < 10 ? experts : 10);
    r.used = used;
    r.item_tokens = 8 << random_below(random, 5);
    float *x = random_floats(random, (size_t)rows * columns, 3), *norm = random_floats(random, columns, 1);
    float *router = random_floats(random, (size_t)experts * columns, 1);
    float *device_x = cuda_test_buffer(x, sizeof *x * rows * columns);
    r.norm = (struct cuda_norm){.columns = columns,
                                .rows = rows,
                                .norm = cuda_test_buffer(norm, sizeof *norm * columns),
                                .epsilon = 1e-6f,
                                .out = activation_make(rows, columns, random_below(random, 2)),
                                .factors = cuda_test_buffer(NULL, sizeof(float) * rows)};
    r.router = cuda_test_buffer(router, sizeof *router * experts * columns);
    r.logits = cuda_test_buffer(NULL, sizeof(float) * rows * experts);
    r.chosen = cuda_test_buffer(NULL, sizeof(uint32_t) * rows * used);
    r.weights = cuda_test_buffer(NULL, sizeof(float) * rows * used);
    const uint32_t item_limit = cuda_route_item_limit(rows, experts, used, r.item_tokens);
    r.items = cuda_test_buffer(NULL, sizeof(struct cuda_item) * item_limit);
    r.item_count = cuda_test_buffer(NULL, sizeof(uint32_t));
    r.order = cuda_test_buffer(NULL, sizeof(uint32_t) * rows * used);
    r.counts = cuda_test_buffer(NULL, sizeof(uint32_t) * CUDA_SORT_BLOCKS * experts);
    struct routed all = routed_make(&r, rows), few = routed_make(&r, rows);
    route(&r, device_x, 0, &all);
    const bool sorted = items_are_right(&r, all.chosen);

    double error = 0, total_error = 0, want[8192];
    for (int trial = 0; trial < 4; trial++) {
        const uint32_t row = trial ? random_below(random, rows) : rows - 1;
        double squares = 0, difference = 0, size = 0, total = 0;
        for (uint32_t i = 0; i < columns; i++)
            squares += (double)x[(size_t)row * columns + i] * x[(size_t)row * columns + i];
        for (uint32_t i = 0; i < columns; i++)
            want[i] = x[(size_t)row * columns + i] / sqrt(squares / columns + 1e-6) * norm[i];
        for (uint32_t e = 0; e < experts; e++) {
            double logit = 0;
            for (uint32_t i = 0; i < columns; i++)
                logit += want[i] * router[(size_t)e * columns + i];
            const double off = all.logits[(size_t)row * experts + e] - logit;
            difference += off * off;
            size += logit * logit;
        }
        for (uint32_t k = 0; k < used; k++)
            total += all.weights[(size_t)row * used + k];
        error = fmax(error, sqrt(difference / size));
        total_error = fmax(total_error, fmax(fabs(total - 1), row_error(&r.norm.out, row, columns, want)));
    }

    struct cuda_activation of_all = r.norm.out;
    bool same = true;
    r.norm.out = activation_make(16, columns, false);
    for (uint32_t first = 0; first < rows; first += r.norm.rows) {
        r.norm.rows = 1 + random_below(random, rows - first < 16 ? rows - first : 16);
        route(&r, device_x, first, &few);
        same = same && row_is_same(&of_all, first, &r.norm.out, columns);
    }
    same = same && memcmp(all.logits, few.logits, sizeof(float) * rows * experts) == 0 &&
           memcmp(all.chosen, few.chosen, sizeof(uint32_t) * rows * used) == 0 &&
           memcmp(all.weights, few.weights, sizeof(float) * rows * used) == 0;
    tap_ok(error < 1e-5 && total_error < 1e-3 && sorted && same,
           "route: %u rows of %u, %u of %u experts, items of %u, %s: logits %.1e, rounded %.1e, items %s, few rows %s",
           rows, columns, used, experts, r.item_tokens, of_all.interleaved ? "interleaved" : "plain", error,
           total_error, sorted ? "right" : "WRONG", same ? "the same" : "DIFFERENT");
    activation_free(&of_all);
    activation_free(&r.norm.out);
    void *device[] = {device_x, (void *)r.norm.norm, r.norm.factors, (void *)r.router, r.logits, r.chosen, r.weights,
                      r.items,  r.item_count,        r.order,        r.counts};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        cudaFree(device[i]);
    struct routed both[] = {all, few};
    for (int i = 0; i < 2; i++) {
        free(both[i].logits);
        free(both[i].weights);
        free(both[i].chosen);
    }
    free(x);
    free(norm);
    free(router);
}

int main(void) {
    static const uint32_t rows[] = {1, 2, 3, 16, 17, 50, 64, 65, 128, 129, 256, 257, 300, 511, 700, 1537, 2049, 2700};
    struct random random;
    cuda_test_begin(&random);
    for (int round = 0; round < 20; round++)
        test_norm(&random, round % 2);
    for (int round = 0; round < 20; round++)
        test_round(&random);
    for (int round = 0; round < 2; round++)
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
            test_route(&random, rows[i]);
    return tap_done();
}
