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
enum { FLOAT32, BFLOAT16 };

INLINE Vec load_stored(const char *from, const int dtype) {
    if (dtype == FLOAT32)
        return *(const VecInMemory *)from;
    return (Vec)(__builtin_convertvector(*(const HalvesInMemory *)from, Bits) << 16);
}

/* Round to nearest even, as the hardware does; NaN stays NaN. */
INLINE void store_stored(char *to, Vec x, const int dtype) {
    if (dtype == FLOAT32) {
        *(VecInMemory *)to = x;
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
