/* Gradients from the saved log-sum-exp (arXiv 2307.08691, section 3.1.2), in one pass: five products, no more.
 *
 * With P = exp(scale * query key^T - lse), dP = grad_out value^T and dS = P (dP - delta): a thread holds LANES keys and
 * walks over the queries of all heads that share them. It sums grad_value = P^T grad_out and grad_key = scale dS^T query
 * by itself. grad_query = scale dS key has a part from every block of keys. A thread adds the parts of its blocks one
 * after the other; where `parts` threads share a key head, each has a grad_query of its own, and these are added in the
 * end. So every sum has one order for a given number of parts. */
#include "scores.h"

#define NOWHERE 1e30f /* stands for the lse of a row without keys: its weights are 0 */

typedef struct {
    ALIGNED float held[MAX_DIM * LANES], held_v[MAX_DIM * LANES]; /* key and value: see hold_rows */
    ALIGNED float keys[TILE_SIZE];                                /* scale * key, as copied rows */
    ALIGNED float queries[TILE_SIZE], grads[TILE_SIZE];           /* the walked rows of query and grad_out */
    ALIGNED float weights[TILE * GROUP], grad_scores[TILE * GROUP];
    ALIGNED float sums[MAX_DIM * LANES], sums_v[MAX_DIM * LANES], sums_q[MAX_DIM * TILE];
    ALIGNED float lse[TILE], lse_rest[TILE], delta[TILE]; /* of the walked rows. In base 2, but lse of altered calls */
    Sight sight;
    int64_t dim, dim_v, chunk;
    int64_t first, num_keys; /* the first of the held keys, and how many there are */
    float scale;             /* times log2(e) */
    int altered;
    Shape shape;
    Bias bias;
    float *grad_bias; /* the rows of a head, or NULL */
    const Call *call;
    int64_t b, h;
    uint32_t hash[LANES]; /* of the held keys, for dropout */
} Block;

/* The weights of a query row for vector v of a group of held keys. `slope` becomes the derivative of their scores. */
INLINE Vec altered_weight(const Block *block, int group, int v, int64_t row, Vec product, float lse, float lse_rest,
                          Vec *slope) {
    Vec score = capped(&block->shape, product, slope);
    if (block->bias.data) {
        const int64_t key = block->first + group * GROUP + v * WIDTH;
        score = with_bias(score, load_bias(&block->bias, row, key, block->num_keys));
    }
    return exp2_of((score - splat(lse)) * (float)(1 / LN_2) - splat(lse_rest));
}

/* Add the gradients of the scores of a query row to those of the bias. */
static void add_to_bias(const Block *block, int group, int v, int64_t row, Vec grad) {
    const int64_t key = block->first + group * GROUP + v * WIDTH;
    float *to = block->grad_bias + row * block->num_keys + key;
    for (int i = 0; i < WIDTH && key + i < block->num_keys; i++)
        to[i] += grad[i];
}

/* P and dS of walked rows lo .. hi of the tile, a whole number of steps. Rows of 0 fill up whole ROWS around them. */
INLINE void grade_tile(Block *block, const int altered, int group, int64_t first, int64_t end, int64_t lo,
                       int64_t hi) {
    const float *held = block->held + group * GROUP * block->dim, *held_v = block->held_v + group * GROUP * block->dim_v;
    const int64_t stride = stride_of(block->dim), stride_v = stride_of(block->dim_v);
    for (int64_t step = lo; step < hi; step += STEP) {
        float *weights = block->weights + step * GROUP, *grad_scores = block->grad_scores + step * GROUP;
        multiply(held, block->queries + step * stride, stride, block->dim, block->chunk, weights);
        multiply(held_v, block->grads + step * stride_v, stride_v, block->dim_v, block->chunk, grad_scores);
        for (int j = 0; j < STEP; j++) {
            const int inner = all_see(&block->sight, group, first + step + j);
            for (int v = 0; v < VECTORS; v++) {
                const int at = j * GROUP + v * WIDTH;
                const float lse = block->lse[step + j], lse_rest = block->lse_rest[step + j];
                const Vec product = load(weights + at);
                Vec slope = {0}, weight;
                if (altered)
                    weight = altered_weight(block, group, v, smaller(first + step + j, end - 1), product, lse, lse_rest,
                                            &slope);
                else
                    weight = exp2_of(product * block->scale - splat(lse) - splat(lse_rest));
                if (!inner)
                    weight = only(seen(&block->sight, group, v, first + step + j), weight);
                Vec grad = load(grad_scores + at), kept_weight = weight;
                if (altered && block->call->drop_below) {
                    const uint32_t walked = row_hashes_of(block->call, block->b, block->h)[first + step + j];
                    const Ints mask = kept(block->call, block->hash + group * GROUP + v * WIDTH, walked);
                    kept_weight = only(mask, weight);
                    grad = only(mask, grad * block->call->keep_scale);
                }
                grad = weight * (grad - splat(block->delta[step + j]));
                if (altered)
                    grad *= slope;
                store(weights + at, kept_weight);
                /* Where nothing is seen, 0 * dP may be NaN. */
                grad = only(weight != (Vec){0}, grad);
                if (altered && block->grad_bias && first + step + j < end)
                    add_to_bias(block, group, v, first + step + j, grad);
                store(grad_scores + at, grad);
            }
        }
    }
    for (int64_t row = lo / ROWS * ROWS; row < lo; row++)
        memset(block->grad_scores + row * GROUP, 0, sizeof(float) * GROUP);
    for (int64_t row = hi; row < round_up(hi, ROWS); row++)
        memset(block->grad_scores + row * GROUP, 0, sizeof(float) * GROUP);
}

