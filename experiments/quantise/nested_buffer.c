/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/nested_buffer.h"

#include <math.h>
#include <string.h>

#include "core/mem.h"
#include "core/tensor.h"

static const double F16_MAX = 65504.0;

uint16_t nested_store_f16(bool *clamped, double value)
{
    if (fabs(value) > F16_MAX) {
        *clamped = true;
        value = value > 0 ? F16_MAX : -F16_MAX;
    }
    return f32_to_f16((float)value);
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
    case LEVEL_LUT:
        s->lut[bits] = at;
        break;
    case LEVEL_NONE:
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
    out->total_bytes = total;
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

/* The buffer's own memory, of which source holds read-only views. */
static uint16_t *writable(const struct nested_buffer *out, const uint16_t *view)
{
    return (uint16_t *)((char *)out->block + ((const char *)view - (const char *)out->block));
}

void nested_buffer_put_levels(const struct nested_buffer *out, int32_t row, int32_t group,
                              const struct group_levels *l)
{
    const struct nested_source *s = &out->source;
    size_t at = (size_t)row * (size_t)nested_n_groups(s) + (size_t)group;
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

void nested_buffer_put_lut(const struct nested_buffer *out, int32_t row, int bits,
                           const uint16_t *lut)
{
    size_t n = (size_t)1 << bits;
    memcpy(writable(out, out->source.lut[bits]) + (size_t)row * n, lut, n * sizeof *lut);
}

/* Bit t of byte j is column 8j + t. */
void nested_buffer_put_codes(const struct nested_buffer *out, int32_t row, const uint8_t *code)
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
