/* The cuda backend: the door's operations on a GPU (kernels/gpu.h) by the kernels of
 * kernels/cuda_kernels.h. The same file makes the emulated backend of the tests, which differs in
 * the GPU it is linked with and in its name.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/cuda_arena.h"
#include "kernels/cuda_kernels.h"
#include "kernels/kernels.h"

struct cuda {
    struct gpu gpu;
    struct cuda_arena arena;
    char arithmetic[32];
    void *scratch; /* device: wants and results of statistics; grows only */
    size_t scratch_bytes;
};

static struct gpu *gpu_of(const struct backend *be)
{
    return &((struct cuda *)be->impl)->gpu;
}

/* ---- life and memory ---- */

static void cuda_close(struct backend *be)
{
    struct cuda *c = be->impl;
    if (c->gpu.impl) {
        gpu_release(&c->gpu, c->scratch);
        cuda_arena_close(&c->arena);
        gpu_close(&c->gpu);
    }
    mem_free(c);
}

static enum status cuda_open(struct backend *be, const struct backend_options *options)
{
    struct cuda *c = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&c, 1));
    be->impl = c;
    TRY_GOTO(st, gpu_open(&c->gpu, options->device), failed);
    TRY_GOTO(st, cuda_arena_open(&c->arena, &c->gpu), failed);
    snprintf(c->arithmetic, sizeof c->arithmetic, "%s", c->gpu.arch);
    return ST_OK;
failed:
    cuda_close(be);
    return st;
}

static const char *cuda_arithmetic(const struct backend *be)
{
    return ((const struct cuda *)be->impl)->arithmetic;
}

static bool cuda_is_host(const struct backend *be)
{
    (void)be;
    return false;
}

static const char *cuda_device(const struct backend *be)
{
    return ((const struct cuda *)be->impl)->gpu.id;
}

static enum status cuda_alloc(struct backend *be, void **out, size_t bytes)
{
    return gpu_alloc(gpu_of(be), out, bytes);
}

static void cuda_release(struct backend *be, void *ptr)
{
    gpu_release(gpu_of(be), ptr);
}

static enum status cuda_upload(struct backend *be, void *dst, const void *src, size_t bytes)
{
    return gpu_upload(gpu_of(be), dst, src, bytes);
}

static enum status cuda_download(struct backend *be, void *dst, const void *src, size_t bytes)
{
    return gpu_download(gpu_of(be), dst, src, bytes);
}

static enum status cuda_zero(struct backend *be, void *dst, size_t bytes)
{
    return gpu_zero(gpu_of(be), dst, bytes);
}

static enum status cuda_sync(struct backend *be)
{
    return gpu_sync(gpu_of(be));
}

/* ---- nested weights ---- */

/* w->planes: where the planes of this matrix lie in the arena. w->levels[b]: one block on the
 * device, the arrays in the order of level_arrays. */

struct level_array {
    const uint16_t *values;
    size_t per_group; /* 0: a look-up table */
};

