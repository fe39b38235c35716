/* Split-KV decoding, for few queries and many keys. A thread computes a chunk of SPLIT_KEYS keys at a time; then the
 * chunks' results are merged.
 *
 * The keys are the held rows here, one per lane. So each key is read once for all queries of all heads that share it.
 * In the product of weights and values, the columns of value are in the lanes, and the sum is over pairs of keys. */
#define FEW_ROWS
#include "scores.h"

#define SPLIT_KEYS 512 /* keys of a chunk; not by the number of threads, so that sums are the same for any number */
#define MAX_ROWS 256   /* rows of all heads that share a key head */

/* The result of one chunk for every row: row_max (of scores, see to_base_2), row_sum = sum of exp(score - row_max),
 * and the values' sum with the same weights. */
typedef struct {
    float *row_max, *row_sum, *sums;
} Found;

typedef struct {
    _Alignas(64) int32_t held[MAX_DIM / 2 * LANES]; /* the keys, see `hold_rows` */
    _Alignas(64) bf16 weights[MAX_ROWS][LANES];
    _Alignas(64) bf16 queries[MAX_ROWS * MAX_DIM]; /* rows of all heads that share the keys, head by head */
    int64_t b, kv_head;
} Block;

/* Query rows of one key head: the rows of all heads that share it. */
static int64_t shared_rows(const Call *call) { return call->heads / call->kv_heads * call->num_rows; }

static Found found_of(const Call *call, int64_t item) {
    const int64_t rows = shared_rows(call);
    float *start = call->partials + item * rows * (call->dim_v + 2);
    return (Found){start, start + rows, start + 2 * rows};
}

/* Prefetch LANES rows from `first` on. They arrive while the products before their use are computed. Inlined,
 * because GCC takes a function that only prefetches for one without effect, and drops calls of it. */
INLINE void prefetch(Rows rows, int64_t first, int64_t dim) {
    for (int64_t row = first; row < smaller(first + LANES, rows.count); row++)
        for (int64_t column = 0; column < dim; column += 32)
            _mm_prefetch((const void *)(rows.data + row * rows.stride + column), _MM_HINT_T0);
}

/* The score of row t and 16 keys from `key` on, from their product. */
INLINE __m512 altered_score(const Call *call, const Shape *shape, const Bias *bias, int64_t t, int64_t key,
                            __m512 product) {
    const __m512 score = capped(shape, product, NULL);
    return bias->data ? with_bias(score, load_bias(bias, t, key, call->num_keys)) : score;
}

/* Weights of LANES keys from `first` on, for all rows. Where a row's maximum grows, its sums so far are rescaled. */
INLINE void weigh(const Call *call, const int altered, Block *block, Found found, const Sight *sight, int64_t first,
                  int64_t end) {
    const int64_t rows = shared_rows(call);
    const Rows queries = {block->queries, call->dim, rows};
    const Shape shape = altered ? shape_of(call) : (Shape){0};
    const __m512 scale = _mm512_set1_ps(call->scale / LN_2), nothing = _mm512_set1_ps(-INFINITY);
    const float power = altered ? to_base_2(call) : 1;
    for (int64_t row = 0; row < rows; row += STEP) {
        __m512 scores[STEP][VECTORS];
        multiply(block->held, queries, row, call->dim, scores);
        for (int j = 0; j < STEP && row + j < rows; j++) {
            const int64_t h = block->kv_head * (rows / call->num_rows) + (row + j) / call->num_rows;
            const int64_t t = (row + j) % call->num_rows;
            const Bias bias = altered ? bias_of(call, block->b, h) : (Bias){0};
            __m512 most = nothing, sum = _mm512_setzero_ps(), weight[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                const int64_t lanes = smaller(larger(end - first - 16 * v, 0), 16);
                const __mmask16 mask = seen(sight, v, t) & ((1u << lanes) - 1);
                const int64_t key = first + 16 * v;
                weight[v] = _mm512_mul_ps(scores[j][v], scale);
                if (altered)
                    weight[v] = altered_score(call, &shape, &bias, t, key, scores[j][v]);
                weight[v] = _mm512_mask_mov_ps(nothing, mask, weight[v]);
                most = _mm512_max_ps(most, weight[v]);
            }
            const float before = found.row_max[row + j], row_max = fmaxf(before, _mm512_reduce_max_ps(most));
            if (row_max > before) {
                const float change = (before - row_max) * power;
                const __m512 rescale = exp2_of(_mm512_set1_ps(before == -INFINITY ? -1e30f : change));
                float *sums = found.sums + (row + j) * call->dim_v;
                for (int64_t column = 0; column < call->dim_v; column += 16)
                    _mm512_storeu_ps(sums + column, _mm512_mul_ps(_mm512_loadu_ps(sums + column), rescale));
                found.row_sum[row + j] *= _mm512_cvtss_f32(rescale);
                found.row_max[row + j] = row_max;
            }
            const __m512 shift = _mm512_set1_ps(row_max == -INFINITY ? 0 : row_max);
            for (int v = 0; v < VECTORS; v++) {
                const __mmask16 mask = _mm512_cmp_ps_mask(weight[v], nothing, _CMP_NEQ_UQ);
                __m512 shifted = _mm512_sub_ps(weight[v], shift);
                if (altered)
                    shifted = _mm512_mul_ps(shifted, _mm512_set1_ps(power));
                weight[v] = _mm512_maskz_mov_ps(mask, exp2_of(shifted));
                sum = _mm512_add_ps(sum, weight[v]);
            }
            found.row_sum[row + j] += _mm512_reduce_add_ps(sum);
            for (int v = 0; v < VECTORS; v += 2)
                _mm512_store_si512(block->weights[row + j] + 16 * v,
                                   (__m512i)_mm512_cvtne2ps_pbh(weight[v + 1], weight[v]));
        }
    }
}

