#include "tests/reference/reference.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gguf.h"

struct reference {
    struct gguf *gguf;
    struct reference_config config;
};

/* A matrix of the file: y = W x. Experts lie behind each other. */
struct matrix {
    uint32_t type;
    uint64_t columns, rows, row_bytes;
    const unsigned char *data;
};

static int find(const struct reference *reference, const char *name, struct matrix *out, struct status *status) {
    const struct gguf_tensor *tensor = gguf_tensor_find(reference->gguf, name);
    if (!tensor || !tensor->data) return status_set(status, STATUS_NOT_FOUND, "reference: no tensor %s", name);
    uint64_t rows = tensor->shape[1] * tensor->shape[2] * tensor->shape[3];
    *out = (struct matrix){tensor->type, tensor->shape[0], rows, tensor->bytes / rows, tensor->data};
    return 0;
}

static int find_in_layer(const struct reference *reference, uint32_t layer, const char *name, struct matrix *out,
                         struct status *status) {
    char full[64];
    snprintf(full, sizeof full, "blk.%" PRIu32 ".%s.weight", layer, name);
    return find(reference, full, out, status);
}

static void *array(uint64_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) abort(); /* a test tool on small models */
    return memory;
}

static void unpack_row(const struct matrix *matrix, uint64_t row, double *out) {
    if (reference_unpack(matrix->type, matrix->data + row * matrix->row_bytes, matrix->columns, out)) abort();
}

/* y[t][r] = sum over i of W[first + r][i] x[t][i], for `rows` rows and n tokens. */
static void multiply(const struct matrix *w, uint64_t first, uint64_t rows, const double *x, uint32_t n, double *y) {
    double *row = array(w->columns, sizeof *row);
    for (uint64_t r = 0; r < rows; r++) {
        unpack_row(w, first + r, row);
        for (uint32_t t = 0; t < n; t++) {
            double sum = 0;
            for (uint64_t i = 0; i < w->columns; i++) sum += row[i] * x[t * w->columns + i];
            y[t * rows + r] = sum;
        }
    }
    free(row);
}

/* Root-mean-square norm of each of `count` vectors. */
static void normalize(const struct matrix *weight, double epsilon, const double *x, uint64_t count, double *y) {
    uint64_t n = weight->columns;
    double *w = array(n, sizeof *w);
    unpack_row(weight, 0, w);
    for (uint64_t v = 0; v < count; v++, x += n, y += n) {
        double squares = 0;
        for (uint64_t i = 0; i < n; i++) squares += x[i] * x[i];
        double scale = 1 / sqrt(squares / (double)n + epsilon);
        for (uint64_t i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
    }
    free(w);
}

/* Rotary positions of GPT-NeoX: component i turns with component i + dim / 2. */
static void rotate(const struct reference_config *c, double *x, uint32_t heads, uint32_t n) {
    uint32_t half = c->head_dim / 2;
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t i = 0; i < half; i++) {
            double angle = t * pow(c->rope_freq_base, -2.0 * i / c->head_dim), cosine = cos(angle), sine = sin(angle);
            for (uint32_t h = 0; h < heads; h++) {
                double *a = x + ((uint64_t)t * heads + h) * c->head_dim + i, *b = a + half, first = *a;
                *a = first * cosine - *b * sine;
                *b = first * sine + *b * cosine;
            }
        }
    }
}

