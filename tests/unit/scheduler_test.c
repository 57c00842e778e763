/* worker/scheduler.c, sequence.c and kv_cache.c under an executor that checks every batch. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <cmocka.h>

#include "tests/fake_executor.h"
#include "worker/scheduler.h"

enum { VOCAB = 997, CONTEXT = 100, SEQUENCES_MAX = 300 };

static uint64_t random_state;

static uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % n;
}

/* A scheduler, the executor it plans for, and the sequences a test has given it. */
struct world {
    struct model model;
    struct executor *executor;
    struct scheduler *scheduler;
    struct sequence *sequences[SEQUENCES_MAX];
    uint32_t count;
    uint64_t finished, answered_rows;
};

static void world_open_with(struct world *world, uint32_t max_sequences, uint32_t step_tokens, uint32_t kv_blocks,
                            uint32_t block_tokens, uint32_t max_outputs, bool prefix_cache) {
    struct status status;
    *world = (struct world){0};
    fake_model(&world->model, VOCAB, CONTEXT);
    fake_executor.kv_blocks = kv_blocks;
    fake_executor.kv_block_tokens = block_tokens;
    fake_executor.max_outputs = max_outputs;
    const struct executor_options options = {.max_sequences = max_sequences, .step_tokens = step_tokens};
    assert_int_equal(fake_executor_ops.open(&world->model, &options, &world->executor, &status), 0);
    world->scheduler = scheduler_create(&world->executor->info, prefix_cache);
    assert_non_null(world->scheduler);
}

static void world_open(struct world *world, uint32_t max_sequences, uint32_t step_tokens, uint32_t kv_blocks,
                       uint32_t block_tokens, uint32_t max_outputs) {
    world_open_with(world, max_sequences, step_tokens, kv_blocks, block_tokens, max_outputs, true);
}

static void world_forget(struct world *world, uint32_t index) {
    scheduler_remove(world->scheduler, world->sequences[index]);
    sequence_clear(world->sequences[index]);
    free(world->sequences[index]);
    world->sequences[index] = world->sequences[--world->count];
}

static void world_close(struct world *world) {
    while (world->count > 0)
        world_forget(world, 0);
    struct scheduler_load load;
    scheduler_get_load(world->scheduler, &load);
    assert_int_equal(load.running, 0);
    assert_int_equal(load.waiting, 0);
    assert_int_equal(load.waiting_tokens, 0);
    assert_int_equal(load.kv_blocks_free, world->executor->info.kv_blocks);
    scheduler_destroy(world->scheduler);
    fake_executor_ops.close(world->executor);
}

static struct sequence *world_add_tokens(struct world *world, const uint32_t *tokens, uint32_t length,
                                         uint32_t longest) {
    struct sequence *sequence = calloc(1, sizeof(*sequence));
    assert_int_equal(sequence_set_tokens(sequence, tokens, length), 0);
    sequence->prompt_length = length;
    sequence->generate = true;
    sequence->longest = longest;
    sequence->eos = MODEL_EOS_NONE;
    scheduler_add(world->scheduler, sequence);
    world->sequences[world->count++] = sequence;
    return sequence;
}

static struct sequence *world_add(struct world *world, uint32_t length, uint32_t longest) {
    uint32_t tokens[CONTEXT];
    for (uint32_t i = 0; i < length; i++)
        tokens[i] = random_below(VOCAB);
    return world_add_tokens(world, tokens, length, longest);
}

static uint32_t world_index(const struct world *world, const struct sequence *sequence) {
    uint32_t index = 0;
    while (world->sequences[index] != sequence)
        index++;
    return index;
}

static bool goes_before(const struct sequence *a, const struct sequence *b) {
    return a->priority != b->priority ? a->priority > b->priority : a->arrival < b->arrival;
}

static bool holds_block(const struct sequence *sequence, uint32_t block) {
    for (uint32_t i = 0; i < sequence->kv.count; i++)
        if (sequence->kv.blocks[i] == block)
            return true;
    return false;
}

