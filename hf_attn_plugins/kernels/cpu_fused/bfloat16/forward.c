/* softmax(scale * query key^T) value and its log-sum-exp: FlashAttention's loop (arXiv 2205.14135, algorithm 1).
 *
 * A thread holds LANES queries and loops over the keys. `row_max` is subtracted from a query's scores before exp2. It
 * need not be the maximum, only within a factor LIMIT of it: bfloat16 has the exponents of float32, so large weights
 * lose no digit. It starts as the maximum over some keys that a query sees. Only when the weights of a tile pass LIMIT
 * is it raised, and are the sums so far rescaled. */
#include "scores.h"

#define LIMIT 0x1p60f
#define FIRST_KEYS round_up(24, STEP) /* keys that the first guess of the maximum looks at */

typedef struct {
    _Alignas(64) int32_t held[MAX_DIM / 2 * LANES];
    _Alignas(64) int32_t weights[TILE / 2 * LANES];
    _Alignas(64) float sums[MAX_DIM * LANES];
    __m512 row_max[VECTORS], row_sum[VECTORS]; /* row_max: see to_base_2 */
    _Alignas(64) int32_t pairs[TILE / 2 * MAX_DIM]; /* values of a tile, where no pairs of all were made */
    Rows keys, values;
    Sight sight;
    int64_t dim, dim_v;
    float scale;    /* of products: with log2(e), in base 2; 1 for altered scores */
    float to_base_2; /* of `row_max`: see altered.h */
    int altered; /* by softcap or a bias: see scores.h */
    Shape shape;
    Bias bias;
    _Alignas(64) float bias_tile[TILE * LANES];
    __mmask16 some[VECTORS]; /* lanes for which the bias of this tile leaves a key */
    const Call *call;
    uint32_t hash[LANES]; /* of the held queries, for dropout */
    const uint32_t *key_hashes;
} Block;

/* Turn products of keys at `place` of the tile on, for `vectors` vectors from v0 on, into scores. */
INLINE void alter(const Block *block, int64_t place, int v0, const int vectors, __m512 scores[STEP][VECTORS]) {
    for (int v = 0; v < vectors; v++)
        for (int j = 0; j < STEP; j++) {
            scores[j][v] = capped(&block->shape, scores[j][v], NULL);
            if (block->bias.data) {
                const float *bias = block->bias_tile + (place + j) * LANES + 16 * (v0 + v);
                scores[j][v] = with_bias(scores[j][v], _mm512_load_ps(bias));
            }
        }
}

/* Weights of keys key .. key + STEP, at `place` of the tile, for `vectors` vectors from v0 on, whose sums are added to
 * `row_sum`. */
INLINE void weigh_step(Block *block, const int altered, int64_t key, int64_t place, const __m512 shift[VECTORS], int v0,
                       const int vectors, __m512 row_sum[VECTORS]) {
    int32_t *weights = block->weights + place / 2 * LANES;
    const __m512 scale = _mm512_set1_ps(block->scale), to_base_2 = _mm512_set1_ps(block->to_base_2);
    __m512 scores[STEP][VECTORS];
    multiply_some(block->held + 16 * v0, block->keys, key, block->dim, vectors, scores);
    if (altered)
        alter(block, place, v0, vectors, scores);
    const int inner = sees_all(&block->sight, key);
    for (int v = 0; v < vectors; v++)
        for (int j = 0; j < STEP; j += 2) {
            __m512 pair[2];
            for (int i = 0; i < 2; i++) {
                if (altered)
                    pair[i] = exp2_of(_mm512_mul_ps(_mm512_sub_ps(scores[j + i][v], shift[v0 + v]), to_base_2));
                else
                    pair[i] = exp2_of(_mm512_fmsub_ps(scores[j + i][v], scale, shift[v0 + v]));
                if (!inner)
                    pair[i] = _mm512_maskz_mov_ps(seen(&block->sight, v0 + v, key + j + i), pair[i]);
                row_sum[v0 + v] = _mm512_add_ps(row_sum[v0 + v], pair[i]);
                if (altered && block->call->drop_below) {
                    const uint32_t *held = block->hash + 16 * (v0 + v);
                    pair[i] = _mm512_maskz_mov_ps(kept(block->call, held, block->key_hashes[key + j + i]), pair[i]);
                }
            }
            _mm512_store_si512(weights + j / 2 * LANES + 16 * (v0 + v), paired(pair[0], pair[1]));
        }
}

