/* SPDX-License-Identifier: Apache-2.0 */
#include "core/decoder.h"

#include <math.h>
#include <string.h>

#include "core/chooser.h"
#include "core/divergence.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/policy.h"
#include "core/rope.h"

struct decoder {
    struct backend *be;               /* borrowed */
    struct collective *coll;          /* borrowed */
    struct weights *w;                /* borrowed */
    const struct level_table *levels; /* borrowed */
    struct decoder_options opt;
    struct kvcache kv;
    struct rope_table rope;
    int32_t rows;        /* most tokens of a pass */
    int32_t decode_rows; /* most tokens of a decode pass, probes included */
    /* Backend scratch, cut from one block. R = rows. */
    void *block;
    float *x, *h;                       /* (R, hidden) residual stream, normed */
    float *q, *att;                     /* (R, n_heads_local, head_dim) */
    float *k, *v;                       /* (R, n_kv_heads_local, head_dim) */
    float *gate, *up;                   /* (R, ffn_local) */
    float *parts;                       /* (parts of all ranks, R, hidden) partial sums */
    float *logits;                      /* (R, n_vocab_local) */
    int32_t *ids, *slot, *pos, *kv_row; /* (R) */
    uint8_t *bits;                      /* (n_layers * M_N_ROLES + 1, R) */
    /* Host scratch. */
    int32_t *host_ids, *host_slot, *host_pos, *host_row; /* (R), one block */
    uint8_t *host_bits;                                  /* as bits */
    uint32_t *bits_used;                                 /* (n_layers * M_N_ROLES + 1) */
    int32_t *levels_of;                                  /* (R) level of each token */
    struct logit_stats *stats_local, *stats_all;         /* (R, cuts): this rank's, all ranks' */
    struct logit_want *wants;                            /* (R) */
    struct logit_stats *merged;                          /* (R) */
    bool *probe;                                         /* (R) */
    struct chooser *chooser;                             /* NULL when nothing is filtered */
    struct meter *meter;                                 /* NULL when nothing is measured */
    struct divergence *divergence;                       /* NULL without probes */
    float *host_parts; /* as parts, of a backend whose memory is not the host's and several ranks */
    float *host_logits;     /* (n_vocab_local), of such a backend */
    size_t *counts;         /* (ranks) */
    float *feature_scratch; /* allocated on first use */
    char *fork_bounce;      /* the same */
    int32_t last_results;   /* rows of logits of the last pass */
};

/* ---- creation ---- */

enum { CUT_ALIGN = 64 };

/* Hands out consecutive aligned pieces of a block; with base NULL it only measures. */
static void *cut(char *base, size_t *used, size_t n, size_t size)
{
    void *piece = base ? base + *used : NULL;
    *used += (n * size + CUT_ALIGN - 1) / CUT_ALIGN * CUT_ALIGN;
    return piece;
}

/* Where the partial sums of rank r begin among those of all ranks; r = size: how many there are.
 * The first rank's segments come first in the order of all, so that it adds them up in the product;
 * the others' are kept apart. */
static int32_t part_at(const struct segment_share *share, int32_t size, int32_t r)
{
    return r == 0 ? 0 : 1 + split_at(share->total, size, r) - split_at(share->total, size, 1);
}

static size_t lay_out(struct decoder *d, char *base)
{
    const struct model_config *c = &d->w->config;
    const struct model_shard *s = &d->w->shard;
    size_t used = 0, r = (size_t)d->rows, hidden = (size_t)c->hidden, hd = (size_t)c->head_dim;
    size_t heads = (size_t)(s->head_end - s->head_begin), kv = (size_t)(s->kv_end - s->kv_begin);
    size_t ffn = (size_t)(s->ffn_end - s->ffn_begin),
           vocab = (size_t)(s->vocab_end - s->vocab_begin);
    int32_t attn_parts = part_at(&s->attn, s->size, s->size);
    int32_t mlp_parts = part_at(&s->mlp, s->size, s->size);
    size_t parts = (size_t)(attn_parts > mlp_parts ? attn_parts : mlp_parts);
    d->x = cut(base, &used, r * hidden, sizeof(float));
    d->h = cut(base, &used, r * hidden, sizeof(float));
    d->q = cut(base, &used, r * heads * hd, sizeof(float));
    d->att = cut(base, &used, r * heads * hd, sizeof(float));
    d->k = cut(base, &used, r * kv * hd, sizeof(float));
    d->v = cut(base, &used, r * kv * hd, sizeof(float));
    d->gate = cut(base, &used, model_has_role(c, M_GATE) ? r * ffn : 0, sizeof(float));
    d->up = cut(base, &used, r * ffn, sizeof(float));
    d->parts = cut(base, &used, parts * r * hidden, sizeof(float));
    d->logits = cut(base, &used, r * vocab, sizeof(float));
    d->ids = cut(base, &used, r, sizeof(int32_t));
    d->slot = cut(base, &used, r, sizeof(int32_t));
    d->pos = cut(base, &used, r, sizeof(int32_t));
    d->kv_row = cut(base, &used, r, sizeof(int32_t));
    d->bits = cut(base, &used, r * ((size_t)c->n_layers * M_N_ROLES + 1), 1);
    return used;
}

