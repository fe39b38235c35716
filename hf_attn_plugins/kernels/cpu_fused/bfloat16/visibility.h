/* Which walked rows a block of held rows sees: queries that hold see keys, keys that hold are seen by queries. */
#pragma once
#include "products.h"
#include "../labels.h"

typedef struct {
    int64_t begin, end;             /* walked rows that some lane sees */
    int64_t inner_begin, inner_end; /* those that every lane sees by its position */
    int64_t prefix;                 /* walked rows before it are seen whatever the position */
    int64_t whole_begin, whole_end; /* those that every lane sees by its label */
    const int32_t *labels;          /* of the walked rows, NULL where all are 0 */
    int has_labels;
    __m512i low[VECTORS], high[VECTORS], label[VECTORS]; /* first and last walked row of every lane, and its label */
    int64_t from[VECTORS], to[VECTORS];                  /* walked rows that some lane of a vector sees */
} Sight;

/* Numbers of the 16 held rows of a vector; lanes past the end repeat the last row. */
static inline __m512i held_index(int64_t first, int v, int64_t held_count) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32((int32_t)first + 16 * v));
    return _mm512_min_epi32(index, _mm512_set1_epi32((int32_t)held_count - 1));
}

/* The part of it that labels decide: bounds of the block, labels of its lanes. */
static inline void set_labels(Sight *sight, const int32_t bound[4], const int32_t *held, const int32_t *walked,
                              int64_t first, int64_t held_count) {
    sight->has_labels = 1;
    sight->labels = walked;
    sight->begin = larger(sight->begin, bound[0]);
    sight->end = smaller(sight->end, bound[1]);
    sight->whole_begin = bound[2];
    sight->whole_end = bound[3];
    for (int v = 0; v < VECTORS; v++)
        sight->label[v] =
            held ? _mm512_i32gather_epi32(held_index(first, v, held_count), held, 4) : _mm512_setzero_si512();
}

/* index + shift as far as it lies in low .. high. */
static inline __m512i moved(__m512i index, int64_t shift, int64_t low, int64_t high) {
    const int64_t far = 1 << 30;
    const __m512i sum = _mm512_add_epi32(index, _mm512_set1_epi32((int32_t)larger(smaller(shift, far), -far)));
    return _mm512_max_epi32(_mm512_min_epi32(sum, _mm512_set1_epi32((int32_t)high)), _mm512_set1_epi32((int32_t)low));
}

/* What follows from `low`, `high` and `prefix`: the walked rows that each vector sees, and that any does. */
static inline void set_ends(Sight *sight) {
    sight->begin = INT32_MAX;
    sight->end = 0;
    for (int v = 0; v < VECTORS; v++) {
        sight->from[v] = sight->prefix ? 0 : _mm512_reduce_min_epi32(sight->low[v]);
        sight->to[v] = larger(_mm512_reduce_max_epi32(sight->high[v]) + 1, sight->prefix);
        sight->begin = smaller(sight->begin, sight->from[v]);
        sight->end = larger(sight->end, sight->to[v]);
    }
    sight->begin = smaller(sight->begin, sight->end);
}

/* What LANES rows from `first` on see of `count` walked ones: row i those of i + shift - back .. i + shift + ahead. */
static inline Sight sight_of(int64_t first, int64_t held_count, int64_t count, int64_t shift, int64_t back,
                             int64_t ahead, int64_t held_prefix, int64_t walked_prefix) {
    Sight sight = {.prefix = smaller(walked_prefix, count), .whole_end = INT32_MAX};
    __m512i most_low = _mm512_setzero_si512(), least_high = _mm512_set1_epi32(INT32_MAX);
    for (int v = 0; v < VECTORS; v++) {
        const __m512i index = held_index(first, v, held_count);
        const __mmask16 all = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32((int32_t)held_prefix));
        sight.low[v] = _mm512_maskz_mov_epi32(~all, moved(index, shift - back, 0, count));
        sight.high[v] = _mm512_mask_mov_epi32(moved(index, shift + ahead, -1, count - 1), all,
                                              _mm512_set1_epi32((int32_t)count - 1));
        most_low = _mm512_max_epi32(most_low, sight.low[v]);
        least_high = _mm512_min_epi32(least_high, sight.high[v]);
    }
    set_ends(&sight);
    sight.inner_begin = _mm512_reduce_max_epi32(most_low);
    sight.inner_end = _mm512_reduce_min_epi32(least_high) + 1;
    return sight;
}

