/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/baseline_fit.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"

/* Clipping: this many steps from the whole range down to CLIP_MIN of it. */
enum { CLIP_STEPS = 27, LLOYD_ROUNDS = 60 };
static const double CLIP_MIN = 0.35;

void grid_fit(double level[2], const float *t, const float *weight, int32_t n, int bits)
{
    double low = 0, high = 0, best = DBL_MAX, steps = (double)((1 << bits) - 1);
    for (int32_t i = 0; i < n; i++) {
        low = fmin(low, (double)t[i]);
        high = fmax(high, (double)t[i]);
    }
    high = high > low ? high : low + 1e-8;
    for (int f = 0; f < CLIP_STEPS; f++) {
        double clip = 1 - f * (1 - CLIP_MIN) / (CLIP_STEPS - 1), error = 0;
        double scale = (high - low) * clip / steps, zero = rint(-low * clip / scale);
        for (int32_t i = 0; i < n; i++) {
            double code = fmin(fmax(rint((double)t[i] / scale) + zero, 0), steps);
            double e = (double)t[i] - (code - zero) * scale;
            error += (weight ? (double)weight[i] : 1.0) * e * e;
        }
        if (error < best) {
            best = error;
            level[0] = scale;
            level[1] = scale * (0.5 * steps - zero);
        }
    }
}

static double squared_error(const float *w, const uint8_t *code, int shift, const float *table,
                            int32_t n)
{
    double error = 0;
    for (int32_t i = 0; i < n; i++) {
        double d = (double)w[i] - (double)table[code[i] >> shift];
        error += d * d;
    }
    return error;
}

/* The columns of a group: first and number. */
static int32_t group_span(const struct nested_source *s, int32_t group, int32_t *begin)
{
    int32_t left = s->n_cols - group * s->group_cols;
    *begin = group * s->group_cols;
    return left < s->group_cols ? left : s->group_cols;
}

/* ---- rounding to nearest ---- */

/* Scale and offset by least squares for codes cut to their first bits. */
static void fit_line(double level[2], const float *w, const uint8_t *code, int shift, int bits,
                     int32_t n)
{
    double x = 0, y = 0, xx = 0, xy = 0, middle = 0.5 * (double)((1 << bits) - 1);
    for (int32_t i = 0; i < n; i++) {
        double u = (double)(code[i] >> shift) - middle, v = (double)w[i];
        x += u;
        y += v;
        xx += u * u;
        xy += u * v;
    }
    double spread = xx - x * x / n;
    level[0] = spread > 1e-9 ? (xy - x * y / n) / spread : 0;
    level[1] = (y - level[0] * x) / n;
}

bool baseline_rtn_row(const struct nested_buffer *out, struct fit_report *report,
                      const struct fit_spec *spec, int32_t row, const float *w, uint8_t *code)
{
    for (int32_t g = 0; g < nested_n_groups(&out->source); g++) {
        int32_t begin, n = group_span(&out->source, g, &begin);
        struct group_levels l = {.clamped = false};
        double top[2], steps = (double)((1 << spec->hi) - 1);
        grid_fit(top, w + begin, NULL, n, spec->hi);
        for (int32_t i = begin; i < begin + n; i++) {
            double c = rint(((double)w[i] - top[1]) / top[0] + 0.5 * steps);
            code[i] = (uint8_t)fmin(fmax(c, 0), steps);
        }
        for (int b = spec->lo; b <= spec->hi; b++) {
            double level[2] = {top[0], top[1]};
            float table[LEVELS_MAX];
            if (spec->kind[b] == LEVEL_NONE) {
                continue;
            }
            if (b < spec->hi) {
                fit_line(level, w + begin, code + begin, spec->hi - b, b, n);
            }
            l.scale[b] = nested_store_f16(&l.clamped, level[0]);
            l.offset[b] = nested_store_f16(&l.clamped, level[1]);
            level_table_tied(table, b, f16_to_f32(l.scale[b]), f16_to_f32(l.offset[b]));
            report->error[b] += squared_error(w + begin, code + begin, spec->hi - b, table, n);
        }
        nested_buffer_put_levels(out, row, g, &l);
        report->n_clamped += l.clamped;
    }
    return true;
}

/* ---- greedy binary coding ---- */

bool baseline_greedy_row(const struct nested_buffer *out, struct fit_report *report,
                         const struct fit_spec *spec, int32_t row, const float *w, uint8_t *code)
{
    for (int32_t g = 0; g < nested_n_groups(&out->source); g++) {
        int32_t begin, n = group_span(&out->source, g, &begin);
        struct group_levels l = {.clamped = false};
        double left[FIT_MAX_GROUP], mean = 0, alpha[FIT_MAX_BITS];
        for (int32_t i = 0; i < n; i++) {
            mean += (double)w[begin + i] / n;
        }
        for (int32_t i = 0; i < n; i++) {
            left[i] = (double)w[begin + i] - mean;
        }
        for (int p = 0; p < spec->hi; p++) {
            alpha[p] = 0;
            for (int32_t i = 0; i < n; i++) {
                alpha[p] += fabs(left[i]) / n;
            }
            for (int32_t i = 0; i < n; i++) {
                bool up = left[i] >= 0;
                code[begin + i] = (uint8_t)(code[begin + i] << 1 | up);
                left[i] -= up ? alpha[p] : -alpha[p];
            }
        }
        for (int b = spec->lo; b <= spec->hi; b++) {
            float table[LEVELS_MAX], half[FIT_MAX_BITS];
            if (spec->kind[b] == LEVEL_NONE) {
                continue;
            }
            l.offset[b] = nested_store_f16(&l.clamped, mean);
            for (int p = 0; p < b; p++) {
                l.alpha[b][p] = nested_store_f16(&l.clamped, alpha[p]);
                half[p] = f16_to_f32(l.alpha[b][p]);
            }
            level_table_free(table, b, half, f16_to_f32(l.offset[b]));
            report->error[b] += squared_error(w + begin, code + begin, spec->hi - b, table, n);
        }
        nested_buffer_put_levels(out, row, g, &l);
        report->n_clamped += l.clamped;
    }
    return true;
}

