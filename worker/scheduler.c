#include "worker/scheduler.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

struct scheduler {
    uint32_t max_sequences, step_tokens, max_outputs;
    struct kv_cache *kv;
    uint32_t block_tokens;
    bool prefix_cache;
    uint64_t arrivals, preemptions, prefix_queries, prefix_hits;

    struct sequence **running; /* [max_sequences], in order */
    uint32_t running_count;
    uint32_t *free_slots; /* [max_sequences], a stack */
    struct sequence *waiting_first, *waiting_last; /* in order */
    uint32_t waiting_count;
    uint64_t waiting_tokens;

    /* The plan being made. */
    uint32_t *tokens;                        /* [step_tokens] */
    struct batch_sequence *batch_sequences;  /* [max_sequences] */
    struct sequence **planned;               /* [max_sequences] */
    uint32_t *first_output, *output_count;   /* [max_sequences] */
    struct batch_output *outputs;            /* [max_outputs] */
    struct batch batch;
};

uint32_t scheduler_context_length(const struct executor_info *info) {
    uint64_t positions = (uint64_t)info->kv_blocks * info->kv_block_tokens;
    return positions < info->context_length ? (uint32_t)positions : info->context_length;
}

struct scheduler *scheduler_create(const struct executor_info *info, bool prefix_cache) {
    struct scheduler *scheduler = calloc(1, sizeof(*scheduler));
    if (!scheduler)
        return NULL;
    uint32_t slots = scheduler->max_sequences = info->max_sequences;
    scheduler->step_tokens = info->step_tokens;
    scheduler->max_outputs = info->max_outputs;
    scheduler->block_tokens = info->kv_block_tokens;
    scheduler->prefix_cache = prefix_cache;
    scheduler->kv = kv_cache_create(info->kv_blocks, info->kv_block_tokens, prefix_cache);
    scheduler->running = calloc(slots, sizeof(*scheduler->running));
    scheduler->free_slots = calloc(slots, sizeof(*scheduler->free_slots));
    scheduler->tokens = calloc(info->step_tokens, sizeof(*scheduler->tokens));
    scheduler->batch_sequences = calloc(slots, sizeof(*scheduler->batch_sequences));
    scheduler->planned = calloc(slots, sizeof(*scheduler->planned));
    scheduler->first_output = calloc(slots, sizeof(*scheduler->first_output));
    scheduler->output_count = calloc(slots, sizeof(*scheduler->output_count));
    scheduler->outputs = calloc(info->max_outputs, sizeof(*scheduler->outputs));
    if (!scheduler->kv || !scheduler->running || !scheduler->free_slots || !scheduler->tokens ||
        !scheduler->batch_sequences || !scheduler->planned || !scheduler->first_output || !scheduler->output_count ||
        !scheduler->outputs) {
        scheduler_destroy(scheduler);
        return NULL;
    }
    for (uint32_t i = 0; i < slots; i++)
        scheduler->free_slots[i] = slots - 1 - i;
    return scheduler;
}

void scheduler_destroy(struct scheduler *scheduler) {
    if (!scheduler)
        return;
    assert(scheduler->running_count == 0 && scheduler->waiting_count == 0);
    kv_cache_destroy(scheduler->kv);
    free(scheduler->running);
    free(scheduler->free_slots);
    free(scheduler->tokens);
    free(scheduler->batch_sequences);
    free(scheduler->planned);
    free(scheduler->first_output);
    free(scheduler->output_count);
    free(scheduler->outputs);
    free(scheduler);
}

static bool goes_before(const struct sequence *a, const struct sequence *b) {
    return a->turn != b->turn ? a->turn < b->turn : a->arrival < b->arrival;
}

/* ---- the waiting ones */

static void waiting_insert(struct scheduler *scheduler, struct sequence *sequence) {
    struct sequence *before = scheduler->waiting_last;
    while (before && goes_before(sequence, before))
        before = before->previous;
    struct sequence *after = before ? before->next : scheduler->waiting_first;
    sequence->previous = before;
    sequence->next = after;
    *(before ? &before->next : &scheduler->waiting_first) = sequence;
    *(after ? &after->previous : &scheduler->waiting_last) = sequence;
    sequence->state = SEQUENCE_WAITING;
    scheduler->waiting_count++;
    scheduler->waiting_tokens += sequence->token_count;
}

