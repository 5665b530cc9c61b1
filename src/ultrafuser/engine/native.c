/* What decoding does with a few rows: products with weights, and what stands between them in a Llama-like layer. */

#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define SHARED 32768 /* numbers from which several threads make them faster than one */
#define TILE 4 /* outputs: the unit in which threads share the work */

enum kind { FP32, BF16, FP16 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* y[g, m, o] = sum over i of x[g, m, i] * weight[g, o, i], for a few rows m.

   Decoding multiplies one to some tens of rows by every weight there is, so the time is that of reading weights, if
   each is read once and in order, whatever the number of rows. So a tile of a few outputs meets all rows while it is
   in the cache, and threads get neighbouring outputs. Weights are fp32, bf16 or fp16; rows, sums and outputs are fp32.

   A sum is made in the same order for any number of rows, members and threads: an answer does not depend on which
   others are in its batch. */

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
            __builtin_prefetch(at + outs * stride, 0, 0); /* what the next tile reads, once: it need not stay */
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

/* The same for a base with the adapters of its members in fp16: y = matrix [x; scales * (down x)], where `matrix` has
   the ranks of all members as further inputs and `scales` [G, ranks] are zero for those of others. `wide` is room for
   [G * M, num_in + ranks], `lowered` for [G * M, ranks]. */
void ultrafuser_adapted(const float *x, const void *down, const float *scales, const void *matrix, float *lowered,
                        float *wide, float *y, long num_members, long num_rows, long num_in, long num_ranks,
                        long num_out, int num_threads) {
    const long all = num_members * num_rows, width = num_in + num_ranks;
    ultrafuser_few_rows(x, down, lowered, 1, all, num_in, num_ranks, FP16, num_threads);
    for (long row = 0; row < all; row++) {
        const float *own = scales + row / num_rows * num_ranks;
        memcpy(wide + row * width, x + row * num_in, num_in * sizeof(float));
        for (long i = 0; i < num_ranks; i++) wide[row * width + num_in + i] = lowered[row * num_ranks + i] * own[i];
    }
    ultrafuser_few_rows(wide, matrix, y, 1, all, width, num_out, FP16, num_threads);
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

/* x += scale * more (where there is more), then y = x / sqrt(mean of its squares + eps) * weight, row by row. */
void ultrafuser_add_norm(float *x, const float *more, const float *weight, float *y, long num_members, long num_rows,
                         long size, long weight_members, float scale, float eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_members * num_rows * size > SHARED)
    for (long row = 0; row < num_members * num_rows; row++) {
        float *own = x + row * size, *to = y + row * size;
        const float *scales = weight + (weight_members > 1 ? row / num_rows : 0) * size;
        vec squares = {0};
        float rest = 0;
        long i = 0;
        for (; i + LANES <= size; i += LANES) {
            vec values = *(vec_anywhere *)(own + i);
            if (more) *(vec_anywhere *)(own + i) = values += *(const vec_anywhere *)(more + row * size + i) * scale;
            squares += values * values;
        }
        for (; i < size; i++) {
            if (more) own[i] += more[row * size + i] * scale;
            rest += own[i] * own[i];
        }
        const float factor = 1.0f / __builtin_sqrtf((sum_of(squares) + rest) / size + eps);
        for (i = 0; i < size; i++) to[i] = own[i] * factor * scales[i];
    }
}

/* y = silu(gate) * up, of rows that hold both side by side. */
void ultrafuser_silu_mul(const float *gate_up, float *y, long num_rows, long size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_rows * size > SHARED)
    for (long row = 0; row < num_rows; row++) {
        const float *gate = gate_up + 2 * row * size, *up = gate + size;
        float *to = y + row * size;
        for (long i = 0; i < size; i += LANES) {
            const long count = size - i < LANES ? size - i : LANES;
            vec g, u;
            if (count == LANES) {
                g = *(const vec_anywhere *)(gate + i);
                u = *(const vec_anywhere *)(up + i);
            } else {
                g = load_rest((const char *)(gate + i), count, FP32);
                u = load_rest((const char *)(up + i), count, FP32);
            }
            const vec done = g / (1.0f + exp_of(-g)) * u;
            memcpy(to + i, &done, count * sizeof(float));
        }
    }
}

/* Positions as angles: x * cos + (x, half a turn on) * sin. */
INLINE void turn(const float *x, const float *cosines, const float *sines, float *y, long size, float scale) {
    const long half = size / 2;
    for (long i = 0; i < half; i++) {
        y[i] = (x[i] * cosines[i] + x[i + half] * sines[i]) * scale;
        y[i + half] = (x[i + half] * cosines[i + half] + x[i] * sines[i + half]) * scale;
    }
}

