#ifndef MOED_WORKER_BACKEND_H
#define MOED_WORKER_BACKEND_H

#include "common/status.h"
#include "worker/executor.h"

/* The executor of a name: "auto" is the best of this build that runs on this machine. NULL: this build has none of that name. */
const struct executor_ops *backend_find(const char *name, struct status *status);

#endif
