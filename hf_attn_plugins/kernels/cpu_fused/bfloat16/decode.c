/* Split-KV decoding, for few queries and many keys. A thread computes a chunk of SPLIT_KEYS keys at a time; then the
 * chunks' results are merged.
 *
 * Each key is read once for all queries of all heads that share it. Scores have the keys in the lanes: a few queries are
 * multiplied with keys as they lie in memory, and the products are summed across lanes; for more queries the keys are
 * held, one per lane. In the product of weights and values, the columns of value are in the lanes, and the sum is over
 * pairs of keys. */
#define MAX_ROWS 256 /* rows of all heads that share a key head */
#include "scores.h"
#include "few.h"

#define SPLIT_KEYS 512 /* keys of a chunk; not by the number of threads, so that sums are the same for any number */

/* The result of one chunk for every row: row_max (of scores, see to_base_2), row_sum = sum of exp(score - row_max),
 * and the values' sum with the same weights. */
typedef struct {
    float *row_max, *row_sum, *sums;
} Found;

typedef struct {
    Few few;
    _Alignas(64) bf16 queries[MAX_ROWS * MAX_DIM]; /* rows of all heads that share the keys, head by head */
    _Alignas(64) bf16 weights[MAX_ROWS][LANES];
    __m512 row_sum[MAX_ROWS]; /* lane by lane */
    int64_t b, kv_head;
} Block;

/* Query rows of one key head: the rows of all heads that share it. */
static int64_t shared_rows(const Call *call) { return call->heads / call->kv_heads * call->num_rows; }

static Found found_of(const Call *call, int64_t item) {
    const int64_t rows = shared_rows(call);
    float *start = call->partials + item * rows * (call->dim_v + 2);
    return (Found){start, start + rows, start + 2 * rows};
}

/* The score of row t and 16 keys from `key` on, from their product. */
INLINE __m512 altered_score(const Call *call, const Shape *shape, const Bias *bias, int64_t t, int64_t key,
                            __m512 product) {
    const __m512 score = capped(shape, product, NULL);
    return bias->data ? with_bias(score, load_bias(bias, t, key, call->num_keys)) : score;
}

/* Whether every query row sees every one of LANES keys from `first` on. */
static inline int all_seen(const Call *call, const Sight *sight, int64_t first, int64_t end) {
    return first + LANES <= end && sight->whole_begin <= 0 && sight->whole_end >= call->num_rows &&
           sight->inner_begin <= 0 && sight->inner_end >= call->num_rows;
}

/* Weights of LANES keys from `first` on for one row, from their products. Where the row's maximum grows, its sums so far
 * are rescaled. `all`: it sees all of these keys. */
INLINE void weigh_row(const Call *call, const int altered, const int all, Block *block, Found found, const Sight *sight,
                      int64_t row, int64_t first, int64_t end, const __m512 products[VECTORS]) {
    const __m512 scale = _mm512_set1_ps(call->scale / LN_2), nothing = _mm512_set1_ps(-INFINITY);
    const float power = altered ? to_base_2(call) : 1, before = found.row_max[row];
    const int64_t t = call->num_rows == 1 ? 0 : row % call->num_rows;
    __m512 most = nothing, weight[VECTORS], sum = block->row_sum[row];
    for (int v = 0; v < VECTORS; v++)
        weight[v] = _mm512_mul_ps(products[v], scale);
    if (altered) {
        const Shape shape = shape_of(call);
        const Bias bias = bias_of(call, block->b, block->kv_head * (call->heads / call->kv_heads) + row / call->num_rows);
        for (int v = 0; v < VECTORS; v++)
            weight[v] = altered_score(call, &shape, &bias, t, first + 16 * v, products[v]);
    }
    for (int v = 0; v < VECTORS; v++) {
        if (!all) {
            const int64_t lanes = smaller(larger(end - first - 16 * v, 0), 16);
            weight[v] = _mm512_mask_mov_ps(nothing, seen(sight, v, t) & ((1u << lanes) - 1), weight[v]);
        }
        most = _mm512_max_ps(most, weight[v]);
    }
    if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(before), _CMP_GT_OQ)) {
        const float row_max = fmaxf(before, _mm512_reduce_max_ps(most)), change = (before - row_max) * power;
        const __m512 rescale = exp2_of(_mm512_set1_ps(before == -INFINITY ? -1e30f : change));
        float *sums = found.sums + row * call->dim_v;
        for (int64_t column = 0; column < call->dim_v; column += 16)
            _mm512_storeu_ps(sums + column, _mm512_mul_ps(_mm512_loadu_ps(sums + column), rescale));
        sum = _mm512_mul_ps(sum, rescale);
        found.row_max[row] = row_max;
    }
    const __m512 shift = _mm512_set1_ps(found.row_max[row] == -INFINITY ? 0 : found.row_max[row]);
    for (int v = 0; v < VECTORS; v++) {
        const __mmask16 mask = _mm512_cmp_ps_mask(weight[v], nothing, _CMP_NEQ_UQ);
        __m512 shifted = _mm512_sub_ps(weight[v], shift);
        if (altered)
            shifted = _mm512_mul_ps(shifted, _mm512_set1_ps(power));
        weight[v] = _mm512_maskz_mov_ps(mask, exp2_of(shifted));
        sum = _mm512_add_ps(sum, weight[v]);
    }
    block->row_sum[row] = sum;
    for (int v = 0; v < VECTORS; v += 2)
        _mm512_store_si512(block->weights[row] + 16 * v, (__m512i)_mm512_cvtne2ps_pbh(weight[v + 1], weight[v]));
}

