/* Scores of a tile of keys, and the weights that they become, for the queries that a thread holds.
 *
 * `row_max` is subtracted from a query's scores before exp2. It need not be the maximum, only within a factor LIMIT of
 * it: large weights lose no digit. It starts as the maximum over the first tile whose keys a query sees. Only when the
 * weights of a tile pass LIMIT is it raised, and are the sums so far rescaled. */
#pragma once
#include "scores.h"

#define LIMIT 0x1p60f
#define TOGETHER 2 /* times LANES queries that walk together, at most */

/* LANES queries of a head, from `first` on. */
typedef struct {
    ALIGNED float held[MAX_DIM * LANES], sums[MAX_DIM * LANES]; /* see hold_rows; sums[lane][column] */
    ALIGNED float row_max[LANES], row_sum[LANES];               /* row_max: see to_base_2 */
    Sight sight;
    int64_t first;
    uint32_t hash[LANES]; /* for dropout */
} Queries;

typedef struct {
    Queries queries[TOGETHER];
    ALIGNED float keys[TILE_SIZE], values[TILE_SIZE];
    ALIGNED float weights[TILE * GROUP];
    const float *tile; /* the keys of this tile, `stride` floats apart */
    int64_t stride;
    int64_t dim, dim_v, chunk, num_rows;
    float scale;     /* of products: with log2(e), in base 2; 1 for altered scores */
    float to_base_2; /* of `row_max`: see altered.h */
    int altered;
    Shape shape;
    Bias bias;
    ALIGNED float bias_tile[TILE * GROUP];
    const Call *call;
    const uint32_t *key_hashes;
} Block;

/* Turn products of rows lo .. hi of the tile into scores. */
static void alter(Block *block, int64_t lo, int64_t hi) {
    for (int64_t at = lo * GROUP; at < hi * GROUP; at += WIDTH) {
        Vec slope, score = capped(&block->shape, load(block->weights + at), &slope);
        if (block->bias.data)
            score = with_bias(score, load(block->bias_tile + at));
        store(block->weights + at, score);
    }
}

/* Scores of walked rows lo .. hi of the tile, and of those around them that fill up whole steps. */
static void score(Block *block, const Queries *queries, int group, int64_t lo, int64_t hi) {
    const float *held = queries->held + group * GROUP * block->dim;
    for (int64_t row = lo / STEP * STEP; row < hi; row += STEP)
        multiply(held, block->tile + row * block->stride, block->stride, block->dim, block->chunk,
                 block->weights + row * GROUP);
    if (block->altered)
        alter(block, lo, hi);
}

/* The rows of keys first .. end in float32: where they lie, unless a whole number of steps would pass the last one. */
static void take_keys(Block *block, Rows keys, int64_t first, int64_t end) {
    block->tile = (const float *)(keys.data + first * keys.stride);
    block->stride = keys.stride / 4;
    if (keys.dtype == FLOAT32 && first + round_up(end - first, STEP) <= keys.count)
        return;
    copy_rows(keys, first, end - first, STEP, block->dim, 1, block->keys);
    block->tile = block->keys;
    block->stride = stride_of(block->dim);
}

/* Whether some query of the group sees keys from .. end and has no `row_max` yet. */
static int unset(const Queries *queries, int group, int64_t from, int64_t end) {
    int lanes = 0;
    for (int i = group * GROUP; i < (group + 1) * GROUP; i++)
        lanes |= (queries->row_max[i] == -INFINITY) &
                 (((queries->sight.low[i] < end) & (queries->sight.high[i] >= from)) | (from < queries->sight.prefix));
    return lanes;
}

/* Raise `row_max` to the largest score of rows lo .. hi of the tile and bring what is summed so far along. */
static void raise_max(const Block *block, Queries *queries, int group, int64_t first, int64_t lo, int64_t hi) {
    Vec most[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        most[v] = splat(-INFINITY);
    for (int64_t row = lo; row < hi; row++) {
        const int inner = all_see(&queries->sight, group, first + row);
        for (int v = 0; v < VECTORS; v++) {
            Vec scores = block->scale * load(block->weights + row * GROUP + v * WIDTH);
            if (!inner)
                scores = choose(seen(&queries->sight, group, v, first + row), scores, splat(-INFINITY));
            most[v] = larger_of(scores, most[v]);
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        const int at = group * GROUP + v * WIDTH;
        const Vec before = load(queries->row_max + at), now = larger_of(most[v], before);
        const Vec rescale = only(before > splat(-INFINITY), exp2_of((before - now) * block->to_base_2));
        store(queries->row_max + at, now);
        store(queries->row_sum + at, load(queries->row_sum + at) * rescale);
        for (int i = 0; i < WIDTH; i++)
            for (int64_t column = 0; column < block->dim_v && before[i] > -INFINITY && rescale[i] != 1; column += WIDTH) {
                float *sum = queries->sums + (at + i) * block->dim_v + column;
                store(sum, load(sum) * rescale[i]);
            }
    }
}

/* Turn the scores of rows lo .. hi of the tile into weights, and add those of a query to `total`. */
INLINE void weigh_tile(Block *block, const Queries *queries, const int altered, int group, int64_t first, int64_t lo,
                       int64_t hi, Vec total[VECTORS]) {
    Vec shift[VECTORS], sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const Vec row_max = load(queries->row_max + group * GROUP + v * WIDTH);
        shift[v] = only(row_max > splat(-INFINITY), row_max);
        sum[v] = (Vec){0};
    }
    for (int64_t row = lo; row < hi; row++) {
        float *at = block->weights + row * GROUP;
        const int inner = all_see(&queries->sight, group, first + row);
        for (int v = 0; v < VECTORS; v++) {
            const Vec score = load(at + v * WIDTH);
            Vec weight = exp2_of(altered ? (score - shift[v]) * block->to_base_2 : score * block->scale - shift[v]);
            if (!inner)
                weight = only(seen(&queries->sight, group, v, first + row), weight);
            sum[v] += weight;
            store(at + v * WIDTH, weight);
        }
    }
    for (int v = 0; v < VECTORS; v++)
        total[v] = sum[v];
}

static void weigh(Block *block, const Queries *queries, int group, int64_t first, int64_t lo, int64_t hi,
                  Vec total[VECTORS]) {
    if (block->altered)
        weigh_tile(block, queries, 1, group, first, lo, hi, total);
    else
        weigh_tile(block, queries, 0, group, first, lo, hi, total);
}

/* Drop weights of rows lo .. hi of the tile. */
static void drop(Block *block, const Queries *queries, int group, int64_t first, int64_t lo, int64_t hi) {
    for (int64_t row = lo; row < hi; row++)
        for (int v = 0; v < VECTORS; v++) {
            float *at = block->weights + row * GROUP + v * WIDTH;
            const uint32_t *held = queries->hash + group * GROUP + v * WIDTH;
            store(at, only(kept(block->call, held, block->key_hashes[first + row]), load(at)));
        }
}

static int within_limit(const Vec total[VECTORS]) {
    Ints within = ~(Ints){0};
    for (int v = 0; v < VECTORS; v++)
        within &= total[v] < splat(LIMIT);
    return !any_of(~within);
}
