/* SPDX-License-Identifier: Apache-2.0 */
#include "core/meter.h"

#include <math.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/policy.h"

struct meter {
    struct backend *be;                /* borrowed */
    struct collective *coll;           /* borrowed */
    const struct model_shard *shard;   /* borrowed */
    const struct model_config *config; /* borrowed */
    uint32_t needs;
    int32_t max_rows, first, n;
    int32_t parts[METER_N_INPUTS]; /* of this rank's part of each input */
    int32_t kv_cut[SHARD_MAX_SEGMENTS + 1];
    /* (regions) of (n, parts, 2): inputs of all layers, then hidden, K and V */
    float *block, *host; /* owned: in backend memory; its copy, NULL when that is the host's */
    size_t block_floats;
    float *mine, *all; /* owned: what travels, per position */
    size_t counts[SHARD_MAX_SEGMENTS];
    int32_t
        kv_own[SHARD_MAX_SEGMENTS + 1]; /* KV heads before rank r's own; replicated ones belong
                                           to the first rank that holds them. [0] < 0: unknown */
    struct measured *out;               /* (max_rows) owned */
    float *activation;                  /* (max_rows, n_layers, M_N_ROLES, 2) owned */
};

/* ---- where things lie ---- */

static int32_t layer_parts(const struct meter *m)
{
    return m->parts[METER_ATTN] + m->parts[METER_O] + m->parts[METER_MLP] + m->parts[METER_DOWN];
}

static int32_t kv_local(const struct meter *m)
{
    return m->shard->kv_end - m->shard->kv_begin;
}

/* Parts before an input; layer n_layers: hidden, then K, V and the end. */
static size_t parts_before(const struct meter *m, int32_t layer, int which)
{
    size_t at = (size_t)layer * (size_t)layer_parts(m);
    for (int i = 0; i < which; i++) {
        at += (size_t)m->parts[i];
    }
    return at;
}

static size_t hidden_at(const struct meter *m)
{
    return parts_before(m, m->config->n_layers, 0);
}

static size_t kv_at(const struct meter *m, int which)
{
    return hidden_at(m) + 1 + (size_t)which * (size_t)kv_local(m);
}

/* Floats of a position that travel from rank r. */
static size_t travelling(const struct meter *m, int r, int32_t n_kv)
{
    const struct segment_share *a = &m->shard->attn, *f = &m->shard->mlp;
    int32_t size = m->coll->size;
    size_t n = (size_t)(split_at(a->total, size, r + 1) - split_at(a->total, size, r)) +
               (size_t)(split_at(f->total, size, r + 1) - split_at(f->total, size, r));
    n = m->needs & SIGNAL_ACTIVATION ? 2 * n * (size_t)m->config->n_layers : 0;
    return n + (m->needs & SIGNAL_KV_NORMS ? 2 * (size_t)n_kv : 0);
}