/* Whether one that is passed over shares a prefix with one that runs: the only reason to let others by. */
static bool may_share(const struct world *world, const struct sequence *sequence) {
    for (uint32_t i = 0; i < world->count; i++) {
        const struct sequence *other = world->sequences[i];
        if (other->state == SEQUENCE_RUNNING && other->tokens[0] == sequence->tokens[0])
            return true;
    }
    return false;
}

/*
 * Every block is free or in a table; what is in several is published in all of them, so nobody writes it. And who is
 * admitted (waited before the plan) has overtaken nobody.
 */
static void world_check(const struct world *world, const struct plan *plan, const bool *waited) {
    struct scheduler_load load;
    uint32_t used = 0, running = 0;
    scheduler_get_load(world->scheduler, &load);
    for (uint32_t i = 0; i < world->count; i++) {
        const struct sequence *sequence = world->sequences[i];
        running += sequence->state == SEQUENCE_RUNNING;
        assert_true(sequence->state == SEQUENCE_RUNNING || sequence->kv.count == 0);
        assert_true(sequence->kv.published * world->executor->info.kv_block_tokens <= sequence->computed);
    }
    for (uint32_t block = 0; block < world->executor->info.kv_blocks; block++) {
        uint32_t owners = 0, writers = 0;
        for (uint32_t i = 0; i < world->count; i++) {
            const struct sequence *sequence = world->sequences[i];
            if (!holds_block(sequence, block))
                continue;
            owners++;
            for (uint32_t b = sequence->kv.published; b < sequence->kv.count; b++)
                writers += sequence->kv.blocks[b] == block;
        }
        used += owners > 0;
        assert_true(writers == 0 || owners == 1);
    }
    assert_int_equal(running, load.running);
    assert_int_equal(world->count - running, load.waiting);
    assert_int_equal(used + load.kv_blocks_free, world->executor->info.kv_blocks);
    for (uint32_t i = 0; i < plan->batch.sequence_count; i++) {
        assert_false(sequence_stalled(plan->sequences[i]));
        if (!waited[world_index(world, plan->sequences[i])])
            continue;
        for (uint32_t j = 0; j < world->count; j++) {
            const struct sequence *other = world->sequences[j];
            if (other->state == SEQUENCE_WAITING && !sequence_stalled(other) && !may_share(world, other))
                assert_true(goes_before(plan->sequences[i], other));
        }
    }
}

/* One step, its results given to the sequences; those that end are forgotten. False: nothing could run. */
static bool world_step(struct world *world) {
    struct plan plan;
    struct batch_result result;
    struct status status;
    bool waited[SEQUENCES_MAX];
    for (uint32_t i = 0; i < world->count; i++)
        waited[i] = world->sequences[i]->state == SEQUENCE_WAITING;
    bool planned = scheduler_plan(world->scheduler, &plan);
    world_check(world, &plan, waited);
    if (!planned)
        return false;
    assert_int_equal(world->executor->ops->step(world->executor, &plan.batch, &result, &status), 0);
    scheduler_advance(world->scheduler, &plan);
    for (uint32_t i = 0; i < plan.batch.sequence_count; i++) {
        struct sequence *sequence = plan.sequences[i];
        enum sequence_end end = SEQUENCE_GOES_ON;
        if (!sequence->generate) {
            world->answered_rows += plan.output_count[i];
            end = sequence_remaining(sequence) == 0 ? SEQUENCE_LENGTH : SEQUENCE_GOES_ON;
        } else if (plan.output_count[i] > 0) {
            uint32_t token = result.sampled[plan.first_output[i]].token;
            assert_int_equal(token, fake_executor_next(sequence->tokens, sequence->token_count, VOCAB));
            assert_int_equal(sequence_append(sequence, token, &end), 0);
        }
        if (end != SEQUENCE_GOES_ON) {
            world_forget(world, world_index(world, sequence));
            world->finished++;
        }
    }
    return true;
}

/* ---- tests */

