/* SPDX-License-Identifier: Apache-2.0 */
#include "core/bitplane.h"

#include <string.h>

#include "core/tensor.h"

static const char *const kind_names[LEVEL_N] = {
    [LEVEL_NONE] = "none", [LEVEL_TIED] = "tied", [LEVEL_FREE] = "free",
    [LEVEL_LUT] = "lut",   [LEVEL_TAIL] = "tail",
};

const char *level_kind_name(enum level_kind kind)
{
    return (unsigned)kind < LEVEL_N ? kind_names[kind] : "?";
}

enum level_kind level_kind_parse(const char *word)
{
    for (int k = 0; k < LEVEL_N; k++) {
        if (strcmp(word, kind_names[k]) == 0) {
            return (enum level_kind)k;
        }
    }
    return LEVEL_N;
}

int32_t nested_n_groups(const struct nested_source *w)
{
    return w->n_cols_padded / w->group_cols;
}

size_t level_values_per_row(enum level_kind kind, int bits, int32_t n_groups)
{
    size_t g = (size_t)n_groups;
    switch (kind) {
    case LEVEL_TIED:
        return 2 * g;
    case LEVEL_FREE:
        return ((size_t)bits + 1) * g;
    case LEVEL_LUT:
        return (size_t)1 << bits;
    case LEVEL_TAIL:
        return 3 * g;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    return 0;
}

size_t nested_bytes_read(const enum level_kind kind[BITS_ALL], int32_t n_rows,
                         int32_t n_cols_padded, int32_t group_cols, int max_bits,
                         uint32_t bits_used)
{
    size_t row = (size_t)max_bits * (size_t)n_cols_padded / 8;
    for (int b = 1; b <= BITS_MAX; b++) {
        if (bits_used >> b & 1) {
            row += 2 * level_values_per_row(kind[b], b, n_cols_padded / group_cols);
        }
    }
    return row * (size_t)n_rows;
}

int nested_max_bits(const struct nested_source *w)
{
    for (int b = BITS_MAX; b > 0; b--) {
        if (w->kind[b] != LEVEL_NONE) {
            return b;
        }
    }
    return 0;
}

uint32_t bitplane_code(const struct nested_source *w, int32_t row, int32_t col, int bits)
{
    size_t row_bytes = (size_t)w->n_cols_padded / 8;
    size_t plane_bytes = row_bytes * (size_t)w->n_rows;
    const uint8_t *byte = w->planes + (size_t)row * row_bytes + (size_t)col / 8;
    uint32_t code = 0;
    for (int p = 0; p < bits; p++) {
        code = code << 1 | (byte[(size_t)p * plane_bytes] >> (col % 8) & 1u);
    }
    return code;
}

void level_table_tied(float *out, int bits, float scale, float offset)
{
    int n = 1 << bits;
    for (int c = 0; c < n; c++) {
        out[c] = offset + scale * (0.5f * (float)(2 * c - (n - 1)));
    }
}

void level_table_free(float *out, int bits, const float *alpha, float offset)
{
    int n = 1 << bits;
    for (int c = 0; c < n; c++) {
        float w = offset;
        for (int p = 0; p < bits; p++) {
            w += c >> (bits - 1 - p) & 1 ? alpha[p] : -alpha[p];
        }
        out[c] = w;
    }
}

void level_table_tail(float *out, float scale, float tail, float offset)
{
    for (int c = 0; c < 256; c++) {
        float high = 0.5f * (float)(2 * (c >> 4) - 15), low = 0.5f * (float)(2 * (c & 15) - 15);
        float base = offset + scale * high;
        out[c] = base + tail * low;
    }
}

void bitplane_level_table(float *out, const struct nested_source *w, int32_t row, int32_t group,
                          int bits)
{
    size_t at = (size_t)row * (size_t)nested_n_groups(w) + (size_t)group;
    float alpha[BITS_MAX];
    switch (w->kind[bits]) {
    case LEVEL_TIED:
        level_table_tied(out, bits, f16_to_f32(w->scale[bits][at]),
                         f16_to_f32(w->offset[bits][at]));
        return;
    case LEVEL_FREE:
        for (int p = 0; p < bits; p++) {
            alpha[p] = f16_to_f32(w->alpha[bits][at * (size_t)bits + (size_t)p]);
        }
        level_table_free(out, bits, alpha, f16_to_f32(w->offset[bits][at]));
        return;
    case LEVEL_LUT:
        floats_from(out, w->lut[bits] + ((size_t)row << bits), DT_F16, (size_t)1 << bits);
        return;
    case LEVEL_TAIL:
        level_table_tail(out, f16_to_f32(w->scale[bits][at]), f16_to_f32(w->tail[at]),
                         f16_to_f32(w->offset[bits][at]));
        return;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    INVARIANT(!"levels of this precision are held");
}

float bitplane_weight(const struct nested_source *w, int32_t row, int32_t col, int bits)
{
    float table[LEVELS_MAX];
    bitplane_level_table(table, w, row, col / w->group_cols, bits);
    return table[bitplane_code(w, row, col, bits)];
}
