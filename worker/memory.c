#include "worker/memory.h"

#include <stdlib.h>
#include <string.h>

#include "common/log.h"

void *memory_allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory) {
        log_error("out_of_memory", LOG_UINT("bytes", count * size));
        abort();
    }
    return memory;
}

char *memory_copy_string(const char *string) {
    size_t bytes = strlen(string) + 1;
    return memcpy(memory_allocate(bytes, 1), string, bytes);
}
