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
#define CACHED 1048576 /* bytes of weights, after which outputs are still in the cache */

/* Some of the ranks that stand side by side. */
struct ranks {
    long first, count;
};

/* B of the adapters of one layer of a product: which of its outputs they add to, from which of its ranks, and which of these
   are each member's own. */
struct up {
    const void *weight; /* [num_out, num_ranks] */
    const struct ranks *own;
    long first_out, num_out, first_rank, num_ranks;
};

#define MOST_UPS 3

/* The linear layers of one product, for all members or one; `weight` may be one for all (a shared base). */
struct matrix {
    const void *weight; /* [members, num_out, num_in] */
    const float *units; /* [members, num_out]: what one of an int8 weight is; else none */
    const float *bias;  /* [members, num_out], or none */
    /* Adapters of the members: B (scales * A x), with A of all one below the other. */
    const void *down;    /* A [num_ranks, num_in] */
    const float *scales; /* [num_ranks] */
    struct up ups[MOST_UPS];
    long members, num_in, num_out, num_ranks, num_ups;
    int kind, adapter_kind;
};

/* What is added to outputs of a product, and where: y [all rows, num_out] of some members. */
struct extra {
    const char *shares; /* [all rows, num_ranks]: scaled, and rounded where B is met as PAIRS */
    float *y;
    long num_members, num_rows, num_out, num_ranks;
};

/* y[c] += sum over `count` ranks of shares[rank] * weight[c, rank], of `outs` outputs (a constant where this is inlined). Sums
   have one order, whether four are made at once or one. */
INLINE void add_ranks(const char *shares, const char *weight, float *y, long count, long stride, int outs, enum kind kind) {
    const enum kind share_kind = rows_kind(kind);
    const long size = size_of(kind), step = lanes_of(kind);
    wide sums[4] = {{0}, {0}, {0}, {0}};
    long i = 0;
    for (; i + step <= count; i += step) {
        const wide part = load(shares + i * size_of(share_kind), share_kind);
#pragma GCC unroll 4
        for (int c = 0; c < outs; c++)
            sums[c] = add_product(sums[c], part, load(weight + c * stride + i * size, kind), kind);
    }
    if (i < count) {
        const wide part = load_rest(shares + i * size_of(share_kind), count - i, share_kind);
#pragma GCC unroll 4
        for (int c = 0; c < outs; c++)
            sums[c] = add_product(sums[c], part, load_rest(weight + c * stride + i * size, count - i, kind), kind);
    }
    if (outs == 4)
        *(four_anywhere *)y += wide_sums_of(sums[0], sums[1], sums[2], sums[3]);
    else
        *y += wide_sum_of(sums[0]);
}

/* What the adapters of a layer add to its outputs [first, last). B is read once and in order. */
INLINE void add_up(const struct up *up, const struct extra *e, long first, long last, enum kind kind) {
    const long share_size = size_of(rows_kind(kind)), stride = up->num_ranks * size_of(kind);
    for (long o = first, outs; o < last; o += outs) {
        outs = last - o < 4 ? 1 : 4;
        const char *at = (const char *)up->weight + o * stride;
        for (long ahead = 0; ahead < outs * stride; ahead += LINE) __builtin_prefetch(at + AHEAD + ahead);
        for (long member = 0; member < e->num_members; member++) {
            const struct ranks own = up->own[member];
            const char *weight = at + own.first * size_of(kind);
            for (long row = member * e->num_rows; row < (member + 1) * e->num_rows && own.count; row++) {
                const char *shares = e->shares + (row * e->num_ranks + up->first_rank + own.first) * share_size;
                float *y = e->y + row * e->num_out + up->first_out + o;
                if (outs == 4)
                    add_ranks(shares, weight, y, own.count, stride, 4, kind);
                else
                    add_ranks(shares, weight, y, own.count, stride, 1, kind);
            }
        }
    }
}

#define DEFINE_ADD_UP(kind)                                                                                            \
    static NOINLINE void add_up_##kind(const struct up *up, const struct extra *e, long first, long last) {            \
        add_up(up, e, first, last, kind);                                                                              \
    }
DEFINE_ADD_UP(FP32)
DEFINE_ADD_UP(BF16)
DEFINE_ADD_UP(FP16)
#if HAS_PAIRS
DEFINE_ADD_UP(PAIRS)
#endif

/* What adapters add to the outputs [first, last). */
static void add_ups(const struct matrix *a, const struct extra *e, enum kind kind, long first, long last) {
    void (*const call[])(const struct up *, const struct extra *, long, long) = {
        add_up_FP32, add_up_BF16, add_up_FP16, 0,
#if HAS_PAIRS
        add_up_PAIRS,
#endif
    };
    for (const struct up *up = a->ups; up < a->ups + a->num_ups; up++) {
        const long from = first > up->first_out ? first : up->first_out, end = up->first_out + up->num_out;
        const long to = last < end ? last : end;
        if (from < to) call[kind](up, e, from - up->first_out, to - up->first_out);
    }
}