/* Angles in double, as the definition has them; rounded once to f32. */
static enum status make_rope(struct decoder *d)
{
    const struct model_config *c = &d->w->config;
    int32_t half = c->rot_dim / 2;
    size_t n = (size_t)d->opt.max_tok * (size_t)half;
    float *host = NULL;
    double *frequency = NULL;
    void *block = NULL;
    enum status st = ST_OK;
    TRY_GOTO(st, MEM_NEW(&host, 2 * n), done);
    TRY_GOTO(st, MEM_NEW(&frequency, half), done);
    rope_frequencies(frequency, c->rope_theta, c->rot_dim, &c->rope_scaling);
    for (int32_t p = 0; p < d->opt.max_tok; p++) {
        for (int32_t i = 0; i < half; i++) {
            double angle = p * frequency[i];
            host[(size_t)p * (size_t)half + (size_t)i] = (float)cos(angle);
            host[n + (size_t)p * (size_t)half + (size_t)i] = (float)sin(angle);
        }
    }
    TRY_GOTO(st, backend_alloc(d->be, &block, 2 * n * sizeof *host), done);
    d->rope.cos = tensor_2d(block, DT_F32, d->opt.max_tok, half);
    d->rope.sin = tensor_2d((float *)block + n, DT_F32, d->opt.max_tok, half);
    d->rope.rot_dim = c->rot_dim;
    TRY_GOTO(st, backend_upload(d->be, block, host, 2 * n * sizeof *host), done);
done:
    mem_free(host);
    mem_free(frequency);
    return st;
}

enum status decoder_create(struct decoder **out, struct backend *be, struct collective *coll,
                           struct weights *weights, const struct level_table *levels,
                           const struct decoder_options *options)
{
    const struct model_config *c = &weights->config;
    enum status st = ST_OK;
    struct decoder *d = NULL;
    if (options->max_tok < 1 || options->max_tok > c->context) {
        FAIL(ST_USER, "a context of %d tokens is asked for; the model has %d", options->max_tok,
             c->context);
    }
    TRY(mem_alloc_array((void **)&d, 1, sizeof *d));
    *d = (struct decoder){.be = be, .coll = coll, .w = weights, .levels = levels, .opt = *options};
    d->decode_rows = options->n_slots * (options->adds_tokens ? 2 : 1);
    d->rows = d->decode_rows > options->prefill_chunk ? d->decode_rows : options->prefill_chunk;
    size_t n_matrices = (size_t)c->n_layers * M_N_ROLES + 1, r = (size_t)d->rows;
    size_t bytes = lay_out(d, NULL);
    TRY_GOTO(st, backend_alloc(be, &d->block, bytes), fail);
    lay_out(d, d->block);
    TRY_GOTO(st, make_rope(d), fail);
    TRY_GOTO(st,
             kvcache_create(&d->kv, be, c, &weights->shard, options->n_slots, options->max_tok, 1,
                            options->kv_dtype),
             fail);
    TRY_GOTO(st, MEM_NEW(&d->host_ids, 4 * r), fail);
    d->host_slot = d->host_ids + r;
    d->host_pos = d->host_slot + r;
    d->host_row = d->host_pos + r;
    TRY_GOTO(st, MEM_NEW(&d->host_bits, r * n_matrices), fail);
    TRY_GOTO(st, MEM_NEW(&d->bits_used, n_matrices), fail);
    TRY_GOTO(st, MEM_NEW(&d->levels_of, r), fail);
    TRY_GOTO(st, MEM_NEW(&d->wants, r), fail);
    TRY_GOTO(st, MEM_NEW(&d->stats_local, r * SHARD_MAX_SEGMENTS), fail);
    TRY_GOTO(st, MEM_NEW(&d->stats_all, r * (size_t)weights->shard.vocab.total), fail);
    TRY_GOTO(st, MEM_NEW(&d->merged, r), fail);
    TRY_GOTO(st, MEM_NEW(&d->probe, r), fail);
    TRY_GOTO(st, MEM_NEW(&d->counts, coll->size), fail);
    if (!backend_is_host(be)) {
        const struct model_shard *s = &weights->shard;
        size_t n = r * (size_t)c->hidden;
        n *= (size_t)(s->attn.total > s->mlp.total ? s->attn.total : s->mlp.total);
        TRY_GOTO(st, MEM_NEW(&d->host_parts, coll->size > 1 ? n : 1), fail);
        TRY_GOTO(st, MEM_NEW(&d->host_logits, s->vocab_end - s->vocab_begin), fail);
    }
    if (candidate_filter_is_on(&options->filter)) {
        TRY_GOTO(st,
                 chooser_create(&d->chooser, be, coll, &weights->shard, c->vocab, &options->filter,
                                d->decode_rows),
                 fail);
    }
    if (options->signals & SIGNALS_MEASURED) {
        TRY_GOTO(
            st,
            meter_create(&d->meter, be, coll, &weights->shard, c, options->signals, d->decode_rows),
            fail);
    }
    if (options->adds_tokens) {
        TRY_GOTO(st, divergence_create(&d->divergence, be, coll, &weights->shard, options->n_slots),
                 fail);
    }
    *out = d;
    return ST_OK;
fail:
    decoder_destroy(&d);
    return st;
}

