/* What decoding does with a few rows: products with weights, and the layers of Llama-like models. */

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
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
#define PATIENCE 2000 /* spins: some tens of microseconds */
#ifdef __x86_64__
#define PAUSE() _mm_pause()
#else
#define PAUSE()
#endif
#define SHARED 32768 /* numbers from which several threads make them faster than one */
#define AHEAD 4096 /* bytes */
#define LINE 64    /* bytes of the processor's cache */
#define KEPT 64 /* outputs whose weights stay in the cache */
#define CACHED 262144 /* bytes of weights, after which outputs are still in the cache */
#define TILE 4 /* outputs: the unit in which threads share the work, and those of a tile */

/* PAIRS: bf16 by bf16, two products an instruction, where the processor has it; rows are rounded for it. */
enum kind { FP32, BF16, FP16, INT8, PAIRS };
#ifdef __AVX512BF16__
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

typedef float four __attribute__((vector_size(16)));
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float wide_anywhere __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDE)));
typedef uint16_t few_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));

/* y[g, m, o] = sum over i of x[g, m, i] * weight[g, o, i], for a few rows m; of int8 times units[g, o].

   Decoding multiplies one to some tens of rows by every weight there is, so the time is that of reading weights, if
   each is read once and in order, whatever the number of rows. So a tile of a few outputs meets all rows while it is
   in the cache, and each thread gets a part of the outputs. Weights are fp32, bf16, fp16 or int8; rows, sums and
   outputs are fp32. Where there are PAIRS, rows that meet bf16 weights are rounded to bf16, as models in bf16 do.

   A sum is made in the same order for any number of rows, members and threads: an answer does not depend on which
   others are in its batch. */

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
    char copy[4 * WIDE] = {0};
    memcpy(copy, at, count * size_of(kind));
    return load(copy, kind);
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

/* `rows` by `outs` results: of outputs `first`, `first + gap`, ... Rows, outs and kind are constants where this is inlined,
   so `sums` lies in registers. `weight` and `y` begin at output `first`, `units` at output 0. */
INLINE void tile(const char *x, const char *weight, const float *units, float *y, long num_in, long num_out,
                 long first, long gap, int rows, int outs, int reads_ahead, enum kind kind) {
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
            if (reads_ahead) __builtin_prefetch(at + AHEAD, 0, 2);
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
                                                       int reads_ahead) {                                              \
        tile(x, weight, units, y, num_in, num_out, first, gap, rows, outs, reads_ahead, kind);                         \
    }

#define CASE(kind, rows, outs)                                                                                         \
    case 10 * outs + rows:                                                                                             \
        tile_##kind##_##rows##_##outs(x + r * row, weight + o * stride, units, y + r * num_out + o, num_in, num_out,   \
                                      o, gap, reads_ahead);                                                            \
        break;

/* The tiles that there are, by rows and outputs: for as many registers as there are. */
#define MOST_ROWS 6
#define FROM_MEMORY(kind) (kind == PAIRS ? 3 : 2) /* rows up to which arithmetic is not what one waits for */
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
        const int reads_ahead = num_rows > FROM_MEMORY(kind);                                                          \
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

static void round_rows(const float *x, uint16_t *y, long count) {
    for (long i = 0; i < count; i += WIDE) {
        const __mmask16 rest = count - i < WIDE ? (1 << (count - i)) - 1 : 0xffff;
        _mm256_mask_storeu_epi16(y + i, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + i)));
    }
}
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
    const int reads_ahead = 0;
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

/* B of the adapters of one layer of a product: which of its outputs they add to, from which of its ranks. */
struct up {
    const void *weight; /* [num_ranks, num_out] */
    long first_out, num_out, first_rank, num_ranks;
};

#define MOST_UPS 3

/* The linear layers of one product, for all members or one; `weight` may be one for all (a shared base). */
struct matrix {
    const void *weight; /* [members, num_out, num_in] */
    const float *units; /* [members, num_out]: what one of an int8 weight is; else none */
    const float *bias;  /* [members, num_out], or none */
    /* Adapters of the members: B (scales * A x), with the ranks of all side by side; scales of others' ranks are 0. */
    const void *down;    /* A [num_ranks, num_in] */
    const float *scales; /* [G, num_ranks] */
    struct up ups[MOST_UPS];
    long members, num_in, num_out, num_ranks, num_ups;
    int kind, adapter_kind;
};