/* Weights of keys first .. end, their sums a lane in `row_sum`. Vectors that see none of a step's keys get none. */
INLINE void weigh_tile(Block *block, const int altered, int64_t first, int64_t end, __m512 row_sum[VECTORS]) {
    __m512 shift[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const __mmask16 known = _mm512_cmpneq_ps_mask(block->row_max[v], _mm512_set1_ps(-INFINITY));
        shift[v] = _mm512_maskz_mov_ps(known, block->row_max[v]);
        row_sum[v] = _mm512_setzero_ps();
    }
    const Sight *sight = &block->sight;
    for (int64_t key = first; key < end; key += STEP) {
        int v0 = 0, v1 = VECTORS;
        while (v0 < v1 && (key >= sight->to[v0] || key + STEP <= sight->from[v0]))
            v0++;
        while (v0 < v1 && (key >= sight->to[v1 - 1] || key + STEP <= sight->from[v1 - 1]))
            v1--;
        switch (v1 - v0) {
        case 1: weigh_step(block, altered, key, key - first, shift, v0, 1, row_sum); break;
        case 2: weigh_step(block, altered, key, key - first, shift, v0, 2, row_sum); break;
        case 3: weigh_step(block, altered, key, key - first, shift, v0, 3, row_sum); break;
        case VECTORS: weigh_step(block, altered, key, key - first, shift, 0, VECTORS, row_sum); break;
        }
    }
}

static void weigh(Block *block, int64_t first, int64_t end, __m512 row_sum[VECTORS]) {
    if (block->altered)
        weigh_tile(block, 1, first, end, row_sum);
    else
        weigh_tile(block, 0, first, end, row_sum);
}

/* Raise `row_max` to the largest score of keys first .. end and bring what is summed so far along. */
static void raise_max(Block *block, int64_t first, int64_t end) {
    const __m512 scale = _mm512_set1_ps(block->scale), nothing = _mm512_set1_ps(-INFINITY);
    __m512 row_max[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        row_max[v] = block->row_max[v];
    for (int64_t key = first; key < end; key += STEP) {
        __m512 scores[STEP][VECTORS];
        multiply(block->held, block->keys, key, block->dim, scores);
        if (block->altered)
            alter(block, key - first, 0, VECTORS, scores);
        for (int v = 0; v < VECTORS; v++)
            for (int j = 0; j < STEP; j++)
                row_max[v] = _mm512_mask_max_ps(row_max[v], seen(&block->sight, v, key + j), row_max[v],
                                                _mm512_mul_ps(scores[j][v], scale));
    }
    for (int v = 0; v < VECTORS; v++) {
        const __mmask16 known = _mm512_cmpneq_ps_mask(block->row_max[v], nothing);
        const __m512 to_base_2 = _mm512_set1_ps(block->to_base_2);
        const __m512 change = _mm512_mul_ps(_mm512_sub_ps(block->row_max[v], row_max[v]), to_base_2);
        const __m512 rescale = _mm512_maskz_mov_ps(known, exp2_of(change));
        block->row_max[v] = row_max[v];
        block->row_sum[v] = _mm512_mul_ps(block->row_sum[v], rescale);
        if (!known)
            continue;
        for (int64_t column = 0; column < block->dim_v; column++) {
            float *sum = block->sums + column * LANES + 16 * v;
            _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), rescale));
        }
    }
}

