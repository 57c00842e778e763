#ifndef MOED_GATEWAY_UNIX_PATH_H
#define MOED_GATEWAY_UNIX_PATH_H

#include "common/status.h"

/*
 * Makes a path free for a socket to be bound to: makes its directory, and removes the socket of a process that is gone.
 * ZeroMQ and C-core unlink whatever lies there, a living gateway's socket too, so this comes before them. -1 with a
 * status where somebody listens, where a file that is no socket is in the way, or where the system says no.
 */
int unix_path_clear(const char *path, struct status *status);

#endif