/* ---- k-means ---- */

struct sorted {
    float w;
    int32_t col;
};

static int by_weight(const void *a, const void *b)
{
    const struct sorted *x = a, *y = b;
    return x->w < y->w ? -1 : x->w > y->w ? 1 : x->col < y->col ? -1 : x->col > y->col;
}

/* Weights in rising order and their running sums; clusters are runs between borders. */
struct clusters {
    int32_t n, border[(1 << FIT_MAX_BITS) + 1];
    struct sorted *w; /* (n) */
    double *sum;      /* (n + 1) */
};

static double cluster_mean(const struct clusters *c, int i)
{
    int32_t begin = c->border[i], end = c->border[i + 1];
    if (end > begin) {
        return (c->sum[end] - c->sum[begin]) / (end - begin);
    }
    return (double)c->w[begin < c->n ? begin : c->n - 1].w; /* nobody's: what stands next to it */
}

static int32_t first_above(const struct clusters *c, double value)
{
    int32_t low = 0, high = c->n;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if ((double)c->w[middle].w < value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The share of weight i: its distance to its neighbours to the power 2/3. */
static double start_share(const struct clusters *c, int32_t i)
{
    int32_t left = i > 0 ? i - 1 : 0, right = i < c->n - 1 ? i + 1 : i;
    double distance = (double)c->w[right].w - (double)c->w[left].w;
    return right > left ? pow(distance / (right - left), 2.0 / 3.0) : 0;
}

/* Lloyd's rounds from borders at equal shares of the density's cube root: where clusters of least
 * squares lie in the limit of many. */
static void cluster_start(struct clusters *c, int k)
{
    double total = 0, at = 0;
    for (int32_t i = 0; i < c->n; i++) {
        total += start_share(c, i);
    }
    c->border[0] = 0;
    int next = 1;
    for (int32_t i = 0; i < c->n; i++) {
        at += start_share(c, i);
        while (next < k && at >= total * next / k) {
            c->border[next++] = i;
        }
    }
    while (next <= k) {
        c->border[next++] = c->n;
    }
    for (int round = 0; round < LLOYD_ROUNDS; round++) {
        bool moved = false;
        int32_t border[(1 << FIT_MAX_BITS) + 1];
        for (int i = 1; i < k; i++) {
            border[i] = first_above(c, 0.5 * (cluster_mean(c, i - 1) + cluster_mean(c, i)));
            moved |= border[i] != c->border[i];
        }
        if (!moved) {
            return;
        }
        memcpy(c->border + 1, border + 1, (size_t)(k - 1) * sizeof *border);
    }
}

/* Where a run is best cut in two: the largest sum of squares between the parts. */
static int32_t best_cut(const struct clusters *c, int32_t begin, int32_t end)
{
    int32_t cut = end; /* one weight or none stays in the left part */
    double best = -1;
    for (int32_t t = begin + 1; t < end; t++) {
        double left = c->sum[t] - c->sum[begin], right = c->sum[end] - c->sum[t];
        double score = left * left / (t - begin) + right * right / (end - t);
        if (score > best) {
            best = score;
            cut = t;
        }
    }
    return cut;
}

static void cluster_split(struct clusters *c, int k)
{
    for (int i = k; i-- > 0;) { /* from the end: borders move up in place */
        int32_t begin = c->border[i], end = c->border[i + 1];
        c->border[2 * i + 2] = end;
        c->border[2 * i + 1] = best_cut(c, begin, end);
        c->border[2 * i] = begin;
    }
}

bool baseline_kmeans_row(const struct nested_buffer *out, struct fit_report *report,
                         const struct fit_spec *spec, int32_t row, const float *w, uint8_t *code)
{
    struct clusters c = {.n = out->source.n_cols};
    bool clamped = false, good = MEM_NEW(&c.w, c.n) == ST_OK && MEM_NEW(&c.sum, c.n + 1) == ST_OK;
    for (int32_t i = 0; good && i < c.n; i++) {
        c.w[i] = (struct sorted){w[i], i};
    }
    if (good) {
        qsort(c.w, (size_t)c.n, sizeof *c.w, by_weight);
    }
    for (int32_t i = 0; good && i < c.n; i++) {
        c.sum[i + 1] = c.sum[i] + (double)c.w[i].w;
    }
    for (int b = spec->lo; good && b <= spec->hi; b++) {
        uint16_t lut[1 << FIT_MAX_BITS];
        if (b == spec->lo) {
            cluster_start(&c, 1 << b);
        } else {
            cluster_split(&c, 1 << (b - 1));
        }
        for (int i = 0; i < 1 << b; i++) {
            lut[i] = nested_store_f16(&clamped, cluster_mean(&c, i));
            for (int32_t at = c.border[i]; at < c.border[i + 1]; at++) {
                double d = (double)c.w[at].w - (double)f16_to_f32(lut[i]);
                code[c.w[at].col] = (uint8_t)i;
                report->error[b] += spec->kind[b] != LEVEL_NONE ? d * d : 0;
            }
        }
        if (spec->kind[b] != LEVEL_NONE) {
            nested_buffer_put_lut(out, row, b, lut);
        }
    }
    report->n_clamped += clamped;
    mem_free(c.w);
    mem_free(c.sum);
    return good;
}
