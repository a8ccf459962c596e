/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/group_moments.h"

#include <math.h>

/* Below this share the spread of the codes is rounding. One weight of 128 with another code: 1e-4.
 */
static const double SPREAD_MIN = 1e-12;

double group_weight(const struct group *g, int i)
{
    return g->weight ? (double)g->weight[i] : 1.0;
}

void group_moments(struct moments *m, const struct group *g, int bits, const float *target)
{
    int n_codes = 1 << bits;
    *m = (struct moments){.bits = bits};
    for (int i = 0; i < g->n; i++) {
        double x = (double)target[i], weight = group_weight(g, i);
        m->n[g->code[i]] += weight;
        m->x[g->code[i]] += weight * x;
        m->power += weight * x * x;
    }
    /* Walsh-Hadamard: per bit, (0, 1) becomes (sum, ones - zeros) */
    for (int step = 1; step < n_codes; step *= 2) {
        for (int c = 0; c < n_codes; c++) {
            if (c & step) {
                continue;
            }
            double zero = m->n[c], one = m->n[c | step];
            m->n[c] = zero + one;
            m->n[c | step] = one - zero;
            zero = m->x[c];
            one = m->x[c | step];
            m->x[c] = zero + one;
            m->x[c | step] = one - zero;
        }
    }
}

static int plane_mask(const struct moments *m, int plane)
{
    return 1 << (m->bits - 1 - plane);
}

void group_solve(double a[N_UNKNOWNS_MAX][N_UNKNOWNS_MAX], double r[N_UNKNOWNS_MAX], int n,
                 double ridge)
{
    double trace = 0;
    for (int i = 0; i < n; i++) {
        trace += a[i][i];
    }
    for (int j = 0; j < n; j++) {
        double pivot = a[j][j] + ridge * trace;
        for (int k = 0; k < j; k++) {
            pivot -= a[j][k] * a[j][k];
        }
        a[j][j] = sqrt(fmax(pivot, 0.5 * ridge * trace));
        for (int i = j + 1; i < n; i++) {
            double sum = a[i][j];
            for (int k = 0; k < j; k++) {
                sum -= a[i][k] * a[j][k];
            }
            a[i][j] = sum / a[j][j];
        }
        for (int k = 0; k < j; k++) {
            r[j] -= a[j][k] * r[k];
        }
        r[j] /= a[j][j];
    }
    for (int j = n - 1; j >= 0; j--) {
        for (int i = j + 1; i < n; i++) {
            r[j] -= a[i][j] * r[i];
        }
        r[j] /= a[j][j];
    }
}

static void fit_free(struct sign_levels *l, const struct moments *m, int bits)
{
    double a[N_UNKNOWNS_MAX][N_UNKNOWNS_MAX], r[N_UNKNOWNS_MAX], x[N_UNKNOWNS_MAX];
    int mask[N_UNKNOWNS_MAX];
    for (int p = 0; p < bits; p++) {
        mask[p] = plane_mask(m, p);
        x[p] = l->alpha[p];
    }
    mask[bits] = 0; /* the offset's sign is always +1 */
    x[bits] = l->offset;
    for (int i = 0; i <= bits; i++) {
        r[i] = m->x[mask[i]];
        for (int j = 0; j <= bits; j++) {
            a[i][j] = m->n[mask[i] ^ mask[j]];
            r[i] -= a[i][j] * x[j];
        }
    }
    /* solved for the change, so that a direction without weights keeps its levels */
    group_solve(a, r, bits + 1, GROUP_RIDGE);
    for (int p = 0; p < bits; p++) {
        l->alpha[p] += r[p];
    }
    l->offset += r[bits];
}

static void fit_tied(struct sign_levels *l, const struct moments *m, int bits)
{
    double n = m->n[0], sum_v = 0, sum_vv = 0, sum_vx = 0;
    for (int p = 0; p < bits; p++) { /* v = sum_p sign_p * 2^(bits - 1 - p), an odd integer */
        double u = (double)(1 << (bits - 1 - p));
        sum_v += u * m->n[plane_mask(m, p)];
        sum_vx += u * m->x[plane_mask(m, p)];
        for (int q = 0; q < bits; q++) {
            sum_vv += u * (double)(1 << (bits - 1 - q)) * m->n[plane_mask(m, p) ^ plane_mask(m, q)];
        }
    }
    double spread = n * sum_vv - sum_v * sum_v; /* 0 when only one code occurs */
    double unit = l->alpha[bits - 1];
    if (spread > SPREAD_MIN * n * sum_vv) {
        unit = (n * sum_vx - sum_v * m->x[0]) / spread;
    }
    l->offset = (m->x[0] - unit * sum_v) / n;
    for (int p = 0; p < bits; p++) {
        l->alpha[p] = unit * (double)(1 << (bits - 1 - p));
    }
}

void group_fit_levels(struct sign_levels *l, enum level_kind kind, const struct moments *m,
                      int bits)
{
    if (kind == LEVEL_TIED) {
        fit_tied(l, m, bits);
    } else {
        fit_free(l, m, bits);
    }
}

double group_levels_error(const struct sign_levels *l, const struct moments *m, int bits)
{
    double error = m->power - 2 * l->offset * m->x[0] + l->offset * l->offset * m->n[0];
    for (int p = 0; p < bits; p++) {
        int mask = plane_mask(m, p);
        error += 2 * l->alpha[p] * (l->offset * m->n[mask] - m->x[mask]);
        for (int q = 0; q < bits; q++) {
            error += l->alpha[p] * l->alpha[q] * m->n[mask ^ plane_mask(m, q)];
        }
    }
    return error;
}

void group_levels_table(double *out, const struct sign_levels *l, int bits)
{
    for (int c = 0; c < 1 << bits; c++) {
        double v = l->offset;
        for (int p = 0; p < bits; p++) {
            v += c >> (bits - 1 - p) & 1 ? l->alpha[p] : -l->alpha[p];
        }
        out[c] = v;
    }
}