static void test_kv_cache(void **state) {
    (void)state;
    struct kv_cache *cache = kv_cache_create(10, 4, false);
    struct kv_table a = {0}, b = {0};
    assert_int_equal(kv_cache_blocks_for(cache, 0), 0);
    assert_int_equal(kv_cache_blocks_for(cache, 4), 1);
    assert_int_equal(kv_cache_blocks_for(cache, 5), 2);
    assert_int_equal(kv_cache_blocks_for(cache, UINT32_MAX), 1u << 30);
    assert_true(kv_cache_reserve(cache, &a, 21));
    assert_int_equal(a.count, 6);
    assert_true(kv_cache_reserve(cache, &a, 24));
    assert_int_equal(a.count, 6);
    assert_false(kv_cache_reserve(cache, &b, 17));
    assert_int_equal(b.count, 0);
    assert_true(kv_cache_reserve(cache, &b, 16));
    assert_int_equal(kv_cache_free(cache), 0);
    for (uint32_t i = 0; i < a.count; i++)
        for (uint32_t j = 0; j < b.count; j++)
            assert_int_not_equal(a.blocks[i], b.blocks[j]);
    kv_cache_release(cache, &a);
    assert_int_equal(kv_cache_free(cache), 6);
    kv_cache_release(cache, &a);
    kv_cache_release(cache, &b);
    assert_int_equal(kv_cache_free(cache), kv_cache_total(cache));
    kv_cache_destroy(cache);
}

/* ---- prefixes: tables over a cache whose content is modelled, block by block */

enum { MODEL_BLOCKS = 24, MODEL_BLOCK_TOKENS = 3, MODEL_TABLES = 6, MODEL_TOKENS = 40 };

struct kv_model {
    struct kv_cache *cache;
    uint32_t content[MODEL_BLOCKS][MODEL_BLOCK_TOKENS]; /* stands for keys and values: of all tokens up to there */
    struct {
        struct kv_table table;
        uint32_t tokens[MODEL_TOKENS], length, computed;
    } sequences[MODEL_TABLES];
};

static uint32_t kv_model_value(uint32_t before, uint32_t token) {
    return (before + token + 1) * 0x9E3779B1u;
}

/* What a table says is computed is what its blocks hold, and no block that another has is still to be written. */
static void kv_model_check(const struct kv_model *model) {
    uint32_t owners[MODEL_BLOCKS] = {0}, used = 0;
    for (uint32_t s = 0; s < MODEL_TABLES; s++)
        for (uint32_t b = 0; b < model->sequences[s].table.count; b++)
            owners[model->sequences[s].table.blocks[b]]++;
    for (uint32_t s = 0; s < MODEL_TABLES; s++) {
        const struct kv_table *table = &model->sequences[s].table;
        for (uint32_t i = 0, value = 0; i < model->sequences[s].computed; i++) {
            value = kv_model_value(value, model->sequences[s].tokens[i]);
            assert_int_equal(model->content[table->blocks[i / MODEL_BLOCK_TOKENS]][i % MODEL_BLOCK_TOKENS], value);
        }
        for (uint32_t b = table->published; b < table->count; b++)
            assert_int_equal(owners[table->blocks[b]], 1);
    }
    for (uint32_t b = 0; b < MODEL_BLOCKS; b++)
        used += owners[b] > 0;
    assert_int_equal(used + kv_cache_free(model->cache), MODEL_BLOCKS);
}

static void kv_model_step(struct kv_model *model, uint32_t s, uint64_t *hits) {
    struct kv_table *table = &model->sequences[s].table;
    uint32_t *tokens = model->sequences[s].tokens, *computed = &model->sequences[s].computed;
    uint32_t what = random_below(8);
    if (what == 0 || model->sequences[s].length == 0) { /* another sequence, of few tokens, so that many begin alike */
        kv_cache_release(model->cache, table);
        model->sequences[s].length = 1 + random_below(MODEL_TOKENS);
        for (uint32_t i = 0; i < model->sequences[s].length; i++)
            tokens[i] = random_below(i % MODEL_BLOCK_TOKENS ? 1 : 2);
        *computed = kv_cache_match(model->cache, table, tokens, model->sequences[s].length);
        *hits += *computed;
    } else if (*computed < model->sequences[s].length) {
        uint32_t end = *computed + 1 + random_below(model->sequences[s].length - *computed);
        uint32_t had = table->count, free = kv_cache_free(model->cache);
        if (!kv_cache_reserve(model->cache, table, end)) {
            assert_int_equal(table->count, had);
            assert_true(kv_cache_blocks_for(model->cache, end) - had > free);
            return;
        }
        for (uint32_t i = 0, value = 0; i < end; i++) {
            value = kv_model_value(value, tokens[i]);
            if (i >= *computed)
                model->content[table->blocks[i / MODEL_BLOCK_TOKENS]][i % MODEL_BLOCK_TOKENS] = value;
        }
        *computed = end;
        if (what > 1) /* or later, with more */
            kv_cache_publish(model->cache, table, tokens, *computed);
    }
}

