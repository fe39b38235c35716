/* Which walked rows a block of held rows sees: queries that hold see keys, keys that hold are seen by queries.
 *
 * `../bfloat16/visibility.h` is the same for the kernels with bfloat16 products. */
#pragma once
#include "tile.h"
#include "../labels.h"

typedef struct {
    int64_t begin, end;             /* walked rows that some lane sees */
    int64_t prefix;                 /* walked rows before it are seen whatever the position */
    int64_t whole_begin, whole_end; /* those that every lane sees by its label */
    const int32_t *labels;          /* of the walked rows, NULL where all are 0 */
    int has_labels;
    int groups;                                       /* that hold rows; the others only repeat the last row */
    int32_t low[LANES], high[LANES], label[LANES];    /* first and last walked row of every lane, and its label */
    int32_t from[GROUPS], to[GROUPS];                 /* walked rows that some lane of a group sees by its position */
    int32_t inner_begin[GROUPS], inner_end[GROUPS];   /* those that every lane of it sees by its position */
} Sight;

/* What follows from `low`, `high` and `prefix`. */
static inline void set_ends(Sight *sight) {
    sight->begin = INT32_MAX;
    sight->end = sight->prefix;
    for (int g = 0; g < sight->groups; g++) {
        int32_t from = INT32_MAX, to = 0, inner_begin = 0, inner_end = INT32_MAX;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            const int32_t low = sight->low[i], next = sight->high[i] + 1;
            from = low < from ? low : from;
            to = next > to ? next : to;
            inner_begin = low > inner_begin ? low : inner_begin;
            inner_end = next < inner_end ? next : inner_end;
        }
        sight->from[g] = from;
        sight->to[g] = to;
        sight->inner_begin[g] = inner_begin;
        sight->inner_end[g] = inner_end;
        sight->begin = smaller(sight->begin, from);
        sight->end = larger(sight->end, to);
    }
    sight->begin = sight->prefix ? 0 : smaller(sight->begin, sight->end);
}

/* A distance as 32 bits; further than any row is far enough. */
static inline int32_t near(int64_t distance) {
    const int64_t far = 1 << 30;
    return (int32_t)larger(smaller(distance, far), -far);
}

static inline int32_t between(int32_t least, int32_t x, int32_t most) {
    x = x < most ? x : most;
    return x > least ? x : least;
}

/* What LANES rows from `first` on see of `count` walked ones: row i those of i + shift - back .. i + shift + ahead. */
static inline void set_positions(Sight *sight, int64_t first, int64_t held_count, int64_t count, int64_t shift,
                                 int64_t back, int64_t ahead, int64_t held_prefix, int64_t walked_prefix) {
    sight->prefix = smaller(walked_prefix, count);
    sight->whole_begin = 0;
    sight->whole_end = INT32_MAX;
    sight->labels = NULL;
    sight->has_labels = 0;
    sight->groups = (int)((smaller(held_count - first, LANES) + GROUP - 1) / GROUP);
    /* In 32 bits, which compilers turn into vectors: decoding does this for every LANES keys. */
    const int32_t last = (int32_t)held_count - 1, begin = (int32_t)first, end = (int32_t)count;
    const int32_t to_low = near(shift - back), to_high = near(shift + ahead), prefix = near(held_prefix);
    for (int i = 0; i < LANES; i++) {
        const int32_t index = begin + i < last ? begin + i : last;
        const int32_t low = between(0, index + to_low, end), high = between(-1, index + to_high, end - 1);
        sight->low[i] = index < prefix ? 0 : low;
        sight->high[i] = index < prefix ? end - 1 : high;
    }
    set_ends(sight);
}

/* What is left of a sight inside a piece. A row outside of it has high < low: it sees nothing. */
static inline void clip(Sight *sight, const Piece *piece, int64_t first, int64_t held_count) {
    for (int i = 0; i < LANES; i++) {
        const int64_t index = smaller(first + i, held_count - 1);
        const int inside = index >= piece->own_begin && index < piece->own_end;
        sight->low[i] = inside ? (int32_t)larger(sight->low[i], piece->begin) : INT32_MAX;
        sight->high[i] = inside ? (int32_t)smaller(sight->high[i], piece->end - 1) : -1;
    }
    set_ends(sight);
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
    for (int i = 0; i < LANES; i++)
        sight->label[i] = held ? held[smaller(first + i, held_count - 1)] : 0;
}

