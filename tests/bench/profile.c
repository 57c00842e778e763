#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench.h"

void profile_add(struct profile *profile, const struct batch_result *result) {
    if (profile->steps == PROFILE_STEPS)
        return;
    for (uint32_t i = 0; i < result->timing_count; i++) {
        const struct executor_timing *timing = &result->timings[i];
        uint32_t at = 0;
        while (at < profile->count && strcmp(profile->operations[at].name, timing->operation) != 0)
            at++;
        if (at == PROFILE_OPERATIONS)
            continue;
        struct profile_operation *operation = &profile->operations[at];
        if (at == profile->count) {
            profile->count++;
            *operation = (struct profile_operation){.name = timing->operation};
        }
        operation->calls = timing->calls;
        operation->seconds[profile->steps] = timing->seconds;
    }
    profile->steps++;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const struct profile *profile, const struct profile_operation *operation) {
    double seconds[PROFILE_STEPS];
    memcpy(seconds, operation->seconds, sizeof seconds);
    qsort(seconds, profile->steps, sizeof *seconds, compare);
    return seconds[profile->steps / 2];
}

void profile_print(const struct profile *profile, const char *what, bool json) {
    double total = 0;
    for (uint32_t i = 0; i < profile->count; i++)
        total += median(profile, &profile->operations[i]);
    if (json)
        printf(",\"profile_%s\":[", what);
    else
        printf("  %-16s %5s %10s %10s %7s\n", what, "calls", "us each", "us in all", "share");
    for (uint32_t i = 0; i < profile->count; i++) {
        const struct profile_operation *operation = &profile->operations[i];
        const double us = median(profile, operation) * 1e6;
        if (json)
            printf("%s{\"operation\":\"%s\",\"calls\":%u,\"us\":%.5g,\"share\":%.4g}", i == 0 ? "" : ",",
                   operation->name, operation->calls, us, us * 1e-6 / total);
        else
            printf("  %-16s %5u %10.2f %10.1f %5.1f %%\n", operation->name, operation->calls, us / operation->calls, us,
                   us * 1e-4 / total);
    }
    if (json)
        printf("]");
    else
        printf("  %-16s %5s %10s %10.1f\n", "", "", "", total * 1e6);
}