/* y[o] += shares[0] * weight[ranks[0], o] + shares[1] * ..., of four ranks: as many streams as are read well at once. */
INLINE void add_ranks(const float *shares, const long *ranks, const char *weight, float *y, long num_out, long first,
                      long last, enum kind kind) {
    const long size = size_of(kind);
    long o = first;
    for (; o + WIDE <= last; o += WIDE) {
        wide sums = *(wide_anywhere *)(y + o);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const char *at = weight + (ranks[i] * num_out + o) * size;
            sums = add_product(sums, (wide){0} + shares[i], load(at, kind), FP32);
            __builtin_prefetch(at + 4 * num_out * size); /* the next four ranks, or those of the next member */
        }
        *(wide_anywhere *)(y + o) = sums;
    }
    if (o < last) {
        wide sums = load_rest((const char *)(y + o), last - o, FP32);
        for (int i = 0; i < 4; i++)
            sums = add_product(sums, (wide){0} + shares[i],
                               load_rest(weight + (ranks[i] * num_out + o) * size, last - o, kind), FP32);
        memcpy(y + o, &sums, (last - o) * sizeof(float));
    }
}

static void add_up(const float *lowered, const float *scales, const struct up *up, int kind, float *y, long first,
                   long last) {
    float own[4];
    long ranks[4], count = 0;
    for (long rank = 0; rank < up->num_ranks || count; rank++) {
        const int is_left = rank < up->num_ranks;
        if (is_left && scales[rank] == 0) continue; /* of another member */
        own[count] = is_left ? lowered[rank] * scales[rank] : 0;
        ranks[count] = is_left ? rank : 0; /* four are filled up with the first, which counts nothing */
        if (++count < 4) continue;
        count = 0;
        if (kind == FP32) add_ranks(own, ranks, up->weight, y, up->num_out, first, last, FP32);
        if (kind == BF16) add_ranks(own, ranks, up->weight, y, up->num_out, first, last, BF16);
        if (kind == FP16) add_ranks(own, ranks, up->weight, y, up->num_out, first, last, FP16);
    }
}

/* What adapters and bias add to the outputs [first, last) of a row. */
static void add_to(const struct matrix *a, const float *lowered, long whose, float *y, long member, long first, long last) {
    const float *scales = a->scales + whose * a->num_ranks;
    for (const struct up *up = a->ups; up < a->ups + a->num_ups; up++) {
        const long from = first > up->first_out ? first : up->first_out, end = up->first_out + up->num_out;
        const long to = last < end ? last : end;
        if (from < to)
            add_up(lowered + up->first_rank, scales + up->first_rank, up, a->adapter_kind, y + up->first_out,
                   from - up->first_out, to - up->first_out);
    }
    if (a->bias)
        for (long o = first; o < last; o++) y[o] += a->bias[member * a->num_out + o];
}

/* The threads of one pass: each does its part of every step and waits for the others before the next. Steps take some
   microseconds, so waiting is spinning, which costs a tenth of what leaving and entering a parallel region does. */
struct team {
    int part, num_parts;
    atomic_int *arrived, *round;
};

