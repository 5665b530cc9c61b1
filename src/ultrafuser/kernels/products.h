/* Products of a few rows with weights, and of any number of rows in bf16. */

#pragma once

#include <omp.h>

#include "numbers.h"

#define KEPT 64 /* outputs whose weights stay in the cache */
#define TILE 4  /* outputs: the unit in which threads share the work, and those of a tile */

/* y[g, m, o] = sum over i of x[g, m, i] * weight[g, o, i], for a few rows m; of int8 times units[g, o].

   Decoding multiplies one to some tens of rows by every weight there is, so the time is that of reading weights, if
   each is read once and in order, whatever the number of rows. So a tile of a few outputs meets all rows while it is
   in the cache, and each thread gets a part of the outputs. Weights are fp32, bf16, fp16 or int8; rows, sums and
   outputs are fp32. Where there are PAIRS, rows that meet bf16 weights are rounded to bf16, as models in bf16 do.

   A sum is made in the same order for any number of rows, members and threads: an answer does not depend on which
   others are in its batch. */

/* `rows` by `outs` results: of outputs `first`, `first + gap`, ... Rows, outs and kind are constants where this is inlined,
   so `sums` lies in registers. `weight` and `y` begin at output `first`, `units` at output 0. */
INLINE void tile(const char *x, const char *weight, const float *units, float *y, long num_in, long num_out,
                 long first, long gap, int rows, int outs, long ahead, enum kind kind) {
    const enum kind own = rows_kind(kind);
    const long size = size_of(kind), stride = gap * num_in * size, row = num_in * size_of(own), step = lanes_of(kind);
    wide sums[6][4], parts[4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) sums[r][o] = (wide){0};
    long i = 0;
    for (; i + step <= num_in; i += step) {
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) {
            const char *at = weight + o * stride + i * size;
            parts[o] = load(at, kind);
            KEEP(parts[o]);
            if (ahead) __builtin_prefetch(at + ahead, 0, 2);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            wide values = load(x + r * row + i * size_of(own), own);
            KEEP(values);
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) sums[r][o] = add_product(sums[r][o], values, parts[o], kind);
        }
    }
    if (i < num_in) {
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++)
                sums[r][o] += rest_product(x + r * row + i * size_of(own), weight + o * stride + i * size, num_in - i,
                                           kind);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        four all = {0};
        if (outs == 4)
            all = wide_sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
        else
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) all[o] = wide_sum_of(sums[r][o]);
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++)
            y[r * num_out + o * gap] = all[o] * (kind == INT8 ? units[first + o * gap] : 1.0f);
    }
}

/* A tile is a function of its own, for the compiler runs out of registers where several are parts of one. */
#define DEFINE_TILE(kind, rows, outs)                                                                                  \
    static NOINLINE void tile_##kind##_##rows##_##outs(const char *x, const char *weight, const float *units,         \
                                                       float *y, long num_in, long num_out, long first, long gap,      \
                                                       long ahead) {                                                   \
        tile(x, weight, units, y, num_in, num_out, first, gap, rows, outs, ahead, kind);                               \
    }

#define CASE(kind, rows, outs)                                                                                         \
    case 10 * outs + rows:                                                                                             \
        tile_##kind##_##rows##_##outs(x + r * row, weight + o * stride, units, y + r * num_out + o, num_in, num_out,   \
                                      o, gap, ahead);                                                                  \
        break;

/* The tiles that there are, by rows and outputs: for as many registers as there are. */
#define MOST_ROWS 6
/* Bytes that weights are asked for ahead: where a few rows do not wait for arithmetic, none. */
#define AHEAD_FOR(kind, rows) (rows > (kind == PAIRS ? 3 : 2) ? AHEAD : kind == PAIRS && rows == 3 ? AHEAD / 4 : 0)
#if WIDE > LANES
#define NUM_STREAMS(num_rows) 4
#define TILES(DO, kind) DO(kind, 1, 4) DO(kind, 2, 4) DO(kind, 3, 4) DO(kind, 4, 4) DO(kind, 5, 4) DO(kind, 6, 4)
#else
#define NUM_STREAMS(num_rows) (num_rows <= 2 ? 4 : 2)
#define TILES(DO, kind) DO(kind, 1, 4) DO(kind, 2, 4) DO(kind, 3, 2) DO(kind, 4, 2) DO(kind, 5, 2) DO(kind, 6, 2)
#endif

/* All rows by the outputs [first, last) of one member. The outputs of a tile lie a quarter (or half) of them apart, so
   that weights are read as some streams, each from start to end: neighbours would be read in jumps, a quarter slower.
   With several rows arithmetic takes as long as reading does, and memory would rest meanwhile: a few KiB ahead are
   asked for, into the second cache. */
#define DEFINE_OUTPUTS(kind)                                                                                           \
    DEFINE_TILE(kind, 1, 1) TILES(DEFINE_TILE, kind)                                                                   \
    static void outputs_##kind(const char *x, const char *weight, const float *units, float *y, long num_rows,         \
                               long num_in, long num_out, long first, long last) {                                     \
        const long num_blocks = (num_rows + MOST_ROWS - 1) / MOST_ROWS, num_streams = NUM_STREAMS(num_rows);           \
        const long stride = num_in * size_of(kind), gap = (last - first) / num_streams;                                \
        const long row = num_in * size_of(rows_kind(kind));                                                            \
        const long ahead = AHEAD_FOR(kind, num_rows);                                                                  \
        for (long o = first; o < first + gap; o++)                                                                     \
            for (long block = 0; block < num_blocks; block++) {                                                        \
                const long r = num_rows * block / num_blocks, rows = num_rows * (block + 1) / num_blocks - r;          \
                switch (10 * num_streams + rows) { TILES(CASE, kind) }                                                 \
            }                                                                                                          \
        for (long o = first + num_streams * gap; o < last; o++)                                                        \
            for (long r = 0; r < num_rows; r++)                                                                        \
                tile_##kind##_1_1(x + r * row, weight + o * stride, units, y + r * num_out + o, num_in, num_out, o, 1, \
                                  0);                                                                                  \
    }