static int level_arrays(struct level_array out[3], const struct nested_source *src, int b)
{
    switch (src->kind[b]) {
    case LEVEL_TIED:
        out[0] = (struct level_array){src->scale[b], 1};
        out[1] = (struct level_array){src->offset[b], 1};
        return 2;
    case LEVEL_FREE:
        out[0] = (struct level_array){src->alpha[b], (size_t)b};
        out[1] = (struct level_array){src->offset[b], 1};
        return 2;
    case LEVEL_TAIL:
        out[0] = (struct level_array){src->scale[b], 1};
        out[1] = (struct level_array){src->offset[b], 1};
        out[2] = (struct level_array){src->tail, 1};
        return 3;
    case LEVEL_LUT:
        out[0] = (struct level_array){src->lut[b], 0};
        return 1;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    return 0;
}

static enum status levels_load(struct gpu *g, void **out, const struct nested_matrix *w,
                               const struct nested_source *src, const struct matrix_range *range,
                               int b)
{
    size_t n_rows = (size_t)w->n_rows, n_groups = (size_t)(w->n_cols_padded / w->group_cols);
    size_t first_group = (size_t)(range->col_begin / w->group_cols), n = 0;
    size_t src_groups = (size_t)nested_n_groups(src), first_row = (size_t)range->row_begin;
    TRY(mem_mul(&n, n_rows, level_values_per_row(src->kind[b], b, (int32_t)n_groups)));
    TRY(mem_mul(&n, n, sizeof(uint16_t)));
    TRY(gpu_alloc(g, out, n));
    struct level_array arrays[3];
    int n_arrays = level_arrays(arrays, src, b);
    unsigned char *to = *out;
    for (int a = 0; a < n_arrays; a++) {
        size_t per = arrays[a].per_group, width = per ? per * n_groups : (size_t)1 << b;
        size_t stride = per ? per * src_groups : width;
        const uint16_t *from = arrays[a].values + first_row * stride + per * first_group;
        size_t row = width * sizeof *from;
        TRY(gpu_upload_rows(g, to, row, from, stride * sizeof *from, row, n_rows));
        to += n_rows * row;
    }
    return ST_OK;
}

static void levels_drop(struct gpu *g, struct nested_matrix *w, int keep)
{
    for (int b = keep + 1; b <= BITS_MAX; b++) {
        gpu_release(g, w->levels[b]);
        w->levels[b] = NULL;
    }
}

static size_t plane_bytes(const struct nested_matrix *w)
{
    return (size_t)w->n_cols_padded / 8 * (size_t)w->n_rows;
}

static enum status cuda_planes_load(struct backend *be, struct nested_matrix *w,
                                    const struct nested_source *src,
                                    const struct matrix_range *range, int n_planes)
{
    struct cuda *c = be->impl;
    size_t row = (size_t)w->n_cols_padded / 8, src_row = (size_t)src->n_cols_padded / 8;
    size_t bytes = plane_bytes(w), src_plane = src_row * (size_t)src->n_rows;
    struct cuda_range *place = w->planes;
    bool is_new = place == NULL;
    int had = w->n_resident, p = had;
    enum status st = ST_OK;
    if (is_new) {
        TRY(cuda_arena_place(&c->arena, &place, bytes, w->n_planes));
    }
    for (; p < n_planes; p++) {
        void *to = NULL;
        const uint8_t *from = src->planes + (size_t)p * src_plane +
                              (size_t)range->row_begin * src_row + (size_t)range->col_begin / 8;
        TRY_GOTO(st, cuda_arena_commit(&c->arena, place, p, &to), failed);
        TRY_GOTO(st, gpu_upload_rows(&c->gpu, to, row, from, src_row, row, (size_t)w->n_rows),
                 failed_inside);
    }
    for (int b = had + 1; b <= n_planes; b++) {
        if (src->kind[b] != LEVEL_NONE) {
            TRY_GOTO(st, levels_load(&c->gpu, &w->levels[b], w, src, range, b), failed);
        }
    }
    w->planes = place;
    return ST_OK;
failed_inside:
    p++;
failed:
    levels_drop(&c->gpu, w, had);
    while (p-- > had) {
        cuda_arena_decommit(&c->arena, place, p);
    }
    if (is_new) {
        cuda_arena_release(&c->arena, &place);
    }
    return st;
}

static void cuda_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    struct cuda *c = be->impl;
    struct cuda_range *place = w->planes;
    // what was launched may still read them
    if (gpu_sync(&c->gpu) != ST_OK) {
        status_clear(); // the next operation reports it
    }
    levels_drop(&c->gpu, w, keep);
    for (int p = keep; p < w->n_resident; p++) {
        cuda_arena_decommit(&c->arena, place, p);
    }
    if (keep == 0) {
        cuda_arena_release(&c->arena, &place);
        w->planes = NULL;
    }
}

/* The matrix as kernels see it. */
static struct cuda_matrix view(const struct cuda *c, const struct nested_matrix *w)
{
    struct cuda_matrix m = {.n_rows = w->n_rows,
                            .n_cols = w->n_cols,
                            .n_words = w->n_cols_padded / 32,
                            .n_groups = w->n_cols_padded / w->group_cols,
                            .group_cols = w->group_cols};
    size_t n = (size_t)w->n_rows * (size_t)m.n_groups;
    for (int p = 0; p < w->n_resident; p++) {
        m.plane[p] = cuda_arena_address(&c->arena, w->planes, p);
    }
    for (int b = 1; b <= w->n_resident; b++) {
        const uint16_t *at = w->levels[b];
        m.level[b].kind = w->kind[b];
        switch (w->kind[b]) {
        case LEVEL_TIED:
        case LEVEL_TAIL:
            m.level[b].scale = at;
            m.level[b].offset = at + n;
            m.level[b].tail = w->kind[b] == LEVEL_TAIL ? at + 2 * n : NULL;
            break;
        case LEVEL_FREE:
            m.level[b].alpha = at;
            m.level[b].offset = at + n * (size_t)b;
            break;
        case LEVEL_LUT:
            m.level[b].lut = at;
            break;
        case LEVEL_NONE:
        case LEVEL_N:
            break;
        }
    }
    return m;
}