static void wait_for_all(const struct team *team) {
    if (team->num_parts == 1) return;
    const int round = atomic_load_explicit(team->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(team->arrived, 1, memory_order_acq_rel) + 1 == team->num_parts) {
        atomic_store_explicit(team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(team->round, round + 1, memory_order_release);
        return;
    }
    for (long spins = 0; atomic_load_explicit(team->round, memory_order_acquire) == round; spins++)
        if (spins < PATIENCE)
            PAUSE();
        else
            sched_yield(); /* more threads than processors */
}

/* What stands between the products of a Llama-like layer: a call each instead of some twenty operations of torch. */

/* Lanes of `yes` where all bits are set, of `no` where none is. */
INLINE vec choose(bits mask, vec yes, vec no) { return (vec)(((bits)yes & mask) | ((bits)no & ~mask)); }

/* exp, to some 2 units in the last place; below -87 it is the smallest normal number. */
INLINE vec exp_of(vec x) {
    const vec low = (vec){0} - 87.0f, high = (vec){0} + 88.0f;
    x = choose((bits)(x < low), low, x); /* a NaN stays one */
    x = choose((bits)(x > high), high, x);
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    const vec shifted = x * 1.44269504088896f + shift;
    const vec whole = shifted - shift;
    const vec rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    vec y = (vec){0} + 1.9875691500e-4f; /* the polynomial of Cephes (expf) */
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return y * (vec)(((bits)shifted << 23) + ((bits){0} + 0x3f800000u));
}

/* One row: x += more (where there is more), then y = x / sqrt(mean of its squares + eps) * weight; y may be more. */
static void add_norm(float *x, const float *more, const float *weight, float *y, long size, float eps) {
    vec squares = {0};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec values = *(vec_anywhere *)(x + i);
        if (more) *(vec_anywhere *)(x + i) = values += *(const vec_anywhere *)(more + i);
        squares += values * values;
    }
    for (; i < size; i++) {
        if (more) x[i] += more[i];
        rest += x[i] * x[i];
    }
    const float factor = 1.0f / __builtin_sqrtf((sum_of(squares) + rest) / size + eps);
    for (i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

/* The same of the rows [first, last) of `num_rows` for each member, with weights of each or one for all. */
static void add_norms(float *x, const float *more, const float *weight, float *y, long num_rows, long size,
                      long weight_members, float eps, long first, long last) {
    for (long row = first; row < last; row++)
        add_norm(x + row * size, more ? more + row * size : 0,
                 weight + (weight_members > 1 ? row / num_rows : 0) * size, y + row * size, size, eps);
}

void ultrafuser_add_norm(float *x, const float *more, const float *weight, float *y, long num_members, long num_rows,
                         long size, long weight_members, float eps, int num_threads) {
    const long all = num_members * num_rows;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && all * size > SHARED)
    for (int part = 0; part < num_threads; part++)
        add_norms(x, more, weight, y, num_rows, size, weight_members, eps, all * part / num_threads,
                  all * (part + 1) / num_threads);
}

/* y = silu(gate) * up, of the columns [first, last) of a row that holds both side by side. */
static void silu_mul(const float *gate, const float *up, float *y, long first, long last) {
    long i = first;
    for (; i + LANES <= last; i += LANES) {
        const vec g = *(const vec_anywhere *)(gate + i);
        *(vec_anywhere *)(y + i) = g / (1.0f + exp_of(-g)) * *(const vec_anywhere *)(up + i);
    }
    if (i < last) {
        const vec g = rest_of(gate + i, last - i), done = g / (1.0f + exp_of(-g)) * rest_of(up + i, last - i);
        memcpy(y + i, &done, (last - i) * sizeof(float));
    }
}

void ultrafuser_silu_mul(const float *gate_up, float *y, long num_rows, long size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_rows * size > SHARED)
    for (long row = 0; row < num_rows; row++)
        silu_mul(gate_up + 2 * row * size, gate_up + (2 * row + 1) * size, y + row * size, 0, size);
}

/* y [G, M, num_out] of x [G, M, num_in], the share of one thread. What is added to outputs is added a block of them at a
   time, before weights that are read push them out of the cache.

   `lowered`: where there are adapters, room for [G * M, num_ranks]. `active`: where outputs are gates and ups, what becomes
   of them, [G, M, num_out / 2]; else none. */
