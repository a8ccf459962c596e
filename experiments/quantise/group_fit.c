/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/group_fit.h"

#include <math.h>
#include <string.h>

#include "core/tensor.h"
#include "experiments/quantise/group_moments.h"
#include "experiments/quantise/wide.h"

/* Limits, not counts: every loop stops when the codes stand still. Four times as many rounds lower
 * the weighted error of Gaussian weights by 0.1 % (groups of 64) and 0.3 % (128). */
enum { START_ROUNDS = 15, ADD_ROUNDS = 10, JOINT_ROUNDS = 16, TAIL_ROUNDS = 20 };

/* The tail's first reach as a share of the largest remainder. Growing to what pays ends at 1.1 %
 * for Gaussian weights in groups of 128, shrinking from the largest remainder at 1.8 %. */
static const double TAIL_START = 0.2;

/* sum_b lambda_b (x - L_b)^2 is, but for the part that all codes share, a line in x per code:
 * base[c] - x * slope[c]. The best code is the lowest line; n_codes comparisons, no squares. */
struct lines {
    int n_codes;
    float slope[N_CODES_MAX], base[N_CODES_MAX];
};

static void lines_add(double slope[N_CODES_MAX], double base[N_CODES_MAX], int bits,
                      const double *table, int table_bits, double lambda)
{
    for (int c = 0; c < 1 << bits; c++) {
        double v = table[c >> (bits - table_bits)];
        slope[c] += 2 * lambda * v;
        base[c] += lambda * v * v;
    }
}

static void lines_set(struct lines *out, const double *slope, const double *base, int bits)
{
    out->n_codes = 1 << bits;
    for (int c = 0; c < out->n_codes; c++) {
        out->slope[c] = (float)slope[c];
        out->base[c] = (float)base[c];
    }
}

/* Half of the time goes here. The wider instructions give the same bits: nothing is contracted. */
/* Of equal lines the first code wins. Returns whether any code changed. */
WIDE static bool assign_codes(struct group *g, const struct lines *lines)
{
    float best[FIT_MAX_GROUP];
    int32_t code[FIT_MAX_GROUP];
    int n = g->n;
    for (int i = 0; i < n; i++) {
        best[i] = lines->base[0] - g->x[i] * lines->slope[0];
        code[i] = 0;
    }
    for (int c = 1; c < lines->n_codes; c++) {
        float base = lines->base[c], slope = lines->slope[c];
        for (int i = 0; i < n; i++) {
            float cost = base - g->x[i] * slope;
            code[i] = cost < best[i] ? c : code[i];
            best[i] = cost < best[i] ? cost : best[i];
        }
    }
    int changed = 0;
    for (int i = 0; i < n; i++) {
        changed |= code[i] ^ g->code[i];
        g->code[i] = (uint8_t)code[i];
    }
    return changed != 0;
}

/* Codes of `bits` bits by the levels of that precision alone. */
static bool assign_nearest(struct group *g, int bits)
{
    double table[N_CODES_MAX], slope[N_CODES_MAX] = {0}, base[N_CODES_MAX] = {0};
    struct lines lines;
    group_levels_table(table, &g->levels[bits], bits);
    lines_add(slope, base, bits, table, bits, 1.0);
    lines_set(&lines, slope, base, bits);
    return assign_codes(g, &lines);
}

/* Greedy: each plane takes the mean size of what is left. */
static void start_levels(struct sign_levels *l, const struct group *g, int bits)
{
    float left[FIT_MAX_GROUP];
    memcpy(left, g->x, sizeof left);
    *l = (struct sign_levels){0};
    for (int p = 0; p < bits; p++) {
        double sum = 0, total = 0;
        for (int i = 0; i < g->n; i++) {
            sum += group_weight(g, i) * (double)fabsf(left[i]);
            total += group_weight(g, i);
        }
        l->alpha[p] = sum / total;
        if (g->spec->kind[bits] == LEVEL_TIED) {
            for (int q = 1; q < bits; q++) {
                l->alpha[q] = l->alpha[q - 1] / 2;
            }
            return;
        }
        for (int i = 0; i < g->n; i++) {
            left[i] -= left[i] >= 0 ? (float)l->alpha[p] : -(float)l->alpha[p];
        }
    }
}