/* ---- operations ---- */

static enum status cuts_of(struct cuda_cuts *out, const int32_t *cut, int32_t n, int32_t n_cols)
{
    if (n >= CUDA_MAX_CUTS) {
        FAIL(ST_UNSUPPORTED, "%d segments, the cuda backend has up to %d", n, CUDA_MAX_CUTS - 1);
    }
    *out = (struct cuda_cuts){.n = n, .at = {0, n_cols}};
    if (cut) {
        memcpy(out->at, cut, ((size_t)n + 1) * sizeof *cut);
    }
    return ST_OK;
}

static enum status cuda_matmul_nested(struct backend *be, struct tensor *y,
                                      const struct nested_matrix *w, const struct tensor *bits,
                                      const struct tensor *x, const struct tensor *bias,
                                      const struct how *how)
{
    struct cuda *c = be->impl;
    struct cuda_matrix m = view(c, w);
    struct cuda_cuts cuts;
    TRY(cuts_of(&cuts, how->cut, how->n_segments, w->n_cols));
    const float *b = bias ? bias->data : NULL;
    if (how->product == PRODUCT_CHUNK) {
        return cuda_nested_chunk(&c->gpu, y->data, &m, bits->data, how->bits_used, x->data, b,
                                 x->dims[0], &cuts, how->add_up);
    }
    return cuda_nested_tokens(&c->gpu, y->data, &m, bits->data, x->data, b, x->dims[0], &cuts,
                              how->add_up);
}

static enum status cuda_matmul_dense(struct backend *be, struct tensor *y, const struct tensor *w,
                                     const struct tensor *x, const struct tensor *bias,
                                     const struct how *how)
{
    struct cuda_cuts cuts;
    TRY(cuts_of(&cuts, how->cut, how->n_segments, w->dims[1]));
    const float *b = bias ? bias->data : NULL;
    if (how->product == PRODUCT_CHUNK) {
        return cuda_dense_chunk(gpu_of(be), y->data, w->data, w->dtype, x->data, b, w->dims[0],
                                w->dims[1], x->dims[0], &cuts, how->add_up);
    }
    return cuda_dense_tokens(gpu_of(be), y->data, w->data, w->dtype, x->data, b, w->dims[0],
                             w->dims[1], x->dims[0], &cuts, how->add_up);
}

static enum status cuda_op_add_parts(struct backend *be, struct tensor *x,
                                     const struct tensor *parts, const struct tensor *bias)
{
    int32_t n_parts = parts->n_dims == 3 ? parts->dims[0] : 1;
    return cuda_add_parts(gpu_of(be), x->data, parts->data, bias ? bias->data : NULL, n_parts,
                          x->dims[0], x->dims[1]);
}

static enum status cuda_op_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                                 const struct tensor *ids)
{
    return cuda_embed(gpu_of(be), x->data, table->data, table->dtype, ids->data, table->dims[0],
                      x->dims[0], x->dims[1]);
}

static enum status cuda_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                const struct tensor *gain, float eps)
{
    return cuda_norm(gpu_of(be), y->data, x->data, gain->data, NULL, x->dims[0], x->dims[1], eps,
                     false);
}

static enum status cuda_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                  const struct tensor *gain, const struct tensor *bias, float eps)
{
    return cuda_norm(gpu_of(be), y->data, x->data, gain->data, bias ? bias->data : NULL, x->dims[0],
                     x->dims[1], eps, true);
}

static enum status cuda_op_rope(struct backend *be, struct tensor *q, struct tensor *k,
                                const struct token_place *place, const struct rope_table *table)
{
    struct tensor *both[] = {q, k};
    for (int i = 0; i < 2 && table->rot_dim > 0; i++) {
        TRY(cuda_rope(gpu_of(be), both[i]->data, place->pos.data, table->cos.data, table->sin.data,
                      table->rot_dim, both[i]->dims[0], both[i]->dims[1], both[i]->dims[2]));
    }
    return ST_OK;
}

static enum status cuda_op_kv_append(struct backend *be, struct kv_layer *kv,
                                     const struct tensor *k, const struct tensor *v,
                                     const struct token_place *place)
{
    struct tensor *caches[] = {&kv->k, &kv->v};
    const struct tensor *from[] = {k, v};
    for (int i = 0; i < 2; i++) {
        TRY(cuda_kv_append(gpu_of(be), caches[i]->data, caches[i]->dtype, from[i]->data,
                           place->slot.data, place->kv_row.data, k->dims[0], k->dims[1],
                           kv->k.dims[2], k->dims[2]));
    }
    return ST_OK;
}

