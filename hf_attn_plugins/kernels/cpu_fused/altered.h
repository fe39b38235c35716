/* What a call does besides scaling its products, for both sources: softcap * tanh(scale * product / softcap), a bias that
 * is added, and dropout of weights. Calls with none of these are *plain*, the others *altered*.
 *
 * Plain calls keep scores in base 2, divided by ln 2, and subtract the largest in the same instruction. An altered call
 * keeps scores as they are and subtracts first: a score of -1e9, by which some models hide keys, has no digits left for
 * another rounding. */
#pragma once
#include <float.h>
#include <math.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#include "call.h"

static inline int is_altered(const Call *call) { return call->softcap != 0 || call->bias || call->drop_below; }

/* The factor from differences of scores, as the kernels keep them, to powers of 2. */
static inline float to_base_2(const Call *call) { return is_altered(call) ? 1.44269504f : 1; }

typedef struct {
    int is_capped;
    float scale;   /* of scores without a softcap */
    float to_tanh; /* scale / softcap, times 2 / ln 2: tanh is computed from exp(2 y) = 2**x */
    float softcap;
} Shape;

static inline Shape shape_of(const Call *call) {
    const double ln_2 = 0.69314718055994531;
    if (!call->softcap)
        return (Shape){.scale = is_altered(call) ? call->scale : (float)(call->scale / ln_2)};
    return (Shape){1, 0, (float)(2 / ln_2 * call->scale / call->softcap), call->softcap};
}

/* The bias of one head. A bool is True where a row sees a key: then 0 is added, else -inf. */
typedef struct {
    const char *data;
    int64_t row, key; /* strides in elements, 0 along a broadcast dimension */
    int dtype;
} Bias;
enum { FLOAT32_BIAS, BFLOAT16_BIAS, BOOL_BIAS, FLOAT16_BIAS }; /* as BIASES of layout.py */

static inline int64_t size_of_bias(int dtype) { return dtype == FLOAT32_BIAS ? 4 : dtype == BOOL_BIAS ? 1 : 2; }

static inline Bias bias_of(const Call *call, int64_t b, int64_t h) {
    const int64_t at = (b * call->bias_batch + h * call->bias_head) * size_of_bias(call->bias_dtype);
    return (Bias){call->bias ? call->bias + at : NULL, call->bias_row, call->bias_key, call->bias_dtype};
}

/* Element `at` of it, counted from `data`. */
static inline float bias_element(const char *data, int64_t at, const int dtype) {
    if (dtype == FLOAT32_BIAS)
        return ((const float *)data)[at];
    if (dtype == BOOL_BIAS)
        return data[at] ? 0 : -INFINITY;
    const uint32_t half = ((const uint16_t *)data)[at];
    uint32_t bits = dtype == BFLOAT16_BIAS ? half << 16 : (half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    if (dtype == BFLOAT16_BIAS)
        return value;
#if defined(__F16C__)
    return _cvtsh_ss((uint16_t)half);
#elif defined(__aarch64__)
    __fp16 stored;
    memcpy(&stored, (const uint16_t *)data + at, sizeof stored);
    return stored;
#else /* the exponent's bias is 15, that of float32 is 127 */
    value = (half & 0x7c00) != 0x7c00 ? value * 0x1p112f : half & 0x3ff ? NAN : INFINITY;
    return half & 0x8000 ? -value : value;
#endif
}

/* The gradient of one head's bias, rows of num_keys; NULL where it is not wanted. */
static inline float *grad_bias_of(const Call *call, int64_t b, int64_t h) {
    return call->grad_bias ? call->grad_bias + b * call->grad_bias_batch + h * call->grad_bias_head : NULL;
}

/* How many rows of the batch, and how many key heads, add to one gradient of a bias: one thread takes them all. */
static inline int64_t batch_at_once(const Call *call) {
    return call->grad_bias && !call->grad_bias_batch ? call->batch : 1;
}
static inline int64_t heads_at_once(const Call *call) {
    return call->grad_bias && !call->grad_bias_head ? call->kv_heads : 1;
}

/* Dropout: whether a weight is kept depends on the hash of its place, `mixed(row_hash ^ key_hash)`, which the kernels mix
 * in vectors (see `kept` of scores.h). So forward and backward drop the same ones, in any order of tiles. */
#define MIX_1 0x7feb352d /* as in core/drops.py */
#define MIX_2 0x846ca68b

static inline const uint32_t *row_hashes_of(const Call *call, int64_t b, int64_t h) {
    return call->row_hashes + (b * call->heads + h) * call->num_rows;
}

static inline const uint32_t *key_hashes_of(const Call *call, int64_t b) {
    return call->key_hashes + b * call->num_keys;
}

static inline void hash_rows(const Call *call, int64_t b, int64_t h, int64_t first, int count, uint32_t *hash) {
    if (call->drop_below)
        memcpy(hash, row_hashes_of(call, b, h) + first, count * sizeof *hash);
}

static inline void hash_keys(const Call *call, int64_t b, int64_t first, int count, uint32_t *hash) {
    if (call->drop_below)
        memcpy(hash, key_hashes_of(call, b) + first, count * sizeof *hash);
}

/* The factor of the weights that dropout keeps. */
static inline float scale_of_kept(const Call *call) { return call->drop_below ? call->keep_scale : 1; }
