#ifndef MOED_TESTS_SYNTH_PLAN_H
#define MOED_TESTS_SYNTH_PLAN_H

#include "tests/synth/synth.h"

/* What lies where in the file, and the file's beginning; between synth's own files. */

enum { PLAN_ALIGNMENT = 32 };

struct plan_tensor {
    char name[48];
    uint32_t type; /* enum quant_type */
    uint32_t dimensions;
    uint64_t shape[3];
    uint64_t blocks, bytes;
    uint64_t offset; /* from the beginning of the tensor data */
    float low, high; /* weights uniform in [low, high); where they are equal, normal with deviation `std` */
    float std;
};

struct plan {
    struct plan_tensor *tensors;
    uint32_t count;
    uint64_t data_bytes; /* of all tensors with their padding */
};

/* Checks the shape and lays the tensors out. To be freed with plan_free, also on failure. */
int plan_make(const struct synth_options *options, struct plan *plan, struct status *status);
void plan_free(struct plan *plan);

/* The general.file_type of a format, or -1 where it has none. */
int plan_file_type(const char *quant);

/* Magic, metadata and tensor descriptions, padded to PLAN_ALIGNMENT. *out is to be freed. */
int header_make(const struct synth_options *options, const struct plan *plan, unsigned char **out, uint64_t *bytes,
                struct status *status);

/*
 * Blocks [first, first + count) of a tensor, which depend on the key and their number alone. `out` holds
 * count blocks of the tensor's type.
 */
void weights_fill(const struct plan_tensor *tensor, uint64_t key, uint64_t first, uint64_t count, unsigned char *out);
/* The key of a tensor's stream. */
uint64_t weights_key(uint64_t seed, uint32_t tensor);

#endif