/* out[t][h] = softmax over p <= t of q[t][h] . k[p][h'] / sqrt(dim), times v[p][h']. */
static void attend(const struct reference_config *c, const double *q, const double *k, const double *v, uint32_t n,
                   double *out) {
    uint32_t dim = c->head_dim, group = c->heads / c->kv_heads;
    double *score = array(n, sizeof *score);
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t h = 0; h < c->heads; h++) {
            const double *query = q + ((uint64_t)t * c->heads + h) * dim;
            double *y = out + ((uint64_t)t * c->heads + h) * dim, most = -INFINITY, total = 0;
            for (uint32_t p = 0; p <= t; p++) {
                const double *key = k + ((uint64_t)p * c->kv_heads + h / group) * dim;
                score[p] = 0;
                for (uint32_t i = 0; i < dim; i++) score[p] += query[i] * key[i];
                score[p] /= sqrt(dim);
                if (score[p] > most) most = score[p];
            }
            for (uint32_t p = 0; p <= t; p++) total += score[p] = exp(score[p] - most);
            memset(y, 0, dim * sizeof *y);
            for (uint32_t p = 0; p <= t; p++) {
                const double *value = v + ((uint64_t)p * c->kv_heads + h / group) * dim;
                for (uint32_t i = 0; i < dim; i++) y[i] += score[p] / total * value[i];
            }
        }
    }
    free(score);
}

static void add(double *x, const double *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) x[i] += y[i];
}

static int attention_block(const struct reference *reference, uint32_t layer, double *x, uint32_t n,
                           struct status *status) {
    const struct reference_config *c = &reference->config;
    struct matrix norm, wq, wk, wv, q_norm, k_norm, wo;
    if (find_in_layer(reference, layer, "attn_norm", &norm, status) ||
        find_in_layer(reference, layer, "attn_q", &wq, status) ||
        find_in_layer(reference, layer, "attn_k", &wk, status) ||
        find_in_layer(reference, layer, "attn_v", &wv, status) ||
        find_in_layer(reference, layer, "attn_q_norm", &q_norm, status) ||
        find_in_layer(reference, layer, "attn_k_norm", &k_norm, status) ||
        find_in_layer(reference, layer, "attn_output", &wo, status))
        return -1;
    double *h = array((uint64_t)n * c->hidden, sizeof *h), *q = array(n * wq.rows, sizeof *q);
    double *k = array(n * wk.rows, sizeof *k), *v = array(n * wv.rows, sizeof *v), *o = array(n * wq.rows, sizeof *o);
    normalize(&norm, c->rms_epsilon, x, n, h);
    multiply(&wq, 0, wq.rows, h, n, q);
    multiply(&wk, 0, wk.rows, h, n, k);
    multiply(&wv, 0, wv.rows, h, n, v);
    normalize(&q_norm, c->rms_epsilon, q, (uint64_t)n * c->heads, q);
    normalize(&k_norm, c->rms_epsilon, k, (uint64_t)n * c->kv_heads, k);
    rotate(c, q, c->heads, n);
    rotate(c, k, c->kv_heads, n);
    attend(c, q, k, v, n, o);
    multiply(&wo, 0, c->hidden, o, n, h);
    add(x, h, (uint64_t)n * c->hidden);
    free(h);
    free(q);
    free(k);
    free(v);
    free(o);
    return 0;
}

static bool contains(const uint32_t *experts, uint32_t count, uint32_t expert) {
    for (uint32_t i = 0; i < count; i++)
        if (experts[i] == expert) return true;
    return false;
}

/*
 * How far from the limit of the choice the experts are in which `other` differs from it; negative: it is the same set.
 * Infinite where it is no set of as many experts.
 */
static double tie_width(const struct reference_config *c, const double *logits, const uint32_t *chosen,
                        const uint32_t *other) {
    double limit = logits[chosen[c->topk - 1]], width = -1;
    for (uint32_t k = 0; k < c->topk; k++) {
        if (other[k] >= c->experts || contains(other, k, other[k])) return INFINITY;
        if (!contains(other, c->topk, chosen[k])) width = fmax(width, logits[chosen[k]] - limit);
        if (!contains(chosen, c->topk, other[k])) width = fmax(width, limit - logits[other[k]]);
    }
    return width;
}

