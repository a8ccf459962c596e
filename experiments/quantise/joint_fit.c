/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/joint_fit.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "experiments/quantise/group_fit.h"

static enum status check_bits(uint32_t bits, enum level_kind kind, bool tail, int32_t group_cols)
{
    const uint32_t allowed = 1u << 2 | 1u << 3 | 1u << 4;
    if (bits >> 8 & 1) {
        FAIL(ST_USER, "8 bits are made as a tail on top of 4, not as a precision of the list; give "
                      "--bits 2,3,4 --tail 8");
    }
    if (bits & 0xe0) {
        FAIL(ST_USER, "5 to 7 bits cannot be stored: cut from the 8-bit tail they are worse than 4 "
                      "bits; choose from 2, 3, 4 and --tail 8");
    }
    if (bits == 0 || (bits & ~allowed) != 0) {
        FAIL(ST_USER, "the precisions must be chosen from 2, 3 and 4 bits");
    }
    if (kind != LEVEL_TIED && kind != LEVEL_FREE) {
        FAIL(ST_USER, "levels are '%s', expected tied or free", level_kind_name(kind));
    }
    if (tail && !(bits >> FIT_MAX_BITS & 1)) {
        FAIL(ST_USER, "the 8-bit tail is made of 4 planes on top of 4 bits; add 4 to --bits");
    }
    if (group_cols != 32 && group_cols != 64 && group_cols != 128) {
        FAIL(ST_USER, "a group is %d columns, expected 32, 64 or 128", group_cols);
    }
    return ST_OK;
}

enum status fit_spec_make(struct fit_spec *out, uint32_t bits, enum level_kind kind, bool tail,
                          int32_t group_cols, const double *lambda)
{
    TRY(check_bits(bits, kind, tail, group_cols));
    *out = (struct fit_spec){.group_cols = group_cols};
    for (int b = FIT_MIN_BITS; b <= FIT_MAX_BITS; b++) {
        if (!(bits >> b & 1)) {
            continue;
        }
        if (out->lo == 0) {
            out->lo = b;
        }
        out->hi = b;
        out->kind[b] = kind;
        out->lambda[b] = lambda ? *lambda++ : (double)(1 << 2 * (b - out->lo));
        if (!(out->lambda[b] >= 1e-6 && out->lambda[b] <= 1e6)) {
            FAIL(ST_USER, "the weight of %d bits is %g, expected a number from 1e-6 to 1e6", b,
                 out->lambda[b]);
        }
    }
    out->n_planes = out->hi;
    if (tail) {
        out->kind[FIT_TAIL_BITS] = LEVEL_TAIL;
        out->n_planes = FIT_TAIL_BITS;
    }
    return ST_OK;
}

/* The arrays of a precision lie in the block in the order scale or alpha, offset, tail. */
static void place_levels(struct nested_source *s, int bits, const uint16_t *at, size_t groups)
{
    switch (s->kind[bits]) {
    case LEVEL_TIED:
        s->scale[bits] = at;
        s->offset[bits] = at + groups;
        break;
    case LEVEL_FREE:
        s->alpha[bits] = at;
        s->offset[bits] = at + groups * (size_t)bits;
        break;
    case LEVEL_TAIL:
        s->scale[bits] = at;
        s->offset[bits] = at + groups;
        s->tail = at + 2 * groups;
        break;
    case LEVEL_NONE:
    case LEVEL_LUT:
    case LEVEL_N:
        break;
    }
}

