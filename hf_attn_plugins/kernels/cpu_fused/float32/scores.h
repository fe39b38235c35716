/* From products to scores of altered calls, with softcap or a bias: see ../altered.h. */
#pragma once
#include "sight.h"
#include "../altered.h"

/* 2**x - 1 = x (EXPM1_1 + EXPM1_2 x + ...) on [-0.5, 0.5]: the series to x**7, whose last term a Chebyshev polynomial
 * spreads over those before it. The relative error is below 6e-8. */
#define EXPM1_1 0.693147188f
#define EXPM1_2 0.240226507f
#define EXPM1_3 0.0555035724f
#define EXPM1_4 0.00961812911f
#define EXPM1_5 0.00133907559f
#define EXPM1_6 0.000154035304f

/* tanh(x ln 2 / 2) = e / (e + 2) with e = 2**|x| - 1, and the sign of x. For a small x it has as many digits as x. */
INLINE Vec tanh_of_base_2(Vec x) {
    const Ints sign = (Ints)x & (int32_t)0x80000000;
    const Vec magic = splat(0x1.8p23f); /* adding it rounds to an integer */
    const Vec size = smaller_of(splat(40), (Vec)((Ints)x & 0x7fffffff)); /* NaN stays NaN */
    const Vec whole = size + magic - magic, rest = size - whole;
    Vec sum = EXPM1_6 * rest + EXPM1_5;
    sum = sum * rest + EXPM1_4;
    sum = sum * rest + EXPM1_3;
    sum = sum * rest + EXPM1_2;
    sum = sum * rest + EXPM1_1;
    const Vec power = (Vec)((__builtin_convertvector(whole, Ints) + 127) << 23);
    const Vec e = power * (sum * rest) + (power - 1.0f);
    return (Vec)((Ints)(e / (e + 2.0f)) | sign);
}

/* The score of a product, without the bias. `slope` becomes its derivative, that of tanh. */
INLINE Vec capped(const Shape *shape, Vec product, Vec *slope) {
    if (!shape->is_capped) {
        *slope = splat(1);
        return product * shape->scale;
    }
    const Vec tanh = tanh_of_base_2(product * shape->to_tanh);
    *slope = (1.0f - tanh) * (1.0f + tanh);
    return tanh * shape->softcap;
}

/* Where the bias is -inf nothing is seen, whatever the score; a NaN there does not spread. */
INLINE Vec with_bias(Vec score, Vec bias) {
    const Vec nothing = splat(-INFINITY);
    return choose(bias == nothing, nothing, score + bias);
}

/* Biases of a row for WIDTH keys from `key` on; -inf for keys from `num_keys` on. */
INLINE Vec load_bias(const Bias *bias, int64_t row, int64_t key, int64_t num_keys) {
    const int64_t at = row * bias->row + key * bias->key;
    if (bias->key == 1 && key + WIDTH <= num_keys && bias->dtype == FLOAT32_BIAS)
        return load((const float *)bias->data + at);
    if (bias->key == 1 && key + WIDTH <= num_keys && bias->dtype == BFLOAT16_BIAS)
        return load_stored(bias->data + 2 * at, BFLOAT16);
    if (bias->key == 1 && key + WIDTH <= num_keys && bias->dtype == FLOAT16_BIAS)
        return load_stored(bias->data + 2 * at, FLOAT16);
    Vec x = splat(-INFINITY);
    for (int i = 0; i < WIDTH && key + i < num_keys; i++)
        x[i] = bias_element(bias->data, at + i * bias->key, bias->dtype);
    return x;
}

/* tile[row][lane] = the bias of a group of queries from `first` on and of `count` keys from `key` on. Returns whether
 * some element is not -inf. */
INLINE int take_bias_of(const Bias *bias, int64_t first, int64_t num_rows, int64_t key, int64_t count, const int dtype,
                        float *tile) {
    int any = 0;
    for (int lane = 0; lane < GROUP; lane++) {
        const int64_t at = smaller(first + lane, num_rows - 1) * bias->row + key * bias->key;
        for (int64_t i = 0; i < count; i++) {
            const float value = bias_element(bias->data, at + i * bias->key, dtype);
            any |= value != -INFINITY;
            tile[i * GROUP + lane] = value;
        }
    }
    return any;
}

static inline int take_bias(const Bias *bias, int64_t first, int64_t num_rows, int64_t key, int64_t count,
                            float *tile) {
    switch (bias->dtype) {
    case FLOAT32_BIAS: return take_bias_of(bias, first, num_rows, key, count, FLOAT32_BIAS, tile);
    case BFLOAT16_BIAS: return take_bias_of(bias, first, num_rows, key, count, BFLOAT16_BIAS, tile);
    case FLOAT16_BIAS: return take_bias_of(bias, first, num_rows, key, count, FLOAT16_BIAS, tile);
    default: return take_bias_of(bias, first, num_rows, key, count, BOOL_BIAS, tile);
    }
}

/* The lanes whose weights dropout keeps, as all ones, from the hashes of the held rows and of the walked one. */
INLINE Ints kept(const Call *call, const uint32_t *held, uint32_t walked) {
    Bits x = (Bits)load_ints((const int32_t *)held) ^ walked;
    x = (x ^ x >> 16) * (uint32_t)MIX_1;
    x = (x ^ x >> 15) * (uint32_t)MIX_2;
    x ^= x >> 16;
    return (Ints)(x >= call->drop_below);
}