static void multiply(const struct matrix *a, const float *x, float *y, float *lowered, float *active, uint16_t *rounded,
                     long num_members, long num_rows, const struct team *team) {
    const long all = num_members * num_rows, rows = a->members == 1 ? all : num_rows;
    const long size = a->num_in * size_of(a->kind), inner = a->num_out / 2;
    struct share share = share_of(a->members, a->num_out, active ? 2 : 1, team->part, team->num_parts);
    if (a->num_ranks) {
        work(x, a->down, 0, lowered, share_of(1, a->num_ranks, 1, team->part, team->num_parts), all, a->num_in,
             a->num_ranks, a->adapter_kind, rounded);
        wait_for_all(team);
    }
    const long is_plain = !a->num_ranks && !a->bias && !active, fit = CACHED / size / WIDE * WIDE;
    const long block = is_plain ? share.width : fit > WIDE ? fit : WIDE;
    while (goes_on(&share)) {
        const long before = share.member * a->num_out, start = share.member * rows, end = start + rows;
        enum kind kind = a->kind;
        const char *own = rows_for(&kind, x + start * a->num_in, rows * a->num_in, rounded);
        for (long first = share.first, last; first < share.last; first = last) {
            last = first + block < share.last ? first + block : share.last;
            /* Other threads have read these lines: taking them back from their caches is begun now. */
            for (long row = start; row < end && active; row++)
                for (long o = first; o < last; o += LINE / 4) __builtin_prefetch(active + row * inner + o, 1);
            outputs(kind, own, (const char *)a->weight + before * size, kind == INT8 ? a->units + before : a->units,
                    y + before * rows, rows, a->num_in, a->num_out, share.width, first, last);
            for (long row = start; row < end && (a->num_ranks || a->bias); row++)
                for (long piece = 0; piece < a->num_out; piece += share.width)
                    add_to(a, lowered + row * a->num_ranks, row / num_rows, y + row * a->num_out, share.member,
                           piece + first, piece + last);
            for (long row = start; row < end && active; row++)
                silu_mul(y + 2 * row * inner, y + (2 * row + 1) * inner, active + row * inner, first, last);
        }
    }
}

/* Positions as angles: x * cos + (x, half a turn on) * sin. */
INLINE void turn(const float *x, const float *cosines, const float *sines, float *y, long size) {
    const long half = size / 2;
    for (long i = 0; i < half; i++) {
        y[i] = x[i] * cosines[i] + x[i + half] * sines[i];
        y[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
}

/* LANES numbers of a cache, which is in fp32 or bf16. */
INLINE vec kept_at(const char *cache, long at, enum kind kind) {
    if (kind == FP32) return *(const vec_anywhere *)(cache + 4 * at);
    return (vec)(__builtin_convertvector(*(const few_halves *)(cache + 2 * at), bits) << 16);
}

/* Scores of `count` columns, and the largest of them. The first query that reads keys asks for those of some columns on, and
   for the values, which come next: memory alone does not look beyond a page. */
INLINE float scores_of(const float *query, const char *keys, const char *values, float *scores, long count, long size,
                       int reads_ahead, enum kind kind) {
    const long num_bytes = size * size_of(kind);
    float most = -__builtin_inff();
    for (long column = 0; column < count; column++) {
        for (long at = column * num_bytes; reads_ahead && at < (column + 1) * num_bytes; at += LINE) {
            __builtin_prefetch(keys + at + AHEAD, 0, 2);
            __builtin_prefetch(values + at, 0, 2);
        }
        vec sums[2] = {{0}, {0}};
        const long key = column * size;
        long i = 0;
        for (; i + 2 * LANES <= size; i += 2 * LANES) {
            sums[0] += *(const vec_anywhere *)(query + i) * kept_at(keys, key + i, kind);
            sums[1] += *(const vec_anywhere *)(query + i + LANES) * kept_at(keys, key + i + LANES, kind);
        }
        if (i < size) sums[0] += *(const vec_anywhere *)(query + i) * kept_at(keys, key + i, kind);
        scores[column] = sum_of(sums[0] + sums[1]);
        most = scores[column] > most ? scores[column] : most;
    }
    return most;
}

/* `blocks` vectors of what the columns say, from value `first` on, weighted; a constant where this is inlined. */
INLINE void weigh(const char *values, long first, const float *shares, float *y, long count, long size, float factor,
                  int blocks, enum kind kind) {
    vec sums[4] = {{0}, {0}, {0}, {0}};
    for (long column = 0; column < count; column++)
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++)
            sums[b] += kept_at(values, column * size + first + b * LANES, kind) * shares[column];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++) *(vec_anywhere *)(y + first + b * LANES) = sums[b] * factor;
}

/* Attention of one layer. */
struct attention {
    const float *qkv;               /* [G, B * T, (Q + 2 K) * D] */
    const float *norm_q, *norm_k;   /* [G or 1, D]: weights of a norm of each head, or none */
    const float *cosines, *sines;   /* [positions, D]; the sine has the sign of the rotation */
    char *keys, *values;            /* [rows of the cache, K, L, D], in fp32 or bf16 */
    const int64_t *rows, *starts;   /* [B * G], members varying fastest: of the cache, and columns it holds */
    float *y;                       /* [G, B * T, Q * D] */
    float *scores;                  /* [threads, L], filled up to whole vectors */
    long num_members, num_choices, num_new, num_heads, num_kv_heads, size, length;
    long window;       /* columns that a token sees, itself included; 0: all */
    long norm_members; /* whose norms there are: G, or 1 for all */
    int kind;          /* of keys and values; bf16 only where there are PAIRS */
    float eps;
};

