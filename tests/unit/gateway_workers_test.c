#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/worker_table.h"

static struct worker_table *table;
static Moed__V1__Model model;
static struct status status;
static bool back;
static struct worker *rival;

static int setup(void **state) {
    moed__v1__model__init(&model);
    model.name = "synthetic";
    model.fingerprint = "0123456789abcdef";
    model.vocab_size = 100;
    model.context_length = 64;
    memset(&status, 0, sizeof status);
    table = worker_table_create();
    return table ? 0 : -1;
}

static int teardown(void **state) {
    worker_table_destroy(table);
    return 0;
}

static struct wire_identity peer_of(int number) {
    struct wire_identity peer = {.length = 5};
    memcpy(peer.bytes + 1, &number, sizeof number);
    return peer;
}

static Moed__Worker__V1__Hello hello_of(char *id, uint64_t incarnation) {
    Moed__Worker__V1__Hello hello = MOED__WORKER__V1__HELLO__INIT;
    hello.worker_id = id;
    hello.incarnation = incarnation;
    hello.state = MOED__V1__WORKER__STATE__READY;
    hello.context_length = 64;
    hello.model = &model;
    return hello;
}

static struct worker *greet(const Moed__Worker__V1__Hello *hello, int peer_number, uint64_t now_ns) {
    struct wire_identity peer = peer_of(peer_number);
    return worker_table_hello(table, &peer, hello, now_ns, &back, &rival, &status);
}

static struct worker *join(char *id, int peer_number) {
    Moed__Worker__V1__Hello hello = hello_of(id, 1);
    struct worker *worker = greet(&hello, peer_number, 1);
    assert_non_null(worker);
    return worker;
}

static void assert_hello_refused(const Moed__Worker__V1__Hello *hello, int code, const char *words) {
    assert_null(greet(hello, 99, 1));
    assert_int_equal(status.code, code);
    if (!strstr(status.message, words))
        fail_msg("\"%s\" is not in \"%s\"", words, status.message);
}

static void refuses_bad_hellos(void **state) {
    char id[129];
    Moed__Worker__V1__Hello hello = hello_of("", 1);
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "worker_id: 0 bytes");
    memset(id, 'x', 128);
    id[128] = '\0';
    hello.worker_id = id;
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "worker_id: 128 bytes; 1 to 127");
    hello = hello_of("a", 1);
    hello.state = MOED__V1__WORKER__STATE__LOST;
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "state: 4");
    hello = hello_of("a", 1);
    hello.model = NULL;
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "model: missing");
    hello = hello_of("a", 1);
    hello.context_length = 65;
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "context_length: 65; 1 to the model's 64");
    model.vocab_size = 0;
    hello = hello_of("a", 1);
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "model.vocab_size: 0");
    model.vocab_size = 100;
    model.expert_count = 2;
    model.expert_used_count = 3;
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "3 of 2 experts");
    model.expert_used_count = 2;
    model.fingerprint = "";
    assert_hello_refused(&hello, STATUS_INVALID_ARGUMENT, "model.fingerprint: 0 bytes");
    assert_int_equal(worker_table_count(table), 0);
    assert_int_equal(worker_table_model(table)->generation, 0);
}

static void serves_one_model(void **state) {
    struct worker *first = join("a", 1);
    uint64_t generation = worker_table_model(table)->generation;
    Moed__Worker__V1__Hello hello = hello_of("b", 2);
    model.fingerprint = "fedcba9876543210";
    assert_hello_refused(&hello, STATUS_FAILED_PRECONDITION, "fedcba9876543210");
    assert_non_null(strstr(status.message, "0123456789abcdef"));
    worker_lose(first); /* now nobody serves the old model */
    assert_non_null(greet(&hello, 2, 1));
    assert_string_equal(worker_table_model(table)->fingerprint, "fedcba9876543210");
    assert_true(worker_table_model(table)->generation > generation);
    model.fingerprint = "0123456789abcdef";
    hello = hello_of("a", 1);
    assert_hello_refused(&hello, STATUS_FAILED_PRECONDITION, "worker b");
}

static void holds_names(void **state) {
    struct wire_identity old_peer = peer_of(1), new_peer = peer_of(2);
    struct worker *first = join("a", 1);
    Moed__Worker__V1__Hello again = hello_of("a", 1), other = hello_of("a", 2);
    assert_ptr_equal(greet(&again, 2, 5), first); /* reconnected */
    assert_true(back);
    assert_null(worker_table_find(table, &old_peer));
    assert_ptr_equal(worker_table_find(table, &new_peer), first);
    assert_hello_refused(&other, STATUS_ALREADY_EXISTS, "\"a\"");
    assert_ptr_equal(rival, first);
    worker_lose(first);
    assert_null(worker_table_find(table, &new_peer));
    assert_ptr_equal(greet(&other, 3, 6), first);
    assert_false(back);
    assert_int_equal(worker_table_count(table), 1);
}

