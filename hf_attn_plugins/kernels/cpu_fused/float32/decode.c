/* Split-KV decoding, for few queries and many keys. A thread computes a chunk of SPLIT_KEYS keys at a time; then the
 * chunks' results are merged.
 *
 * Reading keys and values is most of the work, so both are read once, row by row, where they lie, for all queries of all
 * heads that share them. */
#include "few.h"
#include "scores.h"

#define SPLIT_KEYS 576 /* keys of a chunk; not by the number of threads, so that sums are the same for any number */
#define MAX_ROWS 256   /* rows of all heads that share a key head */
#define AHEAD 16       /* rows between what is read and what is prefetched */

/* The result of one chunk for every row: row_max (of scores, see to_base_2), row_sum = sum of exp(score - row_max),
 * and the values' sum with the same weights. */
typedef struct {
    float *row_max, *row_sum, *sums;
} Found;

typedef struct {
    ALIGNED float weights[MAX_ROWS][LANES];
    ALIGNED float queries[MAX_ROWS * MAX_DIM]; /* rows of all heads that share the keys, head by head */
    ALIGNED float keys[WIDTH][MAX_DIM + 16]; /* copied; apart as in stride_of */
    Sight sight;
    int64_t b, kv_head;
} Block;

/* Query rows of one key head: the rows of all heads that share it. */
static int64_t shared_rows(const Call *call) { return call->heads / call->kv_heads * call->num_rows; }

static Found found_of(const Call *call, int64_t item) {
    const int64_t rows = shared_rows(call);
    float *start = call->partials + item * rows * (call->dim_v + 2);
    return (Found){start, start + rows, start + 2 * rows};
}

/* Prefetch `bytes` of a row AHEAD rows later. A prefetch of memory that is not there does nothing. */
INLINE void prefetch(const char *row, int64_t stride, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(row + AHEAD * stride + byte);
}

/* Scores of WIDTH keys from `key` on, which is a multiple of WIDTH past `first`, for all rows, in units of log 2. Keys
 * are read where they lie. Two kinds are copied first: those of 16 bits that several rows read, so that they are widened
 * once, and the last few, which end within a vector. */
INLINE void score_keys(Block *block, Rows keys, int64_t first, int64_t key, int64_t rows, int64_t dim, float scale,
                       const int dtype) {
    const int64_t size = size_of(dtype);
    const char *from = keys.data + key * keys.stride;
    for (int i = 0; i < WIDTH; i++)
        prefetch(from + i * keys.stride, keys.stride, dim * size);
    if ((dtype == FLOAT32 || rows == 1) && key + WIDTH <= keys.count) {
        for (int64_t row = 0; row < rows; row++)
            store(block->weights[row] + key - first,
                  scale * score_row(block->queries + row * dim, from, keys.stride, dim, dtype));
        return;
    }
    for (int i = 0; i < WIDTH; i++) {
        const char *at = keys.data + smaller(key + i, keys.count - 1) * keys.stride;
        for (int64_t column = 0; column < dim; column += WIDTH)
            store(block->keys[i] + column, load_stored(at + column * size, dtype));
    }
    for (int64_t row = 0; row < rows; row++)
        store(block->weights[row] + key - first, scale * score_row(block->queries + row * dim, (const char *)block->keys,
                                                                   sizeof block->keys[0], dim, FLOAT32));
}

/* Turn products of LANES keys from `first` on, of row t of a head, into scores. */
static void alter(const Call *call, const Shape *shape, int64_t b, int64_t h, int64_t t, int64_t first,
                  float *weights) {
    const Bias bias = bias_of(call, b, h);
    for (int i = 0; i < LANES; i += WIDTH) {
        Vec slope, score = capped(shape, load(weights + i), &slope);
        if (bias.data)
            score = with_bias(score, load_bias(&bias, t, first + i, call->num_keys));
        store(weights + i, score);
    }
}