enum status meter_create(struct meter **out, struct backend *be, struct collective *coll,
                         const struct model_shard *shard, const struct model_config *config,
                         uint32_t needs, int32_t max_rows)
{
    enum status st = ST_OK;
    struct meter *m = NULL;
    void *block = NULL;
    size_t n_all = 0, rows = (size_t)max_rows, roles = (size_t)config->n_layers * M_N_ROLES;
    TRY(MEM_NEW(&m, 1));
    *m = (struct meter){
        .be = be,
        .coll = coll,
        .shard = shard,
        .config = config,
        .needs = needs,
        .max_rows = max_rows,
        .parts = {1, shard->attn.end - shard->attn.begin, 1, shard->mlp.end - shard->mlp.begin},
        .kv_own = {-1}};
    int32_t n_kv = kv_local(m);
    if ((needs & SIGNAL_KV_NORMS) && n_kv > SHARD_MAX_SEGMENTS) {
        FAIL_GOTO(st, ST_SHAPE, fail,
                  "norms of K and V: %d KV heads on a rank, at most %d are measured", n_kv,
                  SHARD_MAX_SEGMENTS);
    }
    for (int32_t h = 0; h <= n_kv && h <= SHARD_MAX_SEGMENTS; h++) {
        m->kv_cut[h] = h * config->head_dim;
    }
    for (int r = 0; r < coll->size; r++) {
        n_all += travelling(m, r, config->n_kv_heads);
    }
    m->block_floats = 2 * rows * kv_at(m, 2);
    TRY_GOTO(st, backend_alloc(be, &block, m->block_floats * sizeof(float)), fail);
    m->block = block;
    if (!backend_is_host(be)) {
        TRY_GOTO(st, MEM_NEW(&m->host, m->block_floats), fail);
    }
    TRY_GOTO(st, MEM_NEW(&m->mine, rows * travelling(m, coll->rank, n_kv) + 1), fail);
    TRY_GOTO(st, MEM_NEW(&m->all, rows * n_all + 1), fail);
    TRY_GOTO(st, MEM_NEW(&m->out, max_rows), fail);
    if (needs & SIGNAL_ACTIVATION) {
        TRY_GOTO(st, MEM_NEW(&m->activation, 2 * rows * roles), fail);
    }
    *out = m;
    return ST_OK;
fail:
    meter_destroy(&m);
    return st;
}

void meter_destroy(struct meter **meter)
{
    struct meter *m = *meter;
    if (!m) {
        return;
    }
    backend_release(m->be, m->block);
    mem_free(m->host);
    mem_free(m->mine);
    mem_free(m->all);
    mem_free(m->out);
    mem_free(m->activation);
    mem_free(m);
    *meter = NULL;
}

/* ---- during a pass ---- */

void meter_begin(struct meter *m, int32_t first, int32_t n)
{
    INVARIANT(n <= m->max_rows);
    m->first = first;
    m->n = n;
}

/* The region that begins `before` parts into the block: (n, n_parts, 2). */
static float *region(const struct meter *m, float *base, size_t before)
{
    return base + 2 * before * (size_t)m->n;
}

static enum status take(struct meter *m, size_t before, const float *x, int32_t width,
                        const int32_t *cut, int32_t n_parts)
{
    if (m->n == 0) {
        return ST_OK;
    }
    float *from = (float *)(uintptr_t)(x + (size_t)m->first * (size_t)width);
    struct tensor rows = tensor_2d(from, DT_F32, m->n, width);
    struct tensor sums = tensor_3d(region(m, m->block, before), DT_F32, m->n, n_parts, 2);
    return backend_moments(m->be, &sums, &rows, n_parts > 1 ? cut : NULL, n_parts);
}

enum status meter_take_input(struct meter *m, int32_t layer, enum meter_input which, const float *x)
{
    const struct model_shard *s = m->shard;
    const int32_t width[METER_N_INPUTS] = {m->config->hidden,
                                           (s->head_end - s->head_begin) * m->config->head_dim,
                                           m->config->hidden, s->ffn_end - s->ffn_begin};
    if (!(m->needs & SIGNAL_ACTIVATION)) {
        return ST_OK;
    }
    return take(m, parts_before(m, layer, (int)which), x, width[which],
                which == METER_O ? s->attn.cut : s->mlp.cut, m->parts[which]);
}

enum status meter_take_hidden(struct meter *m, const float *x)
{
    if (!(m->needs & SIGNAL_HIDDEN)) {
        return ST_OK;
    }
    return take(m, hidden_at(m), x, m->config->hidden, NULL, 1);
}

enum status meter_take_kv(struct meter *m, const float *k, const float *v)
{
    int32_t n = kv_local(m), width = n * m->config->head_dim;
    if (!(m->needs & SIGNAL_KV_NORMS)) {
        return ST_OK;
    }
    TRY(take(m, kv_at(m, 0), k, width, m->kv_cut, n));
    return take(m, kv_at(m, 1), v, width, m->kv_cut, n);
}

