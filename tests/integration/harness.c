#include "config.h"

#include "tests/integration/harness.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"

enum { TEST_S = 300 }; /* a test program may take no longer */

struct process {
    struct process *next;
    pid_t pid;
    int wait_status;
    bool ended;
    char name[64], output[80], log[80];
    size_t log_seen; /* bytes that process_wait_log has gone over */
};

static struct process *processes;
static char build_directory[PATH_MAX], directory[PATH_MAX];

/* ---- files */

char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "re");
    size_t length = 0, capacity = 1 << 16;
    char *text = malloc(capacity);
    if (!file || !text)
        fail_msg("%s: %s", path, strerror(errno));
    for (size_t n; (n = fread(text + length, 1, capacity - length - 1, file)) > 0;) {
        length += n;
        if (capacity - length == 1)
            text = realloc(text, capacity *= 2);
        if (!text)
            fail_msg("out of memory");
    }
    fclose(file);
    text[length] = '\0';
    if (size)
        *size = length;
    return text;
}

static void remove_directory(void) {
    DIR *list = opendir(directory);
    for (struct dirent *entry; list && (entry = readdir(list));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            unlinkat(dirfd(list), entry->d_name, 0);
    if (list)
        closedir(list);
    rmdir(directory);
}

/* ---- the test program */

int harness_setup(void **state) {
    const char *top = getenv("top_builddir");
    if (!realpath(top ? top : ".", build_directory))
        return -1;
    snprintf(directory, sizeof directory, "%.4000s/integration.XXXXXX", build_directory);
    if (!mkdtemp(directory) || chdir(directory) != 0)
        return -1;

    /* Options of the programs come from the tests alone. */
    for (char **variable = environ; *variable;) {
        char name[128];
        size_t length = strcspn(*variable, "=");
        snprintf(name, sizeof name, "%.*s", (int)length, *variable);
        if (strncmp(name, "MOED_", 5) == 0 && strcmp(name, "MOED_TEST_SEED") != 0)
            unsetenv(name);
        else
            variable++;
    }
    signal(SIGPIPE, SIG_IGN);
    alarm(TEST_S); /* ends the program, and with it its processes */
    return 0;
}

int harness_teardown(void **state) {
    int result = harness_stop_all(state);
    if (chdir(build_directory) == 0)
        remove_directory();
    return result;
}

/* ---- time */

uint64_t deadline_after(unsigned seconds) {
    return clock_now_ns() + seconds * UINT64_C(1000000000);
}

static void rest(void) {
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
}

void pause_until(uint64_t deadline_ns, const char *what) {
    if (clock_now_ns() > deadline_ns)
        fail_msg("waited too long for %s", what);
    rest();
}

/* ---- processes */

struct process *process_start(const char *name, const char *const *argv) {
    struct process *process = calloc(1, sizeof *process);
    assert_non_null(process);
    snprintf(process->name, sizeof process->name, "%s", name);
    snprintf(process->output, sizeof process->output, "%s.out", process->name);
    snprintf(process->log, sizeof process->log, "%s.log", process->name);
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%.4000s/%s", build_directory, argv[0]);
    int flags = O_CREAT | O_TRUNC | O_APPEND | O_WRONLY | O_CLOEXEC;
    int output = open(process->output, flags, 0600), log = open(process->log, flags, 0600);
    assert_true(output >= 0 && log >= 0);

    pid_t test = getpid();
    process->pid = fork();
    if (process->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != test)
            _exit(125);
        signal(SIGPIPE, SIG_DFL);
        dup2(open("/dev/null", O_RDONLY | O_CLOEXEC), STDIN_FILENO);
        dup2(output, STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        execv(path, (char *const *)argv);
        dprintf(STDERR_FILENO, "%s: %s\n", path, strerror(errno));
        _exit(125);
    }
    close(output);
    close(log);
    assert_true(process->pid > 0);
    process->next = processes;
    processes = process;
    return process;
}

void process_signal(struct process *process, int signal) {
    assert_false(process->ended);
    assert_int_equal(kill(process->pid, signal), 0);
}

/* True when it has ended. */
static bool process_poll(struct process *process) {
    if (!process->ended && waitpid(process->pid, &process->wait_status, WNOHANG) == process->pid)
        process->ended = true;
    return process->ended;
}

int process_wait(struct process *process) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    while (!process_poll(process)) {
        if (clock_now_ns() > deadline)
            fail_msg("waited too long for the end of %s; its log:\n%s", process->name, process_log(process));
        rest();
    }
    int status = process->wait_status;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void process_free(struct process *process) {
    struct process **link = &processes;
    while (*link != process)
        link = &(*link)->next;
    *link = process->next;
    free(process);
}

int process_finish(struct process *process) {
    int status = process_wait(process);
    process_free(process);
    return status;
}

int process_run(const char *name, const char *const *argv) {
    return process_finish(process_start(name, argv));
}

/* True: it has exited with 0. */
static bool process_stop(struct process *process) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    while (!process_poll(process) && clock_now_ns() < deadline)
        rest();
    if (!process_poll(process)) {
        kill(process->pid, SIGKILL);
        waitpid(process->pid, &process->wait_status, 0);
    }
    if (process->wait_status == 0)
        return true;
    char *log = process_log(process);
    print_error("%s did not exit with 0 (wait status 0x%x); its log:\n%s", process->name, process->wait_status, log);
    free(log);
    return false;
}

int harness_stop_all(void **state) {
    int result = 0;
    for (struct process *process = processes; process; process = process->next)
        if (!process_poll(process))
            kill(process->pid, SIGTERM);
    while (processes) {
        if (!process_stop(processes))
            result = -1;
        process_free(processes);
    }
    return result;
}

char *process_log(const struct process *process) {
    return read_file(process->log, NULL);
}

char *process_output(const struct process *process) {
    return read_file(process->output, NULL);
}

/* Looks for the line in what came since. */
static bool find_line(struct process *process, const char *text, const char *also, char *line, size_t size) {
    char *log = process_log(process);
    char *at = log + process->log_seen;
    bool found = false;
    for (char *end; !found && (end = strchr(at, '\n')); at = end + 1) {
        *end = '\0';
        found = strstr(at, text) && (!also || strstr(at, also));
        if (found && line)
            snprintf(line, size, "%s", at);
    }
    process->log_seen = (size_t)(at - log);
    free(log);
    return found;
}

void process_wait_log(struct process *process, const char *text, const char *also, char *line, size_t size) {
    uint64_t deadline = deadline_after(PATIENCE_S);
    for (;;) {
        bool ended = process_poll(process);
        if (find_line(process, text, also, line, size))
            return;
        if (ended || clock_now_ns() > deadline)
            fail_msg("%s %s '%s' in its log:\n%s", process->name, ended ? "ended without" : "took too long for", text,
                     process_log(process));
        rest();
    }
}

/* ---- random inputs */

uint64_t random_next(uint64_t *random) {
    uint64_t z = *random += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t random_seed(void) {
    const char *given = getenv("MOED_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : clock_random_u64();
    print_message("# MOED_TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}