DEFINE_OUTPUTS(FP32)
DEFINE_OUTPUTS(BF16)
DEFINE_OUTPUTS(FP16)
DEFINE_OUTPUTS(INT8)

#if HAS_PAIRS
DEFINE_OUTPUTS(PAIRS)
#endif

/* What one thread has of a product: outputs [first, last) of a member, in units of a tile, then of the next member. Outputs
   may be several pieces side by side, as gate and up are; then it has the same part of each. */
struct share {
    long now, end, per_member, width, member, first, last;
};

static struct share share_of(long num_members, long num_out, long num_pieces, int part, int num_parts) {
    const long width = num_out / num_pieces, per_member = (width + TILE - 1) / TILE, all = num_members * per_member;
    return (struct share){all * part / num_parts, all * (part + 1) / num_parts, per_member, width, 0, 0, 0};
}

/* The next member, if there is one. */
static int goes_on(struct share *s) {
    if (s->now >= s->end) return 0;
    s->member = s->now / s->per_member;
    const long start = s->member * s->per_member, stop = start + s->per_member < s->end ? start + s->per_member : s->end;
    s->first = (s->now - start) * TILE;
    s->last = (stop - start) * TILE < s->width ? (stop - start) * TILE : s->width;
    s->now = stop;
    return 1;
}

/* Rows as weights of a kind want them: rounded, where these are multiplied as PAIRS. */
static const char *rows_for(enum kind *kind, const float *x, long count, uint16_t *rounded) {
#if HAS_PAIRS
    if (*kind == BF16) {
        *kind = PAIRS;
        round_rows(x, rounded, count);
        return (const char *)rounded;
    }
#endif
    return (const char *)x;
}

/* Outputs [first, last) of each piece, of all rows of a member. */
static void outputs(enum kind kind, const char *rows, const char *weight, const float *units, float *y, long num_rows,
                    long num_in, long num_out, long width, long first, long last) {
    void (*const call[])(const char *, const char *, const float *, float *, long, long, long, long, long) = {
        outputs_FP32, outputs_BF16, outputs_FP16, outputs_INT8,
#if HAS_PAIRS
        outputs_PAIRS,
#endif
    };
    for (long piece = 0; piece < num_out; piece += width)
        call[kind](rows, weight + piece * num_in * size_of(kind), kind == INT8 ? units + piece : units, y + piece, num_rows,
                   num_in, num_out, first, last);
}

/* The product's share of one thread; `rounded` is room for the rows of one member. */
static void work(const float *x, const char *weight, const float *units, float *y, struct share share, long num_rows,
                 long num_in, long num_out, enum kind kind, uint16_t *rounded) {
    while (goes_on(&share)) {
        const long before = share.member * num_out;
        enum kind own = kind;
        const char *rows = rows_for(&own, x + share.member * num_rows * num_in, num_rows * num_in, rounded);
        outputs(own, rows, weight + before * num_in * size_of(kind), kind == INT8 ? units + before : units,
                y + before * num_rows, num_rows, num_in, num_out, share.width, share.first, share.last);
    }
}

/* `rounded` is room for the rows of one member for each thread. */
void ultrafuser_few_rows(const float *x, const void *weight, const float *units, float *y, long num_members,
                         long num_rows, long num_in, long num_out, int kind, int num_threads, uint16_t *rounded) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) if (num_threads > 1)
    for (int part = 0; part < num_threads; part++)
        work(x, weight, units, y, share_of(num_members, num_out, 1, part, num_threads), num_rows, num_in, num_out, kind,
             rounded + part * num_rows * num_in);
}

int ultrafuser_has_pairs(void) { return HAS_PAIRS; }

/* y [num_rows, num_out] of x [num_rows, num_in] and weight [num_out, num_in], both bf16: of any number of rows, each to the
   bit what `ultrafuser_few_rows` makes of it. Weights of some outputs stay in the cache until all rows have met them. */
void ultrafuser_multiply_pairs(const char *x, const char *weight, float *y, long num_rows, long num_in, long num_out,
                               int num_threads) {
#if HAS_PAIRS
    const long num_tiles = (num_out + TILE - 1) / TILE, num_blocks = (num_rows + MOST_ROWS - 1) / MOST_ROWS;
    const long row = 2 * num_in, stride = 2 * num_in, gap = 1;
    const float *const units = 0;
    const long ahead = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) if (num_threads > 1)
    for (int part = 0; part < num_threads; part++) {
        const long end = num_tiles * (part + 1) / num_threads * TILE, last = end < num_out ? end : num_out;
        for (long first = num_tiles * part / num_threads * TILE; first < last; first += KEPT) {
            const long stop = first + KEPT < last ? first + KEPT : last, tiled = first + (stop - first) / TILE * TILE;
            for (long block = 0; block < num_blocks; block++) {
                const long r = num_rows * block / num_blocks, rows = num_rows * (block + 1) / num_blocks - r;
                for (long o = first; o < tiled; o += TILE)
                    switch (10 * TILE + rows) { TILES(CASE, PAIRS) }
                for (long o = tiled; o < stop; o++)
                    for (long each = r; each < r + rows; each++)
                        tile_PAIRS_1_1(x + each * row, weight + o * stride, 0, y + each * num_out + o, num_in, num_out,
                                       o, 1, 0);
            }
        }
    }
#else
    memset(y, 0xff, num_rows * num_out * sizeof(float)); /* never called: NaN */
#endif
}