/* Whether some lane that may see keys has no `row_max` yet. */
static int unset(const Block *block) {
    int lanes = 0;
    for (int v = 0; v < VECTORS; v++)
        lanes |= (block->sight.prefix ? 0xffff : _mm512_cmple_epi32_mask(block->sight.low[v], block->sight.high[v])) &
                 block->some[v] & _mm512_cmpeq_ps_mask(block->row_max[v], _mm512_set1_ps(-INFINITY));
    return lanes;
}

static int within_limit(const __m512 row_sum[VECTORS]) {
    int lanes = 0xffff;
    for (int v = 0; v < VECTORS; v++)
        lanes &= _mm512_cmp_ps_mask(row_sum[v], _mm512_set1_ps(LIMIT), _CMP_LT_OQ);
    return lanes == 0xffff;
}

/* Values from `key` on as pairs: of those that were made before, or made now. */
static const int32_t *pairs_at(Block *block, int64_t key, const int32_t *made) {
    if (made)
        return made + key / 2 * block->dim_v;
    pair_rows(block->values, key, block->dim_v, block->pairs);
    return block->pairs;
}

/* Sums over the keys of `sight`. `made`: all values as pairs, or NULL. */
static void walk(const Call *call, Block *block, int64_t first, const int32_t *made) {
    const Sight *sight = &block->sight;
    /* Keys that every lane sees tell all maxima at once; under a window the first keys do not. */
    if (!block->bias.data && unset(block) && sight->inner_end - sight->inner_begin >= FIRST_KEYS)
        raise_max(block, sight->inner_begin, sight->inner_begin + FIRST_KEYS);
    for (int64_t key = tile_begin(sight->begin); key < sight->end; key += TILE) {
        const int64_t tile_end = smaller(key + TILE, sight->end);
        if (block->bias.data &&
            !take_bias(call, &block->bias, first, key, tile_end, block->bias_tile, block->some))
            continue;
        if (unset(block))
            raise_max(block, key, smaller(key + FIRST_KEYS, tile_end));
        if (unset(block))
            raise_max(block, key, tile_end);
        __m512 row_sum[VECTORS];
        weigh(block, key, tile_end, row_sum);
        if (!within_limit(row_sum)) {
            raise_max(block, key, tile_end);
            weigh(block, key, tile_end, row_sum);
        }
        for (int v = 0; v < VECTORS; v++)
            block->row_sum[v] = _mm512_add_ps(block->row_sum[v], row_sum[v]);
        const int32_t *pairs = pairs_at(block, key, made);
        int64_t from[VECTORS], to[VECTORS];
        int whole = 1;
        for (int v = 0; v < VECTORS; v++) {
            from[v] = (larger(sight->from[v], key) - key) / 2;
            to[v] = (smaller(sight->to[v], tile_end) - key + 1) / 2;
            whole &= sight->from[v] <= key && sight->to[v] >= tile_end;
        }
        if (whole)
            accumulate(block->weights, pairs, round_up(tile_end - key, STEP) / 2, block->dim_v, block->sums);
        else
            accumulate_apart(block->weights, pairs, from, to, block->dim_v, block->sums);
    }
}