/* Weights of LANES keys from `first` on, for all rows. */
INLINE void weigh(const Call *call, const int altered, Block *block, Found found, const Sight *sight, Rows keys,
                  Rows values, int64_t first, int64_t end) {
    const Rows queries = {block->queries, call->dim, shared_rows(call)};
    const int all = all_seen(call, sight, first, end);
    __m512 products[AT_ONCE][VECTORS];
    for (int64_t row = 0; row < queries.count; row += AT_ONCE) {
        for (int v = row ? VECTORS : 0; v < VECTORS; v++) {
            prefetch(values, first + 16 * v, call->dim_v);
            prefetch(keys, first + LANES + 16 * v, call->dim);
        }
        multiply_keys(&block->few, queries, row, keys, first, call->dim, products);
        for (int j = 0; j < AT_ONCE && row + j < queries.count; j++)
            if (all)
                weigh_row(call, altered, 1, block, found, sight, row + j, first, end, products[j]);
            else
                weigh_row(call, altered, 0, block, found, sight, row + j, first, end, products[j]);
    }
}

INLINE void decode_chunk(const Call *call, const int altered, Block *block, int64_t b, int64_t kv_head, int64_t first,
                         Found found) {
    const int64_t group_size = call->heads / call->kv_heads, rows = shared_rows(call);
    const Rows keys = rows_of(&call->key, b, kv_head, call->num_keys);
    const Rows values = rows_of(&call->value, b, kv_head, call->num_keys);
    const int64_t end = smaller(first + SPLIT_KEYS, call->num_keys);
    block->b = b;
    block->kv_head = kv_head;
    memset(found.sums, 0, sizeof(float) * rows * call->dim_v);
    for (int64_t row = 0; row < rows; row++) {
        const Rows queries = rows_of(&call->query, b, kv_head * group_size + row / call->num_rows, call->num_rows);
        const bf16 *query = queries.data + row % call->num_rows * queries.stride;
        memcpy(block->queries + row * call->dim, query, sizeof(bf16) * call->dim);
        found.row_max[row] = -INFINITY;
        block->row_sum[row] = _mm512_setzero_ps();
    }
    take_queries(&block->few, (Rows){block->queries, call->dim, rows}, call->dim);
    for (int64_t key = first; key < end; key += LANES) {
        const Sight sight = rows_seeing(call, b, key, NULL);
        if (sight.begin >= sight.end)
            continue;
        weigh(call, altered, block, found, &sight, keys, values, key, end);
        add_values(&block->few, block->weights, rows, values, key, call->dim_v, found.sums);
    }
    for (int64_t row = 0; row < rows; row++)
        found.row_sum[row] = _mm512_reduce_add_ps(block->row_sum[row]);
}

/* Apart, so that plain calls keep their registers. */
static __attribute__((noinline)) void decode_altered_chunk(const Call *call, Block *block, int64_t b, int64_t kv_head,
                                                           int64_t first, Found found) {
    decode_chunk(call, 1, block, b, kv_head, first, found);
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
        for (int64_t column = 0; column < call->dim_v; column++)
            sums[column] += weight * found.sums[row * call->dim_v + column];
    }
    const __m512 factor = _mm512_set1_ps(row_sum == 0 ? 0 : 1 / row_sum);
    bf16 *out = call->out.data + b * call->out.batch + h * call->out.head + t * call->out.token;
    for (int64_t column = 0; column < call->dim_v; column += 16) {
        const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(sums + column), factor);
        _mm256_storeu_si256((void *)(out + column), (__m256i)_mm512_cvtneps_pbh(values));
    }
    call->lse[(b * call->heads + h) * call->num_rows + t] =
        row_sum == 0 ? -INFINITY : row_max * (is_altered(call) ? 1 : LN_2) + log2f(row_sum) * LN_2;
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
        begin_products();
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < key_heads * chunks; item++) {
            const int64_t b = item / chunks / call->kv_heads, kv_head = item / chunks % call->kv_heads;
            const int64_t first = item % chunks * SPLIT_KEYS;
            if (is_altered(call))
                decode_altered_chunk(call, &block, b, kv_head, first, found_of(call, item));
            else
                decode_chunk(call, 0, &block, b, kv_head, first, found_of(call, item));
            if (count_done(done + item / chunks) == chunks)
                merge_rows(call, b, kv_head, chunks);
        }
        end_products();
    }
}
