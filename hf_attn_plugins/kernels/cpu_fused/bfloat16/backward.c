/* Gradients from the saved log-sum-exp (arXiv 2307.08691, section 3.1.2), in two passes that share no sum.
 *
 * With P = exp(scale * query key^T - lse), dP = grad_out value^T and dS = P (dP - delta): grad_query = scale dS key is
 * summed by threads that hold queries and walk over keys, grad_value = P^T grad_out and grad_key = scale dS^T query by
 * threads that hold keys and walk over the queries of all heads that share them. P and dP are computed in both passes:
 * two products more than one pass would take, for sums that no thread waits for and that come out the same every time.
 */
#include "scores.h"

#define NOWHERE 1e30f /* stands for the lse of a row without keys: its weights are 0 */

typedef struct {
    _Alignas(64) int32_t held[MAX_DIM / 2 * LANES], held_v[MAX_DIM / 2 * LANES];
    _Alignas(64) int32_t weights[TILE / 2 * LANES], grad_scores[TILE / 2 * LANES];
    _Alignas(64) int32_t slopes[TILE / 2 * LANES]; /* of altered calls: P times the slope of tanh, nothing dropped */
    _Alignas(64) float sums[MAX_DIM * LANES], sums_v[MAX_DIM * LANES];
    _Alignas(64) float lse[LANES], delta[LANES]; /* of held queries; lse: see shift_of */
    const float *row_lse, *row_delta;            /* of walked queries */
    Rows walked, walked_v;                       /* key and value, or query and grad_out */
    Sight sight;
    int64_t dim, dim_v;
    float scale;
    int altered; /* by softcap or a bias: see scores.h */
    Shape shape;
    Bias bias;
    _Alignas(64) float bias_tile[TILE * LANES]; /* for held queries */
    int64_t first, num_keys;                    /* for held keys: the first of them, and how many there are */
    float *grad_bias;                           /* the rows of a head, or NULL */
    const Call *call;
    int64_t b, h;
    uint32_t hash[LANES]; /* of the held rows, for dropout */
} Block;

/* The lse as it is subtracted from scores: for plain calls in base 2, as the scores are. */
static inline float shift_of(const Block *block, float lse) {
    return lse == -INFINITY ? NOWHERE : block->altered ? lse : lse / LN_2;
}

/* Weights of a walked row for vector v of the held ones, without the mask, and the same times the slope of tanh. */
INLINE __m512 altered_weight(const Block *block, int keys_held, int64_t row, int64_t place, int v, __m512 product,
                             __m512 shift, __m512 *sloped) {
    __m512 slope, score = capped(&block->shape, product, &slope);
    if (block->bias.data && keys_held) {
        const int64_t known_row = smaller(row, block->walked.count - 1);
        score = with_bias(score, load_bias(&block->bias, known_row, block->first + 16 * v, block->num_keys));
    } else if (block->bias.data) {
        score = with_bias(score, _mm512_load_ps(block->bias_tile + place * LANES + 16 * v));
    }
    /* No weight is above 1. The lse of a row whose keys all have a large negative bias is not exact enough for that. */
    const __m512 power = _mm512_mul_ps(_mm512_sub_ps(score, shift), _mm512_set1_ps(1 / LN_2));
    const __m512 weight = exp2_of(_mm512_min_ps(_mm512_setzero_ps(), power));
    *sloped = _mm512_mul_ps(weight, slope);
    return weight;
}

/* The lanes of vector v whose weights dropout keeps. */
INLINE __mmask16 kept_of(const Block *block, int keys_held, int64_t row, int v) {
    const Call *call = block->call;
    const uint32_t *walked = keys_held ? row_hashes_of(call, block->b, block->h) : key_hashes_of(call, block->b);
    return kept(call, block->hash + 16 * v, walked[row]);
}

