/* Vectors of numbers: of which types, how they are read, multiplied and summed. */

#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 8
#ifdef __AVX512F__
#define WIDE 16 /* lanes of a product */
#else
#define WIDE 8
#endif
#define AHEAD 4096 /* bytes */
#define LINE 64    /* bytes of the processor's cache */

/* PAIRS: bf16 by bf16, two products an instruction, where the processor has it; rows are rounded for it. */
enum kind { FP32, BF16, FP16, INT8, PAIRS };
#ifdef __AVX512BF16__
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

typedef float four __attribute__((vector_size(16)));
typedef float four_anywhere __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float wide_anywhere __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDE)));
typedef uint16_t few_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));

INLINE long size_of(enum kind kind) { return kind == FP32 ? 4 : kind == INT8 ? 1 : 2; }

/* What rows are where they meet weights of a kind, and how many numbers a vector holds of them. */
INLINE enum kind rows_kind(enum kind kind) { return kind == PAIRS ? PAIRS : FP32; }
INLINE long lanes_of(enum kind kind) { return kind == PAIRS ? 2 * WIDE : WIDE; }

/* A value stays in a register. Compilers like to read it from the cache again for each product, which is slower. */
#ifdef __x86_64__
#define KEEP(value) __asm__("" : "+v"(value))
#else
#define KEEP(value)
#endif

/* Said and not left to the compiler, which rounds once in some tiles and twice in others: sums would depend on them. */
INLINE wide add_product(wide sum, wide x, wide weight, enum kind kind) {
#if HAS_PAIRS
    if (kind == PAIRS) return (wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
#endif
#if defined(__AVX512F__)
    return (wide)_mm512_fmadd_ps((__m512)x, (__m512)weight, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (wide)_mm256_fmadd_ps((__m256)x, (__m256)weight, (__m256)sum);
#else
    wide product = x * weight;
    KEEP(product);
    return sum + product;
#endif
}

/* WIDE weights in fp32; 2 * WIDE as they are if they are PAIRS. */
INLINE wide load(const char *at, enum kind kind) {
    if (kind == FP32 || kind == PAIRS) return *(const wide_anywhere *)at;
#if defined(__AVX512F__)
    if (kind == INT8) return (wide)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
    const __m256i read = _mm256_loadu_si256((const __m256i *)at);
    if (kind == BF16) return (wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read), 16);
    return (wide)_mm512_cvtph_ps(read);
#elif defined(__AVX2__) && defined(__F16C__)
    if (kind == INT8) return (wide)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
    const __m128i read = _mm_loadu_si128((const __m128i *)at);
    if (kind == BF16) return (wide)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read), 16);
    return (wide)_mm256_cvtph_ps(read);
#else
    if (kind == INT8) return __builtin_convertvector(*(const bytes *)at, wide);
    if (kind == BF16) return (wide)(__builtin_convertvector(*(const halves *)at, wide_bits) << 16);
    wide values;
    for (int lane = 0; lane < WIDE; lane++) {
        _Float16 half;
        memcpy(&half, at + 2 * lane, 2);
        values[lane] = half;
    }
    return values;
#endif
}

/* The last weights of an output, fewer than a vector holds, filled up with zeros. */
INLINE wide load_rest(const char *at, long count, enum kind kind) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const uint32_t rest = (1u << count) - 1;
    if (kind == PAIRS) return (wide)_mm512_maskz_loadu_epi16(rest, at);
    if (kind == FP32) return (wide)_mm512_maskz_loadu_ps(rest, at);
    if (kind == INT8) return (wide)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(rest, at)));
    const __m256i read = _mm256_maskz_loadu_epi16(rest, at);
    if (kind == BF16) return (wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read), 16);
    return (wide)_mm512_cvtph_ps(read);
#else
    char copy[4 * WIDE] = {0};
    memcpy(copy, at, count * size_of(kind));
    return load(copy, kind);
#endif
}

/* The product of the last inputs and weights. No part of a tile, where their copies would take the registers. */
static NOINLINE wide rest_product(const char *x, const char *weight, long count, enum kind kind) {
    return add_product((wide){0}, load_rest(x, count, rows_kind(kind)), load_rest(weight, count, kind), kind);
}

/* The same of numbers in fp32, fewer than LANES. */
INLINE vec rest_of(const float *at, long count) {
    vec values = {0};
    memcpy(&values, at, count * sizeof(float));
    return values;
}

/* Lane by lane, and not through memory: a value whose address is taken is kept in no register, here and before. */
INLINE float sum_of(vec v) {
    const four low = {v[0], v[1], v[2], v[3]}, high = {v[4], v[5], v[6], v[7]}, sums = low + high;
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

/* Of a wide one: what four of them cost at once has the same order. */
INLINE float wide_sum_of(wide v) {
#if WIDE == LANES
    return sum_of(v);
#else
    four sums;
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) sums[q] = (v[4 * q] + v[4 * q + 2]) + (v[4 * q + 1] + v[4 * q + 3]);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
#endif
}

/* Sums of four at once, in a third of the instructions. */
INLINE four wide_sums_of(wide a, wide b, wide c, wide d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
    const __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d);
    const __m512 all = (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) +
                       (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    const __m256 half = _mm512_castps512_ps256(all) + (__m256)_mm512_extractf64x4_pd((__m512d)all, 1);
    return (four)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    return (four){wide_sum_of(a), wide_sum_of(b), wide_sum_of(c), wide_sum_of(d)};
#endif
}

#if HAS_PAIRS
/* To bf16, to the nearest. */
static void round_rows(const float *x, uint16_t *y, long count) {
    for (long i = 0; i < count; i += WIDE) {
        const __mmask16 rest = count - i < WIDE ? (1 << (count - i)) - 1 : 0xffff;
        _mm256_mask_storeu_epi16(y + i, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + i)));
    }
}
#endif
