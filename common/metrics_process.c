#include "common/metrics_process.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

static double seconds(clockid_t clock) {
    struct timespec now = {0};
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

double metrics_process_now(void) {
    return seconds(CLOCK_REALTIME);
}

/* -1: /proc does not say. */
static double resident_bytes(void) {
    unsigned long long pages;
    FILE *file = fopen("/proc/self/statm", "re");
    if (!file)
        return -1;
    int fields = fscanf(file, "%*u %llu", &pages);
    fclose(file);
    return fields == 1 ? (double)pages * (double)sysconf(_SC_PAGESIZE) : -1;
}

void metrics_process_render(struct metrics_text *text, double started) {
    double resident = resident_bytes();
    if (resident >= 0) {
        metrics_text_family(text, METRIC_GAUGE, "", "process_resident_memory_bytes", "Resident memory.");
        metrics_text_sample(text, METRIC_LABELS(), resident);
    }
    metrics_text_family(text, METRIC_COUNTER, "", "process_cpu_seconds_total", "Processor time, user and system.");
    metrics_text_sample(text, METRIC_LABELS(), seconds(CLOCK_PROCESS_CPUTIME_ID));
    metrics_text_family(text, METRIC_GAUGE, "", "process_start_time_seconds", "When the process began, since 1970.");
    metrics_text_sample(text, METRIC_LABELS(), started);
}
