/* Tokens sampled by the kernels, and their log-probabilities, against worker/sampler.c: always the same. */
#include <float.h>
#include <math.h>
#include <time.h>

#include "kernels/cuda/cuda.h"
#include "tests/kernels/cuda_test.h"
#include "worker/sampler.h"

enum { HISTORY_MAX = 3000, LOGITS_MAX = 40 << 20 };

/* Rows of logits, how each is sampled, and its place on the device. */
struct rows {
    uint32_t vocab, count;
    float *logits;
    struct sampling *sampling;
    struct cuda_draw *draws; /* in any order but for those with penalties, which are first */
    uint32_t *history;       /* [count][HISTORY_MAX] */
    uint32_t *logprobs;      /* alternatives asked for; 0: none */
    uint32_t penalized;
};

static uint32_t random_u32(struct random *random) {
    return (uint32_t)random_bits(random);
}

static float random_real(struct random *random) {
    return (float)(random_u32(random) >> 8) * 0x1p-24f;
}

static bool chance(struct random *random, uint32_t of) {
    return random_below(random, of) == 0;
}

/* Logits as models give them, and as they do not: flat, equal, in ties, falling or rising all along, at all ends. */
static void fill_logits(struct random *random, float *logits, uint32_t vocab) {
    const uint32_t kind = random_below(random, 10);
    const float spread = kind == 0 ? 0 : powf(10, 3 * random_real(random) - 1.5f);
    for (uint32_t i = 0; i < vocab; i++) {
        float value = spread * (random_real(random) + random_real(random) + random_real(random) - 1.5f);
        if (kind == 1 || kind == 2)
            value = rintf(value);
        if (kind == 3)
            value += (float)i / (float)vocab * 30 * (random_below(random, 1000) ? 1 : -1);
        if (kind == 4)
            value -= (float)i / (float)vocab * 30;
        if (kind == 5)
            value = spread;
        if (kind == 6 && chance(random, 8))
            value *= 1e-42f; /* below float's normal range, and zeros of both signs */
        if (kind == 7 && chance(random, 50))
            value = chance(random, 2) ? FLT_MAX : -FLT_MAX;
        if (kind >= 8 && chance(random, vocab / 50 + 1))
            value += 6 * spread * random_real(random);
        logits[i] = value;
    }
}

static struct sampling random_sampling(struct random *random, uint32_t vocab) {
    struct sampling sampling = {.seed = (uint64_t)random_u32(random) << 32 | random_u32(random)};
    if (!chance(random, 8))
        sampling.temperature = chance(random, 10) ? powf(10, 20 * random_real(random) - 10) : 0.3f + random_real(random);
    if (!chance(random, 3))
        sampling.top_k = 1 + random_below(random, chance(random, 4) ? vocab + 3 : chance(random, 3) ? 1000 : 60);
    if (!chance(random, 3))
        sampling.top_p = chance(random, 6) ? random_real(random) : chance(random, 8) ? 1 : 0.8f + 0.2f * random_real(random);
    if (chance(random, 3))
        sampling.min_p = chance(random, 8) ? 1 : powf(10, -4 * random_real(random));
    if (chance(random, 4))
        sampling.repetition_penalty = chance(random, 8) ? 1e-30f : 0.5f + random_real(random);
    if (chance(random, 4))
        sampling.presence_penalty = 4 * random_real(random) - 2;
    if (chance(random, 4))
        sampling.frequency_penalty = chance(random, 20) ? 3e38f : 4 * random_real(random) - 2;
    return sampling;
}

