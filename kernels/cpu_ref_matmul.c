/* The oracle's nested and dense products. A segment's sum runs in double over its columns in
 * ascending order and is rounded to f32 once; a bias is then added in f32.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu_ref.h"

#include <string.h>

#include "core/mem.h"

enum status cpu_ref_reserve(double **block, size_t *capacity, size_t n)
{
    if (n > *capacity) {
        double *larger = NULL;
        TRY(MEM_NEW(&larger, n));
        mem_free(*block);
        *block = larger;
        *capacity = n;
    }
    return ST_OK;
}

/* ---- planes and levels ---- */

/* The F16 arrays of precision b in a source: at most three, each (n_rows, n_per_row), cut by groups
 * or (LUT) not cut at all. */
struct level_array {
    const uint16_t *values;
    size_t per_group; /* values per group; 0: a table per row */
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
    case LEVEL_LUT:
        out[0] = (struct level_array){src->lut[b], 0};
        return 1;
    case LEVEL_TAIL:
        out[0] = (struct level_array){src->scale[b], 1};
        out[1] = (struct level_array){src->offset[b], 1};
        out[2] = (struct level_array){src->tail, 1};
        return 3;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    return 0;
}

/* The shard as core/bitplane.h wants it; pointers are borrowed from w. */
static struct nested_source view(const struct nested_matrix *w)
{
    struct nested_source src = {
        .n_rows = w->n_rows,
        .n_cols = w->n_cols,
        .n_cols_padded = w->n_cols_padded,
        .group_cols = w->group_cols,
        .n_planes = w->n_resident,
        .planes = w->planes,
    };
    size_t n = (size_t)w->n_rows * (size_t)nested_n_groups(&src);
    for (int b = 1; b <= w->n_resident; b++) {
        const uint16_t *at = w->levels[b];
        src.kind[b] = w->kind[b];
        switch (w->kind[b]) {
        case LEVEL_TIED:
        case LEVEL_TAIL:
            src.scale[b] = at;
            src.offset[b] = at + n;
            src.tail = w->kind[b] == LEVEL_TAIL ? at + 2 * n : NULL;
            break;
        case LEVEL_FREE:
            src.alpha[b] = at;
            src.offset[b] = at + n * (size_t)b;
            break;
        case LEVEL_LUT:
            src.lut[b] = at;
            break;
        case LEVEL_NONE:
        case LEVEL_N:
            break;
        }
    }
    return src;
}

static enum status levels_load(void **out, const struct nested_matrix *w,
                               const struct nested_source *src, const struct matrix_range *range,
                               int b)
{
    size_t n_rows = (size_t)w->n_rows, n_groups = (size_t)(w->n_cols_padded / w->group_cols);
    size_t src_groups = (size_t)nested_n_groups(src);
    size_t first_group = (size_t)(range->col_begin / w->group_cols), n = 0;
    size_t per_row = level_values_per_row(src->kind[b], b, (int32_t)n_groups);
    TRY(mem_mul(&n, n_rows, per_row));
    uint16_t *to = NULL;
    TRY(MEM_NEW(&to, n));
    *out = to;
    struct level_array arrays[3];
    int n_arrays = level_arrays(arrays, src, b);
    for (int a = 0; a < n_arrays; a++) {
        size_t g = arrays[a].per_group, width = g ? g * n_groups : (size_t)1 << b;
        host_copy_rows(to, arrays[a].values, sizeof *to, n_rows, width, (size_t)range->row_begin,
                       g ? g * src_groups : width, g * first_group);
        to += n_rows * width;
    }
    return ST_OK;
}

enum status cpu_ref_planes_load(struct backend *be, struct nested_matrix *w,
                                const struct nested_source *src, const struct matrix_range *range,
                                int n_planes)
{
    struct cpu_ref *ref = be->impl;
    size_t row_bytes = (size_t)w->n_cols_padded / 8, src_row_bytes = (size_t)src->n_cols_padded / 8;
    size_t plane_bytes = row_bytes * (size_t)w->n_rows;
    size_t src_plane_bytes = src_row_bytes * (size_t)src->n_rows;
    uint8_t *planes = NULL;
    void *levels[BITS_ALL] = {0};
    enum status st;
    TRY_GOTO(st, host_scratch_reserve(&ref->row, (size_t)w->n_cols_padded), failed);
    TRY_GOTO(st, mem_alloc_array((void **)&planes, plane_bytes, (size_t)n_planes), failed);
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        if (src->kind[b] != LEVEL_NONE) {
            TRY_GOTO(st, levels_load(&levels[b], w, src, range, b), failed);
        }
    }
    if (w->planes) {
        memcpy(planes, w->planes, plane_bytes * (size_t)w->n_resident);
    }
    for (int p = w->n_resident; p < n_planes; p++) {
        host_copy_rows(planes + (size_t)p * plane_bytes, src->planes + (size_t)p * src_plane_bytes,
                       1, (size_t)w->n_rows, row_bytes, (size_t)range->row_begin, src_row_bytes,
                       (size_t)range->col_begin / 8);
    }
    mem_free(w->planes);
    w->planes = planes;
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        w->levels[b] = levels[b];
    }
    return ST_OK;