/* The first plane is to be the most significant: sizes in falling order, all positive. */
static void sort_alphas(struct sign_levels *l, int bits)
{
    for (int p = 0; p < bits; p++) {
        double a = fabs(l->alpha[p]);
        int at = p;
        for (; at > 0 && l->alpha[at - 1] < a; at--) {
            l->alpha[at] = l->alpha[at - 1];
        }
        l->alpha[at] = a;
    }
}

static void start_alternate(struct group *g, int bits)
{
    enum level_kind kind = g->spec->kind[bits];
    struct sign_levels *l = &g->levels[bits];
    struct moments m;
    start_levels(l, g, bits);
    assign_nearest(g, bits);
    for (int round = 0; round < START_ROUNDS; round++) {
        group_moments(&m, g, bits, g->x);
        group_fit_levels(l, kind, &m, bits);
        sort_alphas(l, bits);
        if (!assign_nearest(g, bits)) {
            return;
        }
    }
    group_moments(&m, g, bits, g->x);
    group_fit_levels(l, kind, &m, bits);
}

/* One plane more on frozen codes. The alternation may run past its best, which is what is kept. */
static void add_plane(struct group *g, int bits)
{
    enum level_kind kind = g->spec->kind[g->spec->hi];
    struct sign_levels l = g->levels[bits - 1];
    uint8_t parent[FIT_MAX_GROUP], best_code[FIT_MAX_GROUP];
    double best = 0;
    memcpy(parent, g->code, sizeof parent);
    l.alpha[bits - 1] = l.alpha[bits - 2] / 2;
    for (int round = 0; round < ADD_ROUNDS; round++) {
        double middle[N_CODES_MAX];
        group_levels_table(middle, &l, bits - 1);
        int changed = round == 0;
        for (int i = 0; i < g->n; i++) {
            int code = 2 * parent[i] + ((double)g->x[i] >= middle[parent[i]]);
            changed |= code ^ g->code[i];
            g->code[i] = (uint8_t)code;
        }
        if (!changed) {
            break;
        }
        struct moments m;
        group_moments(&m, g, bits, g->x);
        group_fit_levels(&l, kind, &m, bits);
        double error = group_levels_error(&l, &m, bits);
        if (round == 0 || error < best) {
            best = error;
            g->levels[bits] = l;
            memcpy(best_code, g->code, sizeof best_code);
        }
    }
    memcpy(g->code, best_code, sizeof best_code);
}

static bool is_held(const struct fit_spec *spec, int bits)
{
    return spec->kind[bits] != LEVEL_NONE;
}

/* Returns the sum over the precisions held of lambda times squared error. */
static double joint_rounds(struct group *g)
{
    const struct fit_spec *spec = g->spec;
    double cost = 0;
    for (int round = 0; round <= JOINT_ROUNDS; round++) {
        double slope[N_CODES_MAX] = {0}, base[N_CODES_MAX] = {0};
        struct moments m;
        struct lines lines;
        group_moments(&m, g, spec->hi, g->x);
        cost = 0;
        for (int b = spec->lo; b <= spec->hi; b++) {
            double table[N_CODES_MAX];
            if (is_held(spec, b)) {
                group_fit_levels(&g->levels[b], spec->kind[b], &m, b);
                cost += spec->lambda[b] * group_levels_error(&g->levels[b], &m, b);
                group_levels_table(table, &g->levels[b], b);
                lines_add(slope, base, spec->hi, table, b, spec->lambda[b]);
            }
        }
        lines_set(&lines, slope, base, spec->hi);
        if (round == JOINT_ROUNDS || !assign_codes(g, &lines)) {
            break;
        }
    }
    return cost;
}

/* The joint rounds end in a local minimum. From below the lowest precision is at its best and the
 * highest pays, from above the other way round; which is cheaper differs from group to group. The
 * better of the two has 5 % less error at 4 bits and 1 % more at 2 than the start from below alone
 * (Gaussian weights, groups of 64, 2,3,4 bits). */
