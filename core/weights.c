/* SPDX-License-Identifier: Apache-2.0 */
#include "core/weights.h"

#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"

static int float_bits(const struct tensor *t)
{
    return (int)(8 * dtype_bytes(t->dtype));
}

static enum status source_bits(struct model_source *src)
{
    const struct model_config *c = &src->config;
    char name[MODEL_NAME_BYTES + 8];
    struct tensor t;
    if (c->nested) {
        TRY(nested_index_common_bits(src->index, c, &src->held));
        if (c->nested_head) {
            enum level_kind kinds[BITS_ALL];
            int32_t n_cols;
            TRY(nested_index_get(src->index, MODEL_HEAD_NAME, &n_cols, kinds));
            for (int b = 1; b <= BITS_MAX; b++) {
                src->head_held |= (kinds[b] != LEVEL_NONE ? 1u : 0u) << b;
            }
        }
        src->dense_bits = 16;
    } else {
        char matrix[MODEL_NAME_BYTES];
        model_matrix_name(matrix, c, 0, M_Q);
        snprintf(name, sizeof name, "%s.weight", matrix);
        TRY(checkpoint_get(src->ckpt, name, &t));
        src->dense_bits = float_bits(&t);
    }
    if (!c->nested_head) {
        TRY(checkpoint_get(src->ckpt, c->tied_head ? MODEL_EMBED_NAME : MODEL_HEAD_NAME ".weight",
                           &t));
        src->head_dense_bits = float_bits(&t);
    }
    return ST_OK;
}

enum status model_source_open(struct model_source *out, const char *folder)
{
    enum status st = ST_OK;
    *out = (struct model_source){0};
    TRY(model_config_read(&out->config, folder));
    TRY_GOTO(st, checkpoint_open(&out->ckpt, folder), fail);
    TRY_GOTO(st, model_check_biases(&out->config, out->ckpt), fail);
    if (out->config.nested) {
        TRY_GOTO(st, nested_index_read(&out->index, folder), fail);
    }
    TRY_GOTO(st, source_bits(out), fail);
    return ST_OK;
fail:
    model_source_close(out);
    return st;
}

void model_source_close(struct model_source *src)
{
    checkpoint_close(&src->ckpt);
    nested_index_destroy(&src->index);
    *src = (struct model_source){0};
}

enum status weights_new_block(struct weights *w, void **out, size_t bytes)
{
    if (w->n_blocks == w->capacity_blocks) {
        int32_t more = w->capacity_blocks ? 2 * w->capacity_blocks : 64;
        TRY(mem_grow_array((void **)&w->blocks, (size_t)w->capacity_blocks, (size_t)more,
                           sizeof *w->blocks));
        w->capacity_blocks = more;
    }
    TRY(backend_alloc(w->be, out, bytes));
    w->blocks[w->n_blocks++] = *out;
    return ST_OK;
}

/* Values [begin, end) of a one-dimensional tensor of n, as f32. */
static enum status load_vector(struct weights *w, const struct checkpoint *ckpt, const char *name,
                               int32_t n, int32_t begin, int32_t end, struct tensor *out)
{
    struct tensor t;
    float *host = NULL;
    void *block = NULL;
    enum status st = ST_OK;
    size_t part = (size_t)(end - begin);
    TRY(checkpoint_get_shape(ckpt, name, n, 0, &t));
    TRY(MEM_NEW(&host, part));
    floats_from(host, (const char *)t.data + (size_t)begin * dtype_bytes(t.dtype), t.dtype, part);
    TRY_GOTO(st, weights_new_block(w, &block, part * sizeof *host), done);
    TRY_GOTO(st, backend_upload(w->be, block, host, part * sizeof *host), done);
    *out = tensor_1d(block, DT_F32, end - begin);
done:
    mem_free(host);
    return st;
}

