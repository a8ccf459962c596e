/* The loops of cpu_nested.h in portable C: what the other instruction sets have to equal bit for
 * bit. Codes of activations are in column order; expanded codes are (n_cols, NESTED_ROWS).
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <string.h>

#include "core/tensor.h"
#include "kernels/cpu_nested.h"

enum { LANES = 8, FOUR = 4 };

/* The order of the sum is that of eight lanes, one per four columns of a step. */
static float sum_of(const float *x, int32_t n)
{
    float s[LANES] = {0};
    for (int32_t i = 0; i < n; i += NESTED_STEP) {
        for (int l = 0; l < LANES; l++) {
            const float *v = x + i + FOUR * l;
            s[l] += (v[0] + v[1]) + (v[2] + v[3]);
        }
    }
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* What both quantisations share; returns 127 / most, or 0 where there is nothing to scale: below
 * NESTED_LEAST the quotient would leave the range of f32. */
static float begin_group(const struct nested_acts *out, const float *x, int32_t act,
                         int32_t act_cols, float most)
{
    float sum = sum_of(x, act_cols);
    bool is_finite = isfinite(sum) && isfinite(most);
    out->scale[act] = is_finite ? most / 127.0f : 0.0f;
    out->sum[act] = is_finite ? sum : NAN; /* not a number anywhere: every row says so */
    return is_finite && most > NESTED_LEAST ? 127.0f / most : 0.0f;
}

static int8_t rounded(float v)
{
    long r = lrintf(v);
    return (int8_t)(r > 127 ? 127 : r < -128 ? -128 : r);
}

static void scalar_tables(const struct nested_acts *out, const float *x, int32_t act,
                          int32_t act_cols)
{
    int8_t *table = out->values + (size_t)act * (size_t)act_cols * FOUR;
    float most = 0;
    for (int32_t i = 0; i < act_cols; i += FOUR) {
        float s = (fabsf(x[i]) + fabsf(x[i + 1])) + (fabsf(x[i + 2]) + fabsf(x[i + 3]));
        most = s > most ? s : most;
    }
    float inverse = begin_group(out, x, act, act_cols, most);
    if (inverse == 0) {
        memset(table, 0, (size_t)act_cols * FOUR);
        return;
    }
    for (int32_t i = 0; i < act_cols; i += FOUR, table += 16) {
        float p01 = inverse * (x[i] + x[i + 1]), m01 = inverse * (x[i] - x[i + 1]);
        float p23 = inverse * (x[i + 2] + x[i + 3]), m23 = inverse * (x[i + 2] - x[i + 3]);
        const float low[4] = {-p01, m01, -m01, p01}, high[4] = {-p23, m23, -m23, p23};
        for (int e = 0; e < 16; e++) {
            table[e] = rounded(low[e & 3] + high[e >> 2]);
        }
    }
}

static void scalar_codes(const struct nested_acts *out, const float *x, int32_t act,
                         int32_t act_cols)
{
    int8_t *code = out->values + (size_t)act * (size_t)act_cols;
    float most = 0;
    for (int32_t i = 0; i < act_cols; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    }
    float inverse = begin_group(out, x, act, act_cols, most);
    out->total[act] = 0;
    for (int32_t i = 0; i < act_cols; i++) {
        code[i] = inverse == 0 ? 0 : rounded(inverse * x[i]);
        out->total[act] += code[i];
    }
}

static void scalar_look_up(float *sum, const struct nested_tile *tile,
                           const struct nested_acts *acts, int32_t begin, int32_t end)
{
    int n_terms = nested_terms(tile->kind, tile->bits), per_term = tile->bits / n_terms;
    int32_t act_cols = tile->act_cols;
    memset(sum, 0, NESTED_ROWS * sizeof *sum);
    for (int32_t act = begin / act_cols; act < end / act_cols; act++) {
        const uint16_t *levels = tile->levels + (size_t)(act * act_cols / tile->group_cols) *
                                                    (size_t)(n_terms + 1) * NESTED_ROWS;
        float h = acts->scale[act] * (tile->kind == LEVEL_FREE ? 1.0f : 0.5f);
        for (int r = 0; r < NESTED_ROWS; r++) {
            for (int t = 0; t < n_terms; t++) {
                int32_t total = 0;
                for (int p = t * per_term; p < (t + 1) * per_term; p++) {
                    total *= 2;
                    for (int32_t j = act * act_cols / 8; j < (act + 1) * act_cols / 8; j++) {
                        unsigned byte = tile->plane[p][(size_t)j * NESTED_ROWS + (size_t)r];
                        const int8_t *table = acts->values + (size_t)j * 32;
                        total += table[byte & 15] + table[16 + (byte >> 4)];
                    }
                }
                sum[r] = fmaf(f16_to_f32(levels[t * NESTED_ROWS + r]), (float)total * h, sum[r]);
            }
            sum[r] = fmaf(f16_to_f32(levels[n_terms * NESTED_ROWS + r]), acts->sum[act], sum[r]);
        }
    }
}

static void scalar_expand(uint8_t *out, const struct nested_tile *tile, int32_t begin,
                          int32_t n_cols)
{
    for (int32_t c = begin; c < begin + n_cols; c++) {
        for (int r = 0; r < NESTED_ROWS; r++) {
            unsigned code = 0;
            for (int p = 0; p < tile->bits; p++) {
                unsigned byte = tile->plane[p][(size_t)(c / 8) * NESTED_ROWS + (size_t)r];
                code = code << 1 | (byte >> c % 8 & 1u);
            }
            *out++ = (uint8_t)code;
        }
    }
}

static void scalar_dots(float *const *sum, const uint8_t *codes, const struct nested_tile *tile,
                        const struct nested_acts *const *acts, int n_tok, int32_t begin,
                        int32_t end)
{
    int32_t act_cols = tile->act_cols, most = (1 << tile->bits) - 1;
    for (int j = 0; j < n_tok; j++) {
        for (int32_t act = begin / act_cols; act < end / act_cols; act++) {
            const uint16_t *levels =
                tile->levels + (size_t)(act * act_cols / tile->group_cols) * 2 * NESTED_ROWS;
            const int8_t *x = acts[j]->values + (size_t)act * (size_t)act_cols;
            const uint8_t *code = codes + (size_t)(act * act_cols - begin) * NESTED_ROWS;
            float h = acts[j]->scale[act] * 0.5f;
            for (int r = 0; r < NESTED_ROWS; r++) {
                int32_t total = 0;
                for (int32_t c = 0; c < act_cols; c++) {
                    total += code[c * NESTED_ROWS + r] * x[c];
                }
                total = 2 * total - most * acts[j]->total[act];
                float y = fmaf(f16_to_f32(levels[r]), (float)total * h, sum[j][r]);
                sum[j][r] = fmaf(f16_to_f32(levels[NESTED_ROWS + r]), acts[j]->sum[act], y);
            }
        }
    }
}

const struct nested_loops nested_loops_scalar = {
    .together = 1,
    .tables = scalar_tables,
    .codes = scalar_codes,
    .look_up = scalar_look_up,
    .expand = scalar_expand,
    .dots = scalar_dots,
};
