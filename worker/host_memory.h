#ifndef MOED_WORKER_HOST_MEMORY_H
#define MOED_WORKER_HOST_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* Memory this process may use, in bytes: the machine's, or its control group's where that is less. */
struct host_memory {
    uint64_t total;
    uint64_t available; /* without swapping; caches that the kernel can drop count as available */
};

/*
 * Reads /proc/meminfo and the limits of the process's control group and all its parents, v1 or v2
 * (https://docs.kernel.org/admin-guide/cgroup-v2.html). `root` stands before every path: "" but in tests. What cannot
 * be read is taken as no limit; without /proc/meminfo both are UINT64_MAX.
 */
void host_memory_read(const char *root, struct host_memory *out);

/* Zeroed memory, aligned to 2 MiB and advised to be of huge pages, that costs nothing until touched; NULL: none left.
 * To be freed with host_memory_unmap and the same size. */
void *host_memory_map(size_t bytes);
void host_memory_unmap(void *memory, size_t bytes);

#endif