#define LARGEST_HEAD 256

/* One head: normalised where there are weights for it, then turned to its position. */
INLINE void place(const struct attention *a, const float *own, const float *norm, long member, long column, float *to) {
    float normed[LARGEST_HEAD];
    if (norm) {
        add_norm((float *)own, 0, norm + (a->norm_members > 1 ? member * a->size : 0), normed, a->size, a->eps);
        own = normed;
    }
    turn(own, a->cosines + column * a->size, a->sines + column * a->size, to, a->size);
}

/* A head's numbers join the cache. */
INLINE void keep(const float *own, char *cache, long at, long size, enum kind kind) {
    if (kind == FP32) memcpy(cache + 4 * at, own, size * sizeof(float));
#if HAS_PAIRS
    if (kind == BF16) round_rows(own, (uint16_t *)cache + at, size);
#endif
}

/* All new tokens of one row by one head of keys and values: what is new joins the cache, then queries read it. */
INLINE void attend(const struct attention *a, long row, long head, float *scores, enum kind kind) {
    const long size = a->size, share = a->num_heads / a->num_kv_heads, start = a->starts[row];
    const long width = (a->num_heads + 2 * a->num_kv_heads) * size, member = row % a->num_members;
    const long first = (member * a->num_choices + row / a->num_members) * a->num_new;
    const long slot = (a->rows[row] * a->num_kv_heads + head) * a->length * size * size_of(kind);
    char *keys = a->keys + slot, *values = a->values + slot;
    for (long t = 0; t < a->num_new; t++) {
        const float *own = a->qkv + (first + t) * width + (a->num_heads + head) * size;
        const long column = start + t;
        float key[LARGEST_HEAD];
        place(a, own, a->norm_k, member, column, key);
        keep(key, keys, column * size, size, kind);
        keep(own + a->num_kv_heads * size, values, column * size, size, kind);
    }
    const float scale = 1.0f / __builtin_sqrtf((float)size);
    for (long t = 0; t < a->num_new; t++) {
        const long column = start + t, end = column + 1;
        const long from = a->window && end > a->window ? end - a->window : 0, count = end - from;
        const char *seen_keys = keys + from * size * size_of(kind), *seen = values + from * size * size_of(kind);
        for (long q = head * share; q < (head + 1) * share; q++) {
            float query[LARGEST_HEAD], total = 0;
            place(a, a->qkv + (first + t) * width + q * size, a->norm_q, member, column, query);
            for (long d = 0; d < size; d++) query[d] *= scale;
            const int is_first = t == 0 && q == head * share;
            const float most = scores_of(query, seen_keys, seen, scores, count, size, is_first, kind);
            long i = 0;
            vec sums = {0};
            for (; i + LANES <= count; i += LANES)
                sums += *(vec_anywhere *)(scores + i) = exp_of(*(vec_anywhere *)(scores + i) - most);
            if (i < count) {
                const vec last = exp_of(rest_of(scores + i, count - i) - most);
                memcpy(scores + i, &last, (count - i) * sizeof(float));
                for (long lane = 0; lane < count - i; lane++) total += last[lane];
            }
            total += sum_of(sums);
            float *to = a->y + (first + t) * a->num_heads * size + q * size;
            long d = 0;
            for (; d + 4 * LANES <= size; d += 4 * LANES) weigh(seen, d, scores, to, count, size, 1.0f / total, 4, kind);
            for (; d < size; d += LANES) weigh(seen, d, scores, to, count, size, 1.0f / total, 1, kind);
        }
    }
}

static NOINLINE void attend_FP32(const struct attention *a, long row, long head, float *scores) {
    attend(a, row, head, scores, FP32);
}

static NOINLINE void attend_BF16(const struct attention *a, long row, long head, float *scores) {
    attend(a, row, head, scores, BF16);
}

