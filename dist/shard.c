/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/shard.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

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
    if (!o->reproducible) {
        return o->size;
    }
    return o->segments < e->n_units ? o->segments : e->n_units;
}

/* Where segment i begins: a column or row of the whole. */
static int32_t segment_at(const struct extent *e, int32_t n_segs, int32_t i)
{
    int64_t at = (int64_t)split_at(e->n_units, n_segs, i) * e->unit;
    return at < e->n ? (int32_t)at : e->n;
}

/* false: there are fewer segments or units than ranks. */
static bool share_of(struct segment_share *out, int32_t *begin, int32_t *end,
                     const struct extent *e, const struct shard_options *o, int32_t rank)
{
    int32_t total = n_segments(e, o);
    if (o->size > total || total > e->n_units) {
        return false;
    }
    *out = (struct segment_share){.total = total,
                                  .begin = split_at(total, o->size, rank),
                                  .end = split_at(total, o->size, rank + 1)};
    *begin = segment_at(e, total, out->begin);
    *end = segment_at(e, total, out->end);
    for (int32_t i = out->begin; i <= out->end; i++) {
        out->cut[i - out->begin] = segment_at(e, total, i) - *begin;
    }
    return true;
}

/* Each rank gets as many attention units as the others: the rank with the most heads would set the
 * pace of all. (The MLP and the vocabulary have many units; there one more or less is nothing.) */
static bool attention_even(const struct extent *e, const struct segment_share *share,
                           const struct shard_options *o)
{
    int32_t units = split_at(e->n_units, share->total, share->end) -
                    split_at(e->n_units, share->total, share->begin);
    return (int64_t)units * o->size == e->n_units;
}

static bool try_shard(struct model_shard *out, const struct model_config *config,
                      const struct extents *ext, const struct shard_options *o, int32_t rank)
{
    *out = (struct model_shard){.rank = rank, .size = o->size};
    int32_t col_begin = 0, col_end = 0;
    if (!share_of(&out->attn, &col_begin, &col_end, &ext->attn, o, rank) ||
        !share_of(&out->mlp, &out->ffn_begin, &out->ffn_end, &ext->mlp, o, rank) ||
        !share_of(&out->vocab, &out->vocab_begin, &out->vocab_end, &ext->vocab, o, rank) ||
        !attention_even(&ext->attn, &out->attn, o)) {
        return false;
    }
    // units of attention are whole heads
    out->head_begin = col_begin / config->head_dim;
    out->head_end = col_end / config->head_dim;
    int32_t per_kv = config->n_heads / config->n_kv_heads;
    if (out->head_begin % per_kv == 0 && out->head_end % per_kv == 0) {
        out->kv_begin = out->head_begin / per_kv;
        out->kv_end = out->head_end / per_kv;
        return true;
    }
    out->kv_begin = out->head_begin / per_kv;
    out->kv_end = out->kv_begin + 1;
    return (out->head_end - 1) / per_kv == out->kv_begin;
}

static bool size_fits(const struct model_config *config, const struct extents *ext,
                      const struct shard_options *o)
{
    if (o->size < 1 || o->size > SHARD_MAX_SEGMENTS) {
        return false;
    }
    struct model_shard shard;
    for (int32_t rank = 0; rank < o->size; rank++) {
        if (!try_shard(&shard, config, ext, o, rank)) {
            return false;
        }
    }
    return true;
}

/* "1, 2 or 4" */
static void list_sizes(char *text, size_t text_bytes, const struct model_config *config,
                       const struct extents *ext, const struct shard_options *options)
{
    int32_t sizes[SHARD_MAX_SEGMENTS], n = 0;
    for (int32_t size = 1; size <= SHARD_MAX_SEGMENTS; size++) {
        struct shard_options o = *options;
        o.size = size;
        if (size_fits(config, ext, &o)) {
            sizes[n++] = size;
        }
    }
    size_t used = 0;
    text[0] = '\0';
    for (int32_t i = 0; i < n && used < text_bytes; i++) {
        const char *before = i == 0 ? "" : i == n - 1 ? " or " : ", ";
        used += (size_t)snprintf(text + used, text_bytes - used, "%s%d", before, sizes[i]);
    }
}

static enum status check_segments(const struct shard_options *o)
{
    if (o->reproducible && (o->segments < 1 || o->segments > SHARD_MAX_SEGMENTS)) {
        FAIL(ST_USER, "parallel.segments = %d: expected 1 to %d", o->segments, SHARD_MAX_SEGMENTS);
    }
    return ST_OK;
}

enum status shard_model(struct model_shard *out, const struct model_config *config,
                        int32_t group_cols, const struct shard_options *options, int32_t rank)
{
    TRY(check_segments(options));
    struct extents ext = extents_of(config, group_cols);
    if (!size_fits(config, &ext, options)) {
        char sizes[512], segments[64] = "";
        list_sizes(sizes, sizeof sizes, config, &ext, options);
        if (options->reproducible) {
            snprintf(segments, sizeof segments, " in %d segments", n_segments(&ext.attn, options));
        }
        FAIL(ST_USER,
             "%d tensor ranks do not fit this model (%d units of attention input%s, "
             "%d heads that share %d KV heads, %d units of MLP input, vocabulary %d): use %s",
             options->size, ext.attn.n_units, segments, config->n_heads, config->n_kv_heads,
             ext.mlp.n_units, config->vocab, sizes);
    }
    INVARIANT(rank >= 0 && rank < options->size);
    INVARIANT(try_shard(out, config, &ext, options, rank));
    return ST_OK;
}

bool shard_fits(const struct model_config *config, int32_t group_cols,
                const struct shard_options *options)
{
    if (options->reproducible &&
        (options->segments < 1 || options->segments > SHARD_MAX_SEGMENTS)) {
        return false;
    }
    struct extents ext = extents_of(config, group_cols);
    return size_fits(config, &ext, options);
}
