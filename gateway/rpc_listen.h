#ifndef MOED_GATEWAY_RPC_LISTEN_H
#define MOED_GATEWAY_RPC_LISTEN_H

#include "gateway/rpc_server.h"

/*
 * Binds the server to options->listen, with TLS where certificates are given. `bound` becomes the address in the form
 * of the option, with the port that was chosen.
 */
int rpc_listen(grpc_server *server, const struct rpc_server_options *options, char *bound, size_t bound_size,
               struct status *status);

#endif
