/* softmax(scale * query key^T) value and its log-sum-exp: FlashAttention's loop (arXiv 2205.14135, algorithm 1).
 *
 * A thread holds LANES queries and walks over tiles of keys. For a group of queries it computes the scores of a tile,
 * turns them into weights where they lie, and adds the weighted values to the group's sums.
 *
 * `row_max` is subtracted from a query's scores before exp2. It need not be the maximum, only within a factor LIMIT of
 * it: large weights lose no digit. It starts as the maximum over the first tile whose keys a query sees. Only when the
 * weights of a tile pass LIMIT is it raised, and are the sums so far rescaled. */
#include "scores.h"

#define LIMIT 0x1p60f

typedef struct {
    ALIGNED float held[MAX_DIM * LANES], sums[MAX_DIM * LANES]; /* queries: see hold_rows; sums[lane][column] */
    ALIGNED float keys[TILE_SIZE], values[TILE_SIZE];
    ALIGNED float weights[TILE * GROUP];
    ALIGNED float row_max[LANES], row_sum[LANES]; /* row_max: see to_base_2 */
    const float *tile; /* the keys of this tile, `stride` floats apart */
    int64_t stride;
    Sight sight;
    int64_t dim, dim_v, chunk, first, num_rows; /* the first of the held queries, and how many there are */
    float scale;     /* of products: with log2(e), in base 2; 1 for altered scores */
    float to_base_2; /* of `row_max`: see altered.h */
    int altered;
    Shape shape;
    Bias bias;
    ALIGNED float bias_tile[TILE * GROUP];
    const Call *call;
    uint32_t hash[LANES]; /* of the held queries, for dropout */
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
static void score(Block *block, int group, int64_t lo, int64_t hi) {
    const float *held = block->held + group * GROUP * block->dim;
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
static int unset(const Block *block, int group, int64_t from, int64_t end) {
    int lanes = 0;
    for (int i = group * GROUP; i < (group + 1) * GROUP; i++)
        lanes |= (block->row_max[i] == -INFINITY) &
                 (((block->sight.low[i] < end) & (block->sight.high[i] >= from)) | (from < block->sight.prefix));
    return lanes;
}

/* Raise `row_max` to the largest score of rows lo .. hi of the tile and bring what is summed so far along. */
static void raise_max(Block *block, int group, int64_t first, int64_t lo, int64_t hi) {
    Vec most[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        most[v] = splat(-INFINITY);
    for (int64_t row = lo; row < hi; row++) {
        const int inner = all_see(&block->sight, group, first + row);
        for (int v = 0; v < VECTORS; v++) {
            Vec scores = block->scale * load(block->weights + row * GROUP + v * WIDTH);
            if (!inner)
                scores = choose(seen(&block->sight, group, v, first + row), scores, splat(-INFINITY));
            most[v] = larger_of(scores, most[v]);
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        const int at = group * GROUP + v * WIDTH;
        const Vec before = load(block->row_max + at), now = larger_of(most[v], before);
        const Vec rescale = only(before > splat(-INFINITY), exp2_of((before - now) * block->to_base_2));
        store(block->row_max + at, now);
        store(block->row_sum + at, load(block->row_sum + at) * rescale);
        for (int i = 0; i < WIDTH; i++)
            for (int64_t column = 0; column < block->dim_v && before[i] > -INFINITY && rescale[i] != 1; column += WIDTH) {
                float *sum = block->sums + (at + i) * block->dim_v + column;
                store(sum, load(sum) * rescale[i]);
            }
    }
}

/* Turn the scores of rows lo .. hi of the tile into weights, and add those of a query to `total`. */
INLINE void weigh_tile(Block *block, const int altered, int group, int64_t first, int64_t lo, int64_t hi,
                       Vec total[VECTORS]) {
    Vec shift[VECTORS], sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const Vec row_max = load(block->row_max + group * GROUP + v * WIDTH);
        shift[v] = only(row_max > splat(-INFINITY), row_max);
        sum[v] = (Vec){0};
    }
    for (int64_t row = lo; row < hi; row++) {
        float *at = block->weights + row * GROUP;
        const int inner = all_see(&block->sight, group, first + row);
        for (int v = 0; v < VECTORS; v++) {
            const Vec score = load(at + v * WIDTH);
            Vec weight = exp2_of(altered ? (score - shift[v]) * block->to_base_2 : score * block->scale - shift[v]);
            if (!inner)
                weight = only(seen(&block->sight, group, v, first + row), weight);
            sum[v] += weight;
            store(at + v * WIDTH, weight);
        }
    }
    for (int v = 0; v < VECTORS; v++)
        total[v] = sum[v];
}

static void weigh(Block *block, int group, int64_t first, int64_t lo, int64_t hi, Vec total[VECTORS]) {
    if (block->altered)
        weigh_tile(block, 1, group, first, lo, hi, total);
    else
        weigh_tile(block, 0, group, first, lo, hi, total);
}

/* Drop weights of rows lo .. hi of the tile. */
static void drop(Block *block, int group, int64_t first, int64_t lo, int64_t hi) {
    for (int64_t row = lo; row < hi; row++)
        for (int v = 0; v < VECTORS; v++) {
            float *at = block->weights + row * GROUP + v * WIDTH;
            const uint32_t *held = block->hash + group * GROUP + v * WIDTH;
            store(at, only(kept(block->call, held, block->key_hashes[first + row]), load(at)));
        }
}

static int within_limit(const Vec total[VECTORS]) {
    Ints within = ~(Ints){0};
    for (int v = 0; v < VECTORS; v++)
        within &= total[v] < splat(LIMIT);
    return !any_of(~within);
}

/* Sums over the keys of `sight`. */
static void walk(Block *block, Rows keys, Rows values) {
    for (int64_t first = block->sight.begin; first < block->sight.end; first += TILE) {
        const int64_t end = smaller(first + TILE, block->sight.end);
        take_keys(block, keys, first, end);
        copy_rows(values, first, end - first, STEP, block->dim_v, 1, block->values);
        for (int group = 0; group < block->sight.groups; group++) {
            int64_t lo, hi;
            prefetch_part(keys, end, block->sight.end, group, block->sight.groups, block->dim);
            prefetch_part(values, end, block->sight.end, group, block->sight.groups, block->dim_v);
            if (!part_of(&block->sight, group, first, end, &lo, &hi))
                continue;
            if (block->bias.data && !take_bias(&block->bias, block->first + group * GROUP, block->num_rows, first + lo,
                                               hi - lo, block->bias_tile + lo * GROUP))
                continue;
            Vec total[VECTORS];
            score(block, group, lo, hi);
            if (unset(block, group, first + lo, first + hi))
                raise_max(block, group, first, lo, hi);
            weigh(block, group, first, lo, hi, total);
            if (!within_limit(total)) {
                score(block, group, lo, hi);
                raise_max(block, group, first, lo, hi);
                weigh(block, group, first, lo, hi, total);
            }
            for (int v = 0; v < VECTORS; v++) {
                float *row_sum = block->row_sum + group * GROUP + v * WIDTH;
                store(row_sum, load(row_sum) + total[v]);
            }
            if (block->call->drop_below)
                drop(block, group, first, lo, hi);
            accumulate(block->weights + lo * GROUP, block->values + lo * stride_of(block->dim_v), hi - lo, block->dim_v,
                       block->sums + group * GROUP * block->dim_v);
        }
    }
}

static void forward_block(const Call *call, Block *block, int64_t b, int64_t h, int64_t first, Rows keys, Rows values) {
    hold_rows(rows_of(call, &call->query, b, h, call->num_rows), first, call->dim, block->held);
    memset(block->sums, 0, sizeof(float) * call->dim_v * LANES);
    block->first = first;
    block->bias = bias_of(call, b, h);
    hash_rows(call, b, h, first, LANES, block->hash);
    block->key_hashes = key_hashes_of(call, b);
    for (int i = 0; i < LANES; i++) {
        block->row_max[i] = -INFINITY;
        block->row_sum[i] = 0;
    }
    const Piece *pieces = pieces_of(call->row_pieces, call->row_pieces_most, call->row_pieces_batch, b, first);
    for (int64_t i = 0; i < (pieces ? call->row_pieces_most : 1); i++) {
        set_keys_seen(&block->sight, call, b, first, pieces ? pieces + i : NULL);
        walk(block, keys, values);
    }
    const int64_t at = (b * call->heads + h) * call->num_rows + first;
    for (int i = 0; i < LANES && first + i < call->num_rows; i++) {
        const float row_sum = block->row_sum[i];
        const double row_max = block->row_max[i] * (block->altered ? 1 : LN_2), lse = row_max + log2(row_sum) * LN_2;
        store_row(call, &call->out, b, h, first + i, block->sums + i * call->dim_v,
                  row_sum == 0 ? 0 : scale_of_kept(call) / row_sum, call->dim_v);
        call->lse[at + i] = row_sum == 0 ? -INFINITY : (float)lse;
        if (call->lse_rest)
            call->lse_rest[at + i] = row_sum == 0 ? 0 : (float)((row_max - call->lse[at + i]) / LN_2 + log2(row_sum));
    }
}

/* Bytes of `Call`, which call.py compares with its own. */
int64_t hf_call_size(void) { return sizeof(Call); }

/* out and lse of a call. */
void hap_forward(const Call *call) {
    const int64_t group_size = call->heads / call->kv_heads, blocks = (call->num_rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(call->threads)
    {
        Block block;
        block.dim = call->dim;
        block.dim_v = call->dim_v;
        block.chunk = chunk_of(call);
        block.call = call;
        block.num_rows = call->num_rows;
        block.altered = is_altered(call);
        block.shape = shape_of(call);
        block.scale = block.altered ? 1 : block.shape.scale;
        block.to_base_2 = to_base_2(call);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < call->batch * call->heads * blocks; item++) {
            /* A causal mask gives later rows more to do: they go first. Heads that share keys follow each other. */
            const int64_t member = item % group_size, block_index = blocks - 1 - item / group_size % blocks;
            const int64_t pair_head = item / group_size / blocks, b = pair_head / call->kv_heads;
            const int64_t kv_head = pair_head % call->kv_heads;
            forward_block(call, &block, b, kv_head * group_size + member, block_index * LANES,
                          rows_of(call, &call->key, b, kv_head, call->num_keys),
                          rows_of(call, &call->value, b, kv_head, call->num_keys));
        }
    }
}
