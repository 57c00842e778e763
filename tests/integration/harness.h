#ifndef MOED_TESTS_INTEGRATION_HARNESS_H
#define MOED_TESTS_INTEGRATION_HARNESS_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
#include <setjmp.h>

#include <cmocka.h>

/*
 * Real processes for the integration tests. A test program works in a fresh directory below the build directory, so
 * that sockets and files have short relative names; programs are found in the build directory. Every process dies with
 * the test. Nothing here waits by sleeping a fixed time: whatever is waited for has a deadline, past which the test
 * fails.
 */

/* How long anything that must happen may take: generous, for sanitizers on busy machines. */
enum { PATIENCE_S = 30 };

/* cmocka group set-up and tear-down: makes the directory and enters it; stops all processes and removes it. */
int harness_setup(void **state);
int harness_teardown(void **state);
/* cmocka tear-down of one test: ends the processes that are left with SIGTERM, so that sanitizers have their say. One
 * that does not exit with 0 fails the test. */
int harness_stop_all(void **state);

/* Starts a program of the build directory, with argv[0] as its path there ("moed-worker"). Its standard output and
 * error go to the files NAME.out and NAME.log. The process is freed by harness_stop_all or process_finish. */
struct process;
struct process *process_start(const char *name, const char *const *argv);
void process_signal(struct process *process, int signal);
/* The exit status, or 128 and the signal. */
int process_wait(struct process *process);
/* process_wait, and frees it. */
int process_finish(struct process *process);
/* The next line of the log (after the one that the last call gave) with all of two texts in it; `also` may be NULL. */
void process_wait_log(struct process *process, const char *text, const char *also, char *line, size_t size);
/* All of it so far; to be freed. */
char *process_log(const struct process *process);
char *process_output(const struct process *process);
/* Runs to the end; the exit status. */
int process_run(const char *name, const char *const *argv);

/* A whole file, terminated; to be freed. */
char *read_file(const char *path, size_t *size);

/* For loops that wait for something to become true: `while (!x) pause_until(deadline, "x")` sleeps a little, and fails
 * past the deadline. */
uint64_t deadline_after(unsigned seconds);
void pause_until(uint64_t deadline_ns, const char *what);

/* A seeded generator (splitmix64) for random inputs. random_seed prints the seed, which MOED_TEST_SEED sets. */
uint64_t random_seed(void);
uint64_t random_next(uint64_t *random);

#endif
