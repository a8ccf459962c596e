/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/row_chunk.h"

#include <string.h>

#include "core/log.h"
#include "core/mem.h"

enum { PIECE_ALIGN = 64 };

static void *cut(char *base, size_t *used, size_t n, size_t size)
{
    void *piece = base ? base + *used : NULL;
    *used += (n * size + PIECE_ALIGN - 1) / PIECE_ALIGN * PIECE_ALIGN;
    return piece;
}

/* With base NULL it only measures. */
static size_t lay_out(struct row_chunk *c, char *base)
{
    const struct chunk_job *job = c->job;
    size_t used = 0, rows = (size_t)c->rows, count = rows * (size_t)c->n;
    c->w = cut(base, &used, count, sizeof(float));
    c->wh = cut(base, &used, count, sizeof(float));
    c->scratch = cut(base, &used, count, sizeof(float));
    for (int s = 0; s < job->n_slots; s++) {
        c->t[s] = cut(base, &used, count, sizeof(float));
        c->d[s] = cut(base, &used, rows * CHUNK_BLOCK, sizeof(float));
    }
    c->code = cut(base, &used, rows * (size_t)c->code_stride, 1);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (job->spec->kind[b] != LEVEL_NONE) {
            size_t unknowns = (size_t)level_unknowns(job->spec->kind[b], b);
            c->level[b] = cut(base, &used, rows * (size_t)job->n_groups * unknowns, sizeof(double));
        }
    }
    return used;
}

enum status chunk_create(struct row_chunk *out, const struct chunk_job *job, int32_t rows,
                         struct fit_times *times)
{
    *out = (struct row_chunk){.job = job,
                              .rows = rows,
                              .n = job->h->n,
                              .code_stride = job->n_groups * job->spec->group_cols,
                              .code_bits = job->spec->hi,
                              .times = times};
    /* rows are few and n is the width of a matrix of which n * n floats are in memory */
    TRY(mem_alloc_array(&out->block, lay_out(out, NULL), 1));
    lay_out(out, out->block);
    return ST_OK;
}

void chunk_free(struct row_chunk *c)
{
    mem_free(c->block);
    *c = (struct row_chunk){0};
}

int level_unknowns(enum level_kind kind, int bits)
{
    return kind == LEVEL_TIED ? 2 : kind == LEVEL_TAIL ? 3 : bits + 1;
}

float level_feature(enum level_kind kind, int bits, uint32_t code, int f)
{
    if (f == level_unknowns(kind, bits) - 1) {
        return 1.0f;
    }
    if (kind == LEVEL_TIED) {
        return (float)code - 0.5f * (float)((1 << bits) - 1);
    }
    if (kind == LEVEL_TAIL) {
        return (float)(f == 0 ? code >> 4 : code & 15) - 7.5f;
    }
    return code >> (bits - 1 - f) & 1 ? 1.0f : -1.0f;
}

void level_table_of(float *table, enum level_kind kind, int bits, const double *level)
{
    if (kind == LEVEL_TIED) {
        level_table_tied(table, bits, (float)level[0], (float)level[1]);
    } else if (kind == LEVEL_TAIL) {
        level_table_tail(table, (float)level[0], (float)level[1], (float)level[2]);
    } else {
        float alpha[FIT_MAX_BITS];
        for (int p = 0; p < bits; p++) {
            alpha[p] = (float)level[p];
        }
        level_table_free(table, bits, alpha, (float)level[bits]);
    }
}

double *chunk_level(const struct row_chunk *c, int bits, int32_t row, int32_t group)
{
    size_t unknowns = (size_t)level_unknowns(c->job->spec->kind[bits], bits);
    return c->level[bits] + ((size_t)row * (size_t)c->job->n_groups + (size_t)group) * unknowns;
}

uint32_t chunk_code(const struct row_chunk *c, int bits, int32_t row, int32_t col)
{
    return (uint32_t)c->code[(size_t)row * (size_t)c->code_stride + (size_t)col] >>
           (c->code_bits - bits);
}

void chunk_difference(float *diff, const struct row_chunk *c, int bits)
{
    int32_t width = c->job->spec->group_cols;
    float table[LEVELS_MAX];
    for (int32_t row = 0; row < c->rows; row++) {
        const float *w = c->w + (size_t)row * (size_t)c->n;
        float *to = diff + (size_t)row * (size_t)c->n;
        for (int32_t col = 0; col < c->n; col++) {
            if (col % width == 0) {
                level_table_of(table, c->job->spec->kind[bits], bits,
                               chunk_level(c, bits, row, col / width));
            }
            to[col] = w[col] - table[chunk_code(c, bits, row, col)];
        }
    }
}

void chunk_time(struct row_chunk *c, enum fit_stage stage, double begin, double flop)
{
    c->times->thread_s[stage] += clock_s() - begin;
    c->times->flop[stage] += flop;
}

/* ---- the end ---- */

/* Puts one group's levels into *l and what is left of them after rounding back into the chunk. */
static void round_levels(struct row_chunk *c, struct group_levels *l, int32_t row, int32_t group)
{
    const struct fit_spec *spec = c->job->spec;
    l->clamped = false;
    for (int b = 1; b <= BITS_MAX; b++) {
        if (spec->kind[b] == LEVEL_NONE) {
            continue;
        }
        double *level = chunk_level(c, b, row, group);
        int n = level_unknowns(spec->kind[b], b);
        uint16_t half[FIT_MAX_BITS + 1];
        for (int i = 0; i < n; i++) {
            half[i] = nested_store_f16(&l->clamped, level[i]);
            level[i] = (double)f16_to_f32(half[i]);
        }
        l->offset[b] = half[n - 1];
        if (spec->kind[b] == LEVEL_FREE) {
            memcpy(l->alpha[b], half, (size_t)b * sizeof *half);
        } else {
            l->scale[b] = half[0];
        }
        if (spec->kind[b] == LEVEL_TAIL) {
            l->tail = half[1];
        }
    }
}

static double dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

void chunk_store(struct row_chunk *c, struct nested_buffer *out, struct fit_report *report,
                 int32_t first)
{
    const struct fit_spec *spec = c->job->spec;
    size_t count = (size_t)c->rows * (size_t)c->n;
    double begin = clock_s(), flop = 0;
    for (int32_t row = 0; row < c->rows; row++) {
        for (int32_t g = 0; g < c->job->n_groups; g++) {
            struct group_levels l;
            round_levels(c, &l, row, g);
            nested_buffer_put_levels(out, first + row, g, &l);
            report->n_clamped += l.clamped;
        }
        nested_buffer_put_codes(out, first + row, c->code + (size_t)row * (size_t)c->code_stride);
    }
    report->n_weights += (int64_t)count;
    report->n_groups += (int64_t)c->rows * c->job->n_groups;
    report->power += dot(c->w, c->w, count);
    report->output_power += dot(c->w, c->wh, count);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (spec->kind[b] == LEVEL_NONE) {
            continue;
        }
        chunk_difference(c->t[0], c, b);
        blas_gemm(c->rows, c->n, c->n, 1.0f, c->t[0], c->n, c->job->h->h, c->n, 0.0f, c->scratch,
                  c->n);
        report->error[b] += dot(c->t[0], c->t[0], count);
        report->output_error[b] += dot(c->t[0], c->scratch, count);
        flop += 2.0 * (double)count * (double)c->n;
    }
    chunk_time(c, FIT_MEASURE, begin, flop);
}
