#ifndef MOED_COMMON_STATUS_H
#define MOED_COMMON_STATUS_H

/* The codes of gRPC (https://grpc.github.io/grpc/core/md_doc_statuscodes.html), used everywhere in moed. */
enum status_code {
    STATUS_OK = 0,
    STATUS_CANCELLED = 1,
    STATUS_UNKNOWN = 2,
    STATUS_INVALID_ARGUMENT = 3,
    STATUS_DEADLINE_EXCEEDED = 4,
    STATUS_NOT_FOUND = 5,
    STATUS_ALREADY_EXISTS = 6,
    STATUS_PERMISSION_DENIED = 7,
    STATUS_RESOURCE_EXHAUSTED = 8,
    STATUS_FAILED_PRECONDITION = 9,
    STATUS_ABORTED = 10,
    STATUS_OUT_OF_RANGE = 11,
    STATUS_UNIMPLEMENTED = 12,
    STATUS_INTERNAL = 13,
    STATUS_UNAVAILABLE = 14,
    STATUS_DATA_LOSS = 15,
    STATUS_UNAUTHENTICATED = 16,
};

enum { STATUS_CODES = 17 };

/* Why a call failed. The caller owns it, zeroed; functions that return a negative number have filled it in. */
struct status {
    enum status_code code;
    char message[512];
};

/*
 * Fills in *status (which may be NULL) with a code and a printf-style message, cut to fit.
 * Returns -1, so that a failing function can end in `return status_set(...)`.
 */
int status_set(struct status *status, enum status_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " before the message, to say which file, tensor or option it was about. Returns -1. */
int status_prefix(struct status *status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The name of a code as gRPC writes it, such as "INVALID_ARGUMENT"; "UNKNOWN" for any other number. */
const char *status_code_name(int code);

#endif