/* What is left of a sight inside a piece. A row outside of it has high < low: it sees nothing. */
static inline void clip(Sight *sight, const Piece *piece, int64_t first, int64_t held_count) {
    sight->inner_begin = 0;
    sight->inner_end = INT32_MAX;
    for (int v = 0; v < VECTORS; v++) {
        const __m512i index = held_index(first, v, held_count);
        const __mmask16 inside = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(piece->own_begin)) &
                                 _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(piece->own_end));
        sight->low[v] = _mm512_mask_max_epi32(_mm512_set1_epi32(INT32_MAX), inside, sight->low[v],
                                              _mm512_set1_epi32(piece->begin));
        sight->high[v] =
            _mm512_mask_min_epi32(_mm512_set1_epi32(-1), inside, sight->high[v], _mm512_set1_epi32(piece->end - 1));
        sight->inner_begin = larger(sight->inner_begin, _mm512_reduce_max_epi32(sight->low[v]));
        sight->inner_end = smaller(sight->inner_end, _mm512_reduce_min_epi32(sight->high[v]) + 1);
    }
    set_ends(sight);
}

/* The pieces of the LANES held rows from `first` on, `most` of them; one that is NULL where there is no plan. */
static inline const Piece *pieces_of(const int32_t *pieces, int64_t most, int64_t stride, int64_t b, int64_t first) {
    return pieces ? (const Piece *)(pieces + b * stride) + first / LANES * most : NULL;
}

static inline Sight keys_seen(const Call *call, int64_t b, int64_t first, const Piece *piece) {
    const int by_position = !piece || piece->position_masked;
    const int64_t shift = piece ? piece->shift : 0, far = (int64_t)1 << 40;
    Sight sight = sight_of(first, call->num_rows, call->num_keys, call->start + shift, by_position ? call->back : far,
                           by_position ? call->ahead : far, 0, call->prefix);
    if (piece)
        clip(&sight, piece, first, call->num_rows);
    if (call->key_labels)
        set_labels(&sight, call->row_bounds + b * call->row_bounds_batch + first / LANES * 4,
                   call->row_labels ? call->row_labels + b * call->row_labels_batch : NULL,
                   call->key_labels + b * call->key_labels_batch, first, call->num_rows);
    return sight;
}

static inline void set_key_labels(Sight *sight, const Call *call, int64_t b, int64_t first) {
    const int32_t *keys = call->key_labels + b * call->key_labels_batch;
    const int32_t *rows = call->row_labels ? call->row_labels + b * call->row_labels_batch : NULL;
    int32_t bound[4];
    bounds_of_block(call, b, keys, rows, first, LANES, bound);
    set_labels(sight, bound, keys, rows, first, call->num_keys);
}

static inline Sight rows_seeing(const Call *call, int64_t b, int64_t first, const Piece *piece) {
    const int by_position = !piece || piece->position_masked;
    const int64_t shift = piece ? piece->shift : 0, far = (int64_t)1 << 40;
    Sight sight = sight_of(first, call->num_keys, call->num_rows, -call->start - shift,
                           by_position ? call->ahead : far, by_position ? call->back : far, call->prefix, 0);
    if (piece)
        clip(&sight, piece, first, call->num_keys);
    if (call->key_labels)
        set_key_labels(&sight, call, b, first);
    return sight;
}

/* Whether every lane sees all of the STEP walked rows from `row` on. */
static inline int sees_all(const Sight *sight, int64_t row) {
    const int64_t next = row + STEP;
    return row >= sight->whole_begin && next <= sight->whole_end &&
           ((row >= sight->inner_begin && next <= sight->inner_end) || next <= sight->prefix);
}

/* The lanes of vector v that see a walked row. */
static inline __mmask16 seen(const Sight *sight, int v, int64_t row) {
    if (row >= sight->end)
        return 0;
    const __m512i index = _mm512_set1_epi32((int32_t)row);
    __mmask16 mask = _mm512_cmple_epi32_mask(sight->low[v], index) & _mm512_cmpge_epi32_mask(sight->high[v], index);
    if (row < sight->prefix)
        mask = 0xffff;
    if (sight->has_labels) {
        const int32_t label = sight->labels ? sight->labels[row] : 0;
        mask &= _mm512_cmpeq_epi32_mask(sight->label[v], _mm512_set1_epi32(label));
    }
    return mask;
}
