/* The KV cache and attention of the cpu backend. Query heads that share a KV head see its rows in
 * blocks of CPU_KV_BLOCK together; a block's result does not depend on who computes it, and blocks
 * merge in their order, so that threads may take heads or blocks as suits the shape. Rows are
 * visited as place says (0..pos-1, then kv_row), so that a probe in a spare row adds up exactly as
 * the token it stands for.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <omp.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/cpu.h"

/* One head of one slot in a cache. */
static char *kv_head(const struct tensor *cache, int32_t slot, int32_t head)
{
    size_t rows = (size_t)cache->dims[2], row_bytes = (size_t)cache->dims[3];
    row_bytes *= dtype_bytes(cache->dtype);
    size_t at = (size_t)slot * (size_t)cache->dims[1] + (size_t)head;
    return (char *)cache->data + at * rows * row_bytes;
}

static void write_row(const struct cpu_loops *loops, struct tensor *cache, int32_t slot,
                      int32_t head, int32_t row, const float *from)
{
    size_t n = (size_t)cache->dims[3];
    char *to = kv_head(cache, slot, head) + (size_t)row * n * dtype_bytes(cache->dtype);
    if (cache->dtype == DT_F32) {
        memcpy(to, from, n * sizeof *from);
    } else {
        loops->to_f16((uint16_t *)(void *)to, from, cache->dims[3]);
    }
}

enum status cpu_kv_append(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                          const struct tensor *v, const struct token_place *place)
{
    const struct cpu_loops *loops = ((const struct cpu *)be->impl)->isa->loops;
    TRY(host_check_place("kv_append", place, kv->k.dims[0], kv->k.dims[2]));
    const int32_t *slot = place->slot.data, *row = place->kv_row.data;
    size_t head_dim = (size_t)k->dims[2];
    const float *k_from = k->data, *v_from = v->data;
    for (int32_t t = 0; t < k->dims[0]; t++) {
        for (int32_t h = 0; h < k->dims[1]; h++) {
            write_row(loops, &kv->k, slot[t], h, row[t], k_from);
            write_row(loops, &kv->v, slot[t], h, row[t], v_from);
            k_from += head_dim;
            v_from += head_dim;
        }
    }
    return ST_OK;
}

/* One attention, as every thread needs it. */
struct pass {
    const struct cpu_loops *loops;
    float *y;       /* (n_tok, n_heads, head_dim) */
    const float *q; /* the same */
    const struct kv_layer *kv;
    const int32_t *slot, *pos, *row;
    float scale;
    int32_t n_tok, n_heads, head_dim;
    size_t part_floats;  /* of one block's result for the heads of a KV head */
    size_t score_floats; /* of its scores */
    size_t own_floats;   /* of a thread's scratch: scores, two parts */
};

/* The query heads of one token that share one KV head. */
struct unit {
    int32_t token, kv_head, first_head, n_heads;
};

/* Units of a KV head are neighbours: its rows stay in a cache from token to token. */
static struct unit unit_at(const struct pass *c, size_t i)
{
    struct unit u = {.token = (int32_t)(i % (size_t)c->n_tok),
                     .kv_head = (int32_t)(i / (size_t)c->n_tok)};
    int32_t begin = u.kv_head * c->kv->heads_per_kv - c->kv->head_in_group;
    int32_t end = begin + c->kv->heads_per_kv;
    u.first_head = begin > 0 ? begin : 0;
    u.n_heads = (end < c->n_heads ? end : c->n_heads) - u.first_head;
    return u;
}

static size_t head_floats(const struct pass *c, const struct unit *u)
{
    size_t head = (size_t)u->token * (size_t)c->n_heads + (size_t)u->first_head;
    return head * (size_t)c->head_dim;
}

static int32_t unit_blocks(const struct pass *c, const struct unit *u)
{
    return c->pos[u->token] / CPU_KV_BLOCK + 1;
}

/* after: the unit that comes next in this thread, or NULL */
static void attend_block(const struct pass *c, const struct unit *u, int32_t block, float *part,
                         float *scores, const struct unit *after)
{
    const struct kv_layer *kv = c->kv;
    int32_t first = block * CPU_KV_BLOCK, left = c->pos[u->token] + 1 - first;
    size_t k_bytes = (size_t)c->head_dim * dtype_bytes(kv->k.dtype);
    size_t v_bytes = (size_t)c->head_dim * dtype_bytes(kv->v.dtype);
    const char *k = kv_head(&kv->k, c->slot[u->token], u->kv_head);
    const char *v = kv_head(&kv->v, c->slot[u->token], u->kv_head);
    struct cpu_kv_block b = {
        .k = k + (size_t)first * k_bytes,
        .v = v + (size_t)first * v_bytes,
        .k_type = kv->k.dtype,
        .v_type = kv->v.dtype,
        .n_rows = left < CPU_KV_BLOCK ? left : CPU_KV_BLOCK,
        .head_dim = c->head_dim,
    };
    bool is_last = left <= CPU_KV_BLOCK;
    size_t last = (size_t)(is_last ? c->row[u->token] : first + CPU_KV_BLOCK - 1);
    b.k_last = k + last * k_bytes;
    b.v_last = v + last * v_bytes;
    if (!is_last) {
        b.next = b.k + CPU_KV_BLOCK * k_bytes;
        b.next_rows = left - CPU_KV_BLOCK;
    } else if (after &&
               (after->kv_head != u->kv_head || c->slot[after->token] != c->slot[u->token])) {
        b.next = kv_head(&kv->k, c->slot[after->token], after->kv_head);
        b.next_rows = c->pos[after->token] + 1;
    }
    c->loops->attend(part, scores, c->q + head_floats(c, u), u->n_heads, c->scale, &b);
}

