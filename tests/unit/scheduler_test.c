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

static void world_open(struct world *world, uint32_t max_sequences, uint32_t step_tokens, uint32_t kv_blocks,
                       uint32_t block_tokens, uint32_t max_outputs) {
    struct status status;
    *world = (struct world){0};
    fake_model(&world->model, VOCAB, CONTEXT);
    fake_executor.kv_blocks = kv_blocks;
    fake_executor.kv_block_tokens = block_tokens;
    fake_executor.max_outputs = max_outputs;
    const struct executor_options options = {.max_sequences = max_sequences, .step_tokens = step_tokens};
    assert_int_equal(fake_executor_ops.open(&world->model, &options, &world->executor, &status), 0);
    world->scheduler = scheduler_create(&world->executor->info);
    assert_non_null(world->scheduler);
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

static struct sequence *world_add(struct world *world, uint32_t length, uint32_t longest) {
    struct sequence *sequence = calloc(1, sizeof(*sequence));
    uint32_t tokens[CONTEXT];
    for (uint32_t i = 0; i < length; i++)
        tokens[i] = random_below(VOCAB);
    assert_int_equal(sequence_set_tokens(sequence, tokens, length), 0);
    sequence->prompt_length = length;
    sequence->generate = true;
    sequence->longest = longest;
    sequence->eos = MODEL_EOS_NONE;
    scheduler_add(world->scheduler, sequence);
    world->sequences[world->count++] = sequence;
    return sequence;
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

/* Every block is free or in one table, and who is admitted (its first rows are planned) has overtaken nobody. */
static void world_check(const struct world *world, const struct plan *plan) {
    struct scheduler_load load;
    uint32_t blocks = 0, running = 0;
    scheduler_get_load(world->scheduler, &load);
    for (uint32_t i = 0; i < world->count; i++) {
        const struct sequence *sequence = world->sequences[i];
        blocks += sequence->kv.count;
        running += sequence->state == SEQUENCE_RUNNING;
        assert_true(sequence->state == SEQUENCE_RUNNING || sequence->kv.count == 0);
    }
    assert_int_equal(running, load.running);
    assert_int_equal(world->count - running, load.waiting);
    assert_int_equal(blocks + load.kv_blocks_free, world->executor->info.kv_blocks);
    for (uint32_t i = 0; i < plan->batch.sequence_count; i++) {
        bool admitted = plan->batch.sequences[i].position == 0;
        assert_false(sequence_stalled(plan->sequences[i]));
        for (uint32_t j = 0; j < world->count; j++)
            if (admitted && world->sequences[j]->state == SEQUENCE_WAITING && !sequence_stalled(world->sequences[j]))
                assert_true(goes_before(plan->sequences[i], world->sequences[j]));
    }
}

/* One step, its results given to the sequences; those that end are forgotten. False: nothing could run. */
static bool world_step(struct world *world) {
    struct plan plan;
    struct batch_result result;
    struct status status;
    bool planned = scheduler_plan(world->scheduler, &plan);
    world_check(world, &plan);
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
    struct kv_cache *cache = kv_cache_create(10, 4);
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
    world_open(&world, slots, 1 + random_below(60), least + random_below(3 * least), block_tokens,
               1 + random_below(20));
    uint64_t expected_rows = 0, added = 0, cancelled = 0;
    for (int operation = 0; operation < 600; operation++) {
        uint32_t what = random_below(10);
        if (what < 3 && world.count < SEQUENCES_MAX) {
            uint32_t length = 1 + random_below(CONTEXT);
            struct sequence *sequence = world_add(&world, length, length + 1 + random_below(CONTEXT + 1 - length));
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
        cmocka_unit_test(test_sequence_ends),
        cmocka_unit_test(test_decode_goes_first),
        cmocka_unit_test(test_stalled_sequences_make_room),
        cmocka_unit_test(test_stalled_sequences_give_blocks),
        cmocka_unit_test(test_youngest_is_preempted),
        cmocka_unit_test(test_priority),
        cmocka_unit_test(test_context_is_what_fits),
        cmocka_unit_test(test_random_worlds),
    };
    return cmocka_run_group_tests_name("scheduler", tests, NULL, NULL);
}