static void test_kv_prefixes(void **state) {
    (void)state;
    uint64_t hits = 0;
    struct kv_model model = {.cache = kv_cache_create(MODEL_BLOCKS, MODEL_BLOCK_TOKENS, true)};
    for (int i = 0; i < 50000; i++) {
        kv_model_step(&model, random_below(MODEL_TABLES), &hits);
        kv_model_check(&model);
    }
    assert_true(hits > 10000);
    for (uint32_t s = 0; s < MODEL_TABLES; s++)
        kv_cache_release(model.cache, &model.sequences[s].table);
    assert_int_equal(kv_cache_free(model.cache), MODEL_BLOCKS);
    kv_cache_destroy(model.cache);
}

/* Room for one prefix and a half: of an unused chain the end goes first, and of two chains the one unused for longer. */
static void test_kv_eviction(void **state) {
    (void)state;
    struct kv_cache *cache = kv_cache_create(6, 2, true);
    const uint32_t a[8] = {1, 2, 3, 4, 5, 6, 7, 8}, b[4] = {9, 10, 11, 12};
    struct kv_table table = {0};
    assert_int_equal(kv_cache_match(cache, &table, a, 8), 0);
    assert_true(kv_cache_reserve(cache, &table, 8));
    kv_cache_publish(cache, &table, a, 8);
    kv_cache_release(cache, &table);
    assert_int_equal(kv_cache_free(cache), 6);
    assert_true(kv_cache_reserve(cache, &table, 4)); /* in the two blocks that never held anything */
    kv_cache_publish(cache, &table, b, 4);
    kv_cache_release(cache, &table);
    struct kv_table other = {0};
    assert_true(kv_cache_reserve(cache, &other, 3)); /* two blocks: a's last */
    assert_int_equal(kv_cache_match(cache, &table, a, 8), 4);
    kv_cache_release(cache, &table);
    assert_int_equal(kv_cache_match(cache, &table, b, 3), 2); /* whole blocks only */
    kv_cache_release(cache, &table);
    assert_true(kv_cache_reserve(cache, &other, 5)); /* one more: b's second has been unused for longest */
    assert_int_equal(kv_cache_match(cache, &table, b, 4), 2);
    kv_cache_release(cache, &table);
    assert_int_equal(kv_cache_match(cache, &table, a, 8), 4);
    kv_cache_release(cache, &table);
    kv_cache_release(cache, &other);
    kv_cache_destroy(cache);
}

static void test_sequence_ends(void **state) {
    (void)state;
    const uint32_t prompt[3] = {1, 2, 3};
    struct sequence sequence = {.generate = true, .eos = 7, .longest = 6, .credit_limited = true, .credit = 2};
    enum sequence_end end;
    assert_int_equal(sequence_set_tokens(&sequence, prompt, 3), 0);
    sequence.stop_ids = calloc(2, sizeof(*sequence.stop_ids));
    sequence.stop_ids[0] = 8;
    sequence.stop_ids[1] = 9;
    sequence.stop_count = 2;
    assert_int_equal(sequence_append(&sequence, 5, &end), 0);
    assert_int_equal(end, SEQUENCE_GOES_ON);
    assert_false(sequence_stalled(&sequence));
    assert_int_equal(sequence_append(&sequence, 9, &end), 0);
    assert_int_equal(end, SEQUENCE_STOPPED);
    assert_true(sequence_stalled(&sequence));
    sequence_add_credit(&sequence, UINT32_MAX);
    sequence_add_credit(&sequence, UINT32_MAX);
    assert_false(sequence_stalled(&sequence));
    sequence.token_count = 4;
    assert_int_equal(sequence_append(&sequence, 7, &end), 0);
    assert_int_equal(end, SEQUENCE_STOPPED);
    assert_int_equal(sequence_append(&sequence, 5, &end), 0);
    assert_int_equal(end, SEQUENCE_LENGTH);
    sequence_clear(&sequence);
}

