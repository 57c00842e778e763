#ifndef MOED_GATEWAY_DISPATCH_H
#define MOED_GATEWAY_DISPATCH_H

#include "gateway/fleet.h"

/*
 * What the fleet thread does: places requests on workers, takes what the workers say to the requests it is about, and
 * finds out which workers there are. Everything but dispatch_get_limits is called on that thread.
 */
struct dispatch;

/* Of the options, the endpoints are not used: `router` is bound to them. It outlives the dispatch. */
int dispatch_create(const struct fleet_options *options, void *router, struct dispatch **out, struct status *status);
/* No request may be in flight. NULL-safe. */
void dispatch_destroy(struct dispatch *dispatch);

/* Takes one message off the router; false: there was none. */
bool dispatch_receive(struct dispatch *dispatch);
/* Looks for lost workers, and lets others look at them; a few times a second. */
void dispatch_tick(struct dispatch *dispatch, uint64_t now_ns);

/* Takes over the caller's reference to the request, which goes with its end. */
void dispatch_submit(struct dispatch *dispatch, struct fleet_request *request);
/* Ends a request that is in flight, and tells its worker. */
void dispatch_cancel(struct dispatch *dispatch, struct fleet_request *request, const struct status *status);
void dispatch_cancel_all(struct dispatch *dispatch, const struct status *status);
void dispatch_credit(struct dispatch *dispatch, struct fleet_request *request, uint32_t tokens);

struct worker_table *dispatch_workers(struct dispatch *dispatch);
/* Any thread. */
struct fleet_limits dispatch_get_limits(struct dispatch *dispatch);

#endif