struct layer {
    struct matrix qkv, out, gate_up, down;
    const float *norm_in, *norm_mlp; /* [G or 1, H] */
    const float *norm_q, *norm_k;    /* [G or 1, D], or none */
};

/* All layers of a stack of Llama-like models: one call where Python would make some two hundred, each of them with its
   instructions and data thrown out of the caches by the weights that were read since the last. */
struct pass {
    const struct layer *layers;
    const float *norm_out;              /* [G or 1, H] */
    char *const *keys, *const *values;  /* of each layer, as in `attention` */
    const float *x;                     /* [G, M, H]: embedded tokens */
    float *y;                           /* [G, M, H]: last hidden states */
    /* [G, M, max((Q + 2 K) D, 2 F)], [G, M, max(Q D, F)], [G, M, H] and for `multiply`: what threads tell each other */
    float *wide, *narrow, *told, *room;
    float *own;                         /* [threads, 2, G, M, H] */
    uint16_t *rounded;                  /* [threads, num_rounded]: rows of a product in bf16 */
    struct attention attention;         /* what all layers have in common */
    long num_layers, hidden_size, norm_members, num_rounded;
    float eps;
};

/* What one thread does. Sums of the residual stream and their norms are made by each thread for itself, which takes less
   than waiting for another one and reading from its cache. */
static void run(const struct pass *p, const struct team *team) {
    const long members = p->attention.num_members, rows = p->attention.num_choices * p->attention.num_new;
    const long all = members * rows, size = p->hidden_size, num_parts = team->num_parts;
    const long part = team->part, num_heads = p->attention.num_choices * members * p->attention.num_kv_heads;
    /* Rows of those members that it multiplies: of all where one weight is for all. */
    const long own_members = p->layers[0].qkv.members, shared = members / own_members;
    const long first = own_members * part / num_parts * shared * rows;
    const long last = (own_members * (part + 1) + num_parts - 1) / num_parts * shared * rows;
    float *scores = p->attention.scores + part * (p->attention.length + LANES);
    uint16_t *rounded = p->rounded + part * p->num_rounded;
    float *x = p->own + 2 * part * all * size, *h = x + all * size;
    struct attention a = p->attention;
    a.qkv = p->wide;
    a.y = p->narrow;
    memcpy(x + first * size, p->x + first * size, (last - first) * size * sizeof(float));
    add_norms(x, 0, p->layers[0].norm_in, h, rows, size, p->norm_members, p->eps, first, last);
    for (long i = 0; i < p->num_layers; i++) {
        const struct layer *own = p->layers + i;
        const float *norm_after = i + 1 < p->num_layers ? own[1].norm_in : p->norm_out;
        multiply(&own->qkv, h, p->wide, p->room, 0, rounded, members, rows, team);
        wait_for_all(team);
        a.keys = p->keys[i];
        a.values = p->values[i];
        a.norm_q = own->norm_q;
        a.norm_k = own->norm_k;
        for (long u = num_heads * part / num_parts; u < num_heads * (part + 1) / num_parts; u++)
            (a.kind == BF16 ? attend_BF16 : attend_FP32)(&a, u / a.num_kv_heads, u % a.num_kv_heads, scores);
        wait_for_all(team);
        multiply(&own->out, p->narrow, p->told, p->room, 0, rounded, members, rows, team);
        wait_for_all(team);
        add_norms(x, p->told, own->norm_mlp, h, rows, size, p->norm_members, p->eps, first, last);
        multiply(&own->gate_up, h, p->wide, p->room, p->narrow, rounded, members, rows, team);
        wait_for_all(team);
        multiply(&own->down, p->narrow, p->told, p->room, 0, rounded, members, rows, team);
        wait_for_all(team);
        add_norms(x, p->told, norm_after, h, rows, size, p->norm_members, p->eps, first, last);
    }
    const long from = all * part / num_parts, to = all * (part + 1) / num_parts;
    memcpy(p->y + from * size, h + from * size, (to - from) * size * sizeof(float));
}

void ultrafuser_run(const struct pass *p, int num_threads) {
    atomic_int arrived = 0, round = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        const struct team team = {omp_get_thread_num(), omp_get_num_threads(), &arrived, &round};
        run(p, &team);
    }
}
