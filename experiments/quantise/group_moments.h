/* Least squares of one group's levels, at every precision, from sums over its codes. Used by
 * group_fit.c; the solver also by refit.c. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_GROUP_MOMENTS_H
#define PMPD_EXPERIMENTS_QUANTISE_GROUP_MOMENTS_H

#include "experiments/quantise/group_fit.h"

enum { N_CODES_MAX = 1 << FIT_MAX_BITS, N_UNKNOWNS_MAX = FIT_MAX_BITS + 1 };

/* Least squares are regularised by this share of the trace, towards the levels before. */
static const double GROUP_RIDGE = 1e-9;

/* Everything before rounding is in units of the group: x = (w - centre) / span, |x| <= 1. */
struct group {
    const struct fit_spec *spec;
    const float *weight; /* (n) of the squared errors; NULL: all 1 */
    int n;
    double centre, span;
    float x[FIT_MAX_GROUP];
    uint8_t code[FIT_MAX_GROUP];
    struct sign_levels levels[FIT_MAX_BITS + 1];
};

/* Sums over the weights of products of plane signs: n[mask] without and x[mask] with the weight as
 * a factor, where mask has bit (bits - 1 - p) set for each plane p of the product. All that least
 * squares needs at every precision up to `bits`, since lower precisions are the first planes. */
struct moments {
    int bits;
    double n[N_CODES_MAX], x[N_CODES_MAX], power;
};

/* bits: of the codes; target (n): what the weights are to become. */
void group_moments(struct moments *m, const struct group *g, int bits, const float *target);
double group_weight(const struct group *g, int i);

/* Least squares for the codes behind m; *l holds the levels before. */
void group_fit_levels(struct sign_levels *l, enum level_kind kind, const struct moments *m,
                      int bits);
double group_levels_error(const struct sign_levels *l, const struct moments *m, int bits);
/* out (2^bits) */
void group_levels_table(double *out, const struct sign_levels *l, int bits);

/* In place: (a + ridge trace I) d = r by Cholesky; d comes back in r. */
void group_solve(double a[N_UNKNOWNS_MAX][N_UNKNOWNS_MAX], double r[N_UNKNOWNS_MAX], int n,
                 double ridge);

#endif
