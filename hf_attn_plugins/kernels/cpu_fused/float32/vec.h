/* Vectors of WIDTH float32, for any instruction set: the vector types of GCC and Clang, which both compile `a * b + c`
 * to one fused multiply-add. Only the minimum and maximum of x86 are written with its own instructions.
 *
 * The compiler's flags choose the instruction set (see instruction_sets.py); -DWIDTH=n sets another width, for tests. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef WIDTH
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED _Alignas(64)

typedef float Vec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), may_alias));
/* The same in memory, at any address that suits one element. */
typedef float VecInMemory __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t IntsInMemory __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t HalvesInMemory __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

INLINE Vec load(const float *from) { return *(const VecInMemory *)from; }
INLINE void store(float *to, Vec x) { *(VecInMemory *)to = x; }
INLINE Ints load_ints(const int32_t *from) { return *(const IntsInMemory *)from; }
INLINE Vec splat(float x) { return x - (Vec){0}; }

/* Lanes of x where `mask` is all ones, 0 elsewhere. */
INLINE Vec only(Ints mask, Vec x) { return (Vec)((Ints)x & mask); }
INLINE Vec choose(Ints mask, Vec yes, Vec no) { return (Vec)(((Ints)yes & mask) | ((Ints)no & ~mask)); }

/* The larger and the smaller of a and b; b where one of them is NaN. */
INLINE Vec larger_of(Vec a, Vec b) {
#if defined(__AVX512F__) && WIDTH == 16
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && WIDTH == 8
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE Vec smaller_of(Vec a, Vec b) {
#if defined(__AVX512F__) && WIDTH == 16
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && WIDTH == 8
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return choose(a < b, a, b);
#endif
}

/* 2**x - 1 = x (EXP2_1 + EXP2_2 x + ...) on [-0.5, 0.5], fitted for the least relative error of 2**x: 1.1e-7. */
#define EXP2_1 0x1.62e42ap-1f
#define EXP2_2 0x1.ebf9bcp-3f
#define EXP2_3 0x1.c6b752p-5f
#define EXP2_4 0x1.3cea88p-7f
#define EXP2_5 0x1.5bba14p-10f

/* 2**x with a relative error below 1.5e-7 for -126 <= x <= 126. Below, it falls to 0 and is 0 from -127 on; above, it
 * stays at 2**126. NaN stays NaN. A polynomial for 2**(x - round(x)), whose first coefficient must be 1. */
INLINE Vec exp2_of(Vec x) {
    const Vec magic = splat(0x1.8p23f); /* adding it rounds to an integer */
    x = smaller_of(splat(126), larger_of(splat(-127), x));
    const Vec whole = x + magic - magic, rest = x - whole;
    Vec power = EXP2_5 * rest + EXP2_4;
    power = power * rest + EXP2_3;
    power = power * rest + EXP2_2;
    power = power * rest + EXP2_1;
    power = power * rest + 1.0f;
    return (Vec)((Ints)power + (__builtin_convertvector(whole, Ints) << 23));
}

INLINE float sum_of(Vec x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++)
        sum += x[i];
    return sum;
}

INLINE int any_of(Ints mask) {
    int32_t any = 0;
    for (int i = 0; i < WIDTH; i++)
        any |= mask[i];
    return any != 0;
}

/* Storage: how a tensor's elements lie in memory. The products are in float32 whatever the storage. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* `statement` with STORAGE as a constant, so that the compiler makes a loop of its own for every storage. */
#define WITH_STORAGE(dtype, statement)                                                                                 \
    do {                                                                                                               \
        if ((dtype) == FLOAT32) {                                                                                      \
            enum { STORAGE = FLOAT32 };                                                                                \
            statement;                                                                                                 \
        } else if ((dtype) == BFLOAT16) {                                                                              \
            enum { STORAGE = BFLOAT16 };                                                                               \
            statement;                                                                                                 \
        } else {                                                                                                       \
            enum { STORAGE = FLOAT16 };                                                                                \
            statement;                                                                                                 \
        }                                                                                                              \
    } while (0)

INLINE Vec widened(const HalvesInMemory *from) {
#if defined(__AVX512F__) && WIDTH == 16
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__) && WIDTH == 8
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__) && WIDTH == 4
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)from)));
#else
    /* The exponent's bias is 127 in float32 and 15 in float16. A product brings subnormal numbers along. */
    const Bits bits = __builtin_convertvector(*from, Bits), size = (bits & 0x7fff) << 13;
    const Bits special = (Bits)((bits & 0x7c00) == 0x7c00); /* infinity and NaN */
    const Bits wide = (Bits)((Vec)size * 0x1p112f);
    return (Vec)((((size | 0x7f800000) & special) | (wide & ~special)) | (bits & 0x8000) << 16);
#endif
}

/* Round to nearest even, from 65520 on to infinity; NaN stays NaN. */
INLINE void store_narrowed(HalvesInMemory *to, Vec x) {
#if defined(__AVX512F__) && WIDTH == 16
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && WIDTH == 8
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__) && WIDTH == 4
    vst1_u16((uint16_t *)to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    const Bits sign = (Bits)x & 0x80000000, size = (Bits)x ^ sign;
    const Bits normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    /* Below 2**-14, the sum with 0.5 rounds to a multiple of 2**-24, the unit of subnormal numbers. */
    const Bits subnormal = (Bits)((Vec)size + 0.5f) - 0x3f000000;
    const Bits small = (Bits)(size < 0x38800000), infinite = (Bits)(size >= 0x477ff000), nan = (Bits)(x != x);
    Bits narrow = (subnormal & small) | (normal & ~small);
    narrow = (0x7c00 & infinite) | (narrow & ~infinite);
    narrow = (0x7e00 & nan) | (narrow & ~nan);
    *to = __builtin_convertvector(narrow | sign >> 16, Halves);
#endif
}

/* Numbers of 16 bit, each with 16 bits of 0 before it. GCC makes several instructions of the vector conversion. */
INLINE Bits with_zeros(const HalvesInMemory *from) {
#if defined(__AVX512F__) && WIDTH == 16
    return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__) && WIDTH == 8
    return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    return __builtin_convertvector(*from, Bits);
#endif
}

INLINE Vec load_stored(const char *from, const int dtype) {
    if (dtype == FLOAT32)
        return *(const VecInMemory *)from;
    if (dtype == FLOAT16)
        return widened((const HalvesInMemory *)from);
    return (Vec)(with_zeros((const HalvesInMemory *)from) << 16);
}

/* Round to nearest even, as the hardware does; NaN stays NaN. */
INLINE void store_stored(char *to, Vec x, const int dtype) {
    if (dtype == FLOAT32) {
        *(VecInMemory *)to = x;
        return;
    }
    if (dtype == FLOAT16) {
        store_narrowed((HalvesInMemory *)to, x);
        return;
    }
    const Bits bits = (Bits)x, nan = (Bits)(x != x);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits quiet = (bits >> 16) | 0x40;
    *(HalvesInMemory *)to = __builtin_convertvector((quiet & nan) | (rounded & ~nan), Halves);
}

static inline int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
