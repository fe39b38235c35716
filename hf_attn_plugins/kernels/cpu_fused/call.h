/* What Python hands to the compiled kernels. ELEMENT is the type of a tensor's elements. */
#pragma once
#include <stdint.h>

/* A tensor (batch, head, token, dim): its data, and its strides in elements. Elements of a token are neighbours. */
typedef struct {
    ELEMENT *data;
    int64_t batch, head, token;
} Tensor;

/* A rectangle of a plan, as `core.rectangle.table` writes it: held rows own_begin .. own_end see, or are seen by, walked
 * rows begin .. end. Where position_masked, positions decide as well, and a query's position moves by `shift`. */
typedef struct {
    int32_t own_begin, own_end, begin, end, position_masked, shift;
} Piece;

/* One call; call.py declares the same fields in the same order. */
typedef struct {
    Tensor query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    float *lse;            /* (batch, heads, rows) contiguous, as grad_lse and delta */
    const float *grad_lse; /* NULL means 0 */
    float *delta;          /* scratch of backward.c */
    int64_t batch, heads, kv_heads, num_rows, num_keys, dim, dim_v;
    int64_t start;       /* position of row 0 on the key axis */
    int64_t back, ahead; /* a row at position p sees keys p - back .. p + ahead */
    int64_t prefix;      /* and every row sees the first `prefix` keys */
    /* A row sees the keys of its own label. No row labels: the label of every row is 0. No key labels: all keys. */
    const int32_t *row_labels, *key_labels;
    int64_t row_labels_batch, key_labels_batch;
    const int32_t *row_bounds, *key_bounds; /* per LANES rows or keys, from kernels/segment_labels.py. NULL for keys:
                                             * see labels.h */
    int64_t row_bounds_batch, key_bounds_batch;
    /* Rectangles of a plan as `Piece`s, per LANES rows or keys; NULL means every row and every key. */
    const int32_t *row_pieces, *key_pieces;
    int64_t row_pieces_most, key_pieces_most;   /* most pieces of a tile */
    int64_t row_pieces_batch, key_pieces_batch; /* stride of the batch in elements; 0 if all its rows share the plan */
    int32_t *pairs;  /* scratch of the kernels in bfloat16/: see forward.c and backward.c */
    float *partials; /* scratch of both decode.c, and of float32/backward.c */
    float scale;
    int32_t threads;
    int32_t dtype; /* how the tensors are stored: see float32/vec.h. Those in bfloat16/ take bfloat16 only */
    int32_t parts; /* of float32/backward.c: how many threads may share one key head */
    /* (batch, heads, rows): what rounding lse to float32 left out, in base 2: an lse of 40 is off by 2e-6, and so would
     * be all weights of the backward. Written by float32/forward.c, read by float32/backward.c; NULL means 0. */
    float *lse_rest;
    float softcap;      /* c: scores s become c * tanh(s / c); 0 means none */
    int32_t bias_dtype; /* FLOAT32_BIAS and so on */
    const char *bias;   /* added to the scores; NULL means none. Strides in elements, 0 along a broadcast dimension */
    int64_t bias_batch, bias_head, bias_row, bias_key;
    float *grad_bias; /* (1 or batch, 1 or heads, rows, keys), begins as 0; or NULL. Not with softcap */
    int64_t grad_bias_batch, grad_bias_head; /* its strides, 0 along a broadcast dimension */
    uint32_t drop_below; /* a pair is dropped where the hash of its place is below; 0 means no dropout */
    float keep_scale;    /* 1 / (1 - dropout), by which the weights that are kept are multiplied */
    const uint32_t *row_hashes, *key_hashes; /* by core/drops.py: (batch, heads, rows) and (batch, keys), and room */
} Call;

/* How many parts of something are done: who does the last part goes on with the whole. No thread waits for another one
 * there, as it would at a barrier, which takes long where a program beside this one has the other thread's core. */
static inline int64_t count_done(int32_t *done) { return __atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL); }