static void places_on_the_least_loaded(void **state) {
    struct worker *a = join("a", 1), *b = join("b", 2);
    Moed__Worker__V1__Heartbeat beat = MOED__WORKER__V1__HEARTBEAT__INIT;
    beat.state = MOED__V1__WORKER__STATE__READY;
    assert_ptr_equal(worker_table_place(table, 10), a);
    worker_placed(table, a, 10);
    assert_ptr_equal(worker_table_place(table, 10), b);
    worker_placed(table, b, 10);
    assert_ptr_equal(worker_table_place(table, 10), a); /* equals take turns */
    worker_placed(table, a, 0);
    assert_ptr_equal(worker_table_place(table, 10), b);
    worker_placed(table, a, 1);

    beat.waiting_tokens = 50; /* of which 10 are ours: others have placed 40 there */
    assert_true(worker_beat(b, &beat, 1));
    assert_int_equal(b->foreign_load, 40);
    assert_ptr_equal(worker_table_place(table, 10), a);
    beat.waiting_tokens = 0; /* an old beat does not make forget what was just placed */
    assert_true(worker_beat(a, &beat, 1));
    assert_int_equal(a->own_load + a->foreign_load, 11);

    beat.waiting_tokens = UINT64_MAX;
    beat.running = 5;
    assert_true(worker_beat(a, &beat, 1));
    assert_ptr_equal(worker_table_place(table, 10), b);
}

static void places_only_where_it_fits(void **state) {
    Moed__Worker__V1__Hello hello = hello_of("a", 1);
    Moed__Worker__V1__Heartbeat beat = MOED__WORKER__V1__HEARTBEAT__INIT;
    assert_null(worker_table_place(table, 1));
    hello.state = MOED__V1__WORKER__STATE__LOADING;
    struct worker *a = greet(&hello, 1, 1);
    assert_null(worker_table_place(table, 1));
    assert_int_equal(worker_table_ready(table), 0);
    assert_int_equal(worker_table_context_length(table), 0);
    beat.state = MOED__V1__WORKER__STATE__READY;
    assert_true(worker_beat(a, &beat, 1));
    assert_ptr_equal(worker_table_place(table, 64), a);
    assert_null(worker_table_place(table, 65));
    hello = hello_of("b", 1);
    hello.context_length = 32;
    struct worker *b = greet(&hello, 2, 1);
    worker_placed(table, a, 1000);
    assert_ptr_equal(worker_table_place(table, 32), b);
    assert_ptr_equal(worker_table_place(table, 33), a);
    assert_int_equal(worker_table_context_length(table), 64);
    beat.state = MOED__V1__WORKER__STATE__DRAINING;
    assert_true(worker_beat(a, &beat, 1));
    assert_null(worker_table_place(table, 33));
    beat.state = MOED__V1__WORKER__STATE__LOST;
    assert_false(worker_beat(b, &beat, 1));
    beat.state = (Moed__V1__Worker__State)77;
    assert_false(worker_beat(b, &beat, 1));
    assert_string_equal(worker_state_name(b->state), "READY");
    assert_string_equal(worker_state_name((Moed__V1__Worker__State)77), "UNKNOWN");
}

static void forgets_the_lost(void **state) {
    char id[16];
    for (int i = 0; i < 256; i++) {
        snprintf(id, sizeof id, "w%d", i);
        Moed__Worker__V1__Hello hello = hello_of(id, 1);
        assert_non_null(greet(&hello, i, (uint64_t)i + 10));
    }
    Moed__Worker__V1__Hello one_more = hello_of("more", 1);
    assert_hello_refused(&one_more, STATUS_RESOURCE_EXHAUSTED, "256 workers");
    worker_lose(worker_table_at(table, 7));
    assert_non_null(greet(&one_more, 300, 1000)); /* takes the place of the lost one */
    assert_int_equal(worker_table_count(table), 256);
    for (size_t i = 0; i < 10; i++)
        worker_lose(worker_table_at(table, i));
    worker_table_expire(table, 1001);
    assert_int_equal(worker_table_count(table), 246);
    worker_table_expire(table, UINT64_MAX);
    assert_int_equal(worker_table_count(table), 246); /* the living stay */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(refuses_bad_hellos, setup, teardown),
        cmocka_unit_test_setup_teardown(serves_one_model, setup, teardown),
        cmocka_unit_test_setup_teardown(holds_names, setup, teardown),
        cmocka_unit_test_setup_teardown(places_on_the_least_loaded, setup, teardown),
        cmocka_unit_test_setup_teardown(places_only_where_it_fits, setup, teardown),
        cmocka_unit_test_setup_teardown(forgets_the_lost, setup, teardown),
    };
    return cmocka_run_group_tests_name("gateway_workers", tests, NULL, NULL);
}