static void test_decode_goes_first(void **state) {
    (void)state;
    struct world world;
    struct plan plan;
    world_open(&world, 4, 8, 100, 4, 8);
    struct sequence *first = world_add(&world, 3, 50);
    assert_true(world_step(&world));
    struct sequence *second = world_add(&world, 20, 50);
    assert_true(scheduler_plan(world.scheduler, &plan));
    assert_int_equal(plan.batch.rows, 8);
    assert_ptr_equal(plan.sequences[0], first);
    assert_int_equal(plan.batch.sequences[0].rows, 1);
    assert_ptr_equal(plan.sequences[1], second);
    assert_int_equal(plan.batch.sequences[1].rows, 7);
    assert_int_equal(plan.output_count[1], 0);
    world_close(&world);
}

static void test_stalled_sequences_make_room(void **state) {
    (void)state;
    struct world world;
    world_open(&world, 2, 16, 100, 4, 8);
    for (int i = 0; i < 2; i++) {
        struct sequence *slow = world_add(&world, 4, 50);
        slow->credit_limited = true;
        slow->credit = 1;
    }
    assert_true(world_step(&world));
    assert_false(world_step(&world)); /* both wait for their readers */
    struct sequence *fast = world_add(&world, 4, 10);
    while (world_step(&world))
        ;
    assert_int_equal(world.finished, 1);
    for (uint32_t i = 0; i < world.count; i++) {
        assert_ptr_not_equal(world.sequences[i], fast);
        sequence_add_credit(world.sequences[i], 1000);
    }
    while (world_step(&world))
        ;
    assert_int_equal(world.finished, 3);
    world_close(&world);
}

/* Two that generate need a block each when an older one, which waits for its reader, has the rest. */
static void test_stalled_sequences_give_blocks(void **state) {
    (void)state;
    struct world world;
    struct plan plan;
    world_open(&world, 4, 64, 25, 4, 8);
    struct sequence *slow = world_add(&world, 60, 100); /* 15 blocks, the 16th for its next token */
    slow->credit_limited = true;
    slow->credit = 1;
    world_add(&world, 15, 100);
    world_add(&world, 15, 100);
    do {
        assert_true(world_step(&world));
        assert_true(scheduler_plan(world.scheduler, &plan));
    } while (slow->state == SEQUENCE_RUNNING);
    assert_int_equal(plan.batch.sequence_count, 2);
    assert_int_equal(plan.batch.rows, 2);
    world_close(&world);
}

static void test_youngest_is_preempted(void **state) {
    (void)state;
    struct world world;
    world_open(&world, 4, 64, 12, 4, 8); /* 48 positions */
    struct sequence *first = world_add(&world, 15, 40), *second = world_add(&world, 15, 40);
    bool preempted = false;
    while (world.finished == 0) {
        assert_true(world_step(&world));
        if (world.finished == 0) {
            assert_int_equal(first->state, SEQUENCE_RUNNING);
            preempted |= second->state == SEQUENCE_WAITING;
        }
    }
    assert_true(preempted);
    while (world_step(&world))
        ;
    assert_int_equal(world.finished, 2);
    world_close(&world);
}

static void test_priority(void **state) {
    (void)state;
    struct world world;
    struct plan plan;
    world_open(&world, 1, 64, 100, 4, 8);
    world_add(&world, 4, 10);
    struct sequence *urgent = world_add(&world, 4, 10);
    scheduler_remove(world.scheduler, urgent);
    urgent->priority = 1;
    scheduler_add(world.scheduler, urgent);
    assert_true(scheduler_plan(world.scheduler, &plan));
    assert_ptr_equal(plan.sequences[0], urgent);
    world_close(&world);
}

