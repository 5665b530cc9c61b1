/* y[g, m, o] = sum over i of x[g, m, i] * weight[g, o, i], for a few rows m.

   Decoding multiplies one to some tens of rows by every weight there is, so the time is that of reading weights, if
   each is read once and in order, whatever the number of rows. So a tile of a few outputs meets all rows while it is
   in the cache, and threads get neighbouring outputs. Weights are fp32, bf16 or fp16; rows, sums and outputs are fp32.

   A sum is made in the same order for any number of rows, members and threads: an answer does not depend on which
   others are in its batch. */

#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define TILE 4 /* outputs: the unit in which threads share the work */

enum kind { FP32, BF16, FP16 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

INLINE long size_of(enum kind kind) { return kind == FP32 ? 4 : 2; }

/* LANES weights in fp32. */
INLINE vec load(const char *at, enum kind kind) {
    if (kind == FP32) return *(const vec_anywhere *)at;
    if (kind == BF16) return (vec)(__builtin_convertvector(*(const halves *)at, bits) << 16);
#ifdef __F16C__
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    vec values;
    for (int lane = 0; lane < LANES; lane++) {
        _Float16 half;
        memcpy(&half, at + 2 * lane, 2);
        values[lane] = half;
    }
    return values;
#endif
}

/* The last weights of an output, fewer than LANES, filled up with zeros. */
INLINE vec load_rest(const char *at, long count, enum kind kind) {
    char copy[4 * LANES] = {0};
    memcpy(copy, at, count * size_of(kind));
    return load(copy, kind);
}

INLINE float sum_of(vec v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* `rows` by `outs` results; both are constants where this is inlined, so `sums` lies in registers. */
INLINE void tile(const float *x, const char *weight, float *y, long num_in, long num_out, int rows, int outs,
                 enum kind kind) {
    const long size = size_of(kind), stride = num_in * size;
    vec sums[4][4], parts[4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) sums[r][o] = (vec){0};
    long i = 0;
    for (; i + LANES <= num_in; i += LANES) {
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) {
            const char *at = weight + o * stride + i * size;
            parts[o] = load(at, kind);
            __builtin_prefetch(at + outs * stride); /* what the next tile reads */
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const vec values = *(const vec_anywhere *)(x + r * num_in + i);
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) sums[r][o] += values * parts[o];
        }
    }
    if (i < num_in) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const vec values = load_rest((const char *)(x + r * num_in + i), num_in - i, FP32);
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++)
                sums[r][o] += values * load_rest(weight + o * stride + i * size, num_in - i, kind);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) y[r * num_out + o] = sum_of(sums[r][o]);
}

/* All rows by the outputs [first, last) of one member: four rows by two outputs fit into sixteen registers. */
INLINE void outputs(const float *x, const char *weight, float *y, long num_rows, long num_in, long num_out, long first,
                    long last, enum kind kind) {
    const long stride = num_in * size_of(kind);
    for (long o = first; o < last; o += TILE) {
        const long outs = last - o < TILE ? last - o : TILE;
        long r = 0;
        for (; outs == TILE && num_rows - r >= 4; r += 4)
            for (long p = 0; p < TILE; p += 2)
                tile(x + r * num_in, weight + (o + p) * stride, y + r * num_out + o + p, num_in, num_out, 4, 2, kind);
        const float *rest = x + r * num_in;
        float *to = y + r * num_out + o;
        const char *at = weight + o * stride;
        if (outs < TILE) {
            for (long p = 0; p < outs; p++)
                for (r = 0; r < num_rows; r++)
                    tile(x + r * num_in, at + p * stride, y + r * num_out + o + p, num_in, num_out, 1, 1, kind);
        } else if (num_rows - r == 3)
            tile(rest, at, to, num_in, num_out, 3, TILE, kind);
        else if (num_rows - r == 2)
            tile(rest, at, to, num_in, num_out, 2, TILE, kind);
        else if (num_rows - r == 1)
            tile(rest, at, to, num_in, num_out, 1, TILE, kind);
    }
}

static void outputs_fp32(const float *x, const char *weight, float *y, long num_rows, long num_in, long num_out,
                         long first, long last) {
    outputs(x, weight, y, num_rows, num_in, num_out, first, last, FP32);
}

static void outputs_bf16(const float *x, const char *weight, float *y, long num_rows, long num_in, long num_out,
                         long first, long last) {
    outputs(x, weight, y, num_rows, num_in, num_out, first, last, BF16);
}

static void outputs_fp16(const float *x, const char *weight, float *y, long num_rows, long num_in, long num_out,
                         long first, long last) {
    outputs(x, weight, y, num_rows, num_in, num_out, first, last, FP16);
}

/* Part `part` of `num_parts` of the work: outputs of all members, one after another, in units of a tile. */
static void work(const float *x, const char *weight, float *y, long num_members, long num_rows, long num_in,
                 long num_out, int kind, int part, int num_parts) {
    void (*const call[])(const float *, const char *, float *, long, long, long, long, long) = {
        outputs_fp32, outputs_bf16, outputs_fp16};
    const long per_member = (num_out + TILE - 1) / TILE, num_tiles = num_members * per_member;
    long now = num_tiles * part / num_parts;
    const long end = num_tiles * (part + 1) / num_parts;
    while (now < end) {
        const long member = now / per_member, start = member * per_member;
        const long stop = start + per_member < end ? start + per_member : end;
        const long last = (stop - start) * TILE < num_out ? (stop - start) * TILE : num_out;
        call[kind](x + member * num_rows * num_in, weight + member * num_out * num_in * size_of(kind),
                   y + member * num_rows * num_out, num_rows, num_in, num_out, (now - start) * TILE, last);
        now = stop;
    }
}

void ultrafuser_few_rows(const float *x, const void *weight, float *y, long num_members, long num_rows, long num_in,
                         long num_out, int kind, int num_threads) {
    if (num_threads == 1) {
        work(x, weight, y, num_members, num_rows, num_in, num_out, kind, 0, 1);
        return;
    }
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int part = 0; part < num_threads; part++)
        work(x, weight, y, num_members, num_rows, num_in, num_out, kind, part, num_threads);
}
