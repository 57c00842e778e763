#ifndef MOED_COMMON_CLOCK_H
#define MOED_COMMON_CLOCK_H

#include <stdint.h>

/* Nanoseconds of CLOCK_MONOTONIC: for durations and deadlines. */
uint64_t clock_now_ns(void);

/* 64 random bits from the kernel (getrandom): incarnations and default seeds. */
uint64_t clock_random_u64(void);

#endif
