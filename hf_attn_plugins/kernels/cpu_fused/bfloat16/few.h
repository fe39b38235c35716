/* The two products of decoding, of a few query rows and LANES keys: what AMX and AVX512-BF16 do each in their own way.
 *
 * multiply_keys: products[j][v] = query row + j times keys first + 16 v .. first + 16 (v + 1), for j < AT_ONCE.
 * add_values: sums[row][column] += weights[row][key] * value[key][column], over LANES keys from `first` on.
 * In both, keys past the end repeat the last one.
 * prefetch: rows that are used next. */
#pragma once
#include "products.h"

/* pair[v] = columns 16 v .. 16 (v + 1) of two keys, side by side; `vectors` is 1 or even. */
INLINE void pair_columns(const bf16 *even, const bf16 *odd, const int vectors, __m512bh *pair) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    if (vectors == 1) {
        const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)even));
        pair[0] = (__m512bh)_mm512_permutex2var_epi16(a, low, _mm512_castsi256_si512(_mm256_loadu_si256((const void *)odd)));
        return;
    }
    for (int v = 0; v < vectors; v += 2) {
        const __m512i a = _mm512_loadu_si512(even + 16 * v), b = _mm512_loadu_si512(odd + 16 * v);
        pair[v] = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
        pair[v + 1] = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
    }
}

#if defined(__AMX_BF16__)
#include "few_amx.h"
#else
#include "few_vectors.h"
#endif
