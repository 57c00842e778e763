#ifndef MOED_CLIENT_METHODS_H
#define MOED_CLIENT_METHODS_H

#include "client/rpc.h"

/* The methods of a gateway. */
extern const struct rpc_method method_generate, method_forward, method_get_model, method_list_workers;
extern const struct rpc_method method_check, method_watch; /* of the health service */

#endif
