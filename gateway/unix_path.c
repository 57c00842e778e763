#include "gateway/unix_path.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int make_parent(const char *path, struct status *status) {
    char parent[sizeof((struct sockaddr_un *)NULL)->sun_path];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (!slash || slash == parent)
        return 0;
    *slash = '\0';
    if (mkdir(parent, 0755) && errno != EEXIST)
        return status_set(status, STATUS_PERMISSION_DENIED, "directory %s: %s", parent, strerror(errno));
    return 0;
}

int unix_path_clear(const char *path, struct status *status) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat info;
    if (path[0] == '\0' || strlen(path) >= sizeof address.sun_path)
        return status_set(status, STATUS_INVALID_ARGUMENT, "a path of %zu bytes; 1 to %zu are allowed", strlen(path),
                          sizeof address.sun_path - 1);
    if (make_parent(path, status))
        return -1;
    if (lstat(path, &info)) {
        if (errno == ENOENT)
            return 0;
        return status_set(status, STATUS_PERMISSION_DENIED, "%s", strerror(errno));
    }
    if (!S_ISSOCK(info.st_mode))
        return status_set(status, STATUS_ALREADY_EXISTS, "a file that is no socket is in the way");
    memcpy(address.sun_path, path, strlen(path) + 1);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0)
        return status_set(status, STATUS_UNAVAILABLE, "socket: %s", strerror(errno));
    int refused = connect(probe, (struct sockaddr *)&address, sizeof address) ? errno : 0;
    close(probe);
    if (refused != ECONNREFUSED && refused != ENOENT)
        return status_set(status, STATUS_ALREADY_EXISTS, refused ? "%s" : "another process listens there",
                          strerror(refused));
    if (unlink(path) && errno != ENOENT)
        return status_set(status, STATUS_PERMISSION_DENIED, "a stale socket cannot be removed: %s", strerror(errno));
    return 0;
}
