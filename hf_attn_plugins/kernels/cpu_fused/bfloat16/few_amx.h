/* Decoding's products by AMX: see few.h. A matrix of 16 keys times 16 query rows gives scores, one of 16 rows of weights
 * times 16 columns of value their sums. Rows that are not there are multiplied as well, and left out of the results. */
#pragma once
#include "amx.h"

#define AT_ONCE 16

typedef struct {
    _Alignas(64) int32_t queries[MAX_ROWS * MAX_DIM / 2]; /* [16 rows][pair of elements][row], 0 up to 32 elements */
    _Alignas(64) int32_t pairs[LANES / 2 * MAX_DIM];              /* values: [pair of keys][column] */
    _Alignas(64) float found[MATRIX];
} Few;

/* CPUs with AMX see by themselves what comes next: prefetching made decoding a fourth slower. */
INLINE void prefetch(Rows rows, int64_t first, int64_t dim) {}

/* The query rows as matrices whose columns they are. */
static inline void take_queries(Few *few, Rows queries, int64_t dim) {
    const int64_t padded = round_up(dim, 32);
    for (int64_t row = 0; row < queries.count; row += 16)
        for (int64_t pair = 0; pair < padded / 2; pair += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) {
                const __mmask16 inside = dim / 2 - pair < 16 ? 0xff : 0xffff;
                const bf16 *from = queries.data + smaller(row + i, queries.count - 1) * queries.stride + 2 * pair;
                x[i] = _mm512_maskz_loadu_epi32(inside, from);
            }
            transpose(x);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(few->queries + (row * padded / 2) + (pair + i) * 16, x[i]);
        }
}

/* x[j] = column j of a matrix of 16 x 16, for j < 4. */
INLINE void first_columns(const float *matrix, __m512i x[4]) {
    __m512i y[4];
    for (int i = 0; i < 4; i++) {
        const float *row = matrix + 16 * i;
        __m512 four = _mm512_castps128_ps512(_mm_load_ps(row));
        four = _mm512_insertf32x4(four, _mm_load_ps(row + 16 * 4), 1);
        four = _mm512_insertf32x4(four, _mm_load_ps(row + 16 * 8), 2);
        y[i] = (__m512i)_mm512_insertf32x4(four, _mm_load_ps(row + 16 * 12), 3);
    }
    const __m512i low = _mm512_unpacklo_epi32(y[0], y[1]), low_2 = _mm512_unpacklo_epi32(y[2], y[3]);
    const __m512i high = _mm512_unpackhi_epi32(y[0], y[1]), high_2 = _mm512_unpackhi_epi32(y[2], y[3]);
    x[0] = _mm512_unpacklo_epi64(low, low_2);
    x[1] = _mm512_unpackhi_epi64(low, low_2);
    x[2] = _mm512_unpacklo_epi64(high, high_2);
    x[3] = _mm512_unpackhi_epi64(high, high_2);
}

INLINE void multiply_keys(Few *few, Rows queries, int64_t row, Rows keys, int64_t first, int64_t dim,
                          __m512 products[AT_ONCE][VECTORS]) {
    const int64_t padded = round_up(dim, 32);
    const int32_t *held = few->queries + row * padded / 2;
    bf16 copy[LANES * MAX_DIM];
    const bf16 *rows = keys.data + first * keys.stride;
    int64_t stride = keys.stride;
    if (first + LANES > keys.count || padded != dim) {
        for (int v = 0; v < VECTORS; v++)
            copy_rows(keys, first + 16 * v, dim, padded, copy + 16 * v * padded);
        rows = copy;
        stride = padded;
    }
    for (int v = 0; v < VECTORS; v++, rows += 16 * stride) {
        stored();
        _tile_zero(0);
        for (int64_t element = 0; element < padded; element += 32) {
            _tile_loadd(1, rows + element, stride * sizeof(bf16));
            _tile_loadd(2, held + element / 2 * 16, ROW_BYTES);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, few->found, ROW_BYTES);
        stored();
        __m512i x[16];
        if (queries.count <= 4)
            first_columns(few->found, x);
        else {
            for (int i = 0; i < 16; i++)
                x[i] = _mm512_load_si512(few->found + 16 * i);
            transpose(x);
        }
        for (int j = 0; j < smaller(AT_ONCE, queries.count); j++)
            products[j][v] = (__m512)x[j];
    }
}

static void add_values(Few *few, const bf16 (*weights)[LANES], int64_t rows, Rows values, int64_t first, int64_t dim,
                       float *sums) {
    for (int64_t key = 0; key < LANES; key += 2) {
        const bf16 *even = values.data + smaller(first + key, values.count - 1) * values.stride;
        const bf16 *odd = values.data + smaller(first + key + 1, values.count - 1) * values.stride;
        int32_t *to = few->pairs + key / 2 * dim;
        __m512bh pair[2];
        int64_t column = 0;
        for (; column + 32 <= dim; column += 32) {
            pair_columns(even + column, odd + column, 2, pair);
            _mm512_storeu_si512(to + column, (__m512i)pair[0]);
            _mm512_storeu_si512(to + column + 16, (__m512i)pair[1]);
        }
        if (column < dim) {
            pair_columns(even + column, odd + column, 1, pair);
            _mm512_storeu_si512(to + column, (__m512i)pair[0]);
        }
    }
    stored();
    for (int64_t row = 0; row < rows; row += 16) {
        const int64_t bytes = dim * sizeof(int32_t);
        _tile_loadd(4, weights[row], LANES * sizeof(bf16));
        _tile_loadd(5, weights[row] + 32, LANES * sizeof(bf16));
        for (int64_t column = 0; column < dim; column += 16) {
            _tile_zero(0);
            _tile_loadd(6, few->pairs + column, bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, few->pairs + 16 * dim + column, bytes);
            _tile_dpbf16ps(0, 5, 7);
            _tile_stored(0, few->found, ROW_BYTES);
            stored();
            for (int64_t j = 0; j < smaller(16, rows - row); j++) {
                float *sum = sums + (row + j) * dim + column;
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_load_ps(few->found + 16 * j)));
            }
        }
    }
}