/* Ten seconds of waiting are worth a level, so that the lowest has its turn too. */
static void test_waiting_outweighs_priority(void **state) {
    (void)state;
    struct world world;
    world_open(&world, 1, 64, 100, 4, 8);
    struct sequence *sequences[4];
    const struct {
        int32_t priority;
        uint64_t seconds;
    } cases[] = {{0, 100}, {1, 109}, {INT32_MAX, 111}, {INT32_MIN, 0}};
    for (int i = 0; i < 4; i++) {
        sequences[i] = world_add(&world, 4, 5);
        scheduler_remove(world.scheduler, sequences[i]);
        sequences[i]->priority = cases[i].priority;
        sequences[i]->submitted_ns = cases[i].seconds * 1000000000;
        scheduler_add(world.scheduler, sequences[i]);
    }
    const int order[] = {2, 1, 0, 3};
    for (int i = 0; i < 4; i++) {
        struct plan plan;
        assert_true(scheduler_plan(world.scheduler, &plan));
        assert_ptr_equal(plan.sequences[0], sequences[order[i]]);
        assert_true(world_step(&world));
    }
    world_close(&world);
}

static void test_a_prompt_is_computed_once(void **state) {
    (void)state;
    uint32_t tokens[40];
    for (uint32_t i = 0; i < 40; i++)
        tokens[i] = i;
    for (int on = 0; on < 2; on++) {
        struct world world;
        struct scheduler_load load;
        world_open_with(&world, 8, 16, 100, 4, 8, on);
        atomic_store(&fake_executor.rows, 0);
        for (int i = 0; i < 5; i++)
            world_add_tokens(&world, tokens, 40, 42); /* at once: none is in the cache yet */
        world_add(&world, 4, 5);                                /* passes those that wait for the first */
        bool passed = false;
        while (world.count > 0) {
            assert_true(world_step(&world));
            bool short_one_left = false;
            for (uint32_t i = 0; i < world.count; i++)
                short_one_left |= world.sequences[i]->prompt_length == 4;
            passed |= world.count == 5 && !short_one_left;
        }
        assert_int_equal(passed, on);
        /* The first's 40 rows and a decode, four times the last block's and a decode, and the other's. */
        assert_int_equal(atomic_load(&fake_executor.rows), on ? 41 + 4 * (4 + 1) + 4 : 5 * 41 + 4);
        scheduler_get_load(world.scheduler, &load);
        assert_int_equal(load.prefix_queries, 5 * 40 + 4);
        assert_int_equal(load.prefix_hits, on ? 4 * 36 : 0);
        /* And later: all but the last token's block. */
        world_add_tokens(&world, tokens, 40, 41);
        assert_true(world_step(&world));
        scheduler_get_load(world.scheduler, &load);
        assert_int_equal(load.prefix_hits, on ? 5 * 36 : 0);
        world_close(&world);
    }
}

/* What a Forward wants of every position is computed, whatever is cached. */
static void test_wanted_positions_are_computed(void **state) {
    (void)state;
    struct world world;
    struct plan plan;
    uint32_t tokens[12] = {0};
    world_open(&world, 8, 64, 100, 4, 64);
    world_add_tokens(&world, tokens, 12, 13);
    assert_true(world_step(&world));
    struct sequence *all = world_add_tokens(&world, tokens, 12, 13);
    all->generate = false;
    all->all_positions = true;
    assert_true(scheduler_plan(world.scheduler, &plan));
    assert_int_equal(plan.batch.rows, 12);
    assert_int_equal(plan.batch.output_count, 12);
    world_forget(&world, 0);
    struct sequence *routes = world_add_tokens(&world, tokens, 12, 13);
    routes->generate = false;
    routes->routes = true;
    assert_true(scheduler_plan(world.scheduler, &plan));
    assert_int_equal(plan.batch.rows, 12);
    world_forget(&world, 0);
    struct sequence *last = world_add_tokens(&world, tokens, 12, 13);
    last->generate = false;
    assert_true(scheduler_plan(world.scheduler, &plan));
    assert_int_equal(plan.batch.rows, 4);
    assert_int_equal(plan.batch.sequences[0].position, 8);
    world_close(&world);
}

