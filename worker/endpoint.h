#ifndef MOED_WORKER_ENDPOINT_H
#define MOED_WORKER_ENDPOINT_H

#include "common/status.h"

/*
 * Connects a socket. ZeroMQ takes any ipc path and tries it for ever; here the directory must be there, and errors name
 * the endpoint.
 */
int endpoint_connect(void *socket, const char *endpoint, struct status *status);

#endif