static enum status load_norm(struct weights *w, const struct model_source *src, int layer,
                             enum model_norm norm, struct norm_weights *out)
{
    const struct model_config *c = &src->config;
    char name[MODEL_NAME_BYTES];
    model_norm_name(name, c, layer, norm);
    TRY(load_vector(w, src->ckpt, name, c->hidden, 0, c->hidden, &out->gain));
    if (c->norm == NORM_LAYER) {
        model_norm_bias_name(name, c, layer, norm);
        TRY(load_vector(w, src->ckpt, name, c->hidden, 0, c->hidden, &out->bias));
    }
    return ST_OK;
}

/* A bias goes with the rows of its matrix. */
static enum status load_bias(struct weights *w, const struct model_source *src, const char *name,
                             int32_t n_rows, const struct matrix_range *range, struct linear *out)
{
    char full[MODEL_NAME_BYTES + 8];
    snprintf(full, sizeof full, "%s.bias", name);
    return load_vector(w, src->ckpt, full, n_rows, range->row_begin, range->row_end, &out->bias);
}

/* Rows and columns of a dense matrix, copied as they are. */
static enum status load_dense(struct weights *w, const struct tensor *whole,
                              const struct matrix_range *range, struct tensor *out)
{
    int32_t n_rows = range->row_end - range->row_begin, n_cols = range->col_end - range->col_begin;
    size_t one = dtype_bytes(whole->dtype), row = (size_t)whole->dims[1] * one;
    size_t part = (size_t)n_cols * one, bytes = 0;
    void *block = NULL;
    TRY(mem_mul(&bytes, part, (size_t)n_rows));
    TRY(weights_new_block(w, &block, bytes));
    const char *src =
        (const char *)whole->data + (size_t)range->row_begin * row + (size_t)range->col_begin * one;
    if (n_cols == whole->dims[1]) {
        TRY(backend_upload(w->be, block, src, bytes));
    } else {
        for (int32_t r = 0; r < n_rows; r++) {
            TRY(backend_upload(w->be, (char *)block + (size_t)r * part, src + (size_t)r * row,
                               part));
        }
    }
    *out = tensor_2d(block, whole->dtype, n_rows, n_cols);
    return ST_OK;
}

static enum status load_linear(struct weights *w, const struct model_source *src, const char *name,
                               int32_t n_rows, int32_t n_cols, bool nested,
                               const struct matrix_range *range, int n_planes, struct linear *out)
{
    out->is_nested = nested;
    out->n_rows = n_rows;
    out->n_cols = out->n_cols_padded = n_cols;
    if (!nested) {
        char full[MODEL_NAME_BYTES + 8];
        struct tensor whole;
        snprintf(full, sizeof full, "%s.weight", name);
        TRY(checkpoint_get_shape(src->ckpt, full, n_rows, n_cols, &whole));
        return load_dense(w, &whole, range, &out->dense);
    }
    const struct model_config *c = &src->config;
    enum level_kind kinds[BITS_ALL];
    int32_t listed_cols = 0;
    struct nested_source source;
    TRY(nested_index_get(src->index, name, &listed_cols, kinds));
    if (listed_cols != n_cols) {
        FAIL(ST_SHAPE, "%s: quantization_config says %d columns, the model's shape %d", name,
             listed_cols, n_cols);
    }
    TRY(checkpoint_get_nested(src->ckpt, name, kinds, n_rows, n_cols, c->group_cols, c->n_planes,
                              &source));
    out->n_cols_padded = source.n_cols_padded;
    int planes = n_planes > 0 && n_planes < source.n_planes ? n_planes : source.n_planes;
    return backend_planes_load(w->be, &out->nested, &source, range, planes);
}

struct matrix_range weights_role_range(const struct model_config *c, const struct model_shard *s,
                                       enum matrix_role role)
{
    struct matrix_range r = {0};
    model_matrix_shape(c, role, &r.row_end, &r.col_end);
    switch (role) {
    case M_Q:
        r.row_begin = s->head_begin * c->head_dim;
        r.row_end = s->head_end * c->head_dim;
        break;
    case M_K:
    case M_V:
        r.row_begin = s->kv_begin * c->head_dim;
        r.row_end = s->kv_end * c->head_dim;
        break;
    case M_O:
        r.col_begin = s->head_begin * c->head_dim;
        r.col_end = s->head_end * c->head_dim;
        break;
    case M_GATE:
    case M_UP:
        r.row_begin = s->ffn_begin;
        r.row_end = s->ffn_end;
        break;
    case M_DOWN:
        r.col_begin = s->ffn_begin;
        r.col_end = s->ffn_end;
        break;
    case M_N_ROLES:
        break;
    }
    return r;
}

