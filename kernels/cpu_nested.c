/* Nested matrices of the cpu backend. Each plane is a block of its own, so that dropping one gives
 * its memory back and a product at b bits touches b of them. The F16 levels of one precision lie in
 * one block in the order in which a row is walked (struct nested_row), so that bytes follow bits.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <omp.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/cpu.h"

/* What nested_matrix.planes points to. */
struct cpu_planes {
    uint8_t *plane[BITS_MAX]; /* (n_rows, n_cols_padded / 8) each, owned; NULL: not resident */
};

/* ---- load and drop ---- */

/* Writes values[., first..first + n_per) of a group to out + at. */
static size_t put(uint16_t *out, size_t at, const uint16_t *values, size_t first, size_t n_per)
{
    memcpy(out + at, values + first, n_per * sizeof *out);
    return at + n_per;
}

/* The levels of precision b of the shard, interleaved by group. */
static enum status levels_load(void **levels, const struct nested_matrix *w,
                               const struct nested_source *src, const struct matrix_range *range,
                               int b)
{
    size_t n_groups = (size_t)(w->n_cols_padded / w->group_cols), n = 0, at = 0;
    size_t src_groups = (size_t)nested_n_groups(src);
    size_t first_group = (size_t)(range->col_begin / w->group_cols);
    size_t per_row = level_values_per_row(src->kind[b], b, (int32_t)n_groups);
    TRY(mem_mul(&n, (size_t)w->n_rows, per_row));
    uint16_t *out = NULL;
    TRY(MEM_NEW(&out, n));
    *levels = out;
    for (size_t r = (size_t)range->row_begin; r < (size_t)range->row_end; r++) {
        if (src->kind[b] == LEVEL_LUT) {
            at = put(out, at, src->lut[b], r << b, (size_t)1 << b);
            continue;
        }
        for (size_t g = 0; g < n_groups; g++) {
            size_t from = r * src_groups + first_group + g, bits = (size_t)b;
            if (src->kind[b] == LEVEL_FREE) {
                at = put(out, at, src->alpha[b], from * bits, bits);
            } else {
                at = put(out, at, src->scale[b], from, 1);
            }
            if (src->kind[b] == LEVEL_TAIL) {
                at = put(out, at, src->tail, from, 1);
            }
            at = put(out, at, src->offset[b], from, 1);
        }
    }
    INVARIANT(at == n);
    return ST_OK;
}

static enum status plane_load(uint8_t **plane, const struct nested_matrix *w,
                              const struct nested_source *src, const struct matrix_range *range,
                              int p)
{
    size_t row_bytes = (size_t)w->n_cols_padded / 8, src_row_bytes = (size_t)src->n_cols_padded / 8;
    size_t n = 0;
    TRY(mem_mul(&n, row_bytes, (size_t)w->n_rows));
    TRY(MEM_NEW(plane, n));
    host_copy_rows(*plane, src->planes + (size_t)p * src_row_bytes * (size_t)src->n_rows, 1,
                   (size_t)w->n_rows, row_bytes, (size_t)range->row_begin, src_row_bytes,
                   (size_t)range->col_begin / 8);
    return ST_OK;
}

static enum status reserve_rows(struct cpu *cpu, int32_t n_cols)
{
    size_t n = 0;
    TRY(mem_mul(&n, cpu_scratch_width((size_t)n_cols), (size_t)cpu->n_threads));
    TRY(host_scratch_reserve(&cpu->rows, n));
    return ST_OK;
}

enum status cpu_planes_load(struct backend *be, struct nested_matrix *w,
                            const struct nested_source *src, const struct matrix_range *range,
                            int n_planes)
{
    struct cpu *cpu = be->impl;
    struct cpu_planes *planes = w->planes, *fresh = NULL;
    uint8_t *plane[BITS_MAX] = {0};
    void *levels[BITS_ALL] = {0};
    enum status st;
    TRY_GOTO(st, reserve_rows(cpu, w->n_cols_padded), failed);
    for (int p = w->n_resident; p < n_planes; p++) {
        TRY_GOTO(st, plane_load(&plane[p], w, src, range, p), failed);
    }
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        if (src->kind[b] != LEVEL_NONE) {
            TRY_GOTO(st, levels_load(&levels[b], w, src, range, b), failed);
        }
    }
    if (!planes) {
        TRY_GOTO(st, MEM_NEW(&fresh, 1), failed);
        w->planes = planes = fresh;
    }
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        planes->plane[b - 1] = plane[b - 1];
        w->levels[b] = levels[b];
    }
    return ST_OK;
failed:
    for (int b = 1; b <= BITS_MAX; b++) {
        mem_free(plane[b - 1]);
        mem_free(levels[b]);
    }
    return st;
}