enum status nested_buffer_create(struct nested_buffer *out, const struct fit_spec *spec,
                                 int32_t n_rows, int32_t n_cols)
{
    *out = (struct nested_buffer){0};
    if (n_rows < 1 || n_cols < 1 || n_cols > INT32_MAX - spec->group_cols) {
        FAIL(ST_SHAPE,
             "a matrix of %d x %d cannot be quantised, expected at least one row and one "
             "column",
             n_rows, n_cols);
    }
    struct nested_source *s = &out->source;
    memcpy(s->kind, spec->kind, sizeof s->kind);
    int32_t n_groups = (n_cols + spec->group_cols - 1) / spec->group_cols;
    s->n_rows = n_rows;
    s->n_cols = n_cols;
    s->n_cols_padded = n_groups * spec->group_cols;
    s->group_cols = spec->group_cols;
    s->n_planes = spec->n_planes;
    size_t total;
    TRY(mem_mul(&total, (size_t)n_rows, (size_t)s->n_cols_padded / 8));
    TRY(mem_mul(&total, total, (size_t)s->n_planes));
    out->planes_bytes = total;
    for (int b = 1; b <= BITS_MAX; b++) {
        size_t values = level_values_per_row(s->kind[b], b, n_groups), bytes;
        TRY(mem_mul(&values, values, (size_t)n_rows));
        TRY(mem_mul(&bytes, values, sizeof(uint16_t)));
        TRY(mem_add(&total, total, bytes));
        out->level_values[b] = values;
    }
    TRY(mem_alloc_array(&out->block, total, 1));
    s->planes = out->block;
    /* planes are a multiple of 4 bytes, so that the F16 arrays behind them are aligned */
    const uint16_t *at = (const uint16_t *)((const char *)out->block + out->planes_bytes);
    for (int b = 1; b <= BITS_MAX; b++) {
        place_levels(s, b, at, (size_t)n_rows * (size_t)n_groups);
        at += out->level_values[b];
    }
    return ST_OK;
}

void nested_buffer_free(struct nested_buffer *buffer)
{
    mem_free(buffer->block);
    *buffer = (struct nested_buffer){0};
}

double fit_report_relative(const struct fit_report *report, int bits)
{
    return report->power > 0 ? sqrt(report->error[bits] / report->power) : 0;
}

void fit_report_add(struct fit_report *sum, const struct fit_report *part)
{
    sum->power += part->power;
    for (int b = 0; b < BITS_ALL; b++) {
        sum->error[b] += part->error[b];
    }
    sum->n_weights += part->n_weights;
    sum->n_groups += part->n_groups;
    sum->n_clamped += part->n_clamped;
}

/* The buffer's own memory, of which source holds read-only views. */
static uint16_t *writable(const struct nested_buffer *out, const uint16_t *view)
{
    return (uint16_t *)((char *)out->block + ((const char *)view - (const char *)out->block));
}

static void put_levels(const struct nested_buffer *out, size_t at, const struct group_levels *l)
{
    const struct nested_source *s = &out->source;
    for (int b = 1; b <= BITS_MAX; b++) {
        if (s->scale[b]) {
            writable(out, s->scale[b])[at] = l->scale[b];
        }
        if (s->offset[b]) {
            writable(out, s->offset[b])[at] = l->offset[b];
        }
        if (s->alpha[b]) {
            memcpy(writable(out, s->alpha[b]) + at * (size_t)b, l->alpha[b],
                   (size_t)b * sizeof(uint16_t));
        }
    }
    if (s->tail) {
        writable(out, s->tail)[at] = l->tail;
    }
}

/* code (n_cols_padded): bit t of byte j is column 8j + t. */
static void put_planes(const struct nested_buffer *out, int32_t row, const uint8_t *code)
{
    const struct nested_source *s = &out->source;
    size_t row_bytes = (size_t)s->n_cols_padded / 8, plane_bytes = row_bytes * (size_t)s->n_rows;
    uint8_t *to = (uint8_t *)out->block + (size_t)row * row_bytes;
    for (int p = 0; p < s->n_planes; p++) {
        int shift = s->n_planes - 1 - p;
        for (size_t j = 0; j < row_bytes; j++) {
            unsigned byte = 0;
            for (int t = 0; t < 8; t++) {
                byte |= (code[8 * j + (size_t)t] >> shift & 1u) << t;
            }
            to[j] = (uint8_t)byte;
        }
        to += plane_bytes;
    }
}

