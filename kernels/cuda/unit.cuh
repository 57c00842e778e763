#ifndef MOED_KERNELS_CUDA_UNIT_CUH
#define MOED_KERNELS_CUDA_UNIT_CUH

#include <stdint.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/warp.cuh"

/*
 * How cuda_matmul_many cuts its work: an item's tokens into pieces of nearly one size, a multiple of UNIT_TOKEN_STEP but
 * for the last, and each piece by blocks of rows into units, which are counted item by item, piece by piece.
 */
enum { UNIT_TOKEN_STEP = 16 };

struct unit_list {
    const cuda_item *items; /* NULL: one of `tokens` tokens */
    const uint32_t *item_count;
    uint32_t tokens, piece_tokens; /* piece_tokens: the most of a piece, a multiple of UNIT_TOKEN_STEP */
    uint32_t row_blocks, block_tiles;
};

/* Tokens first .. first + count of an expert's, and the unit's first tile of rows. */
struct unit {
    uint32_t expert, first, count, row_tile;
};

/* Finds units in rising order; a warp keeps 32 items in its lanes. */
struct unit_finder {
    const unit_list &list;
    uint32_t items;
    int lane;
    uint32_t first_item = 0, first_unit = 0, pieces, units_up_to; /* of the lane's item: and of those before */
    cuda_item item;

    __device__ __forceinline__ unit_finder(const unit_list &list, int lane)
        : list(list), items(list.items ? *list.item_count : 1), lane(lane) {
        load();
    }
    __device__ __forceinline__ void load() {
        item = {0, 0, 0};
        if (first_item + lane < items)
            item = list.items ? list.items[first_item + lane] : cuda_item{0, 0, list.tokens};
        pieces = (item.count + list.piece_tokens - 1) / list.piece_tokens;
        units_up_to = warp_scan(pieces * list.row_blocks, lane);
    }
    /* Unit `index`, not less than at the call before; one of 0 tokens where there is none. */
    __device__ __forceinline__ unit find(uint32_t index) {
        uint32_t holders;
        while (holders = __ballot_sync(0xffffffffu, index - first_unit < units_up_to), holders == 0) {
            first_unit += __shfl_sync(0xffffffffu, units_up_to, 31);
            first_item += 32;
            if (first_item >= items)
                return {0, 0, 0, 0};
            load();
        }
        const int holder = __ffs(holders) - 1;
        const uint32_t own = index - first_unit - (units_up_to - pieces * list.row_blocks); /* the holder's */
        const uint32_t piece = own / list.row_blocks, even = (item.count + pieces - 1) / max(pieces, 1u),
                       size = (even + UNIT_TOKEN_STEP - 1) / UNIT_TOKEN_STEP * UNIT_TOKEN_STEP, done = piece * size;
        unit found = {item.expert, item.first + done, min(size, item.count - done),
                      (own - piece * list.row_blocks) * list.block_tiles};
        found.expert = __shfl_sync(0xffffffffu, found.expert, holder);
        found.first = __shfl_sync(0xffffffffu, found.first, holder);
        found.count = __shfl_sync(0xffffffffu, found.count, holder);
        found.row_tile = __shfl_sync(0xffffffffu, found.row_tile, holder);
        return found;
    }
};

#endif