/* Scores of `count` columns, and the largest of them. */
INLINE float scores_of(const float *query, const float *keys, float *scores, long count, long size) {
    float most = -__builtin_inff();
    for (long column = 0; column < count; column++) {
        vec sums[2] = {{0}, {0}};
        const float *key = keys + column * size;
        long i = 0;
        for (; i + 2 * LANES <= size; i += 2 * LANES) {
            sums[0] += *(const vec_anywhere *)(query + i) * *(const vec_anywhere *)(key + i);
            sums[1] += *(const vec_anywhere *)(query + i + LANES) * *(const vec_anywhere *)(key + i + LANES);
        }
        if (i < size) sums[0] += *(const vec_anywhere *)(query + i) * *(const vec_anywhere *)(key + i);
        scores[column] = sum_of(sums[0] + sums[1]);
        most = scores[column] > most ? scores[column] : most;
    }
    return most;
}

/* `blocks` vectors of what the columns say, weighted; a constant where this is inlined. */
INLINE void weigh(const float *values, const float *shares, float *y, long count, long size, float factor, int blocks) {
    vec sums[4] = {{0}, {0}, {0}, {0}};
    for (long column = 0; column < count; column++)
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++)
            sums[b] += *(const vec_anywhere *)(values + column * size + b * LANES) * shares[column];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++) *(vec_anywhere *)(y + b * LANES) = sums[b] * factor;
}

struct attention {
    const float *qkv;               /* [G, B * T, (Q + 2 K) * D] */
    const float *cosines, *sines;   /* [positions, D]; the sine has the sign of the rotation */
    float *keys, *values;           /* [rows of the cache, K, L, D] */
    const int64_t *rows, *starts;   /* [B * G], members varying fastest: of the cache, and columns it holds */
    float *y;                       /* [G, B * T, Q * D] */
    float *scores;                  /* [threads, L], filled up to whole vectors */
    long num_members, num_choices, num_new, num_heads, num_kv_heads, size, length;
    long window; /* columns that a token sees, itself included; 0: all */
};

/* All new tokens of one row by one head of keys and values: what is new joins the cache, then queries read it. */
static void attend(const struct attention *a, long row, long head, float *scores) {
    const long size = a->size, share = a->num_heads / a->num_kv_heads, start = a->starts[row];
    const long width = (a->num_heads + 2 * a->num_kv_heads) * size;
    const long first = (row % a->num_members * a->num_choices + row / a->num_members) * a->num_new;
    const long place = (a->rows[row] * a->num_kv_heads + head) * a->length * size;
    float *keys = a->keys + place, *values = a->values + place;
    for (long t = 0; t < a->num_new; t++) {
        const float *own = a->qkv + (first + t) * width + (a->num_heads + head) * size;
        const long column = start + t;
        turn(own, a->cosines + column * size, a->sines + column * size, keys + column * size, size, 1.0f);
        memcpy(values + column * size, own + a->num_kv_heads * size, size * sizeof(float));
    }
    const float scale = 1.0f / __builtin_sqrtf((float)size);
    for (long t = 0; t < a->num_new; t++) {
        const long column = start + t, end = column + 1;
        const long from = a->window && end > a->window ? end - a->window : 0, count = end - from;
        for (long q = head * share; q < (head + 1) * share; q++) {
            float query[256], total = 0;
            turn(a->qkv + (first + t) * width + q * size, a->cosines + column * size, a->sines + column * size, query,
                 size, scale);
            const float most = scores_of(query, keys + from * size, scores, count, size);
            long i = 0;
            vec sums = {0};
            for (; i + LANES <= count; i += LANES)
                sums += *(vec_anywhere *)(scores + i) = exp_of(*(vec_anywhere *)(scores + i) - most);
            if (i < count) {
                const vec last = exp_of(load_rest((const char *)(scores + i), count - i, FP32) - most);
                memcpy(scores + i, &last, (count - i) * sizeof(float));
                for (long lane = 0; lane < count - i; lane++) total += last[lane];
            }
            total += sum_of(sums);
            float *to = a->y + (first + t) * a->num_heads * size + q * size;
            long d = 0;
            for (; d + 4 * LANES <= size; d += 4 * LANES)
                weigh(values + from * size + d, scores, to + d, count, size, 1.0f / total, 4);
            for (; d < size; d += LANES) weigh(values + from * size + d, scores, to + d, count, size, 1.0f / total, 1);
        }
    }
}

void ultrafuser_attend(const struct attention *a, int num_threads) {
    const long units = a->num_choices * a->num_members * a->num_kv_heads, room = a->length + LANES;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) if (num_threads > 1)
    for (int part = 0; part < num_threads; part++)
        for (long u = units * part / num_threads; u < units * (part + 1) / num_threads; u++)
            attend(a, u / a->num_kv_heads, u % a->num_kv_heads, a->scores + part * room);
}