void decoder_destroy(struct decoder **dec)
{
    struct decoder *d = *dec;
    if (!d) {
        return;
    }
    backend_release(d->be, d->rope.cos.data);
    backend_release(d->be, d->block);
    kvcache_free(&d->kv);
    mem_free(d->host_ids);
    mem_free(d->host_bits);
    mem_free(d->bits_used);
    mem_free(d->levels_of);
    mem_free(d->wants);
    mem_free(d->stats_local);
    mem_free(d->stats_all);
    mem_free(d->merged);
    mem_free(d->probe);
    chooser_destroy(&d->chooser);
    meter_destroy(&d->meter);
    divergence_destroy(&d->divergence);
    mem_free(d->counts);
    mem_free(d->host_parts);
    mem_free(d->host_logits);
    mem_free(d->feature_scratch);
    mem_free(d->fork_bounce);
    mem_free(d);
    *dec = NULL;
}

int32_t decoder_n_filled(const struct decoder *dec, int32_t slot)
{
    return dec->kv.n_filled[slot];
}

void decoder_clear_slot(struct decoder *dec, int32_t slot)
{
    dec->kv.n_filled[slot] = 0;
}

enum status decoder_fork_slot(struct decoder *dec, int32_t from, int32_t to)
{
    if (!dec->fork_bounce && !backend_is_host(dec->be)) {
        size_t row = (size_t)dec->kv.head_dim * dtype_bytes(dec->kv.dtype), bytes = 0;
        TRY(mem_mul(&bytes, row, (size_t)dec->kv.n_rows));
        TRY(MEM_NEW(&dec->fork_bounce, bytes));
    }
    return kvcache_fork(&dec->kv, from, to, dec->fork_bounce);
}

enum status decoder_fill_slot(struct decoder *dec, int32_t slot, int32_t n_tok)
{
    TRY(kvcache_fill(&dec->kv, slot, n_tok, (uint32_t)slot + 1));
    return ST_OK;
}

/* ---- one pass ---- */

/* A pass being built: what its operations share. */
struct pass {
    int32_t n_tok, n_results, n_gathered, n_probes;
    enum product product;
    struct token_place place;
};

/* Bits of every (layer, matrix) and token, and which precisions occur. */
static enum status set_bits(struct decoder *d, int32_t n_tok)
{
    int32_t n = d->w->config.n_layers * M_N_ROLES;
    for (int32_t m = 0; m <= n; m++) {
        uint8_t *row = d->host_bits + (size_t)m * (size_t)d->rows;
        uint32_t used = 0;
        for (int32_t i = 0; i < n_tok; i++) {
            const struct level *level = &d->levels->level[d->levels_of[i]];
            row[i] = m < n ? level->bits[m] : level->head_bits;
            used |= 1u << row[i];
        }
        d->bits_used[m] = used & ~1u;
    }
    return backend_upload(d->be, d->bits, d->host_bits, (size_t)(n + 1) * (size_t)d->rows);
}

/* y = the linear layer's product, in `share` segments where the matrix is cut by columns (then
 * without the bias, which add_segments adds). x and y begin at row `first` of the pass. */