/* Scaled as B meets them, `rows` of them, in this thread's room: twice as many numbers. */
static const char *shares_of(const struct matrix *a, const float *lowered, long rows, enum kind *kind, float *room) {
    for (long row = 0; row < rows; row++)
        for (long rank = 0; rank < a->num_ranks; rank++)
            room[row * a->num_ranks + rank] = lowered[row * a->num_ranks + rank] * a->scales[rank];
    return rows_for(kind, room, rows * a->num_ranks, (uint16_t *)(room + rows * a->num_ranks));
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

/* Room of one thread: rows in bf16, and shares of ranks. */
struct room {
    uint16_t *rounded;
    float *shares;
};

/* y [G, M, num_out] of x [G, M, num_in], the share of one thread. What is added to outputs is added a block of them at a
   time, before weights that are read push them out of the cache.

   `lowered`: where there are adapters, [G * M, num_ranks]. `active`: where outputs are gates and ups, what becomes of them,
   [G, M, num_out / 2]; else none. */
static void multiply(const struct matrix *a, const float *x, float *y, float *lowered, float *active,
                     const struct room *room, long num_members, long num_rows, const struct team *team) {
    const long all = num_members * num_rows, rows = a->members == 1 ? all : num_rows;
    const long size = a->num_in * size_of(a->kind), inner = a->num_out / 2;
    struct share share = share_of(a->members, a->num_out, active ? 2 : 1, team->part, team->num_parts);
    int awaits = a->num_ranks > 0; /* what other threads make of A */
    enum kind adapter_kind = a->adapter_kind;
    struct extra extra = {0, y, num_members, num_rows, a->num_out, a->num_ranks};
    if (awaits)
        work(x, a->down, 0, lowered, share_of(1, a->num_ranks, 1, team->part, team->num_parts), all, a->num_in,
             a->num_ranks, a->adapter_kind, room->rounded);
    const long is_plain = !a->num_ranks && !a->bias && !active, fit = CACHED / size / WIDE * WIDE;
    const long block = is_plain ? share.width : fit > WIDE ? fit : WIDE;
    while (goes_on(&share)) {
        const long before = share.member * a->num_out, start = share.member * rows, end = start + rows;
        enum kind kind = a->kind;
        const char *own = rows_for(&kind, x + start * a->num_in, rows * a->num_in, room->rounded);
        for (long first = share.first, last; first < share.last; first = last) {
            last = first + block < share.last ? first + block : share.last;
            /* Other threads have read these lines: taking them back from their caches is begun now. */
            for (long row = start; row < end && active; row++)
                for (long o = first; o < last; o += LINE / 4) __builtin_prefetch(active + row * inner + o, 1);
            outputs(kind, own, (const char *)a->weight + before * size, kind == INT8 ? a->units + before : a->units,
                    y + before * rows, rows, a->num_in, a->num_out, share.width, first, last);
            if (awaits) {
                wait_for_all(team);
                extra.shares = shares_of(a, lowered, all, &adapter_kind, room->shares);
                awaits = 0;
            }
            for (long piece = 0; piece < a->num_out && extra.shares; piece += share.width)
                add_ups(a, &extra, adapter_kind, piece + first, piece + last);
            for (long row = start; row < end && a->bias; row++)
                for (long piece = 0; piece < a->num_out; piece += share.width)
                    for (long o = piece + first; o < piece + last; o++) y[row * a->num_out + o] += a->bias[before + o];
            for (long row = start; row < end && active; row++)
                silu_mul(y + 2 * row * inner, y + (2 * row + 1) * inner, active + row * inner, first, last);
        }
    }
    if (awaits) wait_for_all(team); /* one without outputs */
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
    float *shares;                      /* [threads, num_shares]: twice the ranks of all rows */
    struct attention attention;         /* what all layers have in common */
    long num_layers, hidden_size, norm_members, num_rounded, num_shares;
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
    const struct room room = {p->rounded + part * p->num_rounded, p->shares + part * p->num_shares};
    float *x = p->own + 2 * part * all * size, *h = x + all * size;
    struct attention a = p->attention;
    a.qkv = p->wide;
    a.y = p->narrow;
    memcpy(x + first * size, p->x + first * size, (last - first) * size * sizeof(float));
    add_norms(x, 0, p->layers[0].norm_in, h, rows, size, p->norm_members, p->eps, first, last);
    for (long i = 0; i < p->num_layers; i++) {
        const struct layer *own = p->layers + i;
        const float *norm_after = i + 1 < p->num_layers ? own[1].norm_in : p->norm_out;
        multiply(&own->qkv, h, p->wide, p->room, 0, &room, members, rows, team);
        wait_for_all(team);
        a.keys = p->keys[i];
        a.values = p->values[i];
        a.norm_q = own->norm_q;
        a.norm_k = own->norm_k;
        for (long u = num_heads * part / num_parts; u < num_heads * (part + 1) / num_parts; u++)
            (a.kind == BF16 ? attend_BF16 : attend_FP32)(&a, u / a.num_kv_heads, u % a.num_kv_heads, scores);
        wait_for_all(team);
        multiply(&own->out, p->narrow, p->told, p->room, 0, &room, members, rows, team);
        wait_for_all(team);
        add_norms(x, p->told, own->norm_mlp, h, rows, size, p->norm_members, p->eps, first, last);
        multiply(&own->gate_up, h, p->wide, p->room, p->narrow, &room, members, rows, team);
        wait_for_all(team);
        multiply(&own->down, p->narrow, p->told, p->room, 0, &room, members, rows, team);
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