/* found.sums[row][column] += weights[row][key] * value[key][column], over LANES keys. */
static void add_values(const Call *call, Block *block, Found found, Rows values, int64_t first) {
    const int64_t rows = shared_rows(call);
    for (int64_t row = 0; row < rows; row += STEP)
        for (int64_t column = 0; column < call->dim_v; column += 16 * VECTORS) {
            const int vectors = (int)smaller(VECTORS, (call->dim_v - column) / 16);
            float *at[STEP];
            __m512 sum[STEP][VECTORS];
            for (int j = 0; j < STEP; j++)
                at[j] = found.sums + smaller(row + j, rows - 1) * call->dim_v + column;
            for (int j = 0; j < STEP; j++)
                for (int v = 0; v < VECTORS; v++)
                    sum[j][v] = _mm512_setzero_ps();
            for (int key = 0; key < LANES; key += 2) {
                const bf16 *even = values.data + smaller(first + key, values.count - 1) * values.stride + column;
                const bf16 *odd = values.data + smaller(first + key + 1, values.count - 1) * values.stride + column;
                __m512bh pair[VECTORS];
                for (int v = 0; v < VECTORS; v++) {
                    const __mmask16 mask = v < vectors ? 0xffff : 0;
                    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + 16 * v));
                    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + 16 * v));
                    pair[v] = (__m512bh)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                }
                for (int j = 0; j < STEP; j++) {
                    int32_t both;
                    memcpy(&both, block->weights[smaller(row + j, rows - 1)] + key, sizeof both);
                    for (int v = 0; v < VECTORS; v++)
                        sum[j][v] = _mm512_dpbf16_ps(sum[j][v], (__m512bh)_mm512_set1_epi32(both), pair[v]);
                }
            }
            for (int j = 0; j < STEP && row + j < rows; j++)
                for (int v = 0; v < vectors; v++)
                    _mm512_storeu_ps(at[j] + 16 * v, _mm512_add_ps(_mm512_loadu_ps(at[j] + 16 * v), sum[j][v]));
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
    memset(found.row_sum, 0, sizeof(float) * rows * (1 + call->dim_v));
    for (int64_t row = 0; row < rows; row++) {
        const Rows queries = rows_of(&call->query, b, kv_head * group_size + row / call->num_rows, call->num_rows);
        const bf16 *query = queries.data + row % call->num_rows * queries.stride;
        memcpy(block->queries + row * call->dim, query, sizeof(bf16) * call->dim);
        found.row_max[row] = -INFINITY;
    }
    for (int64_t key = first; key < end; key += LANES) {
        const Sight sight = rows_seeing(call, b, key, NULL);
        if (sight.begin >= sight.end)
            continue;
        prefetch(values, key, call->dim_v);
        hold_rows(keys, key, call->dim, block->held);
        weigh(call, altered, block, found, &sight, key, end);
        prefetch(keys, key + LANES, call->dim);
        add_values(call, block, found, values, key);
    }
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

/* out and lse of a call with at most MAX_ROWS query rows per key head. `partials` is (batch, key heads, chunks, rows,
 * dim_v + 2), float32. */
void hap_decode(const Call *call) {
    const int64_t chunks = (call->num_keys + SPLIT_KEYS - 1) / SPLIT_KEYS;
#pragma omp parallel num_threads(call->threads)
    {
        Block block;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < call->batch * call->kv_heads * chunks; item++) {
            const int64_t b = item / chunks / call->kv_heads, kv_head = item / chunks % call->kv_heads;
            const int64_t first = item % chunks * SPLIT_KEYS;
            if (is_altered(call))
                decode_altered_chunk(call, &block, b, kv_head, first, found_of(call, item));
            else
                decode_chunk(call, 0, &block, b, kv_head, first, found_of(call, item));
        }
#pragma omp for
        for (int64_t row = 0; row < call->batch * call->heads * call->num_rows; row++)
            merge_row(call, row / call->num_rows / call->heads, row / call->num_rows % call->heads,
                      row % call->num_rows, chunks);
    }
}