/* weights = P of walked rows first .. end, in pairs, without those that dropout drops. */
INLINE void weigh(Block *block, int keys_held, const int altered, int64_t first, int64_t end) {
    const __m512 scale = _mm512_set1_ps(block->scale / LN_2);
    for (int64_t row = first; row < end; row += STEP) {
        __m512 scores[STEP][VECTORS];
        multiply(block->held, block->walked, row, block->dim, scores);
        const int inner = sees_all(&block->sight, row);
        int32_t *weights = block->weights + (row - first) / 2 * LANES;
        int32_t *slopes = block->slopes + (row - first) / 2 * LANES;
        for (int j = 0; j < STEP; j += 2) {
            __m512 lse[2];
            for (int i = 0; i < 2 && keys_held; i++)
                lse[i] = _mm512_set1_ps(shift_of(block, block->row_lse[smaller(row + j + i, block->walked.count - 1)]));
            for (int v = 0; v < VECTORS; v++) {
                const int64_t place = j / 2 * LANES + 16 * v;
                __m512 pair[2], sloped[2];
                for (int i = 0; i < 2; i++) {
                    const __m512 shift = keys_held ? lse[i] : _mm512_load_ps(block->lse + 16 * v);
                    if (altered)
                        pair[i] = altered_weight(block, keys_held, row + j + i, row + j + i - first, v,
                                                 scores[j + i][v], shift, &sloped[i]);
                    else
                        pair[i] = exp2_of(_mm512_fmsub_ps(scores[j + i][v], scale, shift));
                    if (!inner) {
                        const __mmask16 mask = seen(&block->sight, v, row + j + i);
                        pair[i] = _mm512_maskz_mov_ps(mask, pair[i]);
                        if (altered)
                            sloped[i] = _mm512_maskz_mov_ps(mask, sloped[i]);
                    }
                    if (altered && block->call->drop_below)
                        pair[i] = _mm512_maskz_mov_ps(kept_of(block, keys_held, row + j + i, v), pair[i]);
                }
                _mm512_store_si512(weights + place, paired(pair[0], pair[1]));
                if (altered)
                    _mm512_store_si512(slopes + place, paired(sloped[0], sloped[1]));
            }
        }
    }
}

/* grad_scores = dS of walked rows first .. end, in pairs, from their weights. */
INLINE void grade(Block *block, int keys_held, const int altered, int64_t first, int64_t end) {
    const int32_t *weights = altered ? block->slopes : block->weights;
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    for (int64_t row = first; row < end; row += STEP) {
        __m512 grads[STEP][VECTORS];
        multiply(block->held_v, block->walked_v, row, block->dim_v, grads);
        const int64_t at = (row - first) / 2 * LANES;
        for (int j = 0; j < STEP; j += 2) {
            __m512 row_delta[2];
            for (int i = 0; i < 2 && keys_held; i++)
                row_delta[i] = _mm512_set1_ps(block->row_delta[smaller(row + j + i, block->walked.count - 1)]);
            for (int v = 0; v < VECTORS; v++) {
                const int64_t place = at + j / 2 * LANES + 16 * v;
                const __m512i both = _mm512_load_si512(weights + place);
                const __m512 weight[2] = {(__m512)_mm512_slli_epi32(both, 16), (__m512)_mm512_and_si512(both, upper)};
                __m512 pair[2];
                for (int i = 0; i < 2; i++) {
                    const __m512 delta = keys_held ? row_delta[i] : _mm512_load_ps(block->delta + 16 * v);
                    __m512 grad = grads[j + i][v];
                    if (altered && block->call->drop_below)
                        grad = _mm512_maskz_mul_ps(kept_of(block, keys_held, row + j + i, v), grad,
                                                   _mm512_set1_ps(block->call->keep_scale));
                    /* Where nothing is seen, 0 * dP may be NaN. */
                    const __mmask16 weighed = _mm512_cmpneq_ps_mask(weight[i], _mm512_setzero_ps());
                    pair[i] = _mm512_maskz_mul_ps(weighed, weight[i], _mm512_sub_ps(grad, delta));
                    if (keys_held && altered && block->grad_bias && row + j + i < block->walked.count)
                        add_to_bias(block->grad_bias, row + j + i, block->first + 16 * v, block->num_keys, pair[i]);
                }
                _mm512_store_si512(block->grad_scores + place, paired(pair[0], pair[1]));
            }
        }
    }
}

INLINE void weigh_and_grade(Block *block, int keys_held, int64_t first, int64_t end) {
    if (block->altered) {
        weigh(block, keys_held, 1, first, end);
        grade(block, keys_held, 1, first, end);
    } else {
        weigh(block, keys_held, 0, first, end);
        grade(block, keys_held, 0, first, end);
    }
}

