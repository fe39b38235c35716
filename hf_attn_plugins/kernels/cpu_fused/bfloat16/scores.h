/* From products to scores of altered calls: see altered.h. Plain calls come here for decoding only. */
#pragma once
#include "visibility.h" /* first: it says what ELEMENT is */
#include "../altered.h"

/* The score of a product, without the bias. `slope` becomes its derivative, that of tanh, where it is not NULL.
 * tanh(y) = 1 - 2 r and its slope is 4 r (1 - r), with r = 1 / (1 + exp(2 y)). */
INLINE __m512 capped(const Shape *shape, __m512 product, __m512 *slope) {
    const __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
    if (!shape->is_capped) {
        if (slope)
            *slope = one;
        return _mm512_mul_ps(product, _mm512_set1_ps(shape->scale));
    }
    /* 2**60 is far enough, and its inverse is not 0. A NaN stays one. */
    const __m512 power = _mm512_min_ps(_mm512_set1_ps(60), _mm512_mul_ps(product, _mm512_set1_ps(shape->to_tanh)));
    const __m512 sum = _mm512_add_ps(exp2_of(power), one), guess = _mm512_rcp14_ps(sum);
    const __m512 inverse = _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, two)); /* Newton's step: 24 bits */
    const __m512 tanh = _mm512_fnmadd_ps(two, inverse, one);
    if (slope)
        *slope = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(4), inverse), _mm512_sub_ps(one, inverse));
    return _mm512_mul_ps(tanh, _mm512_set1_ps(shape->softcap));
}

/* Biases of a row for 16 keys from `key` on; -inf for keys from `num_keys` on. */
static inline __m512 load_bias(const Bias *bias, int64_t row, int64_t key, int64_t num_keys) {
    const int count = (int)smaller(larger(num_keys - key, 0), 16);
    const __mmask16 inside = (1u << count) - 1;
    const char *from = bias->data + (row * bias->row + key) * size_of_bias(bias->dtype);
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    if (bias->key == 1 && bias->dtype == BOOL_BIAS) {
        const __mmask16 seen = _mm_test_epi8_mask(_mm_maskz_loadu_epi8(inside, from), _mm_set1_epi8(-1));
        return _mm512_maskz_mov_ps(~seen, nothing);
    }
    if (bias->key == 1 && bias->dtype == FLOAT32_BIAS)
        return _mm512_mask_loadu_ps(nothing, inside, from);
    if (bias->key == 1 && bias->dtype == FLOAT16_BIAS)
        return _mm512_mask_cvtph_ps(nothing, inside, _mm256_maskz_loadu_epi16(inside, from));
    if (bias->key == 1) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, from));
        return (__m512)_mm512_mask_slli_epi32((__m512i)nothing, inside, bits, 16);
    }
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = -INFINITY;
    for (int i = 0; i < count; i++)
        values[i] = bias_element(bias->data, row * bias->row + (key + i) * bias->key, bias->dtype);
    return _mm512_loadu_ps(values);
}

/* tile[key - begin][lane] = the bias of LANES rows from `first` on and of keys begin .. end, at most TILE. `some`: the
 * lanes for which a key has another bias than -inf. Returns whether there is one. */
static inline int take_bias(const Call *call, const Bias *bias, int64_t first, int64_t begin, int64_t end, float *tile,
                            __mmask16 some[VECTORS]) {
    int any = 0;
    for (int v = 0; v < VECTORS; v++) {
        some[v] = 0;
        for (int64_t key = begin; key < end; key += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) {
                const int64_t row = smaller(first + 16 * v + i, call->num_rows - 1);
                x[i] = (__m512i)load_bias(bias, row, key, call->num_keys);
            }
            transpose(x);
            for (int i = 0; i < 16; i++) {
                _mm512_store_si512(tile + (key - begin + i) * LANES + 16 * v, x[i]);
                if (key + i < end)
                    some[v] |= _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
            }
        }
        any |= some[v];
    }
    return any;
}

/* Where the bias is -inf nothing is seen, whatever the score; a NaN there does not spread. */
INLINE __m512 with_bias(__m512 score, __m512 bias) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    return _mm512_mask_mov_ps(_mm512_add_ps(score, bias), _mm512_cmpeq_ps_mask(bias, nothing), nothing);
}

/* The lanes of 16 whose weights dropout keeps, from the hashes of the held rows and of the walked one. */
INLINE __mmask16 kept(const Call *call, const uint32_t *held, uint32_t walked) {
    __m512i x = _mm512_xor_si512(_mm512_loadu_si512(held), _mm512_set1_epi32((int32_t)walked));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32((int32_t)MIX_1));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32((int32_t)MIX_2));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    return _mm512_cmpge_epu32_mask(x, _mm512_set1_epi32((int32_t)call->drop_below));
}

/* Add the gradients of the scores of a row and 16 keys from `key` on to those of the bias, `num_keys` a row. */
static inline void add_to_bias(float *grad_bias, int64_t row, int64_t key, int64_t num_keys, __m512 grad) {
    const __mmask16 inside = (1u << larger(smaller(num_keys - key, 16), 0)) - 1;
    float *to = grad_bias + row * num_keys + key;
    _mm512_mask_storeu_ps(to, inside, _mm512_add_ps(_mm512_maskz_loadu_ps(inside, to), grad));
}
