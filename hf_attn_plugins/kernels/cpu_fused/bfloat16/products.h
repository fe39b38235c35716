/* The products of a block, by AMX where the compiler is told of it, else by AVX512-BF16; and what both build on. */
#pragma once
#if defined(__AMX_BF16__)
#include "amx.h"
#else
#include "vectors.h"
#endif

INLINE void multiply(const int32_t *held, Rows walked, int64_t first, int64_t dim, __m512 block[STEP][VECTORS]) {
    multiply_some(held, walked, first, dim, VECTORS, block);
}

/* Rows of a head in `pair_heads`, padding included: a tile may begin at any row, and it ends with a whole STEP. */
static inline int64_t padded_rows(int64_t count) { return round_up(count + STEP, TILE); }

/* Where the tile begins that has a row. */
static inline int64_t tile_begin(int64_t row) { return row & ~(int64_t)(ALIGN - 1); }

/* `pair_rows` of every head of a tensor; the threads of a team share the work. */
static inline void pair_heads(const Tensor *tensor, int64_t batch, int64_t heads, int64_t count, int64_t dim,
                              int32_t *pairs) {
    const int64_t tiles = padded_rows(count) / TILE;
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < batch * heads * tiles; item++)
        pair_rows(rows_of(tensor, item / tiles / heads, item / tiles % heads, count), item % tiles * TILE, dim,
                  pairs + item * TILE / 2 * dim);
}