static void fit_codes(struct group *g)
{
    const struct fit_spec *spec = g->spec;
    start_alternate(g, spec->lo);
    for (int b = spec->lo + 1; b <= spec->hi; b++) {
        add_plane(g, b);
    }
    double cost = joint_rounds(g);
    if (spec->lo < spec->hi) {
        struct group above = *g;
        start_alternate(&above, spec->hi);
        if (joint_rounds(&above) < cost) {
            *g = above;
        }
    }
}

/* Rounds the levels, chooses the codes again for what is really stored, and measures that. */
static void store_levels(struct group *g, struct group_levels *out, double error[BITS_ALL],
                         const float *w)
{
    const struct fit_spec *spec = g->spec;
    float table[FIT_MAX_BITS + 1][N_CODES_MAX];
    double slope[N_CODES_MAX] = {0}, base[N_CODES_MAX] = {0};
    for (int b = spec->lo; b <= spec->hi; b++) {
        if (!is_held(spec, b)) {
            continue;
        }
        const struct sign_levels *l = &g->levels[b];
        out->offset[b] = nested_store_f16(&out->clamped, g->centre + g->span * l->offset);
        if (spec->kind[b] == LEVEL_TIED) {
            out->scale[b] = nested_store_f16(&out->clamped, 2 * g->span * l->alpha[b - 1]);
            level_table_tied(table[b], b, f16_to_f32(out->scale[b]), f16_to_f32(out->offset[b]));
        } else {
            float alpha[FIT_MAX_BITS];
            for (int p = 0; p < b; p++) {
                out->alpha[b][p] = nested_store_f16(&out->clamped, g->span * l->alpha[p]);
                alpha[p] = f16_to_f32(out->alpha[b][p]);
            }
            level_table_free(table[b], b, alpha, f16_to_f32(out->offset[b]));
        }
        double stored[N_CODES_MAX];
        for (int c = 0; c < 1 << b; c++) {
            stored[c] = g->span > 0 ? ((double)table[b][c] - g->centre) / g->span : 0;
        }
        lines_add(slope, base, spec->hi, stored, b, spec->lambda[b]);
    }
    struct lines lines;
    lines_set(&lines, slope, base, spec->hi);
    assign_codes(g, &lines);
    for (int b = spec->lo; b <= spec->hi; b++) {
        error[b] = 0;
        for (int i = 0; is_held(spec, b) && i < g->n; i++) {
            double d = (double)w[i] - (double)table[b][g->code[i] >> (spec->hi - b)];
            error[b] += d * d;
        }
    }
}

/* Nearest of the 16 steps of the tail around base. */
static int tail_step(double x, double base, double tail)
{
    double t = tail != 0 ? nearbyint((x - base) / tail + 7.5) : 0;
    return t < 0 ? 0 : t > 15 ? 15 : (int)t;
}

/* Four planes more: x = offset + scale u + tail v with u = c - 7.5 and v = t - 7.5. The codes c are
 * kept, so the tail must reach over all that they leave: often several of their steps. */
