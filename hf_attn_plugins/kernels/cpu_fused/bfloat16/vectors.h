/* The products of the compiled CPU kernels by AVX512-BF16, whose instruction vdpbf16ps multiplies and adds pairs of
 * bfloat16. Walked rows are kept in pairs: pairs[row / 2][column]. `amx.h` has the same functions for AMX. */
#pragma once
#include "tile.h"

#define STEP 6  /* walked rows at a time: STEP * VECTORS accumulators fit in registers */
#define TILE 96 /* walked rows whose weights are kept between the two products; a multiple of STEP */
#define ALIGN 2 /* a tile begins at a multiple of it */

/* pairs[row / 2][column]: TILE rows from `first` on, one element of two neighbouring rows in 32 bits; 0 past the end */
static inline void pair_rows(Rows rows, int64_t first, int64_t dim, int32_t *pairs) {
    for (int64_t row = first; row < first + TILE; row += 2)
        for (int64_t column = 0; column < dim; column += 16)
            _mm512_storeu_si512(pairs + (row - first) / 2 * dim + column, pair_at(rows, row, column));
}

/* block[j][v] = vector v of the held rows times walked row first + j, summed over head_dim, for j < rows, v < vectors.
 * Walked rows past the end repeat the last one. */
INLINE void multiply_few(const int32_t *held, Rows walked, int64_t first, int64_t dim, const int rows, const int vectors,
                         __m512 block[STEP][VECTORS]) {
    const int32_t *row[STEP];
    for (int j = 0; j < rows; j++)
        row[j] = (const void *)(walked.data + smaller(first + j, walked.count - 1) * walked.stride);
    for (int j = 0; j < rows; j++)
        for (int v = 0; v < vectors; v++)
            block[j][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < dim / 2; pair++) {
        __m512bh lanes[VECTORS];
        for (int v = 0; v < vectors; v++)
            lanes[v] = (__m512bh)_mm512_load_si512(held + pair * LANES + 16 * v);
        for (int j = 0; j < rows; j++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(row[j][pair]);
            for (int v = 0; v < vectors; v++)
                block[j][v] = _mm512_dpbf16_ps(block[j][v], lanes[v], both);
        }
    }
}

INLINE void multiply_some(const int32_t *held, Rows walked, int64_t first, int64_t dim, const int vectors,
                          __m512 block[STEP][VECTORS]) {
    multiply_few(held, walked, first, dim, STEP, vectors, block);
}

/* sums[column][lane] += weights[pair][lane] * pairs[pair][column], over `count` pairs of walked rows. */
static inline void accumulate(const int32_t *weights, const int32_t *pairs, int64_t count, int64_t dim, float *sums) {
    enum { COLUMNS = 4 };
    for (int64_t column = 0; column < dim; column += COLUMNS) {
        __m512 sum[COLUMNS][VECTORS];
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++)
                sum[c][v] = _mm512_load_ps(sums + (column + c) * LANES + 16 * v);
        for (int64_t pair = 0; pair < count; pair++) {
            __m512bh lanes[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                lanes[v] = (__m512bh)_mm512_load_si512(weights + pair * LANES + 16 * v);
            for (int c = 0; c < COLUMNS; c++) {
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pairs[pair * dim + column + c]);
                for (int v = 0; v < VECTORS; v++)
                    sum[c][v] = _mm512_dpbf16_ps(sum[c][v], lanes[v], both);
            }
        }
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++)
                _mm512_store_ps(sums + (column + c) * LANES + 16 * v, sum[c][v]);
    }
}

/* `accumulate` where vector v has weights for the pairs from[v] .. to[v] only. It takes one vector at a time, so that
 * more columns fit in registers. */
static inline void accumulate_apart(const int32_t *weights, const int32_t *pairs, const int64_t from[VECTORS],
                                    const int64_t to[VECTORS], int64_t dim, float *sums) {
    enum { COLUMNS = 16 };
    for (int v = 0; v < VECTORS; v++)
        for (int64_t column = 0; column < dim && from[v] < to[v]; column += COLUMNS) {
            __m512 sum[COLUMNS];
            for (int c = 0; c < COLUMNS; c++)
                sum[c] = _mm512_load_ps(sums + (column + c) * LANES + 16 * v);
            for (int64_t pair = from[v]; pair < to[v]; pair++) {
                const __m512bh lanes = (__m512bh)_mm512_load_si512(weights + pair * LANES + 16 * v);
                for (int c = 0; c < COLUMNS; c++)
                    sum[c] = _mm512_dpbf16_ps(sum[c], lanes, (__m512bh)_mm512_set1_epi32(pairs[pair * dim + column + c]));
            }
            for (int c = 0; c < COLUMNS; c++)
                _mm512_store_ps(sums + (column + c) * LANES + 16 * v, sum[c]);
        }
}

/* What a thread does before its first product and after its last. */
static inline void begin_products(void) {}
static inline void end_products(void) {}