static void forward_block(const Call *call, Block *block, int64_t b, int64_t h, int64_t first, const int32_t *made) {
    const Rows queries = rows_of(&call->query, b, h, call->num_rows);
    hold_rows(queries, first, call->dim, block->held);
    memset(block->sums, 0, sizeof(float) * call->dim_v * LANES);
    block->bias = bias_of(call, b, h);
    hash_rows(call, b, h, first, LANES, block->hash);
    block->key_hashes = key_hashes_of(call, b);
    for (int v = 0; v < VECTORS; v++) {
        block->row_max[v] = _mm512_set1_ps(-INFINITY);
        block->row_sum[v] = _mm512_setzero_ps();
        block->some[v] = 0xffff;
    }
    const Piece *pieces = pieces_of(call->row_pieces, call->row_pieces_most, call->row_pieces_batch, b, first);
    for (int64_t i = 0; i < (pieces ? call->row_pieces_most : 1); i++) {
        block->sight = keys_seen(call, b, first, pieces ? pieces + i : NULL);
        walk(call, block, first, made);
    }
    float row_sum[LANES], row_max[LANES], factor[LANES];
    for (int v = 0; v < VECTORS; v++) {
        _mm512_storeu_ps(row_sum + 16 * v, block->row_sum[v]);
        _mm512_storeu_ps(row_max + 16 * v, block->row_max[v]);
    }
    for (int i = 0; i < LANES; i++)
        factor[i] = row_sum[i] == 0 ? 0 : scale_of_kept(call) / row_sum[i];
    store_rows(block->sums, factor, call->out, b, h, first, call->num_rows, call->dim_v);
    float *lse = call->lse + (b * call->heads + h) * call->num_rows;
    const float unit = block->altered ? 1 : LN_2;
    for (int i = 0; i < LANES && first + i < call->num_rows; i++)
        lse[first + i] = row_sum[i] == 0 ? -INFINITY : row_max[i] * unit + log2f(row_sum[i]) * LN_2;
}

/* Bytes of `Call`, which call.py compares with its own. */
int64_t hf_call_size(void) { return sizeof(Call); }

/* Make pairs of one tile of values. */
static void pair_tile(const Call *call, int64_t b, int64_t kv_head, int64_t tile, int32_t *made) {
    const Rows values = rows_of(&call->value, b, kv_head, call->num_keys);
    pair_rows(values, tile * TILE, call->dim_v, made + tile * TILE / 2 * call->dim_v);
}

/* out (bfloat16) and lse of a call. `pairs`: room for (batch, key heads, padded keys, dim_v) numbers of 16 bit, where
 * all values become pairs once, and a number of 32 bits per key head; NULL, and every block of queries makes its own
 * pairs, tile by tile. */
void hap_forward(const Call *call) {
    const int64_t group_size = call->heads / call->kv_heads, head_pairs = padded_rows(call->num_keys) / 2 * call->dim_v;
    const int64_t blocks = (call->num_rows + LANES - 1) / LANES, key_heads = call->batch * call->kv_heads;
    const int64_t tiles = call->pairs ? padded_rows(call->num_keys) / TILE : 0;
    int32_t *done = call->pairs + key_heads * head_pairs;
    if (call->pairs)
        memset(done, 0, key_heads * sizeof *done);
#pragma omp parallel num_threads(call->threads)
    {
        Block block = {.dim = call->dim, .dim_v = call->dim_v, .call = call};
        block.altered = is_altered(call);
        block.shape = shape_of(call);
        block.scale = block.altered ? 1 : block.shape.scale;
        block.to_base_2 = to_base_2(call);
        begin_products();
        /* Items are begun in order: all tiles of values first. A block of queries waits for the tiles of its head. */
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = -key_heads * tiles; item < call->batch * call->heads * blocks; item++) {
            if (item < 0) {
                const int64_t at = item + key_heads * tiles, head = at / tiles;
                pair_tile(call, head / call->kv_heads, head % call->kv_heads, at % tiles, call->pairs + head * head_pairs);
                count_done(done + head);
                continue;
            }
            /* A causal mask gives later rows more to do: they go first. Heads that share keys follow each other. */
            const int64_t member = item % group_size, block_index = blocks - 1 - item / group_size % blocks;
            const int64_t pair_head = item / group_size / blocks, b = pair_head / call->kv_heads;
            const int64_t kv_head = pair_head % call->kv_heads;
            while (call->pairs && __atomic_load_n(done + pair_head, __ATOMIC_ACQUIRE) < tiles)
                _mm_pause();
            block.keys = rows_of(&call->key, b, kv_head, call->num_keys);
            block.values = rows_of(&call->value, b, kv_head, call->num_keys);
            forward_block(call, &block, b, kv_head * group_size + member, block_index * LANES,
                          call->pairs ? call->pairs + pair_head * head_pairs : NULL);
        }
        end_products();
    }
}
