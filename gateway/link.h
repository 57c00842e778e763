#ifndef MOED_GATEWAY_LINK_H
#define MOED_GATEWAY_LINK_H

#include <stddef.h>

#include "common/status.h"

/* The ROUTER socket that workers connect to. Sending and receiving on it is common/wire. */
struct link;

/*
 * Binds a ROUTER to all endpoints (ipc://PATH, tcp://ADDR:PORT, inproc://NAME) and logs them. An ipc socket that a dead
 * process left behind is replaced, one that somebody listens on is an error, and the directory it lies in is created.
 * The endpoints outlive the link. NULL with a status that names the endpoint on failure.
 */
struct link *link_bind(void *zmq_context, const char *const *endpoints, size_t count, struct status *status);
/* Closes the socket and removes its files. NULL-safe. */
void link_close(struct link *link);

void *link_socket(const struct link *link);

#endif
