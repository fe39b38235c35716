/* Products of one query row with WIDTH keys, for decoding: a score is summed over the columns of a key in one vector,
 * and `fold` sums WIDTH such vectors. */
#pragma once
#include "vec.h"

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

/* Sums of neighbours in every four lanes: of the first four of a, of the first four of b, of the next four of a... */
INLINE Vec neighbours(Vec a, Vec b) {
#if WIDTH == 16
    return PICK(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           PICK(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif WIDTH == 8
    return PICK(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + PICK(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    return PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7);
#endif
}

/* Sums of neighbouring fours: those of a in the lower half, those of b in the upper. */
INLINE Vec fours(Vec a, Vec b) {
#if WIDTH == 16
    return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif WIDTH == 8
    return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return a;
#endif
}

/* The sum of each of four vectors, in every four lanes those of its part. */
INLINE Vec fold_four(const Vec x[4]) { return neighbours(neighbours(x[0], x[1]), neighbours(x[2], x[3])); }

/* The sum of vector i in lane i. Written out, so that the compiler keeps the vectors in registers. */
INLINE Vec fold(const Vec x[WIDTH]) {
#if WIDTH == 16
    return fours(fours(fold_four(x), fold_four(x + 4)), fours(fold_four(x + 8), fold_four(x + 12)));
#elif WIDTH == 8
    return fours(fold_four(x), fold_four(x + 4));
#else
    return fold_four(x);
#endif
}

/* Products of a query and WIDTH keys, `stride` bytes apart, one per lane. */
INLINE Vec score_row(const float *query, const char *keys, const int64_t stride, int64_t dim, const int dtype) {
    Vec sum[WIDTH];
    for (int i = 0; i < WIDTH; i++)
        sum[i] = (Vec){0};
    for (int64_t column = 0; column < dim; column += WIDTH, keys += WIDTH * size_of(dtype)) {
        const Vec held = load(query + column);
        for (int i = 0; i < WIDTH; i++)
            sum[i] += held * load_stored(keys + i * stride, dtype);
    }
    return fold(sum);
}
