#include "client/load_run.h"

#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "client/methods.h"
#include "common/clock.h"
#include "moed.pb-c.h"

#define MILLISECOND UINT64_C(1000000)
#define SECOND UINT64_C(1000000000)

enum {
    POLL_MS = 100,       /* how long an interrupt may go unseen */
    SLICE_NS = 20000,    /* of the waits that are too short for C-core's timers */
    STARTS_AT_ONCE = 16, /* then answers are taken, so that they are not timed late */
};

/* A request in flight. */
struct flight {
    struct load_sample sample;
    struct rpc_call *call;
    struct flight *next, *previous;
};

struct loop {
    const struct load_run *run;
    struct load_stats *stats;
    struct load_progress progress;
    uint64_t began_ns; /* of the clock; all other times count from here */
    uint64_t now_ns;
    uint64_t next;  /* index of the next request */
    uint64_t limit; /* of indices */
    uint64_t end_due_ns; /* known when the first counted request is due: none is due from here on */
    bool stopped;   /* nothing more is started */
    bool cancelled;
    struct flight *flights;
    uint32_t *prompt; /* [context_length] */
    uint64_t next_progress_ns;

    /* Open loop. */
    struct load_arrivals arrivals;
    uint64_t due_ns; /* of the next request */

    /* Closed loop: streams that rest, in the order in which they go on. */
    uint64_t idle; /* streams that may start at once */
    uint64_t *resting; /* a ring of [concurrency] times */
    uint64_t rest_first, rest_count;
};

static void look_at_clock(struct loop *loop) {
    loop->now_ns = clock_now_ns() - loop->began_ns;
}

/* ---- starting */

static void start_call(struct loop *loop, const struct load_request *request, struct flight *flight) {
    Moed__V1__Tokens tokens = MOED__V1__TOKENS__INIT;
    Moed__V1__GenerateRequest message = MOED__V1__GENERATE_REQUEST__INIT;
    load_mix_prompt(loop->run->mix, request, loop->prompt);
    tokens.ids = loop->prompt;
    tokens.n_ids = request->prompt_tokens;
    message.tokens = &tokens;
    message.max_tokens = request->output_tokens;
    message.ignore_eos = true;
    struct rpc_channel *channel = loop->run->channels[request->index % loop->run->channel_count];
    const struct rpc_options options = {.timeout_ns = loop->run->timeout_ns, .user = flight};
    flight->call = rpc_call_start(channel, loop->run->queue, &method_generate, &message.base, &options);
}

static int start_request(struct loop *loop, uint64_t intended_ns, struct status *status) {
    struct load_request request;
    struct flight *flight = calloc(1, sizeof *flight);
    if (!flight)
        return status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    load_mix_request(loop->run->mix, loop->next, &request);
    look_at_clock(loop);
    flight->sample = (struct load_sample){
        .index = request.index,
        .warmup = request.index < loop->run->warmup,
        .intended_ns = intended_ns,
        .started_ns = loop->now_ns,
        .prompt_tokens = request.prompt_tokens,
        .asked_tokens = request.output_tokens,
    };
    flight->next = loop->flights;
    if (flight->next)
        flight->next->previous = flight;
    loop->flights = flight;
    loop->next++;
    loop->progress.started++;
    loop->progress.in_flight++;
    start_call(loop, &request, flight);
    return 0;
}

/* Whether the next request, due then, is one of the run's. With the first counted request the time begins to run. */
static bool is_wanted(struct loop *loop, uint64_t due_ns) {
    const struct load_run *run = loop->run;
    if (!loop->stopped && loop->next == run->warmup) {
        loop->stats->begin_ns = due_ns;
        if (run->duration_s > 0)
            loop->end_due_ns = due_ns + (uint64_t)(run->duration_s * 1e9);
    }
    if (loop->next >= loop->limit || due_ns >= loop->end_due_ns)
        loop->stopped = true;
    return !loop->stopped;
}