static enum status multiply(struct decoder *d, const struct pass *p, const struct linear *l, int m,
                            float *y, float *x, int32_t first, const struct segment_share *share)
{
    int32_t n_tok = p->n_tok - first;
    int32_t n_rows = l->is_nested ? l->nested.n_rows : l->dense.dims[0];
    int32_t n_cols = l->is_nested ? l->nested.n_cols : l->dense.dims[1];
    int32_t n_segments = share ? share->end - share->begin : 1;
    bool add_up = share && share->begin == 0;
    struct how how = {.product = p->product,
                      .n_segments = n_segments,
                      .cut = n_segments > 1 ? share->cut : NULL,
                      .add_up = add_up,
                      .bits_used = d->bits_used[m]};
    struct tensor tx = tensor_2d(x + (size_t)first * (size_t)n_cols, DT_F32, n_tok, n_cols);
    struct tensor ty = tensor_3d(y, DT_F32, add_up ? 1 : n_segments, n_tok, n_rows);
    struct tensor bits = tensor_1d(d->bits + (size_t)m * (size_t)d->rows + first, DT_U8, n_tok);
    const struct tensor *bias = !share && l->bias.data ? &l->bias : NULL;
    if (l->is_nested) {
        return backend_matmul_nested(d->be, &ty, &l->nested, &bits, &tx, bias, &how);
    }
    return backend_matmul_dense(d->be, &ty, &l->dense, &tx, bias, &how);
}

/* This rank's partial sums of a pass, at their place among those of all ranks. */
static float *own_parts(const struct decoder *d, const struct pass *p,
                        const struct segment_share *share)
{
    size_t at = (size_t)part_at(share, d->coll->size, d->coll->rank);
    return d->parts + at * (size_t)p->n_tok * (size_t)d->w->config.hidden;
}

/* x += the sum over all segments of all ranks, in segment order, and the bias of the product. */
static enum status add_segments(struct decoder *d, const struct pass *p, const struct linear *l,
                                const struct segment_share *share)
{
    const struct tensor *bias = l->bias.data ? &l->bias : NULL;
    int32_t hidden = d->w->config.hidden, size = d->coll->size, rank = d->coll->rank;
    int32_t n_all = part_at(share, size, size);
    int32_t own = part_at(share, size, rank + 1) - part_at(share, size, rank);
    struct tensor x = tensor_2d(d->x, DT_F32, p->n_tok, hidden);
    struct tensor all = tensor_3d(d->parts, DT_F32, n_all, p->n_tok, hidden);
    if (size == 1) {
        return backend_add_parts(d->be, &x, &all, bias);
    }
    float *at = own_parts(d, p, share);
    struct tensor parts = tensor_3d(at, DT_F32, own, p->n_tok, hidden), seen = parts,
                  seen_all = all;
    if (d->host_parts) { /* ranks exchange through the host */
        seen.data = d->host_parts + (at - d->parts);
        seen_all.data = d->host_parts;
        TRY(backend_download(d->be, seen.data, parts.data, tensor_bytes(&parts)));
    } else {
        TRY(backend_sync(d->be));
    }
    if (n_all == size) { /* one each: rank order is segment order */
        TRY(collective_all_reduce_sum(d->coll, &seen));
        if (d->host_parts) {
            TRY(backend_upload(d->be, parts.data, seen.data, tensor_bytes(&parts)));
        }
        return backend_add_parts(d->be, &x, &parts, bias);
    }
    for (int32_t r = 0; r < size; r++) {
        int32_t n = part_at(share, size, r + 1) - part_at(share, size, r);
        d->counts[r] = (size_t)n * (size_t)p->n_tok * (size_t)hidden;
    }
    TRY(collective_all_gather(d->coll, &seen_all, &seen, d->counts));
    if (d->host_parts) {
        TRY(backend_upload(d->be, all.data, seen_all.data, tensor_bytes(&all)));
    }
    return backend_add_parts(d->be, &x, &all, bias);
}

static enum status normalise(struct decoder *d, struct tensor *y, const struct tensor *x,
                             const struct norm_weights *n)
{
    const struct model_config *c = &d->w->config;
    if (c->norm == NORM_LAYER) {
        return backend_layernorm(d->be, y, x, &n->gain, n->bias.data ? &n->bias : NULL,
                                 c->norm_eps);
    }
    return backend_rmsnorm(d->be, y, x, &n->gain, c->norm_eps);
}

