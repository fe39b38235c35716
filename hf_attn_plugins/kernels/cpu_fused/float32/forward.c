/* softmax(scale * query key^T) value and its log-sum-exp: FlashAttention's loop (arXiv 2205.14135, algorithm 1).
 *
 * A thread holds LANES queries, or some times as many, and walks over tiles of keys. For a group of queries it computes
 * the scores of a tile, turns them into weights where they lie, and adds the weighted values to the group's sums. */
#include "weights.h"

#define MANY 2048 /* rows and keys from which on more queries walk together */

/* What the tile of keys first .. end adds to a group of queries. */
static void attend_tile(Block *block, Queries *queries, int group, int64_t first, int64_t end) {
    int64_t lo, hi;
    if (end <= queries->sight.begin || first >= queries->sight.end)
        return; /* a tile of others that walk along */
    if (!part_of(&queries->sight, group, first, end, &lo, &hi))
        return;
    if (block->bias.data && !take_bias(&block->bias, queries->first + group * GROUP, block->num_rows, first + lo,
                                       hi - lo, block->bias_tile + lo * GROUP))
        return;
    Vec total[VECTORS];
    score(block, queries, group, lo, hi);
    if (unset(queries, group, first + lo, first + hi))
        raise_max(block, queries, group, first, lo, hi);
    weigh(block, queries, group, first, lo, hi, total);
    if (!within_limit(total)) {
        score(block, queries, group, lo, hi);
        raise_max(block, queries, group, first, lo, hi);
        weigh(block, queries, group, first, lo, hi, total);
    }
    for (int v = 0; v < VECTORS; v++) {
        float *row_sum = queries->row_sum + group * GROUP + v * WIDTH;
        store(row_sum, load(row_sum) + total[v]);
    }
    if (block->call->drop_below)
        drop(block, queries, group, first, lo, hi);
    accumulate(block->weights + lo * GROUP, block->values + lo * stride_of(block->dim_v), hi - lo, block->dim_v,
               queries->sums + group * GROUP * block->dim_v);
}

/* Sums over the keys of the sights of `count` times LANES queries. */
static void walk(Block *block, int count, Rows keys, Rows values) {
    int64_t begin = INT64_MAX, last = 0;
    int groups = 0;
    for (const Queries *queries = block->queries; queries < block->queries + count; queries++) {
        begin = smaller(begin, queries->sight.begin);
        last = larger(last, queries->sight.end);
        groups += queries->sight.groups;
    }
    for (int64_t first = begin; first < last; first += TILE) {
        const int64_t end = smaller(first + TILE, last);
        take_keys(block, keys, first, end);
        copy_rows(values, first, end - first, STEP, block->dim_v, 1, block->values);
        int part = 0;
        for (Queries *queries = block->queries; queries < block->queries + count; queries++)
            for (int group = 0; group < queries->sight.groups; group++, part++) {
                prefetch_part(keys, end, last, part, groups, block->dim);
                prefetch_part(values, end, last, part, groups, block->dim_v);
                attend_tile(block, queries, group, first, end);
            }
    }
}

/* Store out and lse of LANES queries. */
static void store_results(const Call *call, const Block *block, const Queries *queries, int64_t b, int64_t h) {
    const int64_t first = queries->first, at = (b * call->heads + h) * call->num_rows + first;
    for (int i = 0; i < LANES && first + i < call->num_rows; i++) {
        const float row_sum = queries->row_sum[i];
        const double row_max = queries->row_max[i] * (block->altered ? 1 : LN_2), lse = row_max + log2(row_sum) * LN_2;
        store_row(call, &call->out, b, h, first + i, queries->sums + i * call->dim_v,
                  row_sum == 0 ? 0 : scale_of_kept(call) / row_sum, call->dim_v);
        call->lse[at + i] = row_sum == 0 ? -INFINITY : (float)lse;
        if (call->lse_rest)
            call->lse_rest[at + i] = row_sum == 0 ? 0 : (float)((row_max - call->lse[at + i]) / LN_2 + log2(row_sum));
    }
}

/* Queries from `first` on, LANES times `together` of them or as many as are left. */
static void forward_block(const Call *call, Block *block, int64_t b, int64_t h, int64_t first, int together, Rows keys,
                          Rows values) {
    const int count = (int)smaller(together, (call->num_rows - first + LANES - 1) / LANES);
    block->bias = bias_of(call, b, h);
    block->key_hashes = key_hashes_of(call, b);
    for (Queries *queries = block->queries; queries < block->queries + count; queries++, first += LANES) {
        hold_rows(rows_of(call, &call->query, b, h, call->num_rows), first, call->dim, queries->held);
        memset(queries->sums, 0, sizeof(float) * call->dim_v * LANES);
        queries->first = first;
        hash_rows(call, b, h, first, LANES, queries->hash);
        for (int i = 0; i < LANES; i++) {
            queries->row_max[i] = -INFINITY;
            queries->row_sum[i] = 0;
        }
    }
    const Piece *pieces =
        pieces_of(call->row_pieces, call->row_pieces_most, call->row_pieces_batch, b, block->queries->first);
    for (int64_t i = 0; i < (pieces ? call->row_pieces_most : 1); i++) { /* with pieces, count is 1 */
        for (Queries *queries = block->queries; queries < block->queries + count; queries++)
            set_keys_seen(&queries->sight, call, b, queries->first, pieces ? pieces + i : NULL);
        walk(block, count, keys, values);
    }
    for (int i = 0; i < count; i++)
        store_results(call, block, block->queries + i, b, h);
}

/* How many times LANES queries walk together. More of them read keys and values less often, which pays where these are
 * many and long: measured with AVX2, head_dim 128 (kernels/README.md). It does not depend on the number of threads, so
 * that a sum has the same order for any. Rectangles of a plan differ from block to block. */
static int together_of(const Call *call) {
    const int64_t dims = call->dim + call->dim_v, least = smaller(call->num_rows, call->num_keys);
#ifdef ALWAYS_TOGETHER /* for tests */
    const int pays = 1;
#else
    const int pays = WIDTH == 8 && least >= MANY && dims > 192 && dims <= 256;
#endif
    return pays && !call->row_pieces ? TOGETHER : 1;
}

/* Bytes of `Call`, which call.py compares with its own. */
int64_t hf_call_size(void) { return sizeof(Call); }

/* out and lse of a call. */
void hap_forward(const Call *call) {
    const int together = together_of(call);
    const int64_t group_size = call->heads / call->kv_heads, lanes = LANES * together;
    const int64_t blocks = (call->num_rows + lanes - 1) / lanes;
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
            forward_block(call, &block, b, kv_head * group_size + member, block_index * lanes,
                          together, rows_of(call, &call->key, b, kv_head, call->num_keys),
                          rows_of(call, &call->value, b, kv_head, call->num_keys));
        }
    }
}
