#include "worker/endpoint.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <zmq.h>

enum { PATH_BYTES_MAX = sizeof(((struct sockaddr_un *)0)->sun_path) - 1 };

static int check_ipc(const char *endpoint, const char *path, struct status *status) {
    size_t length = strlen(path);
    if (length == 0 || length > PATH_BYTES_MAX)
        return status_set(status, STATUS_INVALID_ARGUMENT, "gateway: %s: a socket path has 1 to %d bytes", endpoint,
                          PATH_BYTES_MAX);
    if (path[0] == '@')
        return 0; /* in the abstract namespace */
    char directory[PATH_BYTES_MAX + 1] = ".";
    const char *slash = strrchr(path, '/');
    if (slash)
        snprintf(directory, sizeof(directory), "%.*s", slash == path ? 1 : (int)(slash - path), path);
    struct stat about;
    if (stat(directory, &about) != 0 || !S_ISDIR(about.st_mode))
        return status_set(status, STATUS_INVALID_ARGUMENT, "gateway: %s: there is no directory %s", endpoint,
                          directory);
    return 0;
}

int endpoint_connect(void *socket, const char *endpoint, struct status *status) {
    if (strncmp(endpoint, "ipc://", 6) == 0 && check_ipc(endpoint, endpoint + 6, status) != 0)
        return -1;
    if (zmq_connect(socket, endpoint) != 0)
        return status_set(status, STATUS_INVALID_ARGUMENT,
                          "gateway: \"%s\": %s; ipc://PATH or tcp://HOST:PORT is expected", endpoint,
                          zmq_strerror(zmq_errno()));
    return 0;
}