static void store(const float *sums, float scale, Tensor to, int64_t b, int64_t h, int64_t first, int64_t count,
                  int64_t dim) {
    float factor[LANES];
    for (int i = 0; i < LANES; i++)
        factor[i] = scale;
    store_rows(sums, factor, to, b, h, first, count, dim);
}

static void query_block(const Call *call, Block *block, int64_t b, int64_t h, int64_t first, const int32_t *keys) {
    const int64_t at = (b * call->heads + h) * call->num_rows;
    __mmask16 some[VECTORS];
    block->b = b;
    block->bias = bias_of(call, b, h);
    hash_rows(call, b, h, first, LANES, block->hash);
    hold_rows(rows_of(&call->query, b, h, call->num_rows), first, call->dim, block->held);
    hold_rows(rows_of(&call->grad_out, b, h, call->num_rows), first, call->dim_v, block->held_v);
    memset(block->sums, 0, sizeof(float) * call->dim * LANES);
    for (int i = 0; i < LANES; i++) {
        const int64_t row = at + smaller(first + i, call->num_rows - 1);
        block->lse[i] = shift_of(block, call->lse[row]);
        block->delta[i] = call->delta[row];
    }
    const Piece *pieces = pieces_of(call->row_pieces, call->row_pieces_most, call->row_pieces_batch, b, first);
    for (int64_t i = 0; i < (pieces ? call->row_pieces_most : 1); i++) {
        block->sight = keys_seen(call, b, first, pieces ? pieces + i : NULL);
        const int64_t end = block->sight.end;
        for (int64_t key = tile_begin(block->sight.begin); key < end; key += TILE) {
            const int64_t tile_end = smaller(key + TILE, end);
            if (block->bias.data && !take_bias(call, &block->bias, first, key, tile_end, block->bias_tile, some))
                continue;
            weigh_and_grade(block, 0, key, tile_end);
            accumulate(block->grad_scores, keys + key / 2 * call->dim, round_up(tile_end - key, STEP) / 2, call->dim,
                       block->sums);
        }
    }
    store(block->sums, call->scale, call->grad_query, b, h, first, call->num_rows, call->dim);
}

/* grad_key and grad_value summed over the queries of `sight`, which are at `queries` and `grads` in pairs. */
static void walk_queries(Block *block, const int32_t *queries, const int32_t *grads) {
    const int64_t end = block->sight.end;
    for (int64_t row = tile_begin(block->sight.begin); row < end; row += TILE) {
        const int64_t tile_end = smaller(row + TILE, end), count = round_up(tile_end - row, STEP) / 2;
        weigh_and_grade(block, 1, row, tile_end);
        accumulate(block->weights, grads + row / 2 * block->dim_v, count, block->dim_v, block->sums_v);
        accumulate(block->grad_scores, queries + row / 2 * block->dim, count, block->dim, block->sums);
    }
}

static void key_block(const Call *call, Block *block, int64_t b, int64_t kv_head, int64_t first, const int32_t *queries,
                      const int32_t *grads) {
    const int64_t group_size = call->heads / call->kv_heads, padded = padded_rows(call->num_rows);
    hold_rows(rows_of(&call->key, b, kv_head, call->num_keys), first, call->dim, block->held);
    hold_rows(rows_of(&call->value, b, kv_head, call->num_keys), first, call->dim_v, block->held_v);
    memset(block->sums, 0, sizeof(float) * call->dim * LANES);
    memset(block->sums_v, 0, sizeof(float) * call->dim_v * LANES);
    block->first = first;
    hash_keys(call, b, first, LANES, block->hash);
    const Piece *pieces = pieces_of(call->key_pieces, call->key_pieces_most, call->key_pieces_batch, b, first);
    for (int64_t h = kv_head * group_size; h < (kv_head + 1) * group_size; h++) {
        const int64_t head = b * call->heads + h;
        const int32_t *head_queries = queries + head * padded / 2 * call->dim;
        const int32_t *head_grads = grads + head * padded / 2 * call->dim_v;
        block->walked = rows_of(&call->query, b, h, call->num_rows);
        block->walked_v = rows_of(&call->grad_out, b, h, call->num_rows);
        block->row_lse = call->lse + head * call->num_rows;
        block->row_delta = call->delta + head * call->num_rows;
        block->bias = bias_of(call, b, h);
        block->grad_bias = grad_bias_of(call, b, h);
        block->b = b;
        block->h = h;
        for (int64_t i = 0; i < (pieces ? call->key_pieces_most : 1); i++) {
            block->sight = rows_seeing(call, b, first, pieces ? pieces + i : NULL);
            walk_queries(block, head_queries, head_grads);
        }
    }
    store(block->sums, call->scale, call->grad_key, b, kv_head, first, call->num_keys, call->dim);
    store(block->sums_v, scale_of_kept(call), call->grad_value, b, kv_head, first, call->num_keys, call->dim_v);
}