static void fit_tail(double fit[3], const struct group *g, uint8_t step[FIT_MAX_GROUP])
{
    struct sign_levels line = {0};
    struct moments m;
    double largest = 0;
    group_moments(&m, g, FIT_MAX_BITS, g->x);
    group_fit_levels(&line, LEVEL_TIED, &m, FIT_MAX_BITS);
    fit[0] = 2 * line.alpha[FIT_MAX_BITS - 1];
    fit[2] = line.offset;
    for (int i = 0; i < g->n; i++) {
        double left = (double)g->x[i] - (fit[2] + fit[0] * ((double)g->code[i] - 7.5));
        largest = fmax(largest, fabs(left));
    }
    fit[1] = TAIL_START * largest / 7.5;
    for (int round = 0; round <= TAIL_ROUNDS; round++) {
        double a[N_UNKNOWNS_MAX][N_UNKNOWNS_MAX] = {{0}}, r[N_UNKNOWNS_MAX] = {0};
        bool changed = round == 0;
        for (int i = 0; i < g->n; i++) {
            double u = (double)g->code[i] - 7.5, x = (double)g->x[i];
            int t = tail_step(x, fit[2] + fit[0] * u, fit[1]);
            changed |= t != step[i];
            step[i] = (uint8_t)t;
            double f[3] = {u, (double)t - 7.5, 1.0};
            double left = x - fit[0] * f[0] - fit[1] * f[1] - fit[2];
            for (int j = 0; j < 3; j++) {
                r[j] += f[j] * left;
                for (int k = 0; k < 3; k++) {
                    a[j][k] += f[j] * f[k];
                }
            }
        }
        if (!changed || round == TAIL_ROUNDS) {
            return;
        }
        group_solve(a, r, 3, GROUP_RIDGE);
        for (int j = 0; j < 3; j++) {
            fit[j] += r[j];
        }
    }
}

static void store_tail(struct group *g, struct group_levels *out, double error[BITS_ALL],
                       const float *w)
{
    enum { B = FIT_TAIL_BITS };
    double fit[3];
    uint8_t step[FIT_MAX_GROUP];
    float table[LEVELS_MAX];
    fit_tail(fit, g, step);
    out->scale[B] = nested_store_f16(&out->clamped, g->span * fit[0]);
    out->tail = nested_store_f16(&out->clamped, g->span * fit[1]);
    out->offset[B] = nested_store_f16(&out->clamped, g->centre + g->span * fit[2]);
    float tail = f16_to_f32(out->tail);
    level_table_tail(table, f16_to_f32(out->scale[B]), tail, f16_to_f32(out->offset[B]));
    error[B] = 0;
    for (int i = 0; i < g->n; i++) {
        const float *row = table + 16 * g->code[i];
        double base = 0.5 * ((double)row[7] + (double)row[8]);
        int t = tail_step((double)w[i], base, (double)tail);
        double d = (double)w[i] - (double)row[t];
        error[B] += d * d;
        g->code[i] = (uint8_t)(g->code[i] << 4 | t);
    }
}

/* Sets centre, span and x. */
static void normalise(struct group *g, const float *w)
{
    double sum = 0;
    for (int i = 0; i < g->n; i++) {
        sum += (double)w[i];
    }
    g->centre = sum / g->n;
    for (int i = 0; i < g->n; i++) {
        g->span = fmax(g->span, fabs((double)w[i] - g->centre));
    }
    for (int i = 0; g->span > 0 && i < g->n; i++) {
        g->x[i] = (float)(((double)w[i] - g->centre) / g->span);
    }
}

void group_fit(uint8_t *code, struct group_levels *out, double error[BITS_ALL],
               const struct fit_spec *spec, const float *w, int n)
{
    struct group g = {.spec = spec, .n = n};
    normalise(&g, w);
    out->clamped = false;
    if (g.span > 0) {
        fit_codes(&g);
    }
    store_levels(&g, out, error, w);
    if (spec->kind[FIT_TAIL_BITS] != LEVEL_NONE) {
        store_tail(&g, out, error, w);
    }
    memcpy(code, g.code, (size_t)n);
}

/* ---- targets of their own ---- */

enum { N_HELD_MAX = FIT_MAX_BITS - FIT_MIN_BITS + 1, OWN_ROUNDS = 8 };

/* As assign_codes, where every precision has its own line for its own target. */
struct own_lines {
    int n_codes;
    const float *target[N_HELD_MAX];
    float base[N_CODES_MAX], slope[N_HELD_MAX][N_CODES_MAX];
};

