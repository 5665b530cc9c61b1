/* What stands between the products of a Llama-like layer: norms, activations, attention. */

#pragma once

#include <omp.h>

#include "numbers.h"

#define SHARED 32768 /* numbers from which several threads make them faster than one */

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

/* Positions as angles: x * cos + (x, half a turn on) * sin. */
INLINE void turn(const float *x, const float *cosines, const float *sines, float *y, long size) {
    const long half = size / 2;
    for (long i = 0; i < half; i++) {
        y[i] = x[i] * cosines[i] + x[i + half] * sines[i];
        y[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
}

/* Whose products with keys of a kind are taken: queries are rounded as keys in bf16 are, where there are PAIRS. */
INLINE enum kind query_kind(enum kind kind) { return kind == BF16 ? PAIRS : kind; }

/* Scores of `count` columns, and the largest of them; `query` is of its kind. The first query that reads keys asks for those
   of some columns on, and for the values, which come next: memory alone does not look beyond a page. */
INLINE float scores_of(const char *query, const char *keys, const char *values, float *scores, long count, long size,
                       float scale, int reads_ahead, enum kind kind) {
    const enum kind own = query_kind(kind);
    const long num_bytes = size * size_of(own), step = lanes_of(own);
    float most = -__builtin_inff();
    for (long column = 0, columns; column < count; column += columns) {
        columns = count - column < 4 ? 1 : 4;
        const char *at = keys + column * num_bytes;
        for (long ahead = 0; reads_ahead && ahead < columns * num_bytes; ahead += LINE) {
            __builtin_prefetch(at + ahead + AHEAD, 0, 2);
            __builtin_prefetch(values + column * num_bytes + ahead, 0, 2);
        }
        wide sums[4] = {{0}, {0}, {0}, {0}};
        for (long i = 0; i < size; i += step) {
            const long bytes = i * size_of(own), rest = size - i;
            if (columns == 4 && rest >= step) {
                const wide part = load(query + bytes, own);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
                    sums[c] = add_product(sums[c], part, load(at + c * num_bytes + bytes, own), own);
            } else
                for (int c = 0; c < columns; c++)
                    sums[c] = rest >= step ? add_product(sums[c], load(query + bytes, own),
                                                         load(at + c * num_bytes + bytes, own), own)
                                           : sums[c] + rest_product(query + bytes, at + c * num_bytes + bytes, rest, own);
        }
        const four all = (columns == 4 ? wide_sums_of(sums[0], sums[1], sums[2], sums[3])
                                       : (four){wide_sum_of(sums[0])}) * scale;
        for (int c = 0; c < columns; c++) {
            scores[column + c] = all[c];
            most = all[c] > most ? all[c] : most;
        }
    }
    return most;
}

/* `blocks` vectors of what the columns say, from value `first` on, weighted; a constant where this is inlined. */
INLINE void weigh(const char *values, long first, const float *shares, float *y, long count, long size, float factor,
                  int blocks, enum kind kind) {
    wide sums[4] = {{0}, {0}, {0}, {0}};
    for (long column = 0; column < count; column++)
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++)
            sums[b] = add_product(sums[b], (wide){0} + shares[column],
                                  load(values + (column * size + first + b * WIDE) * size_of(kind), kind), FP32);
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++) *(wide_anywhere *)(y + first + b * WIDE) = sums[b] * factor;
}

/* The last of them, fewer than a vector holds. */
static void weigh_rest(const char *values, long first, const float *shares, float *y, long count, long size, float factor,
                       enum kind kind) {
    wide sums = {0};
    for (long column = 0; column < count; column++)
        sums = add_product(sums, (wide){0} + shares[column],
                           load_rest(values + (column * size + first) * size_of(kind), size - first, kind), FP32);
    sums *= factor;
    memcpy(y + first, &sums, (size - first) * sizeof(float));
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
            uint16_t rounded[LARGEST_HEAD];
            place(a, a->qkv + (first + t) * width + q * size, a->norm_q, member, column, query);
#if HAS_PAIRS
            if (kind == BF16) round_rows(query, rounded, size);
#endif
            const char *asked = kind == BF16 ? (const char *)rounded : (const char *)query;
            const int is_first = t == 0 && q == head * share;
            const float most = scores_of(asked, seen_keys, seen, scores, count, size, scale, is_first, kind);
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
            for (; d + 4 * WIDE <= size; d += 4 * WIDE) weigh(seen, d, scores, to, count, size, 1.0f / total, 4, kind);
            for (; d + WIDE <= size; d += WIDE) weigh(seen, d, scores, to, count, size, 1.0f / total, 1, kind);
            if (d < size) weigh_rest(seen, d, scores, to, count, size, 1.0f / total, kind);
        }
    }
}

static NOINLINE void attend_FP32(const struct attention *a, long row, long head, float *scores) {
    attend(a, row, head, scores, FP32);
}

static NOINLINE void attend_BF16(const struct attention *a, long row, long head, float *scores) {
    attend(a, row, head, scores, BF16);
}
