#ifndef MOED_WORKER_STOP_SIGNAL_H
#define MOED_WORKER_STOP_SIGNAL_H

#include "common/status.h"

/*
 * From now on each SIGTERM or SIGINT is a byte to read from the descriptor returned, which is non-blocking and stays
 * open for the life of the process. A third signal kills, should the second not have been enough. -1: it cannot be.
 */
int stop_signal_open(struct status *status);

#endif
