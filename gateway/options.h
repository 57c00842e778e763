#ifndef MOED_GATEWAY_OPTIONS_H
#define MOED_GATEWAY_OPTIONS_H

#include <stdint.h>

#include "common/log.h"
#include "common/options.h"
#include "common/status.h"

/* The command line of moed-gateway. */
struct gateway_options {
    const char *listen;
    struct option_list worker_endpoints;
    uint64_t pollers;
    uint64_t max_message_size;
    uint64_t max_requests, max_queued_tokens;
    double worker_timeout, stall_timeout, drain_timeout; /* seconds */
    const char *tls_cert, *tls_key, *tls_client_ca;
    const char *metrics_listen, *metrics_prefix; /* listen NULL: no metrics */
    const char *log_level, *log_format;
};

/* An enum options_result, or -1 with a status. Freed with gateway_options_free. */
int gateway_options_parse(int argc, char **argv, struct gateway_options *out, struct status *status);
void gateway_options_free(struct gateway_options *options);

/* Where workers connect: as given, or the default. */
const char *const *gateway_options_endpoints(const struct gateway_options *options, size_t *count);

enum log_level gateway_options_log_level(const struct gateway_options *options);
enum log_format gateway_options_log_format(const struct gateway_options *options);

#endif