/* The likeliest experts (ties: the lower id), or those to follow, and their probabilities, made to sum to 1. */
static void route(const struct reference_config *c, const double *logits, const uint32_t *follow, uint32_t *chosen,
                  double *weights, struct reference_result *result) {
    for (uint32_t k = 0; k < c->topk; k++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t e = 0; e < c->experts; e++)
            if (!contains(chosen, k, e) && (best == UINT32_MAX || logits[e] > logits[best])) best = e;
        chosen[k] = best;
    }
    double most = logits[chosen[0]], total = 0;
    double width = follow ? tie_width(c, logits, chosen, follow) : -1;
    if (width >= 0 && width <= REFERENCE_TIE_OUTLIER) {
        memcpy(chosen, follow, c->topk * sizeof *chosen);
        result->followed++;
        result->outliers += width > REFERENCE_TIE;
    }
    for (uint32_t k = 0; k < c->topk; k++) total += weights[k] = exp(logits[chosen[k]] - most);
    for (uint32_t k = 0; k < c->topk; k++) weights[k] /= total; /* softmax's own denominator cancels */
}

struct experts {
    struct matrix gate, up, down;
};

/* x[t] += weight[t] * down(silu(gate h[t]) * up h[t]) of one expert, for the tokens that chose it. */
static void run_expert(const struct reference_config *c, const struct experts *w, uint32_t expert, uint32_t layer,
                       const struct reference_result *result, const double *h, double *x) {
    uint32_t n = 0, *tokens = array(result->tokens, sizeof *tokens);
    double *weights = array(result->tokens, sizeof *weights);
    for (uint32_t t = 0; t < result->tokens; t++) {
        size_t at = ((size_t)t * c->layers + layer) * c->topk;
        for (uint32_t k = 0; k < c->topk; k++) {
            if (result->experts[at + k] != expert) continue;
            weights[n] = result->weights[at + k];
            tokens[n++] = t;
        }
    }
    size_t inter = (size_t)n * c->inter, hidden = (size_t)n * c->hidden;
    double *in = array(hidden, sizeof *in), *out = array(hidden, sizeof *out);
    double *a = array(inter, sizeof *a), *b = array(inter, sizeof *b);
    for (uint32_t i = 0; i < n; i++)
        memcpy(in + (size_t)i * c->hidden, h + (size_t)tokens[i] * c->hidden, c->hidden * sizeof *in);
    if (n) {
        multiply(&w->gate, (uint64_t)expert * c->inter, c->inter, in, n, a);
        multiply(&w->up, (uint64_t)expert * c->inter, c->inter, in, n, b);
        for (size_t i = 0; i < inter; i++) a[i] = a[i] / (1 + exp(-a[i])) * b[i];
        multiply(&w->down, (uint64_t)expert * c->hidden, c->hidden, a, n, out);
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < c->hidden; j++)
            x[(size_t)tokens[i] * c->hidden + j] += weights[i] * out[(size_t)i * c->hidden + j];
    free(tokens);
    free(weights);
    free(in);
    free(out);
    free(a);
    free(b);
}

static int expert_block(const struct reference *reference, uint32_t layer, double *x, uint32_t n,
                        const uint32_t *follow, struct reference_result *result, struct status *status) {
    const struct reference_config *c = &reference->config;
    struct matrix norm, router;
    struct experts w;
    if (find_in_layer(reference, layer, "ffn_norm", &norm, status) ||
        find_in_layer(reference, layer, "ffn_gate_inp", &router, status) ||
        find_in_layer(reference, layer, "ffn_gate_exps", &w.gate, status) ||
        find_in_layer(reference, layer, "ffn_up_exps", &w.up, status) ||
        find_in_layer(reference, layer, "ffn_down_exps", &w.down, status))
        return -1;
    double *h = array((uint64_t)n * c->hidden, sizeof *h), *logits = array((uint64_t)n * c->experts, sizeof *logits);
    normalize(&norm, c->rms_epsilon, x, n, h);
    multiply(&router, 0, c->experts, h, n, logits);
    for (uint32_t t = 0; t < n; t++) {
        size_t at = (size_t)t * c->layers + layer;
        double *own = logits + (size_t)t * c->experts;
        memcpy(result->router + at * c->experts, own, c->experts * sizeof *own);
        route(c, own, follow ? follow + at * c->topk : NULL, result->experts + at * c->topk,
              result->weights + at * c->topk, result);
    }
    for (uint32_t e = 0; e < c->experts; e++) run_expert(c, &w, e, layer, result, h, x);
    free(h);
    free(logits);
    return 0;
}