/* The input of linear layers, where somebody wants to know. */
static enum status measure(struct decoder *d, int layer, enum meter_input which, const float *x)
{
    return d->meter ? meter_take_input(d->meter, layer, which, x) : ST_OK;
}

static enum status attention_block(struct decoder *d, const struct pass *p, int layer)
{
    const struct model_config *c = &d->w->config;
    const struct model_shard *s = &d->w->shard;
    const struct layer_weights *l = &d->w->layers[layer];
    int m = layer * M_N_ROLES;
    int32_t heads = s->head_end - s->head_begin, kv = s->kv_end - s->kv_begin;
    struct tensor x = tensor_2d(d->x, DT_F32, p->n_tok, c->hidden), h = x;
    h.data = d->h;
    TRY(normalise(d, &h, &x, &l->attn_norm));
    TRY(measure(d, layer, METER_ATTN, d->h));
    TRY(multiply(d, p, &l->matrix[M_Q], m + M_Q, d->q, d->h, 0, NULL));
    TRY(multiply(d, p, &l->matrix[M_K], m + M_K, d->k, d->h, 0, NULL));
    TRY(multiply(d, p, &l->matrix[M_V], m + M_V, d->v, d->h, 0, NULL));
    struct tensor q = tensor_3d(d->q, DT_F32, p->n_tok, heads, c->head_dim), att = q;
    struct tensor k = tensor_3d(d->k, DT_F32, p->n_tok, kv, c->head_dim), v = k;
    att.data = d->att;
    v.data = d->v;
    bool is_last = layer == c->n_layers - 1;
    TRY(backend_rope(d->be, &q, &k, &p->place, &d->rope));
    TRY(backend_kv_append(d->be, &d->kv.layers[layer], &k, &v, &p->place));
    if (d->meter && is_last) {
        TRY(meter_take_kv(d->meter, d->k, d->v));
    }
    float scale = (float)(1.0 / sqrt((double)c->head_dim));
    TRY(backend_attention(d->be, &att, &q, &d->kv.layers[layer], &p->place, scale));
    TRY(measure(d, layer, METER_O, d->att));
    TRY(multiply(d, p, &l->matrix[M_O], m + M_O, own_parts(d, p, &s->attn), d->att, 0, &s->attn));
    return add_segments(d, p, &l->matrix[M_O], &s->attn);
}

static enum status mlp_block(struct decoder *d, const struct pass *p, int layer)
{
    const struct model_config *c = &d->w->config;
    const struct model_shard *s = &d->w->shard;
    const struct layer_weights *l = &d->w->layers[layer];
    int m = layer * M_N_ROLES;
    int32_t width = s->ffn_end - s->ffn_begin;
    struct tensor x = tensor_2d(d->x, DT_F32, p->n_tok, c->hidden), h = x;
    struct tensor up = tensor_2d(d->up, DT_F32, p->n_tok, width), gate = up;
    h.data = d->h;
    gate.data = d->gate;
    if (!c->parallel) { /* else h still is the norm of the block's input, as attention had it */
        TRY(normalise(d, &h, &x, &l->mlp_norm));
        TRY(measure(d, layer, METER_MLP, d->h));
    }
    TRY(multiply(d, p, &l->matrix[M_UP], m + M_UP, d->up, d->h, 0, NULL));
    float *inner = d->up;
    if (model_has_role(c, M_GATE)) {
        inner = d->gate;
        TRY(multiply(d, p, &l->matrix[M_GATE], m + M_GATE, d->gate, d->h, 0, NULL));
        TRY(backend_glu(d->be, &gate, &gate, &up, c->act));
    } else {
        TRY(backend_activate(d->be, &up, &up, c->act));
    }
    TRY(measure(d, layer, METER_DOWN, inner));
    TRY(multiply(d, p, &l->matrix[M_DOWN], m + M_DOWN, own_parts(d, p, &s->mlp), inner, 0,
                 &s->mlp));
    return add_segments(d, p, &l->matrix[M_DOWN], &s->mlp);
}

/* Marks the results of tokens whose logits are no numbers: nobody may index by a pick of these. */
static enum status check_numbers(const struct logit_stats *merged, int32_t n,
                                 struct token_result *results)
{
    int32_t bad = -1;
    for (int32_t i = n - 1; i >= 0; i--) {
        bool good = merged[i].argmax >= 0 && isfinite(merged[i].sum_exp) && isfinite(merged[i].max);
        results[i] = (struct token_result){.token = good ? 0 : -1};
        bad = good ? bad : i;
    }
    if (bad >= 0) {
        FAIL(ST_NUMERIC,
             "the logits are not numbers (largest %g): the model's weights are damaged, or the "
             "precision is too low for it, or its activations leave the range of the KV format "
             "(try kv.format = \"f32\")",
             (double)merged[bad].max);
    }
    return ST_OK;
}

