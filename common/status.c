#include "common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int status_set(struct status *status, enum status_code code, const char *format, ...) {
    if (status) {
        va_list arguments;
        va_start(arguments, format);
        status->code = code;
        vsnprintf(status->message, sizeof status->message, format, arguments);
        va_end(arguments);
    }
    return -1;
}

int status_prefix(struct status *status, const char *format, ...) {
    if (status) {
        char message[sizeof status->message];
        va_list arguments;
        va_start(arguments, format);
        int n = vsnprintf(message, sizeof message, format, arguments);
        va_end(arguments);
        if (n >= 0 && (size_t)n < sizeof message)
            snprintf(message + n, sizeof message - (size_t)n, ": %s", status->message);
        memcpy(status->message, message, sizeof message);
    }
    return -1;
}

const char *status_code_name(int code) {
    static const char *const names[] = {
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
        "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
        "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
    };
    if (code < 0 || (size_t)code >= sizeof names / sizeof *names)
        return "UNKNOWN";
    return names[code];
}