/* delta = sum(grad_out * out) - grad_lse, by all threads of a team. */
static void fill_delta(const Call *call) {
#pragma omp for
    for (int64_t index = 0; index < call->batch * call->heads * call->num_rows; index++) {
        const int64_t head = index / call->num_rows, row = index % call->num_rows;
        const Rows out = rows_of(&call->out, head / call->heads, head % call->heads, call->num_rows);
        const Rows grad = rows_of(&call->grad_out, head / call->heads, head % call->heads, call->num_rows);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t column = 0; column < call->dim_v; column += 16) {
            const void *a = out.data + row * out.stride + column, *b = grad.data + row * grad.stride + column;
            sum = _mm512_fmadd_ps(_mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256(a)),
                                  _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256(b)), sum);
        }
        call->delta[index] = _mm512_reduce_add_ps(sum) - (call->grad_lse ? call->grad_lse[index] : 0);
    }
}

/* grad_query, grad_key and grad_value (bfloat16) of a call. `pairs`: the larger of padded keys (batch, key heads, dim)
 * and of padded rows (batch, heads, dim + dim_v) numbers of 16 bit. */
void hap_backward(const Call *call) {
    const int64_t group_size = call->heads / call->kv_heads;
    const int64_t head_pairs = padded_rows(call->num_keys) / 2 * call->dim;
    const int64_t row_blocks = (call->num_rows + LANES - 1) / LANES, key_blocks = (call->num_keys + LANES - 1) / LANES;
    const int64_t batches = call->batch / batch_at_once(call), heads = call->kv_heads / heads_at_once(call);
    int32_t *grads = call->pairs + call->batch * call->heads * padded_rows(call->num_rows) / 2 * call->dim;
#pragma omp parallel num_threads(call->threads)
    {
        Block block = {.dim = call->dim, .dim_v = call->dim_v, .scale = call->scale, .num_keys = call->num_keys};
        block.altered = is_altered(call);
        block.shape = shape_of(call);
        block.call = call;
        begin_products();
        fill_delta(call);
        pair_heads(&call->key, call->batch, call->kv_heads, call->num_keys, call->dim, call->pairs);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < call->batch * call->heads * row_blocks; item++) {
            /* A causal mask gives later queries, and earlier keys, more to do: they go first. */
            const int64_t b = item / row_blocks / call->heads, h = item / row_blocks % call->heads;
            block.walked = rows_of(&call->key, b, h / group_size, call->num_keys);
            block.walked_v = rows_of(&call->value, b, h / group_size, call->num_keys);
            query_block(call, &block, b, h, (row_blocks - 1 - item % row_blocks) * LANES,
                        call->pairs + (b * call->kv_heads + h / group_size) * head_pairs);
        }
        pair_heads(&call->query, call->batch, call->heads, call->num_rows, call->dim, call->pairs);
        pair_heads(&call->grad_out, call->batch, call->heads, call->num_rows, call->dim_v, grads);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < batches * heads * key_blocks; item++) {
            const int64_t b0 = item / key_blocks / heads * batch_at_once(call);
            const int64_t h0 = item / key_blocks % heads * heads_at_once(call);
            for (int64_t b = b0; b < b0 + batch_at_once(call); b++)
                for (int64_t h = h0; h < h0 + heads_at_once(call); h++)
                    key_block(call, &block, b, h, item % key_blocks * LANES, call->pairs, grads);
        }
        end_products();
    }
}
