/* What the labels of a block of keys tell of the query rows, for decoding's few rows: as `key_bounds` of
 * kernels/segment_labels.py, which takes many small operators of PyTorch. */
#pragma once
#include <stdint.h>

#define HIDDEN INT32_MIN /* the label of keys that no row sees */

/* bounds = begin .. end: the rows that may see one of `lanes` keys from `first` on; whole_begin .. whole_end: those that
 * see all. `rows`: labels of `num_rows` rows, NULL where all are 0. */
static inline void bounds_of_keys(const int32_t *keys, int64_t first, int64_t num_keys, int lanes, const int32_t *rows,
                                  int64_t num_rows, int32_t bounds[4]) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t key = first; key < num_keys && key < first + lanes; key++) {
        low = keys[key] < low ? keys[key] : low;
        high = keys[key] > high ? keys[key] : high;
    }
    bounds[0] = bounds[2] = (int32_t)num_rows;
    bounds[1] = bounds[3] = 0;
    for (int32_t row = 0; row < num_rows; row++) {
        const int32_t label = rows ? rows[row] : 0;
        if (high == HIDDEN || label < low || label > high)
            continue;
        bounds[0] = row < bounds[0] ? row : bounds[0];
        bounds[1] = row + 1;
        if (low == high && (bounds[2] == num_rows || bounds[3] == row)) { /* the first run of such rows */
            bounds[2] = row < bounds[2] ? row : bounds[2];
            bounds[3] = row + 1;
        }
    }
}

/* The same for the block of a call that begins at `first`: the bounds that Python made, where there are some. */
static inline void bounds_of_block(const Call *call, int64_t b, const int32_t *keys, const int32_t *rows, int64_t first,
                                   int lanes, int32_t bounds[4]) {
    if (call->key_bounds)
        memcpy(bounds, call->key_bounds + b * call->key_bounds_batch + first / lanes * 4, 4 * sizeof *bounds);
    else
        bounds_of_keys(keys, first, call->num_keys, lanes, rows, call->num_rows, bounds);
}
