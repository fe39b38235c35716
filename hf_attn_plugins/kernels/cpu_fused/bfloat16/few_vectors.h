/* Decoding's products by AVX512-BF16: see few.h. */
#pragma once
#include "vectors.h"

#define AT_ONCE STEP
#define FEWEST_HELD 5 /* rows from which on holding the keys pays: it takes as long as two products of a row */

typedef struct {
    _Alignas(64) int32_t held[MAX_DIM / 2 * LANES]; /* the keys, see `hold_rows` */
} Few;

INLINE void take_queries(Few *few, Rows queries, int64_t dim) {}

/* Rows first .. first + 16, which are used some hundred cycles later. Inlined, because GCC takes a function that
 * only prefetches for one without effect, and drops calls of it. */
INLINE void prefetch(Rows rows, int64_t first, int64_t dim) {
    for (int64_t row = first; row < smaller(first + 16, rows.count); row++)
        for (int64_t column = 0; column < dim; column += 32)
            _mm_prefetch((const void *)(rows.data + row * rows.stride + column), _MM_HINT_T0);
}

/* Lane i is the sum of all lanes of x[i]. */
INLINE __m512 sums_of(__m512 x[16]) {
    __m512 y[8], z[4];
    for (int i = 0; i < 8; i++)
        y[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d even = (__m512d)y[2 * i], odd = (__m512d)y[2 * i + 1];
        z[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(even, odd), (__m512)_mm512_unpackhi_pd(even, odd));
    }
    for (int i = 0; i < 2; i++)
        y[i] = _mm512_add_ps(_mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
}

/* A query times keys first .. first + 16. Keys past the end repeat the last one. */
INLINE __m512 multiply_one(const bf16 *query, Rows keys, int64_t first, int64_t dim) {
    const bf16 *row[16];
    __m512 sum[16];
    for (int i = 0; i < 16; i++) {
        row[i] = keys.data + smaller(first + i, keys.count - 1) * keys.stride;
        sum[i] = _mm512_setzero_ps();
    }
    for (int64_t column = 0; column < dim; column += 32) {
        const __mmask32 inside = dim - column < 32 ? 0xffff : 0xffffffff;
        const __m512bh elements = (__m512bh)_mm512_maskz_loadu_epi16(inside, query + column);
        for (int i = 0; i < 16; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], elements, (__m512bh)_mm512_maskz_loadu_epi16(inside, row[i] + column));
    }
    return sums_of(sum);
}

/* The code of `rows` rows, 1 .. STEP, at most: no product is made of rows that are not there. */
#define FOR_ROWS(rows, code)                                                                                           \
    switch (rows) {                                                                                                    \
    case 1: code(1); break;                                                                                            \
    case 2: code(2); break;                                                                                            \
    case 3: code(3); break;                                                                                            \
    case 4: code(4); break;                                                                                            \
    case 5: code(5); break;                                                                                            \
    default: code(STEP);                                                                                               \
    }

INLINE void multiply_keys(Few *few, Rows queries, int64_t row, Rows keys, int64_t first, int64_t dim,
                          __m512 products[AT_ONCE][VECTORS]) {
    if (queries.count < FEWEST_HELD) {
        for (int v = 0; v < VECTORS; v++)
            for (int64_t j = 0; j < queries.count; j++)
                products[j][v] = multiply_one(queries.data + j * dim, keys, first + 16 * v, dim);
        return;
    }
    if (row == 0)
        hold_rows(keys, first, dim, few->held);
#define MULTIPLY(count) multiply_few(few->held, queries, row, dim, count, VECTORS, products)
    FOR_ROWS(queries.count - row, MULTIPLY)
}

/* sums[j][column ..] += weights[j][key] * value[key][column ..], over LANES keys, for j < rows and v < vectors. */
INLINE void add_some(float *sums, int64_t stride, const bf16 (*weights)[LANES], Rows values, int64_t first,
                     int64_t column, const int rows, const int vectors) {
    __m512 sum[STEP][VECTORS];
    for (int j = 0; j < rows; j++)
        for (int v = 0; v < vectors; v++)
            sum[j][v] = _mm512_loadu_ps(sums + j * stride + 16 * v);
    for (int key = 0; key < LANES; key += 2) {
        const bf16 *even = values.data + smaller(first + key, values.count - 1) * values.stride + column;
        const bf16 *odd = values.data + smaller(first + key + 1, values.count - 1) * values.stride + column;
        __m512bh pair[VECTORS];
        pair_columns(even, odd, vectors, pair);
        for (int j = 0; j < rows; j++) {
            int32_t both;
            memcpy(&both, weights[j] + key, sizeof both);
            for (int v = 0; v < vectors; v++)
                sum[j][v] = _mm512_dpbf16_ps(sum[j][v], (__m512bh)_mm512_set1_epi32(both), pair[v]);
        }
    }
    for (int j = 0; j < rows; j++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(sums + j * stride + 16 * v, sum[j][v]);
}

static void add_values(Few *few, const bf16 (*weights)[LANES], int64_t rows, Rows values, int64_t first, int64_t dim,
                       float *sums) {
    for (int64_t row = 0; row < rows; row += STEP) {
        int64_t column = 0;
#define ADD(count) add_some(at, dim, weights + row, values, first, column, count, VECTORS)
#define ADD_ONE(count) add_some(at, dim, weights + row, values, first, column, count, 1)
        for (; column + 16 * VECTORS <= dim; column += 16 * VECTORS) {
            float *at = sums + row * dim + column;
            FOR_ROWS(rows - row, ADD)
        }
        for (; column < dim; column += 16) {
            float *at = sums + row * dim + column;
            FOR_ROWS(rows - row, ADD_ONE)
        }
    }
}