static void rows_make(struct random *random, struct rows *rows, uint32_t vocab, uint32_t count) {
    *rows = (struct rows){
        .vocab = vocab,
        .count = count,
        .logits = malloc((size_t)count * vocab * sizeof(float)),
        .sampling = calloc(count, sizeof(struct sampling)),
        .draws = calloc(count, sizeof(struct cuda_draw)),
        .history = malloc((size_t)count * HISTORY_MAX * sizeof(uint32_t)),
        .logprobs = calloc(count, sizeof(uint32_t)),
    };
    uint32_t at = 0, behind = count;
    for (uint32_t row = 0; row < count; row++) {
        const struct sampling s = rows->sampling[row] = random_sampling(random, vocab);
        const uint32_t length = random_below(random, HISTORY_MAX), range = chance(random, 2) ? vocab : vocab / 20 + 1;
        fill_logits(random, rows->logits + (size_t)row * vocab, vocab);
        if (chance(random, 3)) {
            const uint32_t wanted = chance(random, 2) ? CUDA_LOGPROBS_MAX : 1 + random_below(random, CUDA_LOGPROBS_MAX);
            rows->logprobs[row] = wanted < vocab ? wanted : vocab;
        }
        for (uint32_t i = 0; i < length; i++)
            rows->history[(size_t)row * HISTORY_MAX + i] = random_below(random, range);
        rows->draws[sampler_penalizes(&s) ? at++ : --behind] = (struct cuda_draw){
            .random = sampler_random(&s, length),
            .temperature = s.temperature,
            .top_p = s.top_p,
            .min_p = s.min_p,
            .repetition_penalty = s.repetition_penalty,
            .presence_penalty = s.presence_penalty,
            .frequency_penalty = s.frequency_penalty,
            .top_k = s.top_k,
            .row = row,
            .history = row * HISTORY_MAX,
            .history_length = length,
            .prompt_length = random_below(random, length + 1),
        };
    }
    rows->penalized = at;
}

static void rows_free(struct rows *rows) {
    free(rows->logits);
    free(rows->sampling);
    free(rows->draws);
    free(rows->history);
    free(rows->logprobs);
}

/*
 * What the device makes of draws[first .. first + count): sampled[row] of each one's row, and of the others their greatest
 * logit alone.
 */
static void rows_sample(const struct rows *rows, uint32_t first, uint32_t count, struct sampled *sampled) {
    const size_t vocab = rows->vocab, n = rows->count;
    struct cuda_asked *asked = calloc(n, sizeof *asked);
    uint32_t asked_count = 0, *ids = malloc(n * sizeof *ids);
    for (uint32_t i = first; i < first + count; i++) {
        const struct cuda_draw *draw = &rows->draws[i];
        const bool penalized = i < rows->penalized;
        if (rows->logprobs[draw->row] > 0)
            asked[asked_count++] = (struct cuda_asked){draw->row, rows->logprobs[draw->row], draw->history,
                                                       penalized ? draw->history_length : 0};
    }
    float *logits = cuda_test_buffer(rows->logits, n * vocab * sizeof(float));
    struct cuda_draw *draws = cuda_test_buffer(rows->draws + first, count * sizeof *draws);
    uint32_t *history = cuda_test_buffer(rows->history, n * HISTORY_MAX * sizeof(uint32_t));
    uint64_t *ranks = cuda_test_buffer(NULL, n * CUDA_SAMPLE_RANKS * sizeof *ranks);
    struct cuda_part *parts = cuda_test_buffer(NULL, n * CUDA_SAMPLE_PARTS * sizeof *parts);
    uint32_t *list = cuda_test_buffer(NULL, n * vocab * sizeof *list), *out = cuda_test_buffer(NULL, n * sizeof *out);
    float *plain = cuda_test_buffer(NULL, n * HISTORY_MAX * sizeof *plain);
    struct cuda_asked *device_asked = cuda_test_buffer(asked, asked_count * sizeof *asked);
    uint64_t *masses = cuda_test_buffer(NULL, asked_count * CUDA_SAMPLE_PARTS * sizeof *masses);
    struct cuda_alternatives *listed = cuda_test_buffer(NULL, asked_count * sizeof *listed);
    struct cuda_alternatives *home = calloc(n, sizeof *home);
    const struct cuda_logprobs logprobs = {
        .logits = logits,
        .vocab = rows->vocab,
        .asked = device_asked,
        .count = asked_count,
        .ranks = ranks,
        .history = history,
        .ids = out,
        .plain = plain,
        .masses = masses,
        .out = listed,
    };
    const struct cuda_sample arguments = {
        .logits = logits,
        .vocab = rows->vocab,
        .draws = draws,
        .count = count,
        .penalized = first >= rows->penalized ? 0 : rows->penalized - first < count ? rows->penalized - first : count,
        .history = history,
        .plain = plain,
        .ranks = ranks,
        .parts = parts,
        .list = list,
        .ids = out,
    };
    CUDA_CHECK(cuda_greatest(logits, rows->vocab, rows->count, ranks, out, NULL));
    if (asked_count > 0)
        CUDA_CHECK(cuda_logprobs_begin(&logprobs, NULL));
    CUDA_CHECK(cuda_sample(&arguments, NULL));
    if (asked_count > 0)
        CUDA_CHECK(cuda_logprobs_end(&logprobs, NULL));
    cuda_test_fetch(ids, out, n * sizeof *ids);
    cuda_test_fetch(home, listed, asked_count * sizeof *home);
    for (uint32_t row = 0; row < n; row++)
        sampled[row] = (struct sampled){.token = ids[row]};
    for (uint32_t i = 0; i < asked_count; i++) {
        struct sampled *to = &sampled[asked[i].row];
        to->logprob = home[i].logprob;
        to->top_count = asked[i].count;
        memcpy(to->top_ids, home[i].ids, to->top_count * sizeof *to->top_ids);
        memcpy(to->top_logprobs, home[i].logprobs, to->top_count * sizeof *to->top_logprobs);
    }
    void *const buffers[] = {logits, draws, history, ranks, parts, list, out, plain, device_asked, masses, listed};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        cudaFree(buffers[i]);
    free(asked);
    free(ids);
    free(home);
}

