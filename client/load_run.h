#ifndef MOED_CLIENT_LOAD_RUN_H
#define MOED_CLIENT_LOAD_RUN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/load_plan.h"
#include "client/load_stats.h"
#include "client/rpc.h"

/*
 * A run: starts requests when they are due, takes what comes back, and ends when all that were started have ended. One
 * thread. A closed loop keeps `concurrency` requests in flight; an open loop starts them at the times of an arrival
 * process, whatever the server does.
 */

enum {
    LOAD_IN_FLIGHT_MAX = 1 << 20,
    LOAD_RETRY_MS = 10, /* so long a stream of a closed loop rests after a failure: a dead server is not hammered */
};

/* What a live display may tell: of all requests, the warm-up's too. */
struct load_progress {
    uint64_t now_ns; /* since the run began */
    uint64_t started, ended, failed, in_flight, tokens;
};

struct load_run {
    const struct load_mix *mix;
    uint64_t concurrency;             /* closed loop; 0: open loop, of: */
    enum load_arrivals_kind arrivals; /* the seed is the mix's */
    double rate;                      /* a second, unless the arrivals are the trace's */
    uint64_t max_in_flight; /* open loop: what is due beyond it starts late, and counts from when it was due */
    uint64_t warmup;        /* requests, which come first */
    uint64_t requests;      /* behind them; UINT64_MAX: until the time or the trace ends */
    double duration_s;      /* from the first counted request on none is due later; 0: until the requests end */
    uint64_t timeout_ns;    /* of each call; RPC_FOREVER */
    struct rpc_channel *const *channels; /* taken in turn */
    size_t channel_count;
    struct rpc_queue *queue; /* without other calls */

    void *user; /* of: */
    void (*ended)(void *user, const struct load_sample *sample);        /* a request; may be NULL */
    void (*progress)(void *user, const struct load_progress *progress); /* once a second; may be NULL */
    bool (*interrupted)(void); /* true: cancel what is in flight and end; asked every 100 ms and more often */
};

/* Adds to zeroed statistics with their limits set. Fails only for want of memory. */
int load_run(const struct load_run *run, struct load_stats *stats, struct status *status);

#endif