static void plan_arrival(struct loop *loop) {
    double at_s = 0;
    bool more = load_arrivals_next(&loop->arrivals, &at_s);
    loop->due_ns = (uint64_t)(at_s * 1e9);
    /* Known now, so that the run need not wait for an arrival that is not its own. */
    if (!more || loop->next >= loop->limit || loop->due_ns >= loop->end_due_ns)
        loop->stopped = true;
}

static bool is_due(struct loop *loop, uint64_t *intended_ns) {
    if (!loop->run->concurrency) {
        *intended_ns = loop->due_ns;
        return !loop->stopped && loop->due_ns <= loop->now_ns && loop->progress.in_flight < loop->run->max_in_flight;
    }
    for (; loop->rest_count && loop->resting[loop->rest_first] <= loop->now_ns; loop->rest_count--, loop->idle++)
        loop->rest_first = (loop->rest_first + 1) % loop->run->concurrency;
    *intended_ns = loop->now_ns;
    return !loop->stopped && loop->idle > 0;
}

static int start_due(struct loop *loop, struct status *status) {
    uint64_t intended_ns;
    for (int started = 0; started < STARTS_AT_ONCE && is_due(loop, &intended_ns); started++) {
        if (!is_wanted(loop, intended_ns))
            break;
        if (start_request(loop, intended_ns, status) < 0)
            return -1;
        if (loop->run->concurrency)
            loop->idle--;
        else
            plan_arrival(loop);
    }
    return 0;
}

/* ---- answers */

static void take_message(struct loop *loop, struct flight *flight, const Moed__V1__GenerateResponse *response) {
    struct load_sample *sample = &flight->sample;
    if (response->n_token_ids) {
        if (!sample->first_ns) {
            sample->first_ns = loop->now_ns;
            sample->first_tokens = response->n_token_ids;
        } else {
            uint64_t gap_ns = loop->now_ns - sample->last_ns;
            if (gap_ns > sample->gap_max_ns)
                sample->gap_max_ns = gap_ns;
            if (!sample->warmup)
                load_stats_add_gap(loop->stats, gap_ns);
        }
        sample->last_ns = loop->now_ns;
        sample->tokens += response->n_token_ids;
        loop->progress.tokens += response->n_token_ids;
        loop->stats->messages += !sample->warmup;
    }
    if (response->usage)
        sample->cached_tokens = response->usage->cached_tokens;
    if (response->timing)
        sample->resumptions = response->timing->resumptions;
}

static void take_end(struct loop *loop, struct flight *flight, const struct status *end) {
    struct load_sample *sample = &flight->sample;
    sample->ended_ns = loop->now_ns;
    sample->status = *end;
    bool failed = !sample_succeeded(sample);
    sample->unfinished = failed && loop->cancelled && end->code == STATUS_CANCELLED;
    load_stats_add(loop->stats, sample);
    if (loop->run->ended)
        loop->run->ended(loop->run->user, sample);

    loop->progress.in_flight--;
    loop->progress.ended++;
    loop->progress.failed += failed && !sample->unfinished;
    if (loop->run->concurrency && failed) {
        uint64_t at = (loop->rest_first + loop->rest_count++) % loop->run->concurrency;
        loop->resting[at] = loop->now_ns + LOAD_RETRY_MS * MILLISECOND;
    } else {
        loop->idle++;
    }
    if (flight->next)
        flight->next->previous = flight->previous;
    *(flight->previous ? &flight->previous->next : &loop->flights) = flight->next;
    free(flight);
}

/* ---- the loop */

static uint64_t time_until(const struct loop *loop, uint64_t at_ns) {
    return at_ns > loop->now_ns ? at_ns - loop->now_ns : 0;
}

/* How long nothing has to be done unless something comes. */
static uint64_t idle_time(const struct loop *loop) {
    uint64_t wait_ns = POLL_MS * MILLISECOND, until_ns = wait_ns;
    if (loop->stopped)
        return wait_ns;
    if (!loop->run->concurrency) {
        if (loop->progress.in_flight < loop->run->max_in_flight)
            until_ns = time_until(loop, loop->due_ns);
    } else if (loop->idle) {
        until_ns = 0;
    } else if (loop->rest_count) {
        until_ns = time_until(loop, loop->resting[loop->rest_first]);
    }
    return until_ns < wait_ns ? until_ns : wait_ns;
}

