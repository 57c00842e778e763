#include "config.h"

#include "worker/stop_signal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static int stop_pipe[2];
static volatile sig_atomic_t stop_count;

static void on_signal(int number) {
    int saved_errno = errno;
    if (++stop_count == 2)
        signal(number, SIG_DFL);
    if (write(stop_pipe[1], "", 1) < 0) {
        /* the pipe is full of signals that nobody has read yet */
    }
    errno = saved_errno;
}

int stop_signal_open(struct status *status) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaddset(&action.sa_mask, SIGTERM);
    sigaddset(&action.sa_mask, SIGINT);
    if (pipe2(stop_pipe, O_NONBLOCK | O_CLOEXEC) != 0 || sigaction(SIGTERM, &action, NULL) != 0 ||
        sigaction(SIGINT, &action, NULL) != 0)
        return status_set(status, STATUS_INTERNAL, "signals: %s", strerror(errno));
    return stop_pipe[0];
}
