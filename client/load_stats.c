#include "client/load_stats.h"

#include <math.h>

enum { SUB_BUCKETS = 1 << HISTOGRAM_SUB_BITS };

/* Values below SUB_BUCKETS have a bucket each; above, the leading bits tell the power and the bucket within it. */
static size_t bucket_of(uint64_t value) {
    if (value < SUB_BUCKETS)
        return value;
    unsigned shift = 63 - (unsigned)__builtin_clzll(value) - HISTOGRAM_SUB_BITS;
    return ((size_t)(shift + 1) << HISTOGRAM_SUB_BITS) + (size_t)((value >> shift) & (SUB_BUCKETS - 1));
}

static uint64_t bucket_middle(size_t bucket) {
    if (bucket < SUB_BUCKETS)
        return bucket;
    unsigned shift = (unsigned)(bucket >> HISTOGRAM_SUB_BITS) - 1;
    uint64_t low = (uint64_t)(SUB_BUCKETS + (bucket & (SUB_BUCKETS - 1))) << shift;
    return low + (((uint64_t)1 << shift) >> 1);
}

void histogram_add(struct histogram *histogram, uint64_t value) {
    histogram->buckets[bucket_of(value)]++;
    histogram->count++;
    histogram->sum += (double)value;
    if (value > histogram->max)
        histogram->max = value;
}

uint64_t histogram_quantile(const struct histogram *histogram, double share) {
    uint64_t rank = (uint64_t)ceil(share * (double)histogram->count), seen = 0;
    if (rank == 0)
        rank = 1;
    if (rank >= histogram->count)
        return histogram->max;
    for (size_t bucket = 0; bucket < HISTOGRAM_BUCKETS; bucket++) {
        seen += histogram->buckets[bucket];
        if (seen >= rank) {
            uint64_t value = bucket_middle(bucket);
            return value < histogram->max ? value : histogram->max;
        }
    }
    return histogram->max;
}

bool sample_tpot_ns(const struct load_sample *sample, uint64_t *out) {
    uint64_t tokens = sample->tokens - sample->first_tokens;
    if (tokens > 0)
        *out = (sample->last_ns - sample->first_ns) / tokens;
    return tokens > 0;
}

bool sample_succeeded(const struct load_sample *sample) {
    return sample->status.code == STATUS_OK && sample->tokens == sample->asked_tokens;
}

void load_stats_add_gap(struct load_stats *stats, uint64_t gap_ns) {
    histogram_add(&stats->itl, gap_ns);
}

static bool sample_good(const struct load_stats *stats, const struct load_sample *sample) {
    return (!stats->slo_ttft_ns || sample_ttft_ns(sample) <= stats->slo_ttft_ns) &&
           (!stats->slo_itl_ns || sample->gap_max_ns <= stats->slo_itl_ns);
}

static void add_success(struct load_stats *stats, const struct load_sample *sample) {
    uint64_t tpot_ns;
    stats->succeeded++;
    stats->good += sample_good(stats, sample);
    histogram_add(&stats->ttft, sample_ttft_ns(sample));
    histogram_add(&stats->e2e, sample_e2e_ns(sample));
    if (sample_tpot_ns(sample, &tpot_ns))
        histogram_add(&stats->tpot, tpot_ns);
    stats->prompt_tokens += sample->prompt_tokens;
    stats->cached_tokens += sample->cached_tokens;
}

static void add_error(struct load_stats *stats, const struct load_sample *sample) {
    /* Any 32-bit number may come as a code. */
    unsigned code = sample->status.code;
    code = code < STATUS_CODES ? code : STATUS_UNKNOWN;
    stats->errors[code]++;
    if (stats->first_error.message[0])
        return;
    if (code == STATUS_OK)
        status_set(&stats->first_error, STATUS_OK, "%llu tokens came of %u asked for",
                   (unsigned long long)sample->tokens, sample->asked_tokens);
    else
        stats->first_error = sample->status;
}

void load_stats_add(struct load_stats *stats, const struct load_sample *sample) {
    if (sample->warmup) {
        stats->warmup++;
        return;
    }
    if (sample->ended_ns > stats->end_ns)
        stats->end_ns = sample->ended_ns;
    histogram_add(&stats->delay, sample->started_ns - sample->intended_ns);
    stats->tokens_in += sample->first_ns ? sample->prompt_tokens : 0;
    stats->tokens_out += sample->tokens;
    stats->resumptions += sample->resumptions;
    if (sample_succeeded(sample))
        add_success(stats, sample);
    else if (sample->unfinished)
        stats->unfinished++;
    else
        add_error(stats, sample);
}

static struct load_summary summarize(const struct histogram *histogram) {
    struct load_summary summary = {.count = histogram->count};
    if (!histogram->count)
        return summary;
    summary.mean_ms = histogram->sum / (double)histogram->count / 1e6;
    summary.p50_ms = (double)histogram_quantile(histogram, 0.50) / 1e6;
    summary.p90_ms = (double)histogram_quantile(histogram, 0.90) / 1e6;
    summary.p95_ms = (double)histogram_quantile(histogram, 0.95) / 1e6;
    summary.p99_ms = (double)histogram_quantile(histogram, 0.99) / 1e6;
    summary.max_ms = (double)histogram->max / 1e6;
    return summary;
}

void load_figures_compute(const struct load_stats *stats, double load, struct load_figures *out) {
    *out = (struct load_figures){
        .load = load,
        .ttft = summarize(&stats->ttft),
        .itl = summarize(&stats->itl),
        .tpot = summarize(&stats->tpot),
        .e2e = summarize(&stats->e2e),
        .delay = summarize(&stats->delay),
        .succeeded = stats->succeeded,
        .unfinished = stats->unfinished,
        .good = stats->good,
        .warmup = stats->warmup,
        .first_error = stats->first_error,
        .limited = stats->slo_ttft_ns || stats->slo_itl_ns,
        .tokens_in = stats->tokens_in,
        .tokens_out = stats->tokens_out,
        .messages = stats->messages,
        .prompt_tokens = stats->prompt_tokens,
        .cached_tokens = stats->cached_tokens,
        .resumptions = stats->resumptions,
    };
    for (size_t code = 0; code < STATUS_CODES; code++) {
        out->errors[code] = stats->errors[code];
        out->failed += stats->errors[code];
    }
    uint64_t ended = out->succeeded + out->failed;
    if (ended)
        out->good_share = (double)out->good / (double)ended;
    if (stats->end_ns <= stats->begin_ns)
        return;
    out->seconds = (double)(stats->end_ns - stats->begin_ns) / 1e9;
    out->requests_per_s = (double)out->succeeded / out->seconds;
    out->tokens_in_per_s = (double)out->tokens_in / out->seconds;
    out->tokens_out_per_s = (double)out->tokens_out / out->seconds;
    out->good_per_s = (double)out->good / out->seconds;
}
