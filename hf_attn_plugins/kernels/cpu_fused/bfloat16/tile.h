/* The building blocks of the compiled CPU kernels in bfloat16: a block of held rows times a few walked rows.
 *
 * Attention, forward and backward, multiplies rows of one tensor with rows of another: queries with keys, or keys with
 * queries. A thread *holds* LANES rows, one per vector lane, and *walks* over the other rows, STEP at a time. All sums,
 * masks and exponentials of a held row stay in its lane. Only decoding reduces across lanes.
 *
 * Products are of pairs of bfloat16. In a product over head_dim, a pair is two elements of a row. In a product over
 * walked rows, a pair is one element of two neighbouring rows: `pair_at` and `paired` put them side by side. The
 * products themselves are in `vectors.h` and, for CPUs that have it, in `amx.h`. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define VECTORS 4            /* vectors of 16 held rows */
#define LANES (16 * VECTORS) /* held rows */
#define MAX_DIM 256
#define LN_2 0.69314718f
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

/* Rows of one head: row t is at data + t * stride, and its elements are neighbours in memory. */
typedef struct {
    const bf16 *data;
    int64_t stride;
    int64_t count;
} Rows;

#define ELEMENT bf16
#include "../call.h"

static inline Rows rows_of(const Tensor *tensor, int64_t b, int64_t h, int64_t count) {
    return (Rows){tensor->data + b * tensor->batch + h * tensor->head, tensor->token, count};
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Transpose 16 vectors of 16 elements of 32 bits. */
static inline void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
            y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
    }
}

/* held[pair][lane]: LANES rows from `first` on, two elements in 32 bits; 0 up to a multiple of 16 pairs. Lanes past the
 * end repeat the last row. */
static inline void hold_rows(Rows rows, int64_t first, int64_t dim, int32_t *held) {
    for (int64_t pair = 0; pair < dim / 2; pair += 16) {
        const int count = (int)smaller(16, dim / 2 - pair);
        for (int v = 0; v < VECTORS; v++) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) {
                const int64_t row = smaller(first + 16 * v + i, rows.count - 1);
                x[i] = _mm512_maskz_loadu_epi32((1u << count) - 1, rows.data + row * rows.stride + 2 * pair);
            }
            transpose(x);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(held + (pair + i) * LANES + 16 * v, x[i]);
        }
    }
}

/* Elements column .. column + 16 of two neighbouring rows, side by side in 32 bits; 0 past the end. */
static inline __m512i pair_at(Rows rows, int64_t row, int64_t column) {
    __m512i pair = _mm512_setzero_si512();
    const bf16 *at = rows.data + row * rows.stride + column;
    if (row < rows.count)
        pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)at));
    if (row + 1 < rows.count) {
        const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(at + rows.stride)));
        pair = _mm512_or_si512(pair, _mm512_slli_epi32(next, 16));
    }
    return pair;
}

/* The weights of two walked rows for 16 held rows, as pairs. */
static inline __m512i paired(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* 2**x for x <= 127, relative error 3e-6: 2**(x - floor(x)) by a polynomial fitted on [0, 1], times 2**floor(x). */
static inline __m512 exp2_of(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power = _mm512_set1_ps(0.013534166f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.052011467f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.24144274f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.69300383f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(power, x);
}

/* Store rows first .. first + LANES of a tensor: sums[column][lane] * factor[lane], rounded to bfloat16. */
static inline void store_rows(const float *sums, const float *factor, Tensor to, int64_t b, int64_t h, int64_t first,
                              int64_t count, int64_t dim) {
    bf16 *data = to.data + b * to.batch + h * to.head;
    for (int64_t column = 0; column < dim; column += 16)
        for (int v = 0; v < VECTORS; v++) {
            const __m512 scale = _mm512_loadu_ps(factor + 16 * v);
            __m512i x[16];
            for (int i = 0; i < 16; i++)
                x[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(sums + (column + i) * LANES + 16 * v), scale);
            transpose(x);
            for (int i = 0; i < 16 && first + 16 * v + i < count; i++) {
                const __m256bh row = _mm512_cvtneps_pbh((__m512)x[i]);
                _mm256_storeu_si256((void *)(data + (first + 16 * v + i) * to.token + column), (__m256i)row);
            }
        }
}
