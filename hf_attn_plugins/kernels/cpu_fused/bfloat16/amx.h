/* The products of the compiled CPU kernels by AMX: matrices of 16 rows of 64 bytes, in eight tile registers.
 *
 * An instruction adds to 16 x 16 float32 the product of 16 rows of 32 bfloat16 with 16 rows of 16 pairs. Rows of a tensor
 * are such rows as they lie in memory, and `held` and `weights` are such pairs. Of the second product's walked rows
 * `pair_rows` makes rows: an element of 32 of them, side by side. `vectors.h` has the same functions for AVX512-BF16. */
#pragma once
#include "tile.h"

#define STEP 32  /* walked rows at a time, as many as a product over walked rows takes */
#define TILE 128 /* walked rows whose weights are kept between the two products; a multiple of STEP */
#define ALIGN STEP /* a tile begins at a multiple of it */

#define ROW_BYTES 64
#define MATRIX 256 /* elements of 32 bits in a tile register */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

static __thread TileConfig config_before;

/* The compiler does not know that tiles are loaded from what was just stored. */
static inline void stored(void) { __asm__ volatile("" ::: "memory"); }

/* Every tile register holds 16 rows of 64 bytes until `end_products`, which puts back what PyTorch has set. */
static inline void begin_products(void) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = ROW_BYTES;
        config.rows[i] = 16;
    }
    _tile_storeconfig(&config_before);
    _tile_loadconfig(&config);
}

static inline void end_products(void) {
    if (config_before.palette)
        _tile_loadconfig(&config_before);
    else
        _tile_release();
}

/* pairs[group of 32 rows][block of 16 columns][column][pair]: TILE rows from `first` on, 0 past the end */
static inline void pair_rows(Rows rows, int64_t first, int64_t dim, int32_t *pairs) {
    for (int64_t row = first; row < first + TILE; row += STEP)
        for (int64_t column = 0; column < dim; column += 16, pairs += MATRIX) {
            __m512i x[16];
            for (int i = 0; i < 16; i++)
                x[i] = pair_at(rows, row + 2 * i, column);
            transpose(x);
            for (int i = 0; i < 16; i++)
                _mm512_storeu_si512(pairs + 16 * i, x[i]);
        }
}

/* 16 walked rows from `first` on in `copy`, with elements of 0 up to a multiple of 32; past the end the last row. */
static inline void copy_rows(Rows walked, int64_t first, int64_t dim, int64_t padded, bf16 *copy) {
    for (int i = 0; i < 16; i++) {
        bf16 *to = copy + i * padded;
        memcpy(to, walked.data + smaller(first + i, walked.count - 1) * walked.stride, dim * sizeof(bf16));
        memset(to + dim, 0, (padded - dim) * sizeof(bf16));
    }
}

/* block[j][v] = vector v of the held rows times walked row first + j, summed over head_dim, for v < vectors. Walked
 * rows past the end repeat the last one. */
INLINE void multiply_some(const int32_t *held, Rows walked, int64_t first, int64_t dim, const int vectors,
                          __m512 block[STEP][VECTORS]) {
    const int64_t padded = round_up(dim, 32);
    bf16 copy[16 * MAX_DIM];
    for (int j = 0; j < STEP; j += 16) {
        const bf16 *rows = walked.data + (first + j) * walked.stride;
        int64_t stride = walked.stride;
        if (first + j + 16 > walked.count || padded != dim) {
            copy_rows(walked, first + j, dim, padded, copy);
            rows = copy;
            stride = padded;
        }
        stored();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t element = 0; element < padded; element += 32) {
            const int32_t *lanes = held + element / 2 * LANES;
            _tile_loadd(4, rows + element, stride * sizeof(bf16));
            _tile_loadd(5, lanes, LANES * sizeof(int32_t));
            _tile_dpbf16ps(0, 4, 5);
            if (vectors > 1) {
                _tile_loadd(6, lanes + 16, LANES * sizeof(int32_t));
                _tile_dpbf16ps(1, 4, 6);
            }
            if (vectors > 2) {
                _tile_loadd(7, lanes + 32, LANES * sizeof(int32_t));
                _tile_dpbf16ps(2, 4, 7);
            }
            if (vectors > 3) {
                _tile_loadd(5, lanes + 48, LANES * sizeof(int32_t));
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, &block[j][0], sizeof block[0]);
        if (vectors > 1)
            _tile_stored(1, &block[j][1], sizeof block[0]);
        if (vectors > 2)
            _tile_stored(2, &block[j][2], sizeof block[0]);
        if (vectors > 3)
            _tile_stored(3, &block[j][3], sizeof block[0]);
    }
}

/* sums[column][lane] += weights[pair][lane] * pairs[..][column][pair], over `count` pairs of walked rows. */
static inline void accumulate(const int32_t *weights, const int32_t *pairs, int64_t count, int64_t dim, float *sums) {
    const int64_t bytes = LANES * sizeof(float);
    stored();
    for (int64_t column = 0; column < dim; column += 16) {
        float *sum = sums + column * LANES;
        _tile_loadd(0, sum, bytes);
        _tile_loadd(1, sum + 16, bytes);
        _tile_loadd(2, sum + 32, bytes);
        _tile_loadd(3, sum + 48, bytes);
        for (int64_t pair = 0; pair < count; pair += 16) {
            const int32_t *lanes = weights + pair * LANES;
            _tile_loadd(4, pairs + pair * dim + column * 16, ROW_BYTES);
            _tile_loadd(5, lanes, bytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, lanes + 16, bytes);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, lanes + 32, bytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, lanes + 48, bytes);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, sum, bytes);
        _tile_stored(1, sum + 16, bytes);
        _tile_stored(2, sum + 32, bytes);
        _tile_stored(3, sum + 48, bytes);
    }
}

/* `accumulate` where vector v has weights for the pairs from[v] .. to[v] only. */
static inline void accumulate_apart(const int32_t *weights, const int32_t *pairs, const int64_t from[VECTORS],
                                    const int64_t to[VECTORS], int64_t dim, float *sums) {
    const int64_t bytes = LANES * sizeof(float);
    stored();
    for (int v = 0; v < VECTORS; v++)
        for (int64_t column = 0; column < dim && from[v] < to[v]; column += 16) {
            float *sum = sums + column * LANES + 16 * v;
            _tile_loadd(0, sum, bytes);
            for (int64_t pair = from[v] & ~(int64_t)15; pair < to[v]; pair += 16) {
                _tile_loadd(4, pairs + pair * dim + column * 16, ROW_BYTES);
                _tile_loadd(5, weights + pair * LANES + 16 * v, bytes);
                _tile_dpbf16ps(0, 4, 5);
            }
            _tile_stored(0, sum, bytes);
        }
}
