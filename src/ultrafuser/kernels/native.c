/* Whole passes of Llama-like models over a few rows; all that is called from Python is here or in what is included. */

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#include "between.h"
#include "products.h"

#define PATIENCE 2000 /* spins: some tens of microseconds */
#ifdef __x86_64__
#define PAUSE() _mm_pause()
#else
#define PAUSE()
#endif
#define CACHED 262144 /* bytes of weights, after which outputs are still in the cache */

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
