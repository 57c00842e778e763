#include "config.h"

#include "worker/backend.h"

#include <stdio.h>
#include <string.h>

/* The first runs everywhere; of the others "auto" takes the last whose device answers. */
static const struct executor_ops *const backends[] = {
    &executor_cpu,
#ifdef WITH_CUDA
    &executor_cuda,
#endif
};
enum { BACKEND_COUNT = sizeof(backends) / sizeof(backends[0]) };

const struct executor_ops *backend_find(const char *name, struct status *status) {
    for (int i = BACKEND_COUNT - 1; strcmp(name, "auto") == 0; i--)
        if (i == 0 || backends[i]->answers())
            return backends[i];
    char have[128] = "";
    for (int i = 0; i < BACKEND_COUNT; i++) {
        if (strcmp(backends[i]->name, name) == 0)
            return backends[i];
        size_t length = strlen(have);
        snprintf(have + length, sizeof(have) - length, "%s%s", i ? ", " : "", backends[i]->name);
    }
    status_set(status, STATUS_FAILED_PRECONDITION, "backend: %s is no part of this build, which has %s", name, have);
    return NULL;
}