/* Head, statistics of this rank's vocabulary, merged over all ranks in vocabulary order. */
static enum status read_out(struct decoder *d, struct pass *p, struct token_result *results)
{
    const struct model_config *c = &d->w->config;
    const struct model_shard *s = &d->w->shard;
    const struct segment_share *share = &s->vocab;
    int32_t n = p->n_results, first = p->n_tok - n, own = share->end - share->begin;
    bool any_restricted = false;
    d->last_results = n;
    if (n == 0) {
        return backend_sync(d->be);
    }
    struct tensor x = tensor_2d(d->x + (size_t)first * (size_t)c->hidden, DT_F32, n, c->hidden),
                  h = x;
    h.data = d->h + (size_t)first * (size_t)c->hidden;
    TRY(normalise(d, &h, &x, &d->w->final_norm));
    TRY(multiply(d, p, &d->w->head, c->n_layers * M_N_ROLES, d->logits, d->h, first, NULL));
    struct tensor logits = tensor_2d(d->logits, DT_F32, n, s->vocab_end - s->vocab_begin);
    TRY(backend_logit_stats(d->be, d->stats_local, &logits, s->vocab_begin,
                            own > 1 ? share->cut : NULL, own, d->wants));
    for (int r = 0; r < d->coll->size; r++) {
        int32_t parts =
            split_at(share->total, d->coll->size, r + 1) - split_at(share->total, d->coll->size, r);
        d->counts[r] = (size_t)n * (size_t)parts * sizeof *d->stats_all;
    }
    struct tensor mine = tensor_1d(d->stats_local, DT_U8, (int32_t)d->counts[d->coll->rank]);
    struct tensor all = tensor_1d(
        d->stats_all, DT_U8, (int32_t)((size_t)n * (size_t)share->total * sizeof *d->stats_all));
    TRY(collective_all_gather(d->coll, &all, &mine, d->counts));
    for (int32_t i = 0; i < n; i++) {
        struct logit_stats parts[SHARD_MAX_SEGMENTS], *merged = &d->merged[i];
        const struct logit_stats *from = d->stats_all;
        int n_merged = 0;
        for (int r = 0; r < d->coll->size; r++) {
            int32_t of_rank = (int32_t)(d->counts[r] / sizeof *from / (size_t)n);
            for (int32_t j = 0; j < of_rank; j++) {
                parts[n_merged++] = from[(size_t)i * (size_t)of_rank + (size_t)j];
            }
            from += (size_t)n * (size_t)of_rank;
        }
        sampler_merge(merged, parts, n_merged, &d->wants[i]);
        any_restricted = any_restricted || d->wants[i].restricted;
    }
    TRY(check_numbers(d->merged, n, results));
    if (any_restricted) {
        TRY(chooser_run(d->chooser, &logits, d->merged, d->wants, &p->n_gathered));
    }
    for (int32_t i = 0; i < n; i++) {
        sampler_result(&results[i], &d->merged[i], &d->wants[i]);
    }
    return p->n_probes > 0 ? divergence_run(d->divergence, &logits, d->merged, d->probe, results)
                           : ST_OK;
}

/* n_rows: of all ranks together. */
static size_t linear_bytes(const struct decoder *d, const struct linear *l, int m, int32_t n_rows,
                           int32_t n_tok, int32_t first)
{
    if (!l->is_nested) {
        return (size_t)n_rows * (size_t)l->n_cols * dtype_bytes(l->dense.dtype);
    }
    const uint8_t *bits = d->host_bits + (size_t)m * (size_t)d->rows;
    int max = 0;
    for (int32_t i = first; i < n_tok; i++) {
        max = bits[i] > max ? bits[i] : max;
    }
    return nested_bytes_read(l->nested.kind, n_rows, l->n_cols_padded, l->nested.group_cols, max,
                             d->bits_used[m]);
}

/* Bytes that all ranks of the replica read together: planes, levels and head; K and V rows up to
 * each slot's end (a chunk reads its slot's rows once). A KV head that several ranks hold is read
 * by each: its rows of the k and v matrices, and its cache. The embedding's few rows are not
 * counted. */