/* One row; w and code have room for n_cols_padded. */
static void fit_row(const struct nested_buffer *out, struct fit_report *report,
                    const struct fit_spec *spec, int32_t row, const float *w, uint8_t *code)
{
    const struct nested_source *s = &out->source;
    int32_t n_groups = nested_n_groups(s);
    memset(code, 0, (size_t)s->n_cols_padded);
    *report = (struct fit_report){.n_weights = s->n_cols, .n_groups = n_groups};
    for (int32_t i = 0; i < s->n_cols; i++) {
        report->power += (double)w[i] * (double)w[i];
    }
    for (int32_t j = 0; j < n_groups; j++) {
        int32_t begin = j * s->group_cols, left = s->n_cols - begin;
        struct group_levels levels;
        double error[BITS_ALL] = {0};
        group_fit(code + begin, &levels, error, spec, w + begin,
                  left < s->group_cols ? left : s->group_cols);
        put_levels(out, (size_t)row * (size_t)n_groups + (size_t)j, &levels);
        for (int b = 0; b < BITS_ALL; b++) {
            report->error[b] += error[b];
        }
        report->n_clamped += levels.clamped;
    }
    put_planes(out, row, code);
}

/* First column that is not finite; -1: none. */
static int32_t find_not_finite(const float *w, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (!isfinite(w[i])) {
            return i;
        }
    }
    return -1;
}

enum status fit_rows(struct nested_buffer *out, struct fit_report *report, const struct tensor *w,
                     const struct fit_spec *spec, int32_t begin, int32_t end, int n_threads)
{
    const struct nested_source *s = &out->source;
    INVARIANT(w->n_dims == 2 && w->dims[0] == s->n_rows && w->dims[1] == s->n_cols);
    INVARIANT(begin >= 0 && begin <= end && end <= s->n_rows && n_threads >= 1);
    enum status st = ST_OK;
    size_t width = (size_t)s->n_cols_padded;
    float *rows = NULL;
    uint8_t *codes = NULL;
    struct fit_report *parts = NULL; /* per row, added in order: no thread decides the rounding */
    int32_t *bad_col = NULL;
    size_t scratch;
    TRY_GOTO(st, mem_mul(&scratch, width, (size_t)n_threads), done);
    TRY_GOTO(st, MEM_NEW(&rows, scratch), done);
    TRY_GOTO(st, MEM_NEW(&codes, scratch), done);
    TRY_GOTO(st, MEM_NEW(&parts, end - begin), done);
    TRY_GOTO(st, MEM_NEW(&bad_col, end - begin), done);
    size_t row_bytes = (size_t)s->n_cols * dtype_bytes(w->dtype);
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
    for (int32_t i = begin; i < end; i++) {
        float *row = rows + width * (size_t)omp_get_thread_num();
        uint8_t *code = codes + width * (size_t)omp_get_thread_num();
        floats_from(row, (const char *)w->data + (size_t)i * row_bytes, w->dtype,
                    (size_t)s->n_cols);
        bad_col[i - begin] = find_not_finite(row, s->n_cols);
        if (bad_col[i - begin] < 0) {
            fit_row(out, &parts[i - begin], spec, i, row, code);
        }
    }
    for (int32_t i = begin; i < end; i++) {
        int32_t col = bad_col[i - begin];
        if (col >= 0) {
            float value;
            floats_from(&value,
                        (const char *)w->data + (size_t)i * row_bytes +
                            (size_t)col * dtype_bytes(w->dtype),
                        w->dtype, 1);
            FAIL_GOTO(st, ST_FORMAT, done,
                      "weight (%d, %d) is %s, expected a finite number; the file is damaged or the "
                      "training diverged",
                      i, col, isnan(value) ? "NaN" : "infinite");
        }
        fit_report_add(report, &parts[i - begin]);
    }
done:
    mem_free(rows);
    mem_free(codes);
    mem_free(parts);
    mem_free(bad_col);
    return st;
}
