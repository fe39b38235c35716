/* Gradients from the saved log-sum-exp (arXiv 2307.08691, section 3.1.2), in two passes that share no sum.
 *
 * With P = exp(scale * query key^T - lse), dP = grad_out value^T and dS = P (dP - delta): grad_query = scale dS key is
 * summed by threads that hold queries and walk over keys, grad_value = P^T grad_out and grad_key = scale dS^T query by
 * threads that hold keys and walk over the queries of all heads that share them. P and dP are computed in both passes:
 * two products more than one pass would take, for sums that no thread waits for and that come out the same every time.
 */
#include "visibility.h"

#define NOWHERE 1e30f /* stands for the lse of a row without keys: its weights are 0 */

typedef struct {
    _Alignas(64) int32_t held[MAX_DIM / 2 * LANES], held_v[MAX_DIM / 2 * LANES];
    _Alignas(64) int32_t weights[TILE / 2 * LANES], grad_scores[TILE / 2 * LANES];
    _Alignas(64) float sums[MAX_DIM * LANES], sums_v[MAX_DIM * LANES];
    _Alignas(64) float lse[LANES], delta[LANES]; /* of held queries; in base 2, as everywhere here */
    const float *row_lse, *row_delta;            /* of walked queries */
    Rows walked, walked_v;                       /* key and value, or query and grad_out */
    Sight sight;
    int64_t dim, dim_v;
    float scale;
} Block;

static inline float base_2(float lse) { return lse == -INFINITY ? NOWHERE : lse / LN_2; }

/* weights = P of walked rows first .. end, in pairs. */
static inline __attribute__((always_inline)) void weigh(Block *block, int keys_held, int64_t first, int64_t end) {
    const __m512 scale = _mm512_set1_ps(block->scale / LN_2);
    for (int64_t row = first; row < end; row += STEP) {
        __m512 scores[STEP][VECTORS];
        multiply(block->held, block->walked, row, block->dim, scores);
        const int inner = sees_all(&block->sight, row);
        int32_t *weights = block->weights + (row - first) / 2 * LANES;
        for (int j = 0; j < STEP; j += 2) {
            __m512 lse[2];
            for (int i = 0; i < 2 && keys_held; i++)
                lse[i] = _mm512_set1_ps(base_2(block->row_lse[smaller(row + j + i, block->walked.count - 1)]));
            for (int v = 0; v < VECTORS; v++) {
                __m512 pair[2];
                for (int i = 0; i < 2; i++) {
                    const __m512 shift = keys_held ? lse[i] : _mm512_load_ps(block->lse + 16 * v);
                    pair[i] = exp2_of(_mm512_fmsub_ps(scores[j + i][v], scale, shift));
                    if (!inner)
                        pair[i] = _mm512_maskz_mov_ps(seen(&block->sight, v, row + j + i), pair[i]);
                }
                _mm512_store_si512(weights + j / 2 * LANES + 16 * v, paired(pair[0], pair[1]));
            }
        }
    }
}

/* grad_scores = dS of walked rows first .. end, in pairs, from their weights. */
static inline __attribute__((always_inline)) void grade(Block *block, int keys_held, int64_t first, int64_t end) {
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
                const __m512i both = _mm512_load_si512(block->weights + place);
                const __m512 weight[2] = {(__m512)_mm512_slli_epi32(both, 16), (__m512)_mm512_and_si512(both, upper)};
                __m512 pair[2];
                for (int i = 0; i < 2; i++) {
                    const __m512 delta = keys_held ? row_delta[i] : _mm512_load_ps(block->delta + 16 * v);
                    /* Where nothing is seen, 0 * dP may be NaN. */
                    const __mmask16 weighed = _mm512_cmpneq_ps_mask(weight[i], _mm512_setzero_ps());
                    pair[i] = _mm512_maskz_mul_ps(weighed, weight[i], _mm512_sub_ps(grads[j + i][v], delta));
                }
                _mm512_store_si512(block->grad_scores + place, paired(pair[0], pair[1]));
            }
        }
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
    hold_rows(rows_of(&call->query, b, h, call->num_rows), first, call->dim, block->held);
    hold_rows(rows_of(&call->grad_out, b, h, call->num_rows), first, call->dim_v, block->held_v);
    memset(block->sums, 0, sizeof(float) * call->dim * LANES);
    for (int i = 0; i < LANES; i++) {
        const int64_t row = at + smaller(first + i, call->num_rows - 1);
        block->lse[i] = base_2(call->lse[row]);
        block->delta[i] = call->delta[row];
    }
    const Piece *pieces = pieces_of(call->row_pieces, call->row_pieces_most, call->row_pieces_batch, b, first);
    for (int64_t i = 0; i < (pieces ? call->row_pieces_most : 1); i++) {
        block->sight = keys_seen(call, b, first, pieces ? pieces + i : NULL);
        const int64_t end = block->sight.end;
        for (int64_t key = block->sight.begin & ~1; key < end; key += TILE) {
            const int64_t tile_end = smaller(key + TILE, end);
            weigh(block, 0, key, tile_end);
            grade(block, 0, key, tile_end);
            accumulate(block->grad_scores, keys + key / 2 * call->dim, round_up(tile_end - key, STEP) / 2, call->dim,
                       block->sums);
        }
    }
    store(block->sums, call->scale, call->grad_query, b, h, first, call->num_rows, call->dim);
}

/* grad_key and grad_value summed over the queries of `sight`, which are at `queries` and `grads` in pairs. */
static void walk_queries(Block *block, const int32_t *queries, const int32_t *grads) {
    const int64_t end = block->sight.end;
    for (int64_t row = block->sight.begin & ~1; row < end; row += TILE) {
        const int64_t tile_end = smaller(row + TILE, end), count = round_up(tile_end - row, STEP) / 2;
        weigh(block, 1, row, tile_end);
        grade(block, 1, row, tile_end);
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
    const Piece *pieces = pieces_of(call->key_pieces, call->key_pieces_most, call->key_pieces_batch, b, first);
    for (int64_t h = kv_head * group_size; h < (kv_head + 1) * group_size; h++) {
        const int64_t head = b * call->heads + h;
        const int32_t *head_queries = queries + head * padded / 2 * call->dim;
        const int32_t *head_grads = grads + head * padded / 2 * call->dim_v;
        block->walked = rows_of(&call->query, b, h, call->num_rows);
        block->walked_v = rows_of(&call->grad_out, b, h, call->num_rows);
        block->row_lse = call->lse + head * call->num_rows;
        block->row_delta = call->delta + head * call->num_rows;
        for (int64_t i = 0; i < (pieces ? call->key_pieces_most : 1); i++) {
            block->sight = rows_seeing(call, b, first, pieces ? pieces + i : NULL);
            walk_queries(block, head_queries, head_grads);
        }
    }
    store(block->sums, call->scale, call->grad_key, b, kv_head, first, call->num_keys, call->dim);
    store(block->sums_v, 1, call->grad_value, b, kv_head, first, call->num_keys, call->dim_v);
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
    int32_t *grads = call->pairs + call->batch * call->heads * padded_rows(call->num_rows) / 2 * call->dim;
#pragma omp parallel num_threads(call->threads)
    {
        Block block = {.dim = call->dim, .dim_v = call->dim_v, .scale = call->scale};
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
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < call->batch * call->kv_heads * key_blocks; item++)
            key_block(call, &block, item / key_blocks / call->kv_heads, item / key_blocks % call->kv_heads,
                      item % key_blocks * LANES, call->pairs, grads);
    }
}
