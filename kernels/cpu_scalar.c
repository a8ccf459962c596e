/* Inner loops in portable C: eight lanes that a compiler may or may not vectorise; the order of
 * every sum is written down either way.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <string.h>

#include "kernels/cpu.h"

enum { LANES = 8 };

static float sum_lanes(const float s[LANES])
{
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static void add_step(float s[LANES], const float *w, const float *x)
{
    for (int i = 0; i < CPU_STEP; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            s[l] += w[i + l] * x[i + l];
        }
    }
}

/* The step at the end of a vector, filled up with zeros. */
static void add_rest(float s[LANES], const float *w, const float *x, int32_t n)
{
    float w_step[CPU_STEP] = {0}, x_step[CPU_STEP] = {0};
    memcpy(w_step, w, (size_t)n * sizeof *w);
    memcpy(x_step, x, (size_t)n * sizeof *x);
    add_step(s, w_step, x_step);
}

static float dot_f32(const float *w, const float *x, int32_t n)
{
    float s[LANES] = {0};
    int32_t i = 0;
    for (; i + CPU_STEP <= n; i += CPU_STEP) {
        add_step(s, w + i, x + i);
    }
    if (i < n) {
        add_rest(s, w + i, x + i, n - i);
    }
    return sum_lanes(s);
}

static void scalar_dots(float *out, const float *w, const float *const *x, int n_x,
                        const int32_t *cut, int n_segments)
{
    for (int s = 0; s < n_segments; s++) {
        for (int j = 0; j < n_x; j++) {
            out[s * CPU_TILE_ROOM + j] = dot_f32(w + cut[s], x[j] + cut[s], cut[s + 1] - cut[s]);
        }
    }
}

static float scalar_dot(const void *w, enum dtype dtype, const float *x, int32_t n)
{
    if (dtype == DT_F32) {
        return dot_f32(w, x, n);
    }
    float s[LANES] = {0}, step[CPU_STEP];
    const uint16_t *half = w;
    for (int32_t i = 0; i < n; i += CPU_STEP) {
        int32_t now = n - i < CPU_STEP ? n - i : CPU_STEP;
        floats_from(step, half + i, dtype, (size_t)now);
        if (now == CPU_STEP) {
            add_step(s, step, x + i);
        } else {
            add_rest(s, step, x + i, now);
        }
    }
    return sum_lanes(s);
}

static void scalar_dot_segments(float *out, const void *w, enum dtype dtype, const float *x,
                                const int32_t *cut, int n_segments)
{
    for (int s = 0; s < n_segments; s++) {
        const char *begin = (const char *)w + (size_t)cut[s] * dtype_bytes(dtype);
        out[s] = scalar_dot(begin, dtype, x + cut[s], cut[s + 1] - cut[s]);
    }
}

static void scalar_convert(float *out, const void *v, enum dtype dtype, int32_t n)
{
    floats_from(out, v, dtype, (size_t)n);
}

/* The table of a group, or of the whole row (LUT: loaded once, at the first group). */
static void load_table(float *table, const struct nested_row *row, int32_t group)
{
    float alpha[BITS_MAX], tied[3];
    const uint16_t *at;
    switch (row->kind) {
    case LEVEL_TIED:
        floats_from(tied, row->levels + 2 * (size_t)group, DT_F16, 2);
        level_table_tied(table, row->bits, tied[0], tied[1]);
        return;
    case LEVEL_FREE:
        at = row->levels + (size_t)(row->bits + 1) * (size_t)group;
        floats_from(alpha, at, DT_F16, (size_t)row->bits);
        level_table_free(table, row->bits, alpha, f16_to_f32(at[row->bits]));
        return;
    case LEVEL_TAIL:
        floats_from(tied, row->levels + 3 * (size_t)group, DT_F16, 3);
        level_table_tail(table, tied[0], tied[1], tied[2]);
        return;
    case LEVEL_LUT:
        floats_from(table, row->levels, DT_F16, (size_t)1 << row->bits);
        return;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    INVARIANT(!"levels of this precision are held");
}

static void decode_step(float *out, const struct nested_row *row, const float *table, size_t byte)
{
    for (size_t j = byte; j < byte + CPU_STEP / 8; j++) {
        for (int t = 0; t < 8; t++) {
            unsigned code = 0;
            for (int p = 0; p < row->bits; p++) {
                code = code << 1 | (row->plane[p][j] >> t & 1u);
            }
            *out++ = table[code];
        }
    }
}

static void scalar_decode(float *out, const struct nested_row *row, int32_t begin, int32_t n)
{
    float table[LEVELS_MAX];
    for (int32_t c = 0; c < n; c += CPU_STEP) {
        int32_t col = begin + c;
        if (c == 0 || (row->kind != LEVEL_LUT && col % row->group_cols == 0)) {
            load_table(table, row, col / row->group_cols);
        }
        decode_step(out + c, row, table, (size_t)col / 8);
    }
}

const struct cpu_isa cpu_isa_scalar = {
    .name = "scalar",
    .loops = &cpu_loops_scalar,
    .dots = scalar_dots,
    .dot_segments = scalar_dot_segments,
    .convert = scalar_convert,
    .decode = scalar_decode,
    .nested = &nested_loops_scalar,
};