failed:
    mem_free(planes);
    for (int b = 1; b <= BITS_MAX; b++) {
        mem_free(levels[b]);
    }
    return st;
}

void cpu_ref_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    (void)be;
    for (int b = keep + 1; b <= BITS_MAX; b++) {
        mem_free(w->levels[b]);
        w->levels[b] = NULL;
    }
    /* A smaller block where memory allows; the larger one is as good when it does not. */
    size_t plane_bytes = (size_t)w->n_cols_padded / 8 * (size_t)w->n_rows;
    void *planes = NULL;
    if (keep > 0) {
        if (mem_alloc_array(&planes, plane_bytes, (size_t)keep) != ST_OK) {
            status_clear();
            return;
        }
        memcpy(planes, w->planes, plane_bytes * (size_t)keep);
    }
    mem_free(w->planes);
    w->planes = planes;
}

/* ---- products ---- */

/* One output of one token: partial sums of `weights` times its x, one per segment. */
static void store_sums(struct tensor *y, int32_t token, int32_t row, const float *weights,
                       const struct tensor *x, const struct tensor *bias, const struct how *how)
{
    size_t n_tok = (size_t)x->dims[0], n_cols = (size_t)x->dims[1];
    size_t n_rows = (size_t)y->dims[y->n_dims - 1];
    const float *in = (const float *)x->data + (size_t)token * n_cols;
    const int32_t whole[] = {0, x->dims[1]};
    const int32_t *cut = how->cut ? how->cut : whole;
    for (int32_t s = 0; s < how->n_segments; s++) {
        double sum = 0;
        for (int32_t c = cut[s]; c < cut[s + 1]; c++) {
            sum += (double)weights[c] * (double)in[c];
        }
        float partial = (float)sum;
        if (bias) {
            partial += ((const float *)bias->data)[row];
        }
        size_t part = how->add_up ? 0 : (size_t)s;
        float *to = (float *)y->data + (part * n_tok + (size_t)token) * n_rows + (size_t)row;
        *to = how->add_up && s > 0 ? *to + partial : partial;
    }
}

/* The weights of one row at one precision. */
static void decode_row(float *out, const struct nested_source *w, int32_t row, int bits)
{
    float table[LEVELS_MAX];
    for (int32_t c = 0; c < w->n_cols; c++) {
        if (c % w->group_cols == 0) {
            bitplane_level_table(table, w, row, c / w->group_cols, bits);
        }
        out[c] = table[bitplane_code(w, row, c, bits)];
    }
}

enum status cpu_ref_matmul_nested(struct backend *be, struct tensor *y,
                                  const struct nested_matrix *w, const struct tensor *bits,
                                  const struct tensor *x, const struct tensor *bias,
                                  const struct how *how)
{
    struct cpu_ref *ref = be->impl;
    TRY(host_check_bits(bits, how->bits_used));
    TRY(host_scratch_reserve(&ref->row, (size_t)w->n_cols_padded));
    struct nested_source src = view(w);
    const uint8_t *token_bits = bits->data;
    for (int32_t r = 0; r < w->n_rows; r++) {
        for (int b = 1; b <= w->n_resident; b++) {
            if (!(how->bits_used >> b & 1)) {
                continue;
            }
            decode_row(ref->row.data, &src, r, b);
            for (int32_t t = 0; t < x->dims[0]; t++) {
                if (token_bits[t] == b) {
                    store_sums(y, t, r, ref->row.data, x, bias, how);
                }
            }
        }
    }
    return ST_OK;
}

enum status cpu_ref_matmul_dense(struct backend *be, struct tensor *y, const struct tensor *w,
                                 const struct tensor *x, const struct tensor *bias,
                                 const struct how *how)
{
    struct cpu_ref *ref = be->impl;
    int32_t n_cols = w->dims[1];
    TRY(host_scratch_reserve(&ref->row, (size_t)n_cols));
    for (int32_t r = 0; r < w->dims[0]; r++) {
        struct tensor row = tensor_rows(w, r, r + 1);
        floats_from(ref->row.data, row.data, w->dtype, (size_t)n_cols);
        for (int32_t t = 0; t < x->dims[0]; t++) {
            store_sums(y, t, r, ref->row.data, x, bias, how);
        }
    }
    return ST_OK;
}
