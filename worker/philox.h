#ifndef MOED_WORKER_PHILOX_H
#define MOED_WORKER_PHILOX_H

#include <stdint.h>

/*
 * Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
 * 1, 2, 3" (SC11): four random words of any (key, counter), without state. A header, so that device code can have the
 * same function.
 */
static inline void philox4x32(const uint32_t key[2], uint32_t counter[4]) {
    uint32_t key0 = key[0], key1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53 * counter[0];
        uint64_t product1 = (uint64_t)0xCD9E8D57 * counter[2];
        uint32_t word0 = (uint32_t)(product1 >> 32) ^ counter[1] ^ key0;
        uint32_t word2 = (uint32_t)(product0 >> 32) ^ counter[3] ^ key1;
        counter[0] = word0;
        counter[1] = (uint32_t)product1;
        counter[2] = word2;
        counter[3] = (uint32_t)product0;
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
}

#endif
