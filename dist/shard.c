/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/shard.h"

#include <stdint.h>
#include <stdio.h>

/* One dimension that is shared out: n things in units of `unit`, the last unit may be shorter. */
struct extent {
    int32_t n, unit, n_units;
};

struct extents {
    struct extent attn, mlp, vocab; /* columns of o, columns of down, rows of the head */
};

static struct extent extent_of(int64_t n, int64_t unit)
{
    // a unit longer than the whole is the whole
    int64_t u = unit < n ? unit : n;
    return (struct extent){(int32_t)n, (int32_t)u, (int32_t)((n + u - 1) / u)};
}

static int64_t lcm(int64_t a, int64_t b)
{
    int64_t x = a, y = b;
    while (y != 0) {
        int64_t rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

static struct extents extents_of(const struct model_config *c, int32_t group_cols)
{
    INVARIANT(c->n_heads > 0 && c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0);
    INVARIANT(c->head_dim > 0 && c->ffn > 0 && c->vocab > 0 && group_cols > 0);
    int64_t attn_cols = (int64_t)c->n_heads * c->head_dim;
    INVARIANT(attn_cols <= INT32_MAX);
    return (struct extents){
        .attn = extent_of(attn_cols, lcm(group_cols, c->head_dim)),
        .mlp = extent_of(c->ffn, group_cols),
        .vocab = extent_of(c->vocab, 1),
    };
}

static int32_t n_segments(const struct extent *e, const struct shard_options *o)
{
    int32_t most = o->reproducible ? o->segments : o->size;
    return most < e->n_units ? most : e->n_units;
}

/* Every rank owns a segment of each of the three. */
static int32_t most_ranks(const struct extents *ext, const struct shard_options *options)
{
    struct shard_options o = *options;
    o.size = SHARD_MAX_SEGMENTS;
    int32_t attn = n_segments(&ext->attn, &o), mlp = n_segments(&ext->mlp, &o);
    int32_t vocab = n_segments(&ext->vocab, &o), most = attn < mlp ? attn : mlp;
    return most < vocab ? most : vocab;
}

/* Where segment i begins: a column or row of the whole. */
static int32_t segment_at(const struct extent *e, int32_t n_segs, int32_t i)
{
    int64_t at = (int64_t)split_at(e->n_units, n_segs, i) * e->unit;
    return at < e->n ? (int32_t)at : e->n;
}

static void share_of(struct segment_share *out, int32_t *begin, int32_t *end,
                     const struct extent *e, const struct shard_options *o, int32_t rank)
{
    int32_t total = n_segments(e, o);
    *out = (struct segment_share){.total = total,
                                  .begin = split_at(total, o->size, rank),
                                  .end = split_at(total, o->size, rank + 1)};
    *begin = segment_at(e, total, out->begin);
    *end = segment_at(e, total, out->end);
    for (int32_t i = out->begin; i <= out->end; i++) {
        out->cut[i - out->begin] = segment_at(e, total, i) - *begin;
    }
}

static void share_heads(struct model_shard *out, const struct model_config *config,
                        const struct extent *e, const struct shard_options *o, int32_t rank)
{
    int32_t begin = 0, end = 0, per_kv = config->n_heads / config->n_kv_heads;
    share_of(&out->attn, &begin, &end, e, o, rank);
    // units of attention are whole heads
    out->head_begin = begin / config->head_dim;
    out->head_end = end / config->head_dim;
    out->kv_begin = out->head_begin / per_kv;
    out->kv_end = (out->head_end - 1) / per_kv + 1;
}

/* Do all ranks have as many query heads? The rank with the most sets the pace. (The MLP and the
 * vocabulary have many units; there one more or less is nothing.) */
static bool attention_even(const struct model_config *config, const struct extents *ext,
                           const struct shard_options *o)
{
    struct model_shard s;
    for (int32_t rank = 0; rank < o->size; rank++) {
        share_heads(&s, config, &ext->attn, o, rank);
        if ((int64_t)(s.head_end - s.head_begin) * o->size != config->n_heads) {
            return false;
        }
    }
    return true;
}

/* "1 to 4; 1, 2 and 4 share the attention evenly" */
static void list_sizes(char *text, size_t text_bytes, const struct model_config *config,
                       const struct extents *ext, const struct shard_options *options)
{
    int32_t sizes[SHARD_MAX_SEGMENTS], n = 0, most = most_ranks(ext, options);
    if (most == 1) {
        snprintf(text, text_bytes, "1");
        return;
    }
    for (int32_t size = 1; size <= most; size++) {
        struct shard_options o = *options;
        o.size = size;
        if (attention_even(config, ext, &o)) {
            sizes[n++] = size;
        }
    }
    size_t used = (size_t)snprintf(text, text_bytes, "1 to %d; ", most);
    for (int32_t i = 0; i < n && used < text_bytes; i++) {
        const char *before = i == 0 ? "" : i == n - 1 ? " and " : ", ";
        used += (size_t)snprintf(text + used, text_bytes - used, "%s%d", before, sizes[i]);
    }
    if (used < text_bytes) {
        snprintf(text + used, text_bytes - used, " share%s the attention evenly",
                 n == 1 ? "s" : "");
    }
}

enum status shard_model(struct model_shard *out, const struct model_config *config,
                        int32_t group_cols, const struct shard_options *options, int32_t rank)
{
    if (options->reproducible &&
        (options->segments < 1 || options->segments > SHARD_MAX_SEGMENTS)) {
        FAIL(ST_USER, "parallel.segments = %d: expected 1 to %d", options->segments,
             SHARD_MAX_SEGMENTS);
    }
    struct extents ext = extents_of(config, group_cols);
    if (options->size < 1 || options->size > most_ranks(&ext, options)) {
        char sizes[512], segments[64] = "";
        list_sizes(sizes, sizeof sizes, config, &ext, options);
        if (options->reproducible) {
            snprintf(segments, sizeof segments, ", parallel.segments = %d", options->segments);
        }
        FAIL(ST_USER,
             "%d tensor ranks do not fit this model (%d units of attention input, %d units of MLP "
             "input, vocabulary %d%s): use %s",
             options->size, ext.attn.n_units, ext.mlp.n_units, config->vocab, segments, sizes);
    }
    INVARIANT(rank >= 0 && rank < options->size);
    *out = (struct model_shard){.rank = rank, .size = options->size};
    for (int32_t r = 0; r < options->size; r++) {
        struct model_shard other;
        share_heads(&other, config, &ext.attn, options, r);
        out->n_kv_held += other.kv_end - other.kv_begin;
    }
    share_heads(out, config, &ext.attn, options, rank);
    share_of(&out->mlp, &out->ffn_begin, &out->ffn_end, &ext.mlp, options, rank);
    share_of(&out->vocab, &out->vocab_begin, &out->vocab_end, &ext.vocab, options, rank);
    return ST_OK;
}