static struct sampled expected(const struct rows *rows, const struct cuda_draw *draw, void *scratch) {
    struct sampled sampled;
    sampler_sample(rows->logits + (size_t)draw->row * rows->vocab, rows->vocab, &rows->sampling[draw->row],
                   rows->history + draw->history, draw->history_length, draw->prompt_length, rows->logprobs[draw->row],
                   scratch, &sampled);
    return sampled;
}

/* `total` rows of so many logits, many at once; and the same tokens and log-probabilities of few at once. */
static void test_equality(struct random *random, uint32_t vocab, uint32_t total) {
    void *scratch = malloc(sampler_scratch_bytes(vocab));
    const uint32_t at_once = LOGITS_MAX / vocab < 256 ? LOGITS_MAX / vocab : 256;
    uint32_t wrong = 0, unlike = 0, alone = 0, done = 0, asked = 0;
    while (done < total) {
        struct rows rows;
        rows_make(random, &rows, vocab, at_once);
        struct sampled *all = malloc(2 * at_once * sizeof *all), *few = all + at_once;
        rows_sample(&rows, 0, at_once, all);
        for (uint32_t i = 0; i < at_once; i++) {
            const struct cuda_draw *draw = &rows.draws[i];
            const struct sampling *s = &rows.sampling[draw->row];
            const struct sampled *sampled = &all[draw->row], right = expected(&rows, draw, scratch);
            asked += rows.logprobs[draw->row] > 0;
            if (sampled->token == right.token && memcmp(sampled, &right, sizeof right) != 0 && unlike++ < 5)
                tap_note("%u logprobs: %g, expected %g; first %u %g, expected %u %g", right.top_count,
                         (double)sampled->logprob, (double)right.logprob, sampled->top_ids[0],
                         (double)sampled->top_logprobs[0], right.top_ids[0], (double)right.top_logprobs[0]);
            if (sampled->token == right.token)
                continue;
            if (wrong++ < 5)
                tap_note("token %u, expected %u: temperature %g, top-k %u, top-p %g, min-p %g, penalties %g %g %g",
                         sampled->token, right.token, s->temperature, s->top_k, s->top_p, s->min_p, s->repetition_penalty,
                         s->presence_penalty, s->frequency_penalty);
        }
        const uint32_t first = random_below(random, at_once), count = 1 + random_below(random, at_once - first);
        rows_sample(&rows, first, count, few);
        for (uint32_t i = first; i < first + count; i++)
            alone += memcmp(&few[rows.draws[i].row], &all[rows.draws[i].row], sizeof *all) != 0;
        done += at_once;
        free(all);
        rows_free(&rows);
    }
    tap_ok(wrong == 0, "%u rows of %u logits: %u tokens are not the CPU's", done, vocab, wrong);
    tap_ok(unlike == 0, "%u rows of %u logits: log-probabilities of %u are not the CPU's", asked, vocab, unlike);
    tap_ok(alone == 0, "%u rows of %u logits: %u differ among fewer rows", done, vocab, alone);
    free(scratch);
}

