/* The building blocks: held rows in the lanes, a tile of walked rows beside them, and the two kinds of product.
 *
 * Attention multiplies rows of one tensor with rows of another: queries with keys, or keys with queries. A thread
 * *holds* LANES rows, transposed, GROUP rows side by side in VECTORS vectors. It *walks* over the other rows, a TILE at
 * a time, which it copies to float32 rows of its own: so storage and strides matter only there.
 *
 * A matrix product runs at the speed of the fused multiply-add only if its sums stay in registers and few loads feed
 * them. Both products keep STEP * VECTORS or ROWS * COLUMNS sums: 12 of the 16 registers of AVX2, 24 of 32 elsewhere. */
#pragma once
#include "vec.h"
#define ELEMENT char
#include "../call.h"

#if WIDTH == 16
enum { VECTORS = 3, STEP = 8, ROWS = 12, COLUMNS = 2 };
#elif WIDTH == 8
enum { VECTORS = 3, STEP = 4, ROWS = 6, COLUMNS = 2 };
#else
enum { VECTORS = 6, STEP = 4, ROWS = 6, COLUMNS = 4 };
#endif
#define LANES 96 /* held rows */
#define TILE 96  /* walked rows that are copied at a time */
#define MAX_DIM 256
#define FEW_ROWS 32
#define LN_2 0.69314718055994531
enum { GROUP = VECTORS * WIDTH, GROUPS = LANES / GROUP };

/* Rows of one head: row t is at data + t * stride bytes. */
typedef struct {
    const char *data;
    int64_t stride, count;
    int dtype;
} Rows;

static inline Rows rows_of(const Call *call, const Tensor *tensor, int64_t b, int64_t h, int64_t count) {
    const int64_t size = size_of(call->dtype);
    return (Rows){tensor->data + (b * tensor->batch + h * tensor->head) * size, tensor->token * size, count,
                  call->dtype};
}

/* Distance of two rows of a copied tile. Without the 16 floats between them, rows of 512 bytes would share a few sets
 * of the first cache. */
static inline int64_t stride_of(int64_t dim) { return dim + 16; }
#define TILE_SIZE (TILE * (MAX_DIM + 16))

/* to[row][column] = factor * rows first .. first + count, then rows of 0 up to a multiple of `unit`. */
static inline void copy_rows(Rows rows, int64_t first, int64_t count, int64_t unit, int64_t dim, float factor,
                             float *to) {
    const int64_t stride = stride_of(dim);
    for (int64_t row = 0; row < count; row++) {
        const char *from = rows.data + (first + row) * rows.stride;
        WITH_STORAGE(rows.dtype, for (int64_t column = 0; column < dim; column += WIDTH)
                                     store(to + row * stride + column,
                                           factor * load_stored(from + size_of(STORAGE) * column, STORAGE)));
    }
    for (int64_t row = count; row < round_up(count, unit); row++)
        memset(to + row * stride, 0, sizeof(float) * dim);
}

/* Prefetch a share of the next tile, rows first .. first + TILE: part number `part` of `parts`. */
static inline void prefetch_part(Rows rows, int64_t first, int64_t end, int64_t part, int64_t parts, int64_t dim) {
    const int64_t bytes = dim * size_of(rows.dtype);
    end = smaller(first + TILE, end);
    for (int64_t row = first + part * TILE / parts; row < smaller(first + (part + 1) * TILE / parts, end); row++)
        for (int64_t byte = 0; byte < bytes; byte += 64)
            __builtin_prefetch(rows.data + row * rows.stride + byte, 0, 2);
}

/* held[group][column][lane]: LANES rows from `first` on. Lanes past the end repeat the last row. */
static inline void hold_rows(Rows rows, int64_t first, int64_t dim, float *held) {
    float row[MAX_DIM];
    for (int lane = 0; lane < LANES; lane++) {
        const char *from = rows.data + smaller(first + lane, rows.count - 1) * rows.stride;
        WITH_STORAGE(rows.dtype, for (int64_t column = 0; column < dim; column += WIDTH)
                                     store(row + column, load_stored(from + size_of(STORAGE) * column, STORAGE)));
        float *to = held + lane / GROUP * dim * GROUP + lane % GROUP;
        for (int64_t column = 0; column < dim; column++)
            to[column * GROUP] = row[column];
    }
}