static void write_result(const struct pass *c, const struct unit *u, const float *part)
{
    float *y = c->y + head_floats(c, u);
    for (int32_t h = 0; h < u->n_heads; h++, part += c->head_dim + 2) {
        float inverse = 1.0f / part[c->head_dim + 1];
        for (int32_t d = 0; d < c->head_dim; d++) {
            *y++ = part[d] * inverse;
        }
    }
}

/* Units begin..end by one thread, all blocks of each; scratch: own_floats. */
static void attend_units(const struct pass *c, size_t begin, size_t end, float *scratch)
{
    float *part = scratch + c->score_floats, *next = part + c->part_floats;
    for (size_t i = begin; i < end; i++) {
        struct unit u = unit_at(c, i), after = unit_at(c, i + 1);
        for (int32_t b = 0; b < unit_blocks(c, &u); b++) {
            attend_block(c, &u, b, b == 0 ? part : next, scratch, i + 1 < end ? &after : NULL);
            if (b > 0) {
                c->loops->attend_merge(part, next, u.n_heads, c->head_dim);
            }
        }
        write_result(c, &u, part);
    }
}

/* All units by a team whose threads all call this, block by block; parts (n_units, n_blocks). */
static void attend_split(const struct pass *c, size_t n_units, size_t n_blocks, float *parts,
                         float *scratch)
{
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < n_units * n_blocks; i++) {
        struct unit u = unit_at(c, i / n_blocks);
        int32_t b = (int32_t)(i % n_blocks);
        if (b < unit_blocks(c, &u)) {
            attend_block(c, &u, b, parts + i * c->part_floats, scratch, NULL);
        }
    }
#pragma omp for schedule(static)
    for (size_t i = 0; i < n_units; i++) {
        struct unit u = unit_at(c, i);
        float *part = parts + i * n_blocks * c->part_floats;
        for (int32_t b = 1; b < unit_blocks(c, &u); b++) {
            c->loops->attend_merge(part, part + (size_t)b * c->part_floats, u.n_heads, c->head_dim);
        }
        write_result(c, &u, part);
    }
}

/* Threads take a range of units each, or (tokens, whose contexts differ) units as they come free,
 * or, where units are few beside the threads, blocks. */
static void attend_team(const struct pass *c, size_t n_units, size_t n_blocks, float *scratch,
                        float *parts)
{
    size_t team = (size_t)omp_get_num_threads(), me = (size_t)omp_get_thread_num();
    float *mine = scratch + me * c->own_floats;
    if (n_units < 4 * team && n_units % team != 0 && n_blocks > 1) {
        attend_split(c, n_units, n_blocks, parts, mine);
    } else if (c->n_tok == 1) {
        attend_units(c, n_units * me / team, n_units * (me + 1) / team, mine);
    } else {
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < n_units; i++) {
            attend_units(c, i, i + 1, mine);
        }
    }
}

enum status cpu_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                          const struct kv_layer *kv, const struct token_place *place, float scale)
{
    struct cpu *cpu = be->impl;
    TRY(host_check_place("attention", place, kv->k.dims[0], kv->k.dims[2]));
    size_t heads = (size_t)kv->heads_per_kv, part = heads * (size_t)(q->dims[2] + 2);
    struct pass c = {
        .loops = cpu->isa->loops,
        .y = y->data,
        .q = q->data,
        .kv = kv,
        .slot = place->slot.data,
        .pos = place->pos.data,
        .row = place->kv_row.data,
        .scale = scale,
        .n_tok = q->dims[0],
        .n_heads = q->dims[1],
        .head_dim = q->dims[2],
        .part_floats = cpu_scratch_width(part),
        .score_floats = heads * CPU_KV_BLOCK,
    };
    c.own_floats = c.score_floats + 2 * c.part_floats;
    /* Room for the whole cache at once: growing with the position would allocate at every step. */
    size_t n_threads_max = (size_t)cpu->n_threads, parts = 0, own = 0;
    size_t most_blocks = (size_t)kv->k.dims[2] / CPU_KV_BLOCK + 1;
    TRY(mem_mul(&own, c.own_floats, n_threads_max));
    TRY(mem_mul(&parts, 4 * n_threads_max * most_blocks, c.part_floats));
    TRY(host_scratch_reserve(&cpu->scores, own + (n_threads_max > 1 ? parts : 0)));
    float *scratch = cpu->scores.data;
    size_t n_units = (size_t)c.n_tok * (size_t)kv->k.dims[1];
    size_t n_blocks = (size_t)place->max_pos / CPU_KV_BLOCK + 1;
    int n_threads = cpu_threads(cpu, tensor_count(q) * 2 * ((size_t)place->max_pos + 1));
    if (n_threads == 1) {
        attend_units(&c, 0, n_units, scratch);
        return ST_OK;
    }
#pragma omp parallel num_threads(n_threads)
    attend_team(&c, n_units, n_blocks, scratch, scratch + own);
    return ST_OK;
}