/* Weights of LANES keys from `first` on, for all rows. Where a row's maximum grows, its sums so far are rescaled. */
INLINE void weigh(const Call *call, const int altered, Block *block, Found found, Rows keys, int64_t first,
                  int64_t end) {
    const int64_t rows = shared_rows(call);
    const Shape shape = shape_of(call);
    const float scale = altered ? 1 : shape.scale, power = altered ? to_base_2(call) : 1;
    for (int64_t key = first; key < end; key += WIDTH)
        WITH_STORAGE(call->dtype, score_keys(block, keys, first, key, rows, call->dim, scale, STORAGE));
    for (int64_t row = 0; row < rows; row++) {
        float *weights = block->weights[row], row_max = found.row_max[row];
        if (altered)
            alter(call, &shape, block->b, block->kv_head * (rows / call->num_rows) + row / call->num_rows,
                  row % call->num_rows, first, weights);
        Ints mask[LANES / WIDTH];
        Vec most = splat(-INFINITY), sum = {0};
        for (int i = 0; i < LANES / WIDTH; i++) {
            mask[i] = seen(&block->sight, i / VECTORS, i % VECTORS, row % call->num_rows);
            for (int lane = 0; lane < WIDTH && first + (i + 1) * WIDTH > end; lane++)
                mask[i][lane] &= first + i * WIDTH + lane < end ? -1 : 0;
            most = larger_of(choose(mask[i], load(weights + i * WIDTH), splat(-INFINITY)), most);
        }
        for (int lane = 0; lane < WIDTH; lane++)
            row_max = most[lane] > row_max ? most[lane] : row_max;
        if (row_max > found.row_max[row]) {
            const float rescale = found.row_max[row] == -INFINITY ? 0 : exp2f((found.row_max[row] - row_max) * power);
            float *sums = found.sums + row * call->dim_v;
            for (int64_t column = 0; column < call->dim_v; column += WIDTH)
                store(sums + column, rescale * load(sums + column));
            found.row_sum[row] *= rescale;
            found.row_max[row] = row_max;
        }
        for (int i = 0; i < LANES / WIDTH; i++) {
            Vec shifted = load(weights + i * WIDTH) - splat(row_max == -INFINITY ? 0 : row_max);
            if (altered)
                shifted *= power;
            const Vec weight = only(mask[i], exp2_of(shifted));
            store(weights + i * WIDTH, weight);
            sum += weight;
        }
        found.row_sum[row] += sum_of(sum);
    }
}

/* found.sums[row][column] += sum over keys of weights[row][key] * value[key][column], for `rows` rows and `columns`
 * vectors of columns. */
INLINE void add_some(const Call *call, Block *block, Found found, Rows values, int64_t first, int64_t count,
                     int64_t row, int64_t column, const int rows, const int columns, const int dtype) {
    const int64_t size = size_of(dtype);
    Vec sum[8][8];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            sum[r][c] = (Vec){0};
    const char *from = values.data + first * values.stride + column * size;
    for (int64_t key = 0; key < count; key++, from += values.stride) {
        if (row == 0)
            prefetch(from, values.stride, columns * WIDTH * size);
        for (int c = 0; c < columns; c++) {
            const Vec value = load_stored(from + c * WIDTH * size, dtype);
            for (int r = 0; r < rows; r++)
                sum[r][c] += value * block->weights[row + r][key];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            float *to = found.sums + (row + r) * call->dim_v + column + c * WIDTH;
            store(to, load(to) + sum[r][c]);
        }
}

INLINE void add_rows(const Call *call, Block *block, Found found, Rows values, int64_t first, int64_t count, int64_t row,
                     const int rows, const int dtype) {
    const int64_t dim = call->dim_v;
    int64_t column = 0;
    for (; rows < 2 && column + 8 * WIDTH <= dim; column += 8 * WIDTH)
        add_some(call, block, found, values, first, count, row, column, rows, 8, dtype);
    for (; rows < 4 && column + 4 * WIDTH <= dim; column += 4 * WIDTH)
        add_some(call, block, found, values, first, count, row, column, rows, 4, dtype);
    for (; column + 2 * WIDTH <= dim; column += 2 * WIDTH)
        add_some(call, block, found, values, first, count, row, column, rows, 2, dtype);
    for (; column < dim; column += WIDTH)
        add_some(call, block, found, values, first, count, row, column, rows, 1, dtype);
}

/* Add `count` values from `first` on to the sums of all rows. */
INLINE void add_values(const Call *call, Block *block, Found found, Rows values, int64_t first, int64_t count,
                       const int dtype) {
    const int64_t rows = shared_rows(call);
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6)
        add_rows(call, block, found, values, first, count, row, 6, dtype);
    switch (rows - row) {
    case 1: add_rows(call, block, found, values, first, count, row, 1, dtype); break;
    case 3: add_rows(call, block, found, values, first, count, row, 3, dtype); break;
    case 4: add_rows(call, block, found, values, first, count, row, 4, dtype); break;
    case 5: add_rows(call, block, found, values, first, count, row, 3, dtype); row += 3; /* fall through */
    case 2: add_rows(call, block, found, values, first, count, row, 2, dtype);
    }
}