static void waiting_remove(struct scheduler *scheduler, struct sequence *sequence) {
    *(sequence->previous ? &sequence->previous->next : &scheduler->waiting_first) = sequence->next;
    *(sequence->next ? &sequence->next->previous : &scheduler->waiting_last) = sequence->previous;
    sequence->previous = sequence->next = NULL;
    sequence->state = SEQUENCE_IDLE;
    scheduler->waiting_count--;
    scheduler->waiting_tokens -= sequence->token_count;
}

/* ---- the running ones */

static void running_insert(struct scheduler *scheduler, struct sequence *sequence) {
    uint32_t place = scheduler->running_count++;
    for (; place > 0 && goes_before(sequence, scheduler->running[place - 1]); place--)
        scheduler->running[place] = scheduler->running[place - 1];
    scheduler->running[place] = sequence;
    sequence->slot = scheduler->free_slots[scheduler->max_sequences - scheduler->running_count];
    sequence->state = SEQUENCE_RUNNING;
}

/* Free slots lie at the stack's bottom: max_sequences - running_count of them. */
static void running_remove(struct scheduler *scheduler, struct sequence *sequence) {
    uint32_t place = 0;
    while (scheduler->running[place] != sequence)
        place++;
    scheduler->running_count--;
    memmove(scheduler->running + place, scheduler->running + place + 1,
            (scheduler->running_count - place) * sizeof(*scheduler->running));
    scheduler->free_slots[scheduler->max_sequences - scheduler->running_count - 1] = sequence->slot;
    kv_cache_release(scheduler->kv, &sequence->kv);
    sequence->state = SEQUENCE_IDLE;
    sequence->computed = 0;
}

static void preempt(struct scheduler *scheduler, struct sequence *sequence) {
    running_remove(scheduler, sequence);
    waiting_insert(scheduler, sequence);
    scheduler->preemptions++;
}

static bool preempt_stalled(struct scheduler *scheduler) {
    for (uint32_t i = scheduler->running_count; i-- > 0;)
        if (sequence_stalled(scheduler->running[i])) {
            preempt(scheduler, scheduler->running[i]);
            return true;
        }
    return false;
}

void scheduler_add(struct scheduler *scheduler, struct sequence *sequence) {
    assert(sequence->state == SEQUENCE_IDLE && sequence->computed == 0 && sequence->token_count > 0);
    sequence->arrival = scheduler->arrivals++;
    /* Levels beyond what a lifetime of waiting makes up for count as that. */
    const int64_t level_ns = SCHEDULER_PRIORITY_S * INT64_C(1000000000), levels_max = 100000000;
    int64_t levels = sequence->priority > levels_max    ? levels_max
                     : sequence->priority < -levels_max ? -levels_max
                                                        : sequence->priority;
    sequence->turn = (int64_t)sequence->submitted_ns - levels * level_ns;
    waiting_insert(scheduler, sequence);
}

void scheduler_remove(struct scheduler *scheduler, struct sequence *sequence) {
    if (sequence->state == SEQUENCE_WAITING)
        waiting_remove(scheduler, sequence);
    else if (sequence->state == SEQUENCE_RUNNING)
        running_remove(scheduler, sequence);
}

/* ---- a step */

/* How many of its next rows fit into what is left of the step. */
static uint32_t rows_that_fit(const struct scheduler *scheduler, const struct sequence *sequence) {
    uint32_t rows = sequence_remaining(sequence);
    uint32_t rows_left = scheduler->step_tokens - scheduler->batch.rows;
    uint32_t outputs_left = scheduler->max_outputs - scheduler->batch.output_count;
    if (rows > rows_left)
        rows = rows_left;
    if (sequence->all_positions) {
        uint32_t silent = sequence->answered > sequence->computed ? sequence->answered - sequence->computed : 0;
        if (rows > silent + outputs_left)
            rows = silent + outputs_left;
    } else if (outputs_left == 0 && rows == sequence_remaining(sequence)) {
        rows--; /* the last row is the one that wants an output */
    }
    return rows;
}