static double root_mean_square(const double *x, uint64_t n) {
    double squares = 0;
    for (uint64_t i = 0; i < n; i++) squares += x[i] * x[i];
    return sqrt(squares / (double)n);
}

int reference_forward(const struct reference *reference, const uint32_t *tokens, uint32_t count,
                      const uint32_t *follow, struct reference_result *result, struct status *status) {
    const struct reference_config *c = &reference->config;
    uint64_t routes = (uint64_t)count * c->layers;
    struct matrix embeddings, norm, head;
    *result = (struct reference_result){.tokens = count};
    if (find(reference, "token_embd.weight", &embeddings, status) ||
        find(reference, "output_norm.weight", &norm, status))
        return -1;
    if (find(reference, "output.weight", &head, NULL)) head = embeddings;

    result->logits = array((uint64_t)count * c->vocab, sizeof *result->logits);
    result->router = array(routes * c->experts, sizeof *result->router);
    result->experts = array(routes * c->topk, sizeof *result->experts);
    result->weights = array(routes * c->topk, sizeof *result->weights);
    result->residual = array(c->layers, sizeof *result->residual);
    double *x = array((uint64_t)count * c->hidden, sizeof *x);
    int failed = 0;
    for (uint32_t t = 0; t < count; t++) unpack_row(&embeddings, tokens[t], x + (uint64_t)t * c->hidden);
    for (uint32_t layer = 0; layer < c->layers && !failed; layer++) {
        failed = attention_block(reference, layer, x, count, status) ||
                 expert_block(reference, layer, x, count, follow, result, status);
        result->residual[layer] = root_mean_square(x, (uint64_t)count * c->hidden);
    }
    normalize(&norm, c->rms_epsilon, x, count, x);
    multiply(&head, 0, c->vocab, x, count, result->logits);
    free(x);
    if (failed) reference_result_free(result);
    return failed ? -1 : 0;
}

void reference_result_free(struct reference_result *result) {
    free(result->logits);
    free(result->router);
    free(result->experts);
    free(result->weights);
    free(result->residual);
    *result = (struct reference_result){0};
}

static int read_config(struct reference *reference, struct status *status) {
    struct reference_config *c = &reference->config;
    const struct {
        const char *key;
        uint32_t *out;
    } keys[] = {
        {"qwen3moe.block_count", &c->layers},
        {"qwen3moe.embedding_length", &c->hidden},
        {"qwen3moe.attention.head_count", &c->heads},
        {"qwen3moe.attention.head_count_kv", &c->kv_heads},
        {"qwen3moe.attention.key_length", &c->head_dim},
        {"qwen3moe.expert_count", &c->experts},
        {"qwen3moe.expert_used_count", &c->topk},
        {"qwen3moe.expert_feed_forward_length", &c->inter},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (gguf_get_u32(reference->gguf, keys[i].key, keys[i].out, status)) return -1;
    float base, epsilon;
    if (gguf_get_f32(reference->gguf, "qwen3moe.rope.freq_base", &base, status) ||
        gguf_get_f32(reference->gguf, "qwen3moe.attention.layer_norm_rms_epsilon", &epsilon, status))
        return -1;
    c->rope_freq_base = base;
    c->rms_epsilon = epsilon;
    struct matrix embeddings = {0};
    if (find(reference, "token_embd.weight", &embeddings, status)) return -1;
    c->vocab = (uint32_t)embeddings.rows;
    return 0;
}

int reference_open(const char *path, struct reference **out, struct status *status) {
    struct reference *reference = array(1, sizeof *reference);
    if (gguf_open(path, &reference->gguf, status) || read_config(reference, status)) {
        reference_close(reference);
        return -1;
    }
    *out = reference;
    return 0;
}

void reference_close(struct reference *reference) {
    if (!reference) return;
    gguf_close(reference->gguf);
    free(reference);
}

const struct reference_config *reference_config(const struct reference *reference) {
    return &reference->config;
}