/* scores[row][lane] = a group of held rows times STEP walked rows, summed over `dim` columns; or added to it. */
INLINE void multiply_some(const float *held, const float *rows, int64_t stride, int64_t dim, int add, float *scores) {
    Vec sum[STEP][VECTORS];
    for (int j = 0; j < STEP; j++)
        for (int v = 0; v < VECTORS; v++)
            sum[j][v] = (Vec){0};
    for (int64_t column = 0; column < dim; column++) {
        Vec lanes[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            lanes[v] = load(held + column * GROUP + v * WIDTH);
        for (int j = 0; j < STEP; j++)
            for (int v = 0; v < VECTORS; v++)
                sum[j][v] += lanes[v] * rows[j * stride + column];
    }
    if (add)
        for (int j = 0; j < STEP; j++)
            for (int v = 0; v < VECTORS; v++)
                sum[j][v] += load(scores + j * GROUP + v * WIDTH);
    for (int j = 0; j < STEP; j++)
        for (int v = 0; v < VECTORS; v++)
            store(scores + j * GROUP + v * WIDTH, sum[j][v]);
}

/* The same for all columns, in sums of `chunk` columns: rounding grows with the length of a sum. */
INLINE void multiply(const float *held, const float *rows, int64_t stride, int64_t dim, int64_t chunk, float *scores) {
    for (int64_t column = 0; column < dim; column += chunk)
        multiply_some(held + column * GROUP, rows + column, stride, smaller(chunk, dim - column), column > 0, scores);
}

/* Columns of a sum. With a few rows, speed does not count, and plain attention is at its most exact. */
static inline int64_t chunk_of(const Call *call) { return call->num_rows < FEW_ROWS ? 16 : 64; }

/* sums[row][column] += sum over i < count of weights[i * step + row * apart] * others[i][column], for ROWS rows and
 * `columns` vectors of columns. */
INLINE void accumulate_some(const float *weights, int64_t step, int64_t apart, const float *others, int64_t stride,
                            int64_t count, float *sums, int64_t sums_stride, const int columns) {
    Vec sum[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++)
            sum[r][c] = load(sums + r * sums_stride + c * WIDTH);
    for (int64_t i = 0; i < count; i++) {
        Vec other[COLUMNS];
        for (int c = 0; c < columns; c++)
            other[c] = load(others + i * stride + c * WIDTH);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < columns; c++)
                sum[r][c] += other[c] * weights[i * step + r * apart];
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++)
            store(sums + r * sums_stride + c * WIDTH, sum[r][c]);
}

/* sums[lane][column] += sum over walked rows of weights[row][lane] * rows[row][column], for the lanes of a group. */
static inline void accumulate(const float *weights, const float *rows, int64_t count, int64_t dim, float *sums) {
    const int64_t stride = stride_of(dim);
    for (int64_t column = 0; column < dim; column += COLUMNS * WIDTH)
        for (int lane = 0; lane < GROUP; lane += ROWS)
            if (column + COLUMNS * WIDTH <= dim)
                accumulate_some(weights + lane, GROUP, 1, rows + column, stride, count, sums + lane * dim + column, dim,
                                COLUMNS);
            else
                accumulate_some(weights + lane, GROUP, 1, rows + column, stride, count, sums + lane * dim + column, dim,
                                1);
}

/* sums[row][column] += sum over lanes of weights[row][lane] * held[lane][column], for `count` walked rows, a multiple of
 * ROWS. `held` is a group of held rows, copied as `copy_rows` does. */
static inline void accumulate_lanes(const float *weights, const float *held, int64_t count, int64_t dim, float *sums) {
    const int64_t stride = stride_of(dim);
    for (int64_t column = 0; column < dim; column += COLUMNS * WIDTH)
        for (int64_t row = 0; row < count; row += ROWS)
            if (column + COLUMNS * WIDTH <= dim)
                accumulate_some(weights + row * GROUP, 1, GROUP, held + column, stride, GROUP, sums + row * dim + column,
                                dim, COLUMNS);
            else
                accumulate_some(weights + row * GROUP, 1, GROUP, held + column, stride, GROUP, sums + row * dim + column,
                                dim, 1);
}

/* One row of a tensor: factor * sums, in its storage. */
static inline void store_row(const Call *call, const Tensor *to, int64_t b, int64_t h, int64_t t, const float *sums,
                             float factor, int64_t dim) {
    char *at = to->data + (b * to->batch + h * to->head + t * to->token) * size_of(call->dtype);
    WITH_STORAGE(call->dtype,
                 for (int64_t column = 0; column < dim; column += WIDTH)
                     store_stored(at + size_of(STORAGE) * column, factor * load(sums + column), STORAGE));
}
