/* Gradients from the saved log-sum-exp (arXiv 2307.08691, section 3.1.2), in one pass: five products, no more.
 *
 * With P = exp(scale * query key^T - lse), dP = grad_out value^T and dS = P (dP - delta): a thread holds LANES keys and
 * walks over the queries of all heads that share them. It sums grad_value = P^T grad_out and grad_key = scale dS^T query
 * by itself. grad_query = scale dS key has a part from every block of keys. A thread adds the parts of its blocks one
 * after the other; where `parts` threads share a key head, each has a grad_query of its own, and these are added in the
 * end. So every sum has one order for a given number of parts. */
#include "sight.h"

#define NOWHERE 1e30f /* stands for the lse of a row without keys: its weights are 0 */

typedef struct {
    ALIGNED float held[MAX_DIM * LANES], held_v[MAX_DIM * LANES]; /* key and value: see hold_rows */
    ALIGNED float keys[TILE_SIZE];                                /* scale * key, as copied rows */
    ALIGNED float queries[TILE_SIZE], grads[TILE_SIZE];           /* the walked rows of query and grad_out */
    ALIGNED float weights[TILE * GROUP], grad_scores[TILE * GROUP];
    ALIGNED float sums[MAX_DIM * LANES], sums_v[MAX_DIM * LANES], sums_q[MAX_DIM * TILE];
    ALIGNED float lse[TILE], lse_rest[TILE], delta[TILE]; /* of the walked rows; lse + lse_rest is in base 2 */
    Sight sight;
    int64_t dim, dim_v, chunk;
    float scale; /* times log2(e) */
} Block;

/* P and dS of walked rows lo .. hi of the tile, a whole number of steps. Rows of 0 fill up whole ROWS around them. */
static void grade(Block *block, int group, int64_t first, int64_t lo, int64_t hi) {
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
                Vec weight = exp2_of(load(weights + at) * block->scale - splat(block->lse[step + j]) -
                                     splat(block->lse_rest[step + j]));
                if (!inner)
                    weight = only(seen(&block->sight, group, v, first + step + j), weight);
                const Vec grad = weight * (load(grad_scores + at) - splat(block->delta[step + j]));
                store(weights + at, weight);
                /* Where nothing is seen, 0 * dP may be NaN. */
                store(grad_scores + at, only(weight != (Vec){0}, grad));
            }
        }
    }
    for (int64_t row = lo / ROWS * ROWS; row < lo; row++)
        memset(block->grad_scores + row * GROUP, 0, sizeof(float) * GROUP);
    for (int64_t row = hi; row < round_up(hi, ROWS); row++)
        memset(block->grad_scores + row * GROUP, 0, sizeof(float) * GROUP);
}

/* Add to grad_key and grad_value, and to `grad_query` (rows, dim), what the queries of `sight` give. */
static void walk(const Call *call, Block *block, int64_t b, int64_t h, float *grad_query) {
    const Rows queries = rows_of(call, &call->query, b, h, call->num_rows);
    const Rows grads = rows_of(call, &call->grad_out, b, h, call->num_rows);
    const int64_t head = (b * call->heads + h) * call->num_rows;
    const int64_t dim = block->dim, dim_v = block->dim_v;
    for (int64_t first = block->sight.begin; first < block->sight.end; first += TILE) {
        const int64_t end = smaller(first + TILE, block->sight.end);
        copy_rows(queries, first, end - first, STEP, dim, 1, block->queries);
        copy_rows(grads, first, end - first, STEP, dim_v, 1, block->grads);
        for (int64_t row = first; row < first + TILE; row++) {
            const int is_seen = row < end && call->lse[head + row] != -INFINITY;
            const double rest = is_seen && call->lse_rest ? call->lse_rest[head + row] : 0;
            /* In base 2, as two numbers: large scores leave a float32 too few digits. */
            const double lse = is_seen ? call->lse[head + row] / LN_2 + rest : NOWHERE;
            block->lse[row - first] = (float)lse;
            block->lse_rest[row - first] = (float)(lse - (float)lse);
            block->delta[row - first] = is_seen ? call->delta[head + row] : 0;
        }
        memset(block->sums_q, 0, sizeof(float) * dim * TILE);
        for (int group = 0; group < block->sight.groups; group++) {
            int64_t lo, hi;
            if (!part_of(&block->sight, group, first, end, &lo, &hi))
                continue;
            grade(block, group, first, lo / STEP * STEP, round_up(hi, STEP));
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
    const Piece *pieces = pieces_of(call->key_pieces, call->key_pieces_most, call->key_pieces_batch, b, first);
    for (int64_t i = 0; i < (pieces ? call->key_pieces_most : 1); i++) {
        set_rows_seeing(&block->sight, call, b, first, pieces ? pieces + i : NULL);
        for (int64_t h = kv_head * group_size; h < (kv_head + 1) * group_size; h++)
            walk(call, block, b, h, grad_query_of(call, part, b, h));
    }
    for (int64_t i = 0; i < LANES && first + i < call->num_keys; i++) {
        store_row(call, &call->grad_key, b, kv_head, first + i, block->sums + i * call->dim, call->scale, call->dim);
        store_row(call, &call->grad_value, b, kv_head, first + i, block->sums_v + i * call->dim_v, 1, call->dim_v);
    }
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
        for (int64_t column = 0; column < call->dim_v; column += WIDTH)
            if (call->dtype == FLOAT32)
                sum += load_stored(a + 4 * column, FLOAT32) * load_stored(b + 4 * column, FLOAT32);
            else
                sum += load_stored(a + 2 * column, BFLOAT16) * load_stored(b + 2 * column, BFLOAT16);
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
    const int64_t group_size = call->heads / call->kv_heads, blocks = (call->num_keys + LANES - 1) / LANES;
#pragma omp parallel num_threads(call->threads)
    {
        Block block;
        block.dim = call->dim;
        block.dim_v = call->dim_v;
        block.chunk = chunk_of(call);
        block.scale = (float)(call->scale / LN_2);
        fill_delta(call);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < call->batch * call->kv_heads * call->parts; item++) {
            const int64_t part = item % call->parts, kv_head = item / call->parts % call->kv_heads;
            const int64_t b = item / call->parts / call->kv_heads;
            for (int64_t h = kv_head * group_size; h < (kv_head + 1) * group_size; h++)
                memset(grad_query_of(call, part, b, h), 0, sizeof(float) * call->num_rows * call->dim);
            /* Every parts-th block: under a causal mask, neighbours have about the same to do. */
            for (int64_t index = part; index < blocks; index += call->parts)
                key_block(call, &block, b, kv_head, index * LANES, part);
        }
        join_parts(call);
    }
}
