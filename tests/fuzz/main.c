#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "tests/tap.h"

/*
 * Replays a fuzz target's seeds where libFuzzer is not linked, so that what was once found stays found. With arguments
 * it replays those files instead.
 */
static void replay(const char *path) {
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = NULL;
    long size = -1;
    if (file && fseek(file, 0, SEEK_END) == 0 && (size = ftell(file)) >= 0) {
        rewind(file);
        bytes = malloc(size ? (size_t)size : 1);
        if (!bytes || fread(bytes, 1, (size_t)size, file) != (size_t)size)
            size = -1;
    }
    if (file)
        fclose(file);
    if (size >= 0)
        LLVMFuzzerTestOneInput(bytes, (size_t)size);
    tap_ok(size >= 0, "%s", path);
    free(bytes);
}

static int is_seed(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        replay(argv[i]);
    if (argc > 1)
        return tap_done();

    const char *top = getenv("top_srcdir");
    char directory[4096], path[8192];
    struct dirent **entries;
    snprintf(directory, sizeof directory, "%s/%s", top ? top : ".", fuzz_seeds);
    int count = scandir(directory, &entries, is_seed, alphasort);
    if (!tap_ok(count > 0, "%s holds seeds", directory))
        return tap_done();
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, entries[i]->d_name);
        replay(path);
        free(entries[i]);
    }
    free(entries);
    return tap_done();
}
