#include "config.h" /* _GNU_SOURCE: MADV_HUGEPAGE */

#include "worker/host_memory.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

/* The number behind `key` at the beginning of a line of a file, or `otherwise`. With an empty key: the first number. */
static uint64_t read_number(const char *path, const char *key, uint64_t otherwise) {
    FILE *file = fopen(path, "re");
    if (!file)
        return otherwise;
    char line[512];
    size_t length = strlen(key);
    uint64_t value = otherwise;
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) == 0) {
            sscanf(line + length, " %" SCNu64, &value);
            break;
        }
    }
    fclose(file);
    return value;
}

/* Lowers *memory to the limit of one control group, given by the names of its files. */
static void apply_limit(const char *directory, const char *limit_name, const char *usage_name,
                        const char *const cache_names[2], struct host_memory *memory) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, limit_name);
    uint64_t limit = read_number(path, "", UINT64_MAX); /* "max" is no number */
    if (limit >= memory->total)
        return;
    snprintf(path, sizeof path, "%s/%s", directory, usage_name);
    uint64_t usage = read_number(path, "", 0);
    snprintf(path, sizeof path, "%s/memory.stat", directory);
    uint64_t cache = read_number(path, cache_names[0], 0) + read_number(path, cache_names[1], 0);
    usage -= cache < usage ? cache : usage;
    memory->total = limit;
    uint64_t left = usage < limit ? limit - usage : 0;
    if (left < memory->available)
        memory->available = left;
}

/*
 * A line of /proc/self/cgroup is "number:controllers:path", with no controllers for version 2. Inside a container the
 * path may be one of the host that is not mounted here; the walk up then ends at the container's own directory.
 */
static void apply_group(const char *root, char *line, struct host_memory *memory) {
    static const char *const cache_v1[2] = {"total_inactive_file", "total_active_file"};
    static const char *const cache_v2[2] = {"inactive_file", "active_file"};
    char *controllers = strchr(line, ':');
    char *group = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!group)
        return;
    *group++ = '\0';
    group[strcspn(group, "\n")] = '\0';
    bool v2 = strcmp(controllers, ":") == 0;
    if (!v2 && strcmp(controllers, ":memory") != 0)
        return;

    char path[4096];
    int base = snprintf(path, sizeof path, "%s/sys/fs/cgroup%s", root, v2 ? "" : "/memory");
    int length = base + snprintf(path + base, sizeof path - (size_t)base, "%s", group);
    if (length >= (int)sizeof path)
        length = base;
    for (;;) {
        path[length] = '\0';
        if (v2)
            apply_limit(path, "memory.max", "memory.current", cache_v2, memory);
        else
            apply_limit(path, "memory.limit_in_bytes", "memory.usage_in_bytes", cache_v1, memory);
        if (length == base)
            return;
        while (length > base && path[--length] != '/')
            ;
    }
}

void host_memory_read(const char *root, struct host_memory *out) {
    char path[4096];
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    uint64_t total = read_number(path, "MemTotal:", UINT64_MAX >> 10);
    uint64_t available = read_number(path, "MemAvailable:", UINT64_MAX >> 10);
    out->total = total < UINT64_MAX >> 10 ? total << 10 : UINT64_MAX;
    out->available = available < UINT64_MAX >> 10 ? available << 10 : UINT64_MAX;

    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    char line[4096];
    while (fgets(line, sizeof line, file))
        apply_group(root, line, out);
    fclose(file);
}

void *host_memory_map(size_t bytes) {
    /* mmap aligns to small pages only: map more and give the ends back. */
    if (bytes > SIZE_MAX - 2 * HUGE_PAGE)
        return NULL;
    size_t whole = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    unsigned char *memory =
        mmap(NULL, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    size_t before = (HUGE_PAGE - (uintptr_t)memory % HUGE_PAGE) % HUGE_PAGE;
    if (before)
        munmap(memory, before);
    munmap(memory + before + whole, HUGE_PAGE - before);
    madvise(memory + before, whole, MADV_HUGEPAGE); /* advice: small pages work too */
    return memory + before;
}

void host_memory_unmap(void *memory, size_t bytes) {
    if (memory)
        munmap(memory, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}