/* A logit that is not finite is told of, whatever penalties could make of it, and disturbs no other row. */
static void test_not_finite(struct random *random) {
    enum { VOCAB = 3001, ROWS = 200 };
    const float bad[] = {NAN, INFINITY, -INFINITY};
    void *scratch = malloc(sampler_scratch_bytes(VOCAB));
    struct rows rows;
    struct sampled sampled[ROWS];
    bool spoilt[ROWS], told = true, others = true;
    rows_make(random, &rows, VOCAB, ROWS);
    for (uint32_t i = 0; i < ROWS; i++) {
        const struct cuda_draw *draw = &rows.draws[i];
        const uint32_t at = draw->history_length > 0 && chance(random, 2) ? rows.history[draw->history]
                                                                          : random_below(random, VOCAB);
        spoilt[draw->row] = chance(random, 2);
        if (spoilt[draw->row])
            rows.logits[(size_t)draw->row * VOCAB + at] = bad[i % 3];
    }
    rows_sample(&rows, 0, ROWS, sampled);
    for (uint32_t i = 0; i < ROWS; i++) {
        const struct cuda_draw *draw = &rows.draws[i];
        if (spoilt[draw->row]) {
            told = told && sampled[draw->row].token == UINT32_MAX;
            continue;
        }
        const struct sampled right = expected(&rows, draw, scratch);
        others = others && memcmp(&sampled[draw->row], &right, sizeof right) == 0;
    }
    tap_ok(told, "rows with a logit that is not finite are told of");
    tap_ok(others, "and the others have their tokens and log-probabilities");
    rows_free(&rows);
    free(scratch);
}

static void test_busiest(struct random *random) {
    enum { LAYERS = 7, STRIDE = 5000 };
    uint32_t *chosen = malloc(LAYERS * STRIDE * sizeof *chosen), busiest[LAYERS];
    bool right = true;
    for (int round = 0; round < 20; round++) {
        const uint32_t experts = 1 + random_below(random, CUDA_EXPERTS_MAX), count = random_below(random, STRIDE);
        for (uint32_t i = 0; i < LAYERS * STRIDE; i++)
            chosen[i] = random_below(random, experts);
        uint32_t *const device = cuda_test_buffer(chosen, LAYERS * STRIDE * sizeof *chosen);
        uint32_t *const out = cuda_test_buffer(NULL, sizeof busiest);
        CUDA_CHECK(cuda_busiest(device, LAYERS, STRIDE, count, out, NULL));
        cuda_test_fetch(busiest, out, sizeof busiest);
        for (int layer = 0; layer < LAYERS; layer++) {
            uint32_t counts[CUDA_EXPERTS_MAX] = {0}, most = 0;
            for (uint32_t i = 0; i < count; i++) {
                const uint32_t n = ++counts[chosen[layer * STRIDE + i]];
                most = n > most ? n : most;
            }
            right = right && busiest[layer] == most;
        }
        cudaFree(device);
        cudaFree(out);
    }
    tap_ok(right, "the busiest expert's share of each layer");
    free(chosen);
}

int main(void) {
    struct random random;
    cuda_test_begin(&random);
    test_equality(&random, 1, 500);
    test_equality(&random, 2, 500);
    test_equality(&random, 60, 2000);
    test_equality(&random, 513, 2000);
    test_equality(&random, 4096, 4000);
    test_equality(&random, 20011, 1000);
    test_equality(&random, 151936, 500);
    test_not_finite(&random);
    test_busiest(&random);
    return tap_done();
}