static void grade(Block *block, int group, int64_t first, int64_t end, int64_t lo, int64_t hi) {
    if (block->altered)
        grade_tile(block, 1, group, first, end, lo, hi);
    else
        grade_tile(block, 0, group, first, end, lo, hi);
}

/* Add to grad_key and grad_value, and to `grad_query` (rows, dim), what the queries of `sight` give. */
static void walk(const Call *call, Block *block, int64_t b, int64_t h, float *grad_query) {
    const Rows queries = rows_of(call, &call->query, b, h, call->num_rows);
    const Rows grads = rows_of(call, &call->grad_out, b, h, call->num_rows);
    const int64_t head = (b * call->heads + h) * call->num_rows;
    const int64_t dim = block->dim, dim_v = block->dim_v;
    block->bias = bias_of(call, b, h);
    block->grad_bias = grad_bias_of(call, b, h);
    block->b = b;
    block->h = h;
    for (int64_t first = block->sight.begin; first < block->sight.end; first += TILE) {
        const int64_t end = smaller(first + TILE, block->sight.end);
        copy_rows(queries, first, end - first, STEP, dim, 1, block->queries);
        copy_rows(grads, first, end - first, STEP, dim_v, 1, block->grads);
        for (int64_t row = first; row < first + TILE; row++) {
            const int is_seen = row < end && call->lse[head + row] != -INFINITY;
            const double rest = is_seen && call->lse_rest ? call->lse_rest[head + row] : 0;
            /* In base 2, as two numbers: large scores leave a float32 too few digits. */
            const double lse = is_seen ? call->lse[head + row] / LN_2 + rest : NOWHERE;
            block->lse[row - first] = block->altered && is_seen ? call->lse[head + row] : (float)lse;
            block->lse_rest[row - first] = (float)(block->altered ? rest : lse - (float)lse);
            block->delta[row - first] = is_seen ? call->delta[head + row] : 0;
        }
        memset(block->sums_q, 0, sizeof(float) * dim * TILE);
        for (int group = 0; group < block->sight.groups; group++) {
            int64_t lo, hi;
            if (!part_of(&block->sight, group, first, end, &lo, &hi))
                continue;
            grade(block, group, first, end, lo / STEP * STEP, round_up(hi, STEP));
            const int64_t lane = group * GROUP, from = lo / ROWS * ROWS;
            accumulate(block->weights + lo * GROUP, block->grads + lo * stride_of(dim_v), hi - lo, dim_v,
                       block->sums_v + lane * dim_v);
            accumulate(block->grad_scores + lo * GROUP, block->queries + lo * stride_of(dim), hi - lo, dim,
                       block->sums + lane * dim);
            accumulate_lanes(block->grad_scores + from * GROUP, block->keys + lane * stride_of(dim),
                             round_up(hi, ROWS) - from, dim, block->sums_q + from * dim);
        }
        for (int64_t i = 0; i < (end - first) * dim; i += WIDTH)
            store(grad_query + first * dim + i, load(grad_query + first * dim + i) + load(block->sums_q + i));
    }
}

/* grad_query of one head that `part` sums: the tensor itself for the first, scratch for others and other storage. */
static float *grad_query_of(const Call *call, int64_t part, int64_t b, int64_t h) {
    const int64_t head = b * call->heads + h, size = call->num_rows * call->dim;
    if (call->dtype == FLOAT32 && part-- == 0)
        return (float *)call->grad_query.data + head * size;
    return call->partials + (part * call->batch * call->heads + head) * size;
}

