#ifndef MOED_TESTS_FUZZ_FUZZ_H
#define MOED_TESTS_FUZZ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* What every fuzz target defines. libFuzzer (configure --enable-fuzz) calls the function; in other builds main.c does. */
extern const char fuzz_seeds[]; /* the directory of its seeds, below the source tree */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