static void count_bytes(const struct decoder *d, const struct pass *p, struct pass_record *rec)
{
    const struct model_config *c = &d->w->config;
    size_t bytes = 0, rows = 0;
    int32_t n_kv_held = d->w->shard.n_kv_held;
    for (int l = 0; l < c->n_layers; l++) {
        for (int r = 0; r < M_N_ROLES; r++) {
            const struct linear *matrix = &d->w->layers[l].matrix[r];
            int32_t n_rows = r == M_K || r == M_V ? n_kv_held * c->head_dim : matrix->n_rows;
            bytes += linear_bytes(d, matrix, l * M_N_ROLES + r, n_rows, p->n_tok, 0);
        }
    }
    if (p->n_results > 0) {
        bytes += linear_bytes(d, &d->w->head, c->n_layers * M_N_ROLES, d->w->head.n_rows, p->n_tok,
                              p->n_tok - p->n_results);
    }
    for (int32_t i = 0; i < p->n_tok; i++) {
        bool last_of_slot = i + 1 == p->n_tok || d->host_slot[i + 1] != d->host_slot[i];
        rows += last_of_slot ? (size_t)d->host_pos[i] + 1 + d->probe[i] : 0;
        int max = d->levels->level[d->levels_of[i]].max_bits;
        rec->max_bits = max > rec->max_bits ? max : rec->max_bits;
    }
    rec->weight_bytes = bytes;
    rec->kv_bytes = rows * 2 * (size_t)c->n_layers * (size_t)n_kv_held * (size_t)c->head_dim *
                    dtype_bytes(d->kv.dtype);
}

/* Runs the layers over what host_ids, host_slot, host_pos and levels_of hold. */
static enum status forward(struct decoder *d, int32_t n_tok, int32_t n_results,
                           enum product product, struct token_result *results,
                           struct pass_record *rec)
{
    const struct model_config *c = &d->w->config;
    double start = clock_s();
    size_t n = (size_t)n_tok;
    struct pass p = {.n_tok = n_tok, .n_results = n_results, .product = product};
    d->coll->comm_s = 0;
    for (int32_t i = 0; i < n_tok; i++) {
        if (d->host_ids[i] < 0 || d->host_ids[i] >= c->vocab) {
            FAIL(ST_SHAPE, "token id %d is outside the vocabulary of %d", d->host_ids[i], c->vocab);
        }
        if (d->host_pos[i] >= d->opt.max_tok) {
            FAIL(ST_SHAPE, "slot %d is full: %d tokens", d->host_slot[i], d->opt.max_tok);
        }
        d->host_row[i] = d->probe[i] ? d->opt.max_tok : d->host_pos[i];
        p.n_probes += d->probe[i];
        p.place.max_pos = d->host_pos[i] > p.place.max_pos ? d->host_pos[i] : p.place.max_pos;
    }
    if (d->meter) { /* callers that want more results than a decode pass has, want no signals */
        meter_begin(d->meter, n_tok - n_results, n_results <= d->decode_rows ? n_results : 0);
    }
    TRY(set_bits(d, n_tok));
    TRY(backend_upload(d->be, d->ids, d->host_ids, n * sizeof *d->ids));
    TRY(backend_upload(d->be, d->slot, d->host_slot, n * sizeof *d->slot));
    TRY(backend_upload(d->be, d->pos, d->host_pos, n * sizeof *d->pos));
    TRY(backend_upload(d->be, d->kv_row, d->host_row, n * sizeof *d->kv_row));
    p.place.slot = tensor_1d(d->slot, DT_I32, n_tok);
    p.place.pos = tensor_1d(d->pos, DT_I32, n_tok);
    p.place.kv_row = tensor_1d(d->kv_row, DT_I32, n_tok);
    struct tensor x = tensor_2d(d->x, DT_F32, n_tok, c->hidden);
    struct tensor ids = tensor_1d(d->ids, DT_I32, n_tok);
    TRY(backend_embed(d->be, &x, &d->w->embed, &ids));
    for (int l = 0; l < c->n_layers; l++) {
        TRY(attention_block(d, &p, l));
        TRY(mlp_block(d, &p, l));
    }
    if (d->meter) {
        TRY(meter_take_hidden(d->meter, d->x));
    }
    TRY(read_out(d, &p, results));
    if (d->meter) {
        TRY(meter_end(d->meter));
    }
    for (int32_t i = 0; i < n_tok; i++) {
        d->kv.n_filled[d->host_slot[i]] = d->host_pos[i] + 1;
    }
    *rec = (struct pass_record){.n_tok = n_tok,
                                .n_gathered = p.n_gathered,
                                .time_us = (float)(1e6 * (clock_s() - start)),
                                .comm_us = (float)(1e6 * d->coll->comm_s)};
    count_bytes(d, &p, rec);
    return ST_OK;
}