static enum status load_layer(struct weights *w, const struct model_source *src, int layer,
                              int n_planes)
{
    const struct model_config *c = &w->config;
    struct layer_weights *l = &w->layers[layer];
    char name[MODEL_NAME_BYTES];
    TRY(load_norm(w, src, layer, NORM_ATTENTION, &l->attn_norm));
    if (model_has_norm(c, NORM_MLP)) {
        TRY(load_norm(w, src, layer, NORM_MLP, &l->mlp_norm));
    }
    for (int role = 0; role < M_N_ROLES; role++) {
        int32_t n_rows, n_cols;
        if (!model_has_role(c, (enum matrix_role)role)) {
            continue;
        }
        model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
        model_matrix_name(name, c, layer, (enum matrix_role)role);
        struct matrix_range range = weights_role_range(c, &w->shard, (enum matrix_role)role);
        TRY(load_linear(w, src, name, n_rows, n_cols, c->nested, &range, n_planes,
                        &l->matrix[role]));
        if (c->biased >> role & 1) {
            TRY(load_bias(w, src, name, n_rows, &range, &l->matrix[role]));
        }
    }
    return ST_OK;
}

static enum status load_ends(struct weights *w, const struct model_source *src)
{
    const struct model_config *c = &w->config;
    struct tensor embed;
    struct matrix_range all = {0, c->vocab, 0, c->hidden};
    struct matrix_range rows = {w->shard.vocab_begin, w->shard.vocab_end, 0, c->hidden};
    TRY(checkpoint_get_shape(src->ckpt, MODEL_EMBED_NAME, c->vocab, c->hidden, &embed));
    TRY(load_dense(w, &embed, &all, &w->embed));
    TRY(load_norm(w, src, 0, NORM_FINAL, &w->final_norm));
    if (c->tied_head && !c->nested_head) {
        w->head = (struct linear){.dense = tensor_rows(&w->embed, rows.row_begin, rows.row_end),
                                  .n_rows = c->vocab,
                                  .n_cols = c->hidden,
                                  .n_cols_padded = c->hidden};
    } else {
        /* the head keeps all its planes: a level may name head bits of its own */
        TRY(load_linear(w, src, MODEL_HEAD_NAME, c->vocab, c->hidden, c->nested_head, &rows, 0,
                        &w->head));
    }
    return c->head_bias ? load_bias(w, src, MODEL_HEAD_NAME, c->vocab, &rows, &w->head) : ST_OK;
}

enum status weights_load(struct weights *out, struct backend *be, const struct model_source *src,
                         const struct model_shard *shard, int n_planes)
{
    enum status st = ST_OK;
    struct progress progress;
    *out = (struct weights){.be = be, .config = src->config, .shard = *shard};
    progress_begin(&progress, "loading weights", "layers", src->config.n_layers);
    TRY_GOTO(st, MEM_NEW(&out->layers, src->config.n_layers), fail);
    TRY_GOTO(st, load_ends(out, src), fail);
    for (int i = 0; i < src->config.n_layers; i++) {
        TRY_GOTO(st, load_layer(out, src, i, n_planes), fail);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
    return ST_OK;
fail:
    weights_free(out);
    return st;
}

void weights_free(struct weights *w)
{
    if (w->be) {
        for (int i = 0; w->layers && i < w->config.n_layers; i++) {
            for (int role = 0; role < M_N_ROLES; role++) {
                backend_planes_drop(w->be, &w->layers[i].matrix[role].nested, 0);
            }
        }
        backend_planes_drop(w->be, &w->head.nested, 0);
        for (int i = 0; i < w->n_blocks; i++) {
            backend_release(w->be, w->blocks[i]);
        }
    }
    mem_free(w->blocks);
    mem_free(w->layers);
    *w = (struct weights){0};
}