static enum status cuda_op_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                                     const struct kv_layer *kv, const struct token_place *place,
                                     float scale)
{
    return cuda_attention(gpu_of(be), y->data, q->data, kv, place, q->dims[0], q->dims[1], scale);
}

static enum status cuda_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                            const struct tensor *up, enum activation act)
{
    return cuda_activate(gpu_of(be), y->data, gate->data, up->data, tensor_count(y), act);
}

static enum status cuda_op_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                                    enum activation act)
{
    return cuda_activate(gpu_of(be), y->data, x->data, NULL, tensor_count(y), act);
}

static enum status scratch(struct cuda *c, void **out, size_t bytes)
{
    if (bytes > c->scratch_bytes) {
        gpu_release(&c->gpu, c->scratch);
        c->scratch = NULL;
        c->scratch_bytes = 0;
        TRY(gpu_alloc(&c->gpu, &c->scratch, bytes));
        c->scratch_bytes = bytes;
    }
    *out = c->scratch;
    return ST_OK;
}

static enum status cuda_op_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                                   const int32_t *cut, int32_t n_cuts)
{
    struct cuda_cuts cuts;
    TRY(cuts_of(&cuts, cut, n_cuts, x->dims[1]));
    return cuda_moments(gpu_of(be), out->data, x->data, x->dims[0], x->dims[1], &cuts);
}

static enum status cuda_op_logit_stats(struct backend *be, struct logit_stats *out,
                                       const struct tensor *logits, int32_t first_id,
                                       const int32_t *cut, int32_t n_cuts,
                                       const struct logit_want *want)
{
    struct cuda *c = be->impl;
    struct cuda_cuts cuts;
    size_t n_tok = (size_t)logits->dims[0];
    size_t out_bytes = n_tok * (size_t)n_cuts * sizeof *out, want_bytes = n_tok * sizeof *want;
    void *block = NULL;
    TRY(cuts_of(&cuts, cut, n_cuts, logits->dims[1]));
    TRY(scratch(c, &block, out_bytes + want_bytes));
    struct logit_stats *results = block;
    struct logit_want *wants = (struct logit_want *)((char *)block + out_bytes);
    TRY(gpu_upload(&c->gpu, wants, want, want_bytes));
    TRY(cuda_logit_stats(&c->gpu, results, logits->data, logits->dims[0], logits->dims[1], first_id,
                         &cuts, wants));
    return gpu_download(&c->gpu, out, results, out_bytes);
}

static enum status cuda_op_top_k(struct backend *be, struct logit_candidate *out,
                                 const struct tensor *logits, int32_t first_id, int32_t k)
{
    struct cuda *c = be->impl;
    size_t bytes = (size_t)logits->dims[0] * (size_t)k * sizeof *out;
    void *block = NULL;
    TRY(scratch(c, &block, bytes));
    TRY(cuda_top_k(&c->gpu, block, logits->data, logits->dims[0], logits->dims[1], first_id, k));
    return gpu_download(&c->gpu, out, block, bytes);
}

const struct backend_ops CUDA_OPS = {
    .name = CUDA_NAME,
    .help = CUDA_HELP,
    .open = cuda_open,
    .close = cuda_close,
    .arithmetic = cuda_arithmetic,
    .is_host = cuda_is_host,
    .device = cuda_device,
    .alloc = cuda_alloc,
    .release = cuda_release,
    .upload = cuda_upload,
    .download = cuda_download,
    .zero = cuda_zero,
    .sync = cuda_sync,
    .planes_load = cuda_planes_load,
    .planes_drop = cuda_planes_drop,
    .matmul_nested = cuda_matmul_nested,
    .matmul_dense = cuda_matmul_dense,
    .add_parts = cuda_op_add_parts,
    .embed = cuda_op_embed,
    .rmsnorm = cuda_rmsnorm,
    .layernorm = cuda_layernorm,
    .rope = cuda_op_rope,
    .kv_append = cuda_op_kv_append,
    .attention = cuda_op_attention,
    .glu = cuda_glu,
    .activate = cuda_op_activate,
    .moments = cuda_op_moments,
    .logit_stats = cuda_op_logit_stats,
    .top_k = cuda_op_top_k,
};