static void set_want(struct decoder *d, int32_t i, const struct logit_want *want)
{
    d->wants[i] = *want;
    d->wants[i].restricted = d->chooser && want->temperature > 0;
}

enum status decoder_step(struct decoder *d, const struct decode_token *tokens, int32_t n,
                         struct token_result *results, struct pass_record *pass)
{
    int32_t n_probes = 0;
    INVARIANT(n >= 1 && n <= d->decode_rows);
    for (int32_t i = 0; i < n; i++) {
        d->probe[i] = tokens[i].probe;
        n_probes += tokens[i].probe;
        INVARIANT(!tokens[i].probe ||
                  (d->divergence && i > 0 && !tokens[i - 1].probe &&
                   tokens[i].slot == tokens[i - 1].slot && tokens[i].id == tokens[i - 1].id));
        d->host_ids[i] = tokens[i].id;
        d->host_slot[i] = tokens[i].slot;
        d->host_pos[i] = d->kv.n_filled[tokens[i].slot];
        d->levels_of[i] = tokens[i].level;
        set_want(d, i, &tokens[i].want);
    }
    /* the product is named by configuration, never by how many slots are left */
    bool one = d->opt.n_slots == 1 && !d->opt.adds_tokens;
    TRY(forward(d, n, n, one ? PRODUCT_ONE : PRODUCT_SLOTS, results, pass));
    pass->kind = PASS_DECODE;
    pass->n_slots = n - n_probes;
    return ST_OK;
}

enum status decoder_prefill(struct decoder *d, int32_t slot, const int32_t *ids, int32_t n,
                            int32_t level, const struct logit_want *wants, int32_t n_results,
                            struct token_result *results, struct pass_record *pass)
{
    INVARIANT(n >= 1 && n <= d->opt.prefill_chunk && n_results >= 0 && n_results <= n);
    for (int32_t i = 0; i < n; i++) {
        d->probe[i] = false;
        d->host_ids[i] = ids[i];
        d->host_slot[i] = slot;
        d->host_pos[i] = d->kv.n_filled[slot] + i;
        d->levels_of[i] = level;
    }
    for (int32_t i = 0; i < n_results; i++) {
        set_want(d, i, &wants[i]);
    }
    TRY(forward(d, n, n_results, PRODUCT_CHUNK, results, pass));
    pass->kind = PASS_PREFILL;
    pass->n_slots = 1;
    return ST_OK;
}

enum status decoder_logits(struct decoder *d, float *out)
{
    const struct model_shard *s = &d->w->shard;
    const struct segment_share *share = &s->vocab;
    int32_t vocab = d->w->config.vocab, own = s->vocab_end - s->vocab_begin;
    for (int r = 0; r < d->coll->size; r++) {
        /* the same arithmetic as dist/shard: rank r holds whole vocabulary segments */
        int32_t seg0 = split_at(share->total, d->coll->size, r);
        int32_t seg1 = split_at(share->total, d->coll->size, r + 1);
        d->counts[r] =
            (size_t)(split_at(vocab, share->total, seg1) - split_at(vocab, share->total, seg0));
    }
    for (int32_t i = 0; i < d->last_results; i++) {
        struct tensor part = tensor_1d(d->logits + (size_t)i * (size_t)own, DT_F32, own);
        if (d->host_logits) {
            TRY(backend_download(d->be, d->host_logits, part.data, tensor_bytes(&part)));
            part.data = d->host_logits;
        }
        struct tensor whole = tensor_1d(out + (size_t)i * (size_t)vocab, DT_F32, vocab);
        TRY(collective_all_gather(d->coll, &whole, &part, d->counts));
    }
    return ST_OK;
}

const struct measured *decoder_measured(const struct decoder *d, int32_t i)
{
    return meter_of(d->meter, i);
}

enum status decoder_features(struct decoder *d, int32_t slot, int32_t n_tok, bool all_heads,
                             float *out)
{
    const struct model_config *c = &d->w->config;
    if (!d->feature_scratch) {
        size_t heads = (size_t)(c->n_kv_heads + d->kv.n_kv_local), n = 0;
        TRY(mem_mul(&n, heads * (size_t)c->head_dim, (size_t)d->opt.max_tok));
        TRY(MEM_NEW(&d->feature_scratch, n));
    }
    return kvcache_features(&d->kv, d->coll, &d->w->shard, c->n_kv_heads, slot, n_tok, all_heads,
                            out, d->feature_scratch);
}