/* The pieces of the block of rows from `first` on, NULL where there is no plan. */
static inline const Piece *pieces_of(const int32_t *pieces, int64_t most, int64_t batch_stride, int64_t b,
                                     int64_t first) {
    return pieces ? (const Piece *)(pieces + b * batch_stride) + first / LANES * most : NULL;
}

/* Keys that query rows from `first` on see, inside of a piece where there is one. */
static inline void set_keys_seen(Sight *sight, const Call *call, int64_t b, int64_t first, const Piece *piece) {
    const int by_position = !piece || piece->position_masked;
    const int64_t shift = piece ? piece->shift : 0, far = (int64_t)1 << 40;
    set_positions(sight, first, call->num_rows, call->num_keys, call->start + shift, by_position ? call->back : far,
                  by_position ? call->ahead : far, 0, call->prefix);
    if (piece)
        clip(sight, piece, first, call->num_rows);
    if (call->key_labels)
        set_labels(sight, call->row_bounds + b * call->row_bounds_batch + first / LANES * 4,
                   call->row_labels ? call->row_labels + b * call->row_labels_batch : NULL,
                   call->key_labels + b * call->key_labels_batch, first, call->num_rows);
}

static inline void set_key_labels(Sight *sight, const Call *call, int64_t b, int64_t first) {
    const int32_t *keys = call->key_labels + b * call->key_labels_batch;
    const int32_t *rows = call->row_labels ? call->row_labels + b * call->row_labels_batch : NULL;
    int32_t bound[4];
    bounds_of_block(call, b, keys, rows, first, LANES, bound);
    set_labels(sight, bound, keys, rows, first, call->num_keys);
}

/* Query rows that see keys from `first` on. */
static inline void set_rows_seeing(Sight *sight, const Call *call, int64_t b, int64_t first, const Piece *piece) {
    const int by_position = !piece || piece->position_masked;
    const int64_t shift = piece ? piece->shift : 0, far = (int64_t)1 << 40;
    set_positions(sight, first, call->num_keys, call->num_rows, -call->start - shift, by_position ? call->ahead : far,
                  by_position ? call->back : far, call->prefix, 0);
    if (piece)
        clip(sight, piece, first, call->num_keys);
    if (call->key_labels)
        set_key_labels(sight, call, b, first);
}

/* The walked rows first .. end that lanes of a group may see, as `lo` .. `hi` counted from `first`; 0 if there are none. */
static inline int part_of(const Sight *sight, int group, int64_t first, int64_t end, int64_t *lo, int64_t *hi) {
    const int64_t from = first < sight->prefix ? first : larger(sight->from[group], first);
    *lo = from - first;
    *hi = smaller(larger(sight->to[group], sight->prefix), end) - first;
    return *lo < *hi;
}

/* Whether every lane of a group sees a walked row. */
INLINE int all_see(const Sight *sight, int group, int64_t row) {
    return row >= sight->whole_begin && row < sight->whole_end &&
           (row < sight->prefix || (row >= sight->inner_begin[group] && row < sight->inner_end[group]));
}

/* The lanes of vector v of a group that see a walked row. */
INLINE Ints seen(const Sight *sight, int group, int v, int64_t row) {
    if (row >= sight->end)
        return (Ints){0};
    const int lane = group * GROUP + v * WIDTH;
    const Ints index = (int32_t)row - (Ints){0};
    Ints mask = (load_ints(sight->low + lane) <= index) & (load_ints(sight->high + lane) >= index);
    if (row < sight->prefix)
        mask = ~(Ints){0};
    if (sight->has_labels)
        mask &= load_ints(sight->label + lane) == (sight->labels ? sight->labels[row] : 0) - (Ints){0};
    return mask;
}