static void decode_chunk(const Call *call, Block *block, int64_t b, int64_t kv_head, int64_t first, Found found) {
    const int64_t group_size = call->heads / call->kv_heads, rows = shared_rows(call), size = size_of(call->dtype);
    const Rows keys = rows_of(call, &call->key, b, kv_head, call->num_keys);
    const Rows values = rows_of(call, &call->value, b, kv_head, call->num_keys);
    const int64_t end = smaller(first + SPLIT_KEYS, call->num_keys);
    block->b = b;
    block->kv_head = kv_head;
    memset(found.row_sum, 0, sizeof(float) * rows * (1 + call->dim_v));
    for (int64_t row = 0; row < rows; row++) {
        const int64_t h = kv_head * group_size + row / call->num_rows;
        const Rows query = rows_of(call, &call->query, b, h, call->num_rows);
        const char *from = query.data + row % call->num_rows * query.stride;
        for (int64_t column = 0; column < call->dim; column += WIDTH)
            store(block->queries + row * call->dim + column, load_stored(from + column * size, call->dtype));
        found.row_max[row] = -INFINITY;
    }
    for (int64_t key = first; key < end; key += LANES) {
        const int64_t tile_end = smaller(key + LANES, end);
        set_rows_seeing(&block->sight, call, b, key, NULL);
        if (block->sight.begin >= block->sight.end)
            continue;
        if (is_altered(call))
            weigh(call, 1, block, found, keys, key, tile_end);
        else
            weigh(call, 0, block, found, keys, key, tile_end);
        WITH_STORAGE(call->dtype, add_values(call, block, found, values, key, tile_end - key, STORAGE));
    }
}

/* Merge one row of a head from all chunks: M = max row_max, weights 2**(row_max - M), as `merge` in core/partial.py. */
static void merge_row(const Call *call, int64_t b, int64_t h, int64_t t, int64_t chunks) {
    const int64_t group_size = call->heads / call->kv_heads, row = h % group_size * call->num_rows + t;
    const int64_t item = (b * call->kv_heads + h / group_size) * chunks;
    float sums[MAX_DIM] = {0}, row_max = -INFINITY, row_sum = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        row_max = fmaxf(row_max, found_of(call, item + chunk).row_max[row]);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const Found found = found_of(call, item + chunk);
        if (found.row_sum[row] == 0)
            continue;
        /* A row of NaN has row_sum NaN and row_max -inf; weight 1 keeps it NaN. */
        const float weight = row_max == -INFINITY ? 1 : exp2f((found.row_max[row] - row_max) * to_base_2(call));
        row_sum += weight * found.row_sum[row];
        for (int64_t column = 0; column < call->dim_v; column += WIDTH)
            store(sums + column, load(sums + column) + weight * load(found.sums + row * call->dim_v + column));
    }
    store_row(call, &call->out, b, h, t, sums, row_sum == 0 ? 0 : 1 / row_sum, call->dim_v);
    call->lse[(b * call->heads + h) * call->num_rows + t] =
        row_sum == 0 ? -INFINITY : (float)(row_max * (is_altered(call) ? 1 : LN_2) + log2(row_sum) * LN_2);
}

/* Merge the rows of a key head. */
static void merge_rows(const Call *call, int64_t b, int64_t kv_head, int64_t chunks) {
    const int64_t group_size = call->heads / call->kv_heads;
    for (int64_t row = 0; row < shared_rows(call); row++)
        merge_row(call, b, kv_head * group_size + row / call->num_rows, row % call->num_rows, chunks);
}

/* out and lse of a call with at most MAX_ROWS query rows per key head. `partials` is (batch, key heads, chunks, rows,
 * dim_v + 2), float32, and then a number of 32 bits per key head. */
void hap_decode(const Call *call) {
    const int64_t chunks = (call->num_keys + SPLIT_KEYS - 1) / SPLIT_KEYS, key_heads = call->batch * call->kv_heads;
    int32_t *done = (int32_t *)(call->partials + key_heads * chunks * shared_rows(call) * (call->dim_v + 2));
    memset(done, 0, key_heads * sizeof *done);
#pragma omp parallel num_threads(call->threads)
    {
        Block block;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < key_heads * chunks; item++) {
            const int64_t b = item / chunks / call->kv_heads, kv_head = item / chunks % call->kv_heads;
            decode_chunk(call, &block, b, kv_head, item % chunks * SPLIT_KEYS, found_of(call, item));
            if (count_done(done + item / chunks) == chunks)
                merge_rows(call, b, kv_head, chunks);
        }
    }
}
