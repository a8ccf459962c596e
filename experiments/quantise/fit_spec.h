/* What a fit is asked for (which precisions, which kind of levels, how their errors weigh) and what
 * it reports. Plain data, shared by all fits. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_FIT_SPEC_H
#define PMPD_EXPERIMENTS_QUANTISE_FIT_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#include "core/bitplane.h"
#include "core/status.h"

enum { FIT_MIN_BITS = 2, FIT_MAX_BITS = 4, FIT_TAIL_BITS = 8, FIT_MAX_GROUP = 128 };

/* What to fit. Plain data; made and checked by fit_spec_make. */
struct fit_spec {
    enum level_kind kind[BITS_ALL]; /* [2..4] TIED, FREE or NONE; [8] TAIL or NONE */
    double lambda[BITS_ALL];        /* weight of a precision's squared error */
    int32_t group_cols;             /* 32, 64 or 128 */
    int lo, hi;                     /* lowest and highest precision held, the tail aside */
    int n_planes;                   /* hi, or 8 with a tail */
};

/* bits: bit b set = precision b is held, any of 2..4. kind: LEVEL_TIED or LEVEL_FREE. tail: 8 bits
 * on top of 4. lambda: one positive number per precision held, lowest first; NULL: 4^(b - lowest),
 * since an error about halves with each bit.
 * Errors: ST_USER, naming what cannot be held and why. */
MUST_CHECK enum status fit_spec_make(struct fit_spec *out, uint32_t bits, enum level_kind kind,
                                     bool tail, int32_t group_cols, const double *lambda);

/* Sums over the rows fitted so far; zero it before the first row. */
struct fit_report {
    double power;           /* sum of w^2 */
    double error[BITS_ALL]; /* sum of (w - stored weight)^2 of every precision held */
    double output_power;    /* with calibration: tr(W H W^T) and the same of (w - stored weight) */
    double output_error[BITS_ALL];
    int64_t n_weights, n_groups;
    int64_t n_clamped; /* groups with a level outside the range of F16 */
};
/* sqrt(error / power) of one precision; 0 for a matrix of zeros that is stored exactly. */
double fit_report_relative(const struct fit_report *report, int bits);
/* The same of the output, ||X (W - stored)^T|| / ||X W^T||; 0 without calibration. */
double fit_report_output(const struct fit_report *report, int bits);
void fit_report_add(struct fit_report *sum, const struct fit_report *part);

#endif