static void plan_output(struct scheduler *scheduler, const struct sequence *sequence, uint32_t row, uint32_t position) {
    scheduler->outputs[scheduler->batch.output_count++] = (struct batch_output){
        .row = row,
        .sampling = sequence->generate ? &sequence->sampling : NULL,
        .history = sequence->tokens,
        .history_length = position + 1,
        .prompt_length = sequence->prompt_length,
        .logprobs = sequence->logprobs,
        .logits = !sequence->generate,
    };
}

/* Puts what fits of a running sequence into the step. Its blocks are reserved. */
static void plan_sequence(struct scheduler *scheduler, struct sequence *sequence) {
    uint32_t rows = rows_that_fit(scheduler, sequence);
    if (rows == 0)
        return;
    struct batch *batch = &scheduler->batch;
    uint32_t member = batch->sequence_count++;
    scheduler->planned[member] = sequence;
    scheduler->batch_sequences[member] = (struct batch_sequence){
        .slot = sequence->slot,
        .position = sequence->computed,
        .rows = rows,
        .blocks = sequence->kv.blocks,
        .block_count = sequence->kv.count,
    };
    scheduler->first_output[member] = batch->output_count;
    for (uint32_t i = 0; i < rows; i++) {
        uint32_t position = sequence->computed + i;
        if (sequence_wants_output(sequence, position))
            plan_output(scheduler, sequence, batch->rows + i, position);
    }
    scheduler->output_count[member] = batch->output_count - scheduler->first_output[member];
    memcpy(scheduler->tokens + batch->rows, sequence->tokens + sequence->computed, rows * sizeof(*scheduler->tokens));
    batch->rows += rows;
    batch->routes |= sequence->routes;
}

/*
 * Reserves the blocks of a sequence's tokens. Those that give up blocks for it are stalled or come after it in the
 * order, so none of them is in the step yet. False: it is itself the last, and keeps what it has until a block is free.
 */
static bool reserve(struct scheduler *scheduler, struct sequence *sequence) {
    while (!kv_cache_reserve(scheduler->kv, &sequence->kv, sequence->token_count)) {
        if (preempt_stalled(scheduler))
            continue;
        struct sequence *last = scheduler->running[scheduler->running_count - 1];
        if (last == sequence)
            return false;
        preempt(scheduler, last);
    }
    return true;
}

static bool plan_decodes(struct scheduler *scheduler) {
    bool reserved_all = true;
    for (uint32_t i = 0; i < scheduler->running_count; i++) {
        struct sequence *sequence = scheduler->running[i];
        if (sequence_remaining(sequence) != 1 || sequence_stalled(sequence))
            continue;
        if (rows_that_fit(scheduler, sequence) == 0)
            break;
        uint32_t before = scheduler->running_count;
        if (!reserve(scheduler, sequence)) {
            reserved_all = false;
            continue;
        }
        if (scheduler->running_count != before) /* stalled ones ahead may have gone: find the place again */
            for (i = 0; scheduler->running[i] != sequence;)
                i++;
        plan_sequence(scheduler, sequence);
    }
    return reserved_all;
}

static void plan_prefills(struct scheduler *scheduler) {
    for (uint32_t i = 0; i < scheduler->running_count; i++) {
        struct sequence *sequence = scheduler->running[i];
        if (sequence_remaining(sequence) > 1 && !sequence_stalled(sequence))
            plan_sequence(scheduler, sequence);
    }
}

/* Whether a running sequence is at work on the block that comes behind those a waiting one shares with it. */
static bool being_computed(const struct scheduler *scheduler, const struct sequence *sequence) {
    uint32_t block_tokens = scheduler->block_tokens, shared = sequence->kv.count, begin = shared * block_tokens;
    if (sequence_reusable(sequence) < begin + block_tokens)
        return false;
    for (uint32_t i = 0; i < scheduler->running_count; i++) {
        const struct sequence *other = scheduler->running[i];
        if (other->computed < begin + block_tokens && other->token_count >= begin + block_tokens &&
            !sequence_stalled(other) &&
            (shared == 0 || (other->kv.published >= shared &&
                             other->kv.blocks[shared - 1] == sequence->kv.blocks[shared - 1])) &&
            memcmp(other->tokens + begin, sequence->tokens + begin, block_tokens * sizeof(*sequence->tokens)) == 0)
            return true;
    }
    return false;
}