/* ---- merging ---- */

/* Which KV heads are whose, once: the ranges come from the same arithmetic on every rank. */
static enum status find_kv_owners(struct meter *m)
{
    int64_t range[2] = {m->shard->kv_begin, m->shard->kv_end}, all[2 * SHARD_MAX_SEGMENTS];
    struct tensor part = tensor_1d(range, DT_I64, 2),
                  whole = tensor_1d(all, DT_I64, 2 * m->coll->size);
    for (int r = 0; r < m->coll->size; r++) {
        m->counts[r] = 2;
    }
    TRY(collective_all_gather(m->coll, &whole, &part, m->counts));
    m->kv_own[0] = 0;
    for (int r = 0; r < m->coll->size; r++) {
        int32_t end = (int32_t)all[2 * r + 1];
        m->kv_own[r + 1] = end > m->kv_own[r] ? end : m->kv_own[r];
    }
    return ST_OK;
}

static int32_t kv_owned(const struct meter *m, int r)
{
    return m->kv_own[r + 1] - m->kv_own[r];
}

static float *pack(float *to, const float *sums, int32_t n_parts, int32_t row)
{
    const float *from = sums + 2 * (size_t)row * (size_t)n_parts;
    for (int32_t i = 0; i < 2 * n_parts; i++) {
        *to++ = from[i];
    }
    return to;
}

/* This rank's sums, position by position: o and down of every layer; squares of its KV heads. */
static void pack_all(struct meter *m, float *base)
{
    float *to = m->mine;
    int32_t skip = m->kv_own[m->coll->rank] - m->shard->kv_begin, n_kv = kv_local(m);
    for (int32_t i = 0; i < m->n; i++) {
        for (int32_t l = 0; l < m->config->n_layers && (m->needs & SIGNAL_ACTIVATION); l++) {
            to = pack(to, region(m, base, parts_before(m, l, METER_O)), m->parts[METER_O], i);
            to = pack(to, region(m, base, parts_before(m, l, METER_DOWN)), m->parts[METER_DOWN], i);
        }
        for (int which = 0; which < 2 && (m->needs & SIGNAL_KV_NORMS); which++) {
            const float *sums = region(m, base, kv_at(m, which)) + 2 * (size_t)i * (size_t)n_kv;
            for (int32_t h = skip; h < skip + kv_owned(m, m->coll->rank); h++) {
                *to++ = sums[2 * h + 1];
            }
        }
    }
}

/* Sums of a row of `width` numbers -> mean and variance. */
static void set_activation(float *to, const double sums[2], int32_t width)
{
    double mean = sums[0] / width, variance = sums[1] / width - mean * mean;
    to[0] = (float)mean;
    to[1] = variance > 0 ? (float)variance : 0;
}

static void add_parts(double sums[2], const float *from, int32_t n_parts)
{
    for (int32_t p = 0; p < n_parts; p++) {
        sums[0] += (double)from[2 * p];
        sums[1] += (double)from[2 * p + 1];
    }
}

/* Mean and variance of both products by columns of a layer, from all ranks in their order. */
static void merge_columns(const struct meter *m, float *roles, int32_t row, int32_t layer)
{
    const struct model_config *c = m->config;
    const struct segment_share *a = &m->shard->attn, *f = &m->shard->mlp;
    int32_t size = m->coll->size;
    double o[2] = {0}, down[2] = {0};
    const float *from = m->all;
    for (int r = 0; r < size; r++) {
        int32_t n_o = split_at(a->total, size, r + 1) - split_at(a->total, size, r);
        int32_t n_down = split_at(f->total, size, r + 1) - split_at(f->total, size, r);
        const float *at = from + (size_t)row * travelling(m, r, kv_owned(m, r)) +
                          2 * (size_t)layer * (size_t)(n_o + n_down);
        add_parts(o, at, n_o);
        add_parts(down, at + 2 * n_o, n_down);
        from += m->counts[r];
    }
    set_activation(roles + 2 * M_O, o, c->n_heads * c->head_dim);
    set_activation(roles + 2 * M_DOWN, down, c->ffn);
}