void cpu_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    (void)be;
    struct cpu_planes *planes = w->planes;
    for (int b = keep + 1; b <= BITS_MAX; b++) {
        mem_free(planes->plane[b - 1]);
        planes->plane[b - 1] = NULL;
        mem_free(w->levels[b]);
        w->levels[b] = NULL;
    }
    if (keep == 0) {
        mem_free(planes);
        w->planes = NULL;
    }
}

/* ---- the product ---- */

/* One product, as every thread needs it. */
struct pass {
    const struct cpu_isa *isa;
    const struct nested_matrix *w;
    const uint8_t *bits;
    const float *x;
    size_t n_tok;
    const int32_t *cut;
    int32_t n_segments;
    struct cpu_output out;
    size_t n_of[BITS_ALL]; /* tokens of each precision */
};

static struct nested_row row_at(const struct nested_matrix *w, int32_t row, int bits)
{
    const struct cpu_planes *planes = w->planes;
    size_t row_bytes = (size_t)w->n_cols_padded / 8;
    size_t per_row = level_values_per_row(w->kind[bits], bits, w->n_cols_padded / w->group_cols);
    struct nested_row out = {
        .levels = (const uint16_t *)w->levels[bits] + (size_t)row * per_row,
        .kind = w->kind[bits],
        .bits = bits,
        .group_cols = w->group_cols,
    };
    for (int p = 0; p < bits; p++) {
        out.plane[p] = planes->plane[p] + (size_t)row * row_bytes;
    }
    return out;
}

/* The only token of its precision: decoded weights never leave the registers. */
static void row_for_one(const struct pass *pass, const struct nested_row *row, int32_t r)
{
    size_t t = 0, n_cols = (size_t)pass->w->n_cols;
    while (pass->bits[t] != row->bits) {
        t++;
    }
    for (int32_t s = 0; s < pass->n_segments; s++) {
        int32_t begin = pass->cut[s], n = pass->cut[s + 1] - begin;
        const float *x = pass->x + t * n_cols + (size_t)begin;
        cpu_store(&pass->out, s, t, r, pass->isa->dot_nested(row, begin, x, n));
    }
}

/* Several: the row is decoded once and multiplied with tiles of them. */
static void row_for_many(const struct pass *pass, const struct nested_row *row, int32_t r,
                         float *weights)
{
    size_t n_cols = (size_t)pass->w->n_cols;
    pass->isa->decode(weights, row, 0, pass->w->n_cols);
    size_t t = 0;
    while (t < pass->n_tok) {
        const float *x[CPU_TILE];
        size_t token[CPU_TILE];
        int n = 0;
        for (; t < pass->n_tok && n < CPU_TILE; t++) {
            if (pass->bits[t] == row->bits) {
                x[n] = pass->x + t * n_cols;
                token[n++] = t;
            }
        }
        if (n == 0) {
            return;
        }
        cpu_tile(pass->isa, &pass->out, weights, x, token, n, r, pass->cut, pass->n_segments);
    }
}

static void row_product(const struct pass *pass, int32_t r, float *weights)
{
    for (int b = 1; b <= BITS_MAX; b++) {
        if (pass->n_of[b] == 0) {
            continue;
        }
        struct nested_row row = row_at(pass->w, r, b);
        if (pass->n_of[b] == 1) {
            row_for_one(pass, &row, r);
        } else {
            row_for_many(pass, &row, r, weights);
        }
    }
}

enum status cpu_matmul_nested(struct backend *be, struct tensor *y, const struct nested_matrix *w,
                              const struct tensor *bits, const struct tensor *x,
                              const struct tensor *bias, const struct how *how)
{
    struct cpu *cpu = be->impl;
    TRY(host_check_bits(bits, how->bits_used));
    TRY(reserve_rows(cpu, w->n_cols_padded));
    const int32_t whole[] = {0, w->n_cols};
    struct pass pass = {
        .isa = cpu->isa,
        .w = w,
        .bits = bits->data,
        .x = x->data,
        .n_tok = (size_t)x->dims[0],
        .cut = how->cut ? how->cut : whole,
        .n_segments = how->n_segments,
        .out = cpu_output(y, x, bias, how),
    };
    for (size_t t = 0; t < pass.n_tok; t++) {
        pass.n_of[pass.bits[t]]++;
    }
    size_t width = cpu_scratch_width((size_t)w->n_cols_padded);
    int n_threads = cpu_threads(cpu, (size_t)w->n_rows * (size_t)w->n_cols * pass.n_tok);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t r = 0; r < w->n_rows; r++) {
        row_product(&pass, r, cpu->rows.data + (size_t)omp_get_thread_num() * width);
    }
    return ST_OK;
}
