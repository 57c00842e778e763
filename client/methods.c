#include "client/methods.h"

#include "grpc/health/v1/health.pb-c.h"
#include "moed.pb-c.h"

const struct rpc_method method_generate = {"/moed.v1.Inference/Generate", &moed__v1__generate_response__descriptor};
const struct rpc_method method_forward = {"/moed.v1.Inference/Forward", &moed__v1__forward_response__descriptor};
const struct rpc_method method_get_model = {"/moed.v1.Inference/GetModel", &moed__v1__model__descriptor};
const struct rpc_method method_list_workers = {"/moed.v1.Inference/ListWorkers",
                                               &moed__v1__list_workers_response__descriptor};
const struct rpc_method method_check = {"/grpc.health.v1.Health/Check",
                                        &grpc__health__v1__health_check_response__descriptor};
const struct rpc_method method_watch = {"/grpc.health.v1.Health/Watch",
                                        &grpc__health__v1__health_check_response__descriptor};