WIDE static bool assign_own(struct group *g, const struct own_lines *lines)
{
    float best[FIT_MAX_GROUP];
    int32_t code[FIT_MAX_GROUP];
    const float *y0 = lines->target[0], *y1 = lines->target[1], *y2 = lines->target[2];
    int n = g->n;
    for (int c = 0; c < lines->n_codes; c++) {
        float base = lines->base[c], a = lines->slope[0][c], b = lines->slope[1][c],
              d = lines->slope[2][c];
        for (int i = 0; i < n; i++) {
            float cost = base - (y0[i] * a + y1[i] * b + y2[i] * d);
            bool better = c == 0 || cost < best[i];
            code[i] = better ? c : code[i];
            best[i] = better ? cost : best[i];
        }
    }
    int changed = 0;
    for (int i = 0; i < n; i++) {
        changed |= code[i] ^ g->code[i];
        g->code[i] = (uint8_t)code[i];
    }
    return changed != 0;
}

/* y[b] (n): the target of precision b in units of the group. */
static void own_rounds(struct group *g, float y[FIT_MAX_BITS + 1][FIT_MAX_GROUP])
{
    const struct fit_spec *spec = g->spec;
    for (int round = 0; round < OWN_ROUNDS; round++) {
        struct own_lines lines = {.n_codes = 1 << spec->hi, .target = {g->x, g->x, g->x}};
        double base[N_CODES_MAX] = {0};
        int slot = 0;
        for (int b = spec->lo; b <= spec->hi; b++) {
            double table[N_CODES_MAX], slope[N_CODES_MAX] = {0};
            if (!is_held(spec, b)) {
                continue;
            }
            group_levels_table(table, &g->levels[b], b);
            lines_add(slope, base, spec->hi, table, b, spec->lambda[b]);
            for (int c = 0; c < lines.n_codes; c++) {
                lines.slope[slot][c] = (float)slope[c];
            }
            lines.target[slot++] = y[b];
        }
        for (int c = 0; c < lines.n_codes; c++) {
            lines.base[c] = (float)base[c];
        }
        bool changed = assign_own(g, &lines);
        for (int b = spec->lo; b <= spec->hi; b++) {
            struct moments m;
            if (is_held(spec, b)) {
                group_moments(&m, g, spec->hi, y[b]);
                group_fit_levels(&g->levels[b], spec->kind[b], &m, b);
            }
        }
        if (!changed && round > 0) {
            return;
        }
    }
}

void group_start(uint8_t *code, struct sign_levels levels[FIT_MAX_BITS + 1],
                 const struct fit_spec *spec, const float *const target[FIT_MAX_BITS + 1],
                 const float *weight, int n)
{
    struct group g = {.spec = spec, .weight = weight, .n = n};
    float mean[FIT_MAX_GROUP] = {0}, y[FIT_MAX_BITS + 1][FIT_MAX_GROUP];
    double total = 0;
    for (int b = spec->lo; b <= spec->hi; b++) {
        total += spec->lambda[b]; /* 0 where not held */
    }
    for (int b = spec->lo; b <= spec->hi; b++) {
        for (int i = 0; is_held(spec, b) && i < n; i++) {
            mean[i] += (float)(spec->lambda[b] / total) * target[b][i];
        }
    }
    normalise(&g, mean);
    if (g.span > 0) {
        for (int b = spec->lo; b <= spec->hi; b++) {
            for (int i = 0; is_held(spec, b) && i < n; i++) {
                y[b][i] = (float)(((double)target[b][i] - g.centre) / g.span);
            }
        }
        fit_codes(&g);
        own_rounds(&g, y);
    }
    for (int b = spec->lo; b <= spec->hi; b++) {
        levels[b] = g.levels[b];
        levels[b].offset = g.centre + g.span * g.levels[b].offset;
        for (int p = 0; p < b; p++) {
            levels[b].alpha[p] = g.span * g.levels[b].alpha[p];
        }
    }
    memcpy(code, g.code, (size_t)n);
}

void group_start_tail(double fit[3], const uint8_t *code, const float *target, int n)
{
    struct group g = {.n = n};
    uint8_t step[FIT_MAX_GROUP];
    normalise(&g, target);
    memcpy(g.code, code, (size_t)n);
    fit_tail(fit, &g, step);
    fit[0] *= g.span;
    fit[1] *= g.span;
    fit[2] = g.centre + g.span * fit[2];
}