static void test_context_is_what_fits(void **state) {
    (void)state;
    struct executor_info info = {.kv_blocks = 5, .kv_block_tokens = 16, .context_length = 100};
    assert_int_equal(scheduler_context_length(&info), 80);
    info.kv_blocks = UINT32_MAX;
    assert_int_equal(scheduler_context_length(&info), 100);
}

/* Thousands of random operations in random worlds, all of which must come to an end. */
static void random_world(uint32_t round) {
    struct world world;
    uint32_t block_tokens = 1 + random_below(20), slots = 1 + random_below(8);
    uint32_t least = (CONTEXT + block_tokens - 1) / block_tokens;
    world_open_with(&world, slots, 1 + random_below(60), least + random_below(3 * least), block_tokens,
                    1 + random_below(20), round % 4 > 0);
    uint32_t prefix[CONTEXT];
    for (uint32_t i = 0; i < CONTEXT; i++)
        prefix[i] = random_below(VOCAB);
    uint64_t expected_rows = 0, added = 0, cancelled = 0;
    for (int operation = 0; operation < 600; operation++) {
        uint32_t what = random_below(10);
        if (what < 3 && world.count < SEQUENCES_MAX) {
            uint32_t length = 1 + random_below(CONTEXT);
            uint32_t longest = length + 1 + random_below(CONTEXT + 1 - length), tokens[CONTEXT];
            uint32_t alike = random_below(2) ? random_below(length + 1) : 0;
            for (uint32_t i = 0; i < length; i++)
                tokens[i] = i < alike ? prefix[i] : random_below(VOCAB);
            struct sequence *sequence = world_add_tokens(&world, tokens, length, longest);
            added++;
            sequence->generate = random_below(4) > 0;
            sequence->all_positions = !sequence->generate && random_below(2);
            sequence->credit_limited = sequence->generate && random_below(2);
            sequence->credit = random_below(4);
            if (random_below(10) == 0) {
                scheduler_remove(world.scheduler, sequence);
                sequence->priority = (int32_t)random_below(3) - 1;
                scheduler_add(world.scheduler, sequence);
            }
            if (!sequence->generate)
                expected_rows += sequence->all_positions ? length : 1;
        } else if (what == 3 && world.count > 0) {
            uint32_t index = random_below(world.count);
            struct sequence *sequence = world.sequences[index];
            if (!sequence->generate) /* some of its rows may have come, which is not looked at */
                continue;
            cancelled++;
            world_forget(&world, index);
        } else if (what == 4 && world.count > 0) {
            sequence_add_credit(world.sequences[random_below(world.count)], random_below(20));
        } else {
            world_step(&world);
        }
    }
    for (uint32_t i = 0; i < world.count; i++)
        sequence_add_credit(world.sequences[i], 1000);
    for (uint32_t steps = 0; world_step(&world); steps++)
        assert_true(steps < 100000);
    if (world.count != 0)
        fail_msg("round %u: %u sequences starve", round, world.count);
    assert_int_equal(world.finished + cancelled, added);
    assert_int_equal(world.answered_rows, expected_rows); /* each once, preempted or not */
    world_close(&world);
}

static void test_random_worlds(void **state) {
    (void)state;
    for (uint32_t round = 0; round < 60; round++)
        random_world(round);
}

int main(void) {
    const char *seed = getenv("MOED_TEST_SEED");
    random_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL);
    printf("# MOED_TEST_SEED=%llu\n", (unsigned long long)random_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kv_cache),
        cmocka_unit_test(test_kv_prefixes),
        cmocka_unit_test(test_kv_eviction),
        cmocka_unit_test(test_sequence_ends),
        cmocka_unit_test(test_decode_goes_first),
        cmocka_unit_test(test_stalled_sequences_make_room),
        cmocka_unit_test(test_stalled_sequences_give_blocks),
        cmocka_unit_test(test_youngest_is_preempted),
        cmocka_unit_test(test_priority),
        cmocka_unit_test(test_waiting_outweighs_priority),
        cmocka_unit_test(test_a_prompt_is_computed_once),
        cmocka_unit_test(test_wanted_positions_are_computed),
        cmocka_unit_test(test_context_is_what_fits),
        cmocka_unit_test(test_random_worlds),
    };
    return cmocka_run_group_tests_name("scheduler", tests, NULL, NULL);
}