static void key_block(const Call *call, Block *block, int64_t b, int64_t kv_head, int64_t first, int64_t part) {
    const int64_t group_size = call->heads / call->kv_heads;
    const Rows keys = rows_of(call, &call->key, b, kv_head, call->num_keys);
    hold_rows(keys, first, call->dim, block->held);
    hold_rows(rows_of(call, &call->value, b, kv_head, call->num_keys), first, call->dim_v, block->held_v);
    copy_rows(keys, first, smaller(LANES, call->num_keys - first), GROUP, call->dim, call->scale, block->keys);
    memset(block->sums, 0, sizeof(float) * call->dim * LANES);
    memset(block->sums_v, 0, sizeof(float) * call->dim_v * LANES);
    block->first = first;
    hash_keys(call, b, first, LANES, block->hash);
    const Piece *pieces = pieces_of(call->key_pieces, call->key_pieces_most, call->key_pieces_batch, b, first);
    for (int64_t i = 0; i < (pieces ? call->key_pieces_most : 1); i++) {
        set_rows_seeing(&block->sight, call, b, first, pieces ? pieces + i : NULL);
        for (int64_t h = kv_head * group_size; h < (kv_head + 1) * group_size; h++)
            walk(call, block, b, h, grad_query_of(call, part, b, h));
    }
    for (int64_t i = 0; i < LANES && first + i < call->num_keys; i++) {
        store_row(call, &call->grad_key, b, kv_head, first + i, block->sums + i * call->dim, call->scale, call->dim);
        store_row(call, &call->grad_value, b, kv_head, first + i, block->sums_v + i * call->dim_v,
                  scale_of_kept(call), call->dim_v);
    }
}

/* The blocks of a key head that are for one of the threads that share it. */
static void key_head(const Call *call, Block *block, int64_t b, int64_t kv_head, int64_t part) {
    const int64_t group_size = call->heads / call->kv_heads, blocks = (call->num_keys + LANES - 1) / LANES;
    for (int64_t h = kv_head * group_size; h < (kv_head + 1) * group_size; h++)
        memset(grad_query_of(call, part, b, h), 0, sizeof(float) * call->num_rows * call->dim);
    /* Every parts-th block: under a causal mask, neighbours have about the same to do. */
    for (int64_t index = part; index < blocks; index += call->parts)
        key_block(call, block, b, kv_head, index * LANES, part);
}

/* delta = sum(grad_out * out) - grad_lse, by all threads of a team. */
static void fill_delta(const Call *call) {
#pragma omp for
    for (int64_t index = 0; index < call->batch * call->heads * call->num_rows; index++) {
        const int64_t head = index / call->num_rows, row = index % call->num_rows;
        const Rows out = rows_of(call, &call->out, head / call->heads, head % call->heads, call->num_rows);
        const Rows grad = rows_of(call, &call->grad_out, head / call->heads, head % call->heads, call->num_rows);
        const char *a = out.data + row * out.stride, *b = grad.data + row * grad.stride;
        Vec sum = {0};
        WITH_STORAGE(call->dtype, for (int64_t at = 0; at < call->dim_v * size_of(STORAGE); at += WIDTH * size_of(STORAGE))
                                      sum += load_stored(a + at, STORAGE) * load_stored(b + at, STORAGE));
        call->delta[index] = sum_of(sum) - (call->grad_lse ? call->grad_lse[index] : 0);
    }
}

/* Add up what the parts have of grad_query and store it, by all threads of a team. */
static void join_parts(const Call *call) {
    if (call->dtype == FLOAT32 && call->parts == 1)
        return;
#pragma omp for
    for (int64_t index = 0; index < call->batch * call->heads * call->num_rows; index++) {
        const int64_t head = index / call->num_rows, b = head / call->heads, h = head % call->heads;
        const int64_t at = index % call->num_rows * call->dim;
        ALIGNED float sum[MAX_DIM];
        memcpy(sum, grad_query_of(call, 0, b, h) + at, sizeof(float) * call->dim);
        for (int64_t part = 1; part < call->parts; part++) {
            const float *more = grad_query_of(call, part, b, h) + at;
            for (int64_t column = 0; column < call->dim; column += WIDTH)
                store(sum + column, load(sum + column) + load(more + column));
        }
        store_row(call, &call->grad_query, b, h, index % call->num_rows, sum, 1, call->dim);
    }
}

/* grad_query, grad_key and grad_value of a call. `partials` holds a grad_query (batch, heads, rows, dim) in float32 for
 * every part; in float32 storage the first part needs none. */
void hap_backward(const Call *call) {
    const int64_t batches = call->batch / batch_at_once(call), heads = call->kv_heads / heads_at_once(call);
#pragma omp parallel num_threads(call->threads)
    {
        Block block;
        block.dim = call->dim;
        block.dim_v = call->dim_v;
        block.chunk = chunk_of(call);
        block.num_keys = call->num_keys;
        block.call = call;
        block.scale = (float)(call->scale / LN_2);
        block.altered = is_altered(call);
        block.shape = shape_of(call);
        fill_delta(call);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < batches * heads * call->parts; item++) {
            const int64_t part = item % call->parts, b0 = item / call->parts / heads * batch_at_once(call);
            const int64_t h0 = item / call->parts % heads * heads_at_once(call);
            for (int64_t b = b0; b < b0 + batch_at_once(call); b++)
                for (int64_t kv_head = h0; kv_head < h0 + heads_at_once(call); kv_head++)
                    key_head(call, &block, b, kv_head, part);
        }
        join_parts(call);
    }
}