/*
 * C-core's timers have a resolution of a millisecond and are late rather than early. An open loop must not start late
 * on that account, so the last two milliseconds are waited for in slices.
 */
static void next_event(struct loop *loop, uint64_t wait_ns, struct rpc_event *event) {
    uint64_t coarse_ns = wait_ns < 2 * MILLISECOND ? 0 : wait_ns - 2 * MILLISECOND;
    rpc_queue_next(loop->run->queue, coarse_ns, event);
    if (event->type == RPC_TIMEOUT && !coarse_ns && wait_ns)
        nanosleep(&(struct timespec){.tv_nsec = wait_ns < SLICE_NS ? (long)wait_ns : SLICE_NS}, NULL);
}

static void take_event(struct loop *loop, struct rpc_event *event) {
    struct flight *flight = event->user;
    if (event->type == RPC_MESSAGE) {
        take_message(loop, flight, (const Moed__V1__GenerateResponse *)event->message);
        rpc_message_free(event->message);
    } else if (event->type == RPC_END) {
        take_end(loop, flight, &event->status);
    }
}

static void cancel_all(struct loop *loop) {
    loop->stopped = true;
    loop->cancelled = true;
    for (struct flight *flight = loop->flights; flight; flight = flight->next)
        rpc_call_cancel(flight->call);
}

static void tell_progress(struct loop *loop) {
    if (!loop->run->progress || loop->now_ns < loop->next_progress_ns)
        return;
    loop->next_progress_ns = loop->now_ns + SECOND;
    loop->progress.now_ns = loop->now_ns;
    loop->run->progress(loop->run->user, &loop->progress);
}

static int run_loop(struct loop *loop, struct status *status) {
    struct rpc_event event;
    if (!loop->run->concurrency)
        plan_arrival(loop);
    while (!loop->stopped || loop->progress.in_flight) {
        if (!loop->cancelled && loop->run->interrupted && loop->run->interrupted())
            cancel_all(loop);
        if (start_due(loop, status) < 0)
            return -1;
        if (loop->stopped && !loop->progress.in_flight)
            break;
        next_event(loop, idle_time(loop), &event);
        look_at_clock(loop);
        take_event(loop, &event);
        tell_progress(loop);
    }
    return 0;
}

int load_run(const struct load_run *run, struct load_stats *stats, struct status *status) {
    struct loop loop = {
        .run = run,
        .stats = stats,
        .idle = run->concurrency,
        .end_due_ns = UINT64_MAX,
        .arrivals = {.kind = run->arrivals, .rate = run->rate, .seed = run->mix->seed, .trace = run->mix->trace},
    };
    if (__builtin_add_overflow(run->warmup, run->requests, &loop.limit))
        loop.limit = UINT64_MAX;
    if (run->mix->trace && loop.limit > run->mix->trace->count)
        loop.limit = run->mix->trace->count;
    int slack_ns = prctl(PR_GET_TIMERSLACK), result = -1;
    prctl(PR_SET_TIMERSLACK, 1000ul); /* for the slices; where it is refused they are only longer */

    loop.prompt = calloc(run->mix->context_length, sizeof *loop.prompt);
    loop.resting = calloc(run->concurrency + 1, sizeof *loop.resting);
    if (!loop.prompt || !loop.resting) {
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto out;
    }
    loop.began_ns = clock_now_ns();
    loop.next_progress_ns = SECOND;
    result = run_loop(&loop, status);
out:
    /* After a failure calls are left, which the queue ends. */
    for (struct flight *next; loop.flights; loop.flights = next) {
        next = loop.flights->next;
        free(loop.flights);
    }
    if (slack_ns > 0)
        prctl(PR_SET_TIMERSLACK, (unsigned long)slack_ns);
    free(loop.resting);
    free(loop.prompt);
    return result;
}
