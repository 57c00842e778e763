#include "config.h"

#include "tests/synth/synth.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/quant.h"
#include "tests/synth/plan.h"

/*
 * The tensor data is written as pieces of at most PIECE_BYTES, handed out in the file's order to threads that fill a
 * buffer each and write it where it belongs.
 */
enum { PIECE_BYTES = 4 << 20, THREADS_MAX = 64, REPORT_NS = 100000000 };

struct writer {
    int file;
    uint64_t seed;
    const struct plan *plan;
    uint64_t data_offset;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* on CLOCK_MONOTONIC */
    /* under the lock */
    uint32_t tensor;      /* of the next piece */
    uint64_t block;
    uint64_t bytes_done;
    uint32_t running;
    bool stop;
    struct status status; /* the first error */
};

/* Takes the next piece; false: there is none. */
static bool take_piece(struct writer *writer, uint32_t *index, uint64_t *first, uint64_t *count) {
    pthread_mutex_lock(&writer->lock);
    bool taken = !writer->stop && writer->tensor < writer->plan->count;
    if (taken) {
        const struct plan_tensor *tensor = &writer->plan->tensors[writer->tensor];
        uint64_t most = PIECE_BYTES / quant_format(tensor->type)->block_bytes, left = tensor->blocks - writer->block;
        *index = writer->tensor;
        *first = writer->block;
        *count = left < most ? left : most;
        writer->block += *count;
        if (writer->block == tensor->blocks) {
            writer->tensor++;
            writer->block = 0;
        }
    }
    pthread_mutex_unlock(&writer->lock);
    return taken;
}

static int write_at(int file, const unsigned char *bytes, uint64_t length, uint64_t offset, struct status *status) {
    while (length) {
        ssize_t written = pwrite(file, bytes, length, (off_t)offset);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0)
            return status_set(status, STATUS_RESOURCE_EXHAUSTED, "writing at byte %" PRIu64 ": %s", offset,
                              written ? strerror(errno) : "nothing was written");
        bytes += written;
        length -= (uint64_t)written;
        offset += (uint64_t)written;
    }
    return 0;
}

static void *write_pieces(void *argument) {
    struct writer *writer = argument;
    struct status status = {0};
    uint32_t index;
    uint64_t first, count;
    unsigned char *buffer = malloc(PIECE_BYTES);
    if (!buffer) status_set(&status, STATUS_RESOURCE_EXHAUSTED, "out of memory");

    while (buffer && take_piece(writer, &index, &first, &count)) {
        const struct plan_tensor *tensor = &writer->plan->tensors[index];
        uint64_t size = quant_format(tensor->type)->block_bytes;
        weights_fill(tensor, weights_key(writer->seed, index), first, count, buffer);
        uint64_t offset = writer->data_offset + tensor->offset + first * size;
        if (write_at(writer->file, buffer, count * size, offset, &status)) break;
        pthread_mutex_lock(&writer->lock);
        writer->bytes_done += count * size;
        pthread_mutex_unlock(&writer->lock);
    }
    free(buffer);

    pthread_mutex_lock(&writer->lock);
    if (status.code && !writer->status.code) writer->status = status;
    if (status.code) writer->stop = true;
    writer->running--;
    pthread_cond_signal(&writer->changed);
    pthread_mutex_unlock(&writer->lock);
    return NULL;
}

/* Until the threads are through: reports, and stops them if the report says so. */
static void watch(struct writer *writer, const struct synth_progress *progress) {
    pthread_mutex_lock(&writer->lock);
    while (writer->running) {
        if (progress && !writer->stop) {
            uint64_t done = writer->bytes_done;
            pthread_mutex_unlock(&writer->lock);
            int stop = progress->report(progress->context, done, writer->plan->data_bytes);
            pthread_mutex_lock(&writer->lock);
            if (stop) {
                writer->stop = true;
                if (!writer->status.code) status_set(&writer->status, STATUS_CANCELLED, "stopped");
            }
        }
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += REPORT_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (writer->running) pthread_cond_timedwait(&writer->changed, &writer->lock, &until);
    }
    pthread_mutex_unlock(&writer->lock);
}

static int write_data(struct writer *writer, uint32_t threads, const struct synth_progress *progress,
                      struct status *status) {
    pthread_t ids[THREADS_MAX];
    uint32_t started = 0;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&writer->lock, NULL);
    pthread_cond_init(&writer->changed, &attributes);
    pthread_condattr_destroy(&attributes);

    writer->running = threads;
    while (started < threads && pthread_create(&ids[started], NULL, write_pieces, writer) == 0) started++;
    pthread_mutex_lock(&writer->lock);
    writer->running -= threads - started;
    pthread_mutex_unlock(&writer->lock);
    if (!started) status_set(&writer->status, STATUS_RESOURCE_EXHAUSTED, "no thread can be started");
    watch(writer, progress);
    for (uint32_t i = 0; i < started; i++) pthread_join(ids[i], NULL);
    pthread_cond_destroy(&writer->changed);
    pthread_mutex_destroy(&writer->lock);

    if (!writer->status.code && progress)
        progress->report(progress->context, writer->plan->data_bytes, writer->plan->data_bytes);
    if (writer->status.code && status) *status = writer->status;
    return writer->status.code ? -1 : 0;
}

/* Sets the file's size, and room for it aside where the file system can, so that a full disk shows at once. */
static int reserve(int file, uint64_t bytes, struct status *status) {
    int error = fallocate(file, 0, 0, (off_t)bytes) ? errno : 0;
    if (error == EOPNOTSUPP || error == ENOSYS) error = ftruncate(file, (off_t)bytes) ? errno : 0;
    if (!error) return 0;
    return status_set(status, STATUS_RESOURCE_EXHAUSTED, "no room for %" PRIu64 " bytes: %s", bytes, strerror(error));
}

static uint32_t thread_count(const struct synth_options *options) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (options->threads) return options->threads < THREADS_MAX ? options->threads : THREADS_MAX;
    return processors < 1 ? 1 : processors > 8 ? 8 : (uint32_t)processors;
}

int synth_write(const struct synth_options *options, const struct synth_progress *progress, struct status *status) {
    struct plan plan = {0};
    unsigned char *header = NULL;
    uint64_t header_bytes = 0;
    char *temporary = NULL;
    int file = -1, result = -1;

    if (plan_make(options, &plan, status)) goto out;
    if (header_make(options, &plan, &header, &header_bytes, status)) goto out;
    if (asprintf(&temporary, "%s.tmp.%ld", options->path, (long)getpid()) < 0) {
        temporary = NULL;
        status_set(status, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto out;
    }
    file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file < 0) {
        status_set(status, STATUS_FAILED_PRECONDITION, "%s: %s", temporary, strerror(errno));
        goto out;
    }
    struct writer writer = {.file = file, .seed = options->seed, .plan = &plan, .data_offset = header_bytes};
    if (reserve(file, header_bytes + plan.data_bytes, status) || write_at(file, header, header_bytes, 0, status) ||
        write_data(&writer, thread_count(options), progress, status)) {
        status_prefix(status, "%s", options->path);
        goto out;
    }
    int closed = close(file);
    file = -1;
    if (closed || rename(temporary, options->path)) {
        status_set(status, STATUS_FAILED_PRECONDITION, "%s: %s", options->path, strerror(errno));
        unlink(temporary);
        goto out;
    }
    result = 0;
out:
    if (file >= 0) {
        close(file);
        unlink(temporary);
    }
    free(temporary);
    free(header);
    plan_free(&plan);
    return result;
}