enum admission { ADMITTED, PASSED_OVER, NO_ROOM };

/*
 * Makes room for a waiting sequence and admits it. One block is left over for each running sequence, so that the newest
 * does not lose its blocks again at once.
 */
static enum admission admit(struct scheduler *scheduler, struct sequence *sequence) {
    while (scheduler->running_count == scheduler->max_sequences)
        if (!preempt_stalled(scheduler))
            return NO_ROOM;
    uint32_t needed = kv_cache_blocks_for(scheduler->kv, sequence->token_count);
    uint32_t cached =
        kv_cache_match(scheduler->kv, &sequence->kv, sequence->tokens, sequence_reusable(sequence));
    enum admission result = NO_ROOM;
    if (scheduler->prefix_cache && being_computed(scheduler, sequence)) {
        result = PASSED_OVER;
        goto fail;
    }
    while (kv_cache_free(scheduler->kv) < (uint64_t)needed - sequence->kv.count + scheduler->running_count)
        if (!preempt_stalled(scheduler))
            goto fail;
    if (!kv_cache_reserve(scheduler->kv, &sequence->kv, sequence->token_count))
        goto fail;
    waiting_remove(scheduler, sequence);
    running_insert(scheduler, sequence);
    sequence->computed = cached;
    if (!sequence->admitted) {
        sequence->admitted = true;
        sequence->cached = cached;
        scheduler->prefix_queries += sequence->token_count;
        scheduler->prefix_hits += cached;
    }
    return ADMITTED;

fail:
    kv_cache_release(scheduler->kv, &sequence->kv);
    return result;
}

static void plan_admissions(struct scheduler *scheduler) {
    struct sequence *next;
    uint32_t passed_over = 0; /* bounded, for it costs time */
    for (struct sequence *sequence = scheduler->waiting_first; sequence; sequence = next) {
        next = sequence->next;
        if (sequence_stalled(sequence))
            continue;
        if (rows_that_fit(scheduler, sequence) == 0)
            return;
        switch (admit(scheduler, sequence)) {
        case ADMITTED:
            plan_sequence(scheduler, sequence);
            break;
        case PASSED_OVER:
            if (++passed_over == scheduler->max_sequences)
                return;
            break;
        case NO_ROOM:
            return;
        }
    }
}

bool scheduler_plan(struct scheduler *scheduler, struct plan *plan) {
    scheduler->batch = (struct batch){
        .tokens = scheduler->tokens, .sequences = scheduler->batch_sequences, .outputs = scheduler->outputs};
    bool reserved_all = plan_decodes(scheduler);
    plan_prefills(scheduler);
    if (reserved_all)
        plan_admissions(scheduler);
    *plan = (struct plan){scheduler->batch, scheduler->planned, scheduler->first_output, scheduler->output_count};
    return plan->batch.rows > 0;
}

void scheduler_advance(struct scheduler *scheduler, const struct plan *plan) {
    for (uint32_t i = 0; i < plan->batch.sequence_count; i++) {
        struct sequence *sequence = plan->sequences[i];
        sequence->computed += plan->batch.sequences[i].rows;
        if (sequence->answered < sequence->computed)
            sequence->answered = sequence->computed;
        kv_cache_publish(scheduler->kv, &sequence->kv, sequence->tokens, sequence->computed);
    }
}

void scheduler_get_load(const struct scheduler *scheduler, struct scheduler_load *load) {
    *load = (struct scheduler_load){
        .running = scheduler->running_count,
        .waiting = scheduler->waiting_count,
        .kv_blocks_free = kv_cache_free(scheduler->kv),
        .waiting_tokens = scheduler->waiting_tokens,
        .preemptions = scheduler->preemptions,
        .prefix_queries = scheduler->prefix_queries,
        .prefix_hits = scheduler->prefix_hits,
    };
    for (uint32_t i = 0; i < scheduler->running_count; i++)
        if (sequence_remaining(scheduler->running[i]) > 1)
            load->waiting_tokens += sequence_remaining(scheduler->running[i]);
}