static void merge_activation(struct meter *m, float *base, int32_t row)
{
    const struct model_config *c = m->config;
    size_t per_row = 2 * (size_t)c->n_layers * M_N_ROLES;
    float *to = m->activation + (size_t)row * per_row;
    m->out[row].activation = to;
    for (int32_t l = 0; l < c->n_layers; l++, to += 2 * M_N_ROLES) {
        double attn[2] = {0}, mlp[2] = {0};
        add_parts(attn, region(m, base, parts_before(m, l, METER_ATTN)) + 2 * row, 1);
        add_parts(
            mlp,
            region(m, base, parts_before(m, l, c->parallel ? METER_ATTN : METER_MLP)) + 2 * row, 1);
        for (int r = M_Q; r <= M_V; r++) {
            set_activation(to + 2 * r, attn, c->hidden);
        }
        for (int r = 0; r < M_N_ROLES; r++) {
            if ((r == M_GATE || r == M_UP) && model_has_role(c, r)) {
                set_activation(to + 2 * r, mlp, c->hidden);
            }
        }
        merge_columns(m, to, row, l);
    }
}

static void merge_kv(struct meter *m, int32_t row)
{
    double squares[2] = {0};
    const float *from = m->all;
    for (int r = 0; r < m->coll->size; r++) {
        int32_t n = kv_owned(m, r);
        size_t each = travelling(m, r, n);
        const float *at = from + ((size_t)row + 1) * each - 2 * (size_t)n;
        for (int32_t h = 0; h < n; h++) {
            squares[0] += (double)at[h];
            squares[1] += (double)at[n + h];
        }
        from += m->counts[r];
    }
    m->out[row].k_norm = (float)sqrt(squares[0]);
    m->out[row].v_norm = (float)sqrt(squares[1]);
}

enum status meter_end(struct meter *m)
{
    float *base = m->host ? m->host : m->block;
    if (m->n == 0) {
        return ST_OK;
    }
    if (m->host) {
        size_t n = 2 * (size_t)m->n * kv_at(m, 2);
        TRY(backend_download(m->be, m->host, m->block, n * sizeof(float)));
    } else {
        TRY(backend_sync(m->be));
    }
    if (m->kv_own[0] < 0) {
        TRY(find_kv_owners(m));
    }
    size_t total = 0;
    for (int r = 0; r < m->coll->size; r++) {
        m->counts[r] = (size_t)m->n * travelling(m, r, kv_owned(m, r));
        total += m->counts[r];
    }
    if (total > 0) {
        pack_all(m, base);
        struct tensor part = tensor_1d(m->mine, DT_F32, (int32_t)m->counts[m->coll->rank]);
        struct tensor whole = tensor_1d(m->all, DT_F32, (int32_t)total);
        TRY(collective_all_gather(m->coll, &whole, &part, m->counts));
    }
    for (int32_t i = 0; i < m->n; i++) {
        m->out[i] = (struct measured){0};
        if (m->needs & SIGNAL_HIDDEN) {
            const float *sums = region(m, base, hidden_at(m)) + 2 * i;
            m->out[i].hidden_mean = (float)((double)sums[0] / m->config->hidden);
            m->out[i].hidden_rms = (float)sqrt((double)sums[1] / m->config->hidden);
        }
        if (m->needs & SIGNAL_KV_NORMS) {
            merge_kv(m, i);
        }
        if (m->needs & SIGNAL_ACTIVATION) {
            merge_activation(m, base, i);
        }
    }
    return ST_OK;
}

const struct measured *meter_of(const struct meter *m, int32_t i)
{
    return &m->out[i];
}
