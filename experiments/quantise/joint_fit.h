/* The joint nested fit without data: one code per weight, and for every precision b held its own
 * levels, which the first b bits of the code index. Codes and levels are chosen together so that
 * all precisions are good at once. Mathematics only: a matrix in memory goes in, planes and levels
 * in the layout of core/bitplane.h come out; knows neither files nor models.
 *
 * Per row and group of group_cols columns, with L_b the levels of precision b:
 *   start   the lowest precision by alternation (codes = nearest level, levels = least squares);
 *           then one plane after the other: bit = sign of what is left, levels = least squares
 *   rounds  code = argmin over all codes c of sum_b lambda_b (w - L_b(first b bits of c))^2,
 *           levels of every b = least squares for these codes
 *   again   the same from a start at the highest precision; the lower weighted sum is kept
 *   end     levels rounded to F16, codes chosen once more against the rounded levels
 * Source: AnyBCQ (arXiv 2510.10467) for the start (alternating binary-coding quantisation; a plane
 * added to frozen codes); the joint rounds are this project's own.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_JOINT_FIT_H
#define PMPD_EXPERIMENTS_QUANTISE_JOINT_FIT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/bitplane.h"
#include "core/status.h"
#include "core/tensor.h"

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

/* A nested matrix being made. Fill with nested_buffer_create, give back with nested_buffer_free. */
struct nested_buffer {
    struct nested_source source; /* views of block: this is what is stored */
    void *block;                 /* owned */
    size_t planes_bytes;
    size_t level_values[BITS_ALL]; /* F16 values of all arrays of a precision */
};
/* Errors: ST_SHAPE (empty matrix, sizes overflow), ST_NOMEM. */
MUST_CHECK enum status nested_buffer_create(struct nested_buffer *out, const struct fit_spec *spec,
                                            int32_t n_rows, int32_t n_cols);
void nested_buffer_free(struct nested_buffer *buffer);

/* Sums over the rows fitted so far; zero it before the first row. */
struct fit_report {
    double power;           /* sum of w^2 */
    double error[BITS_ALL]; /* sum of (w - stored weight)^2 of every precision held */
    int64_t n_weights, n_groups;
    int64_t n_clamped; /* groups with a level outside the range of F16 */
};
/* sqrt(error / power) of one precision; 0 for a matrix of zeros that is stored exactly. */
double fit_report_relative(const struct fit_report *report, int bits);
void fit_report_add(struct fit_report *sum, const struct fit_report *part);

/* Fits rows [begin, end) of w (n_rows, n_cols) F32, F16 or BF16 into `out` and adds to *report.
 * Threads: n_threads of OpenMP; neither the result nor the report depends on their number or on how
 * a matrix is cut into calls.
 * Errors: ST_FORMAT (NaN or infinity: gives row and column), ST_NOMEM. */
MUST_CHECK enum status fit_rows(struct nested_buffer *out, struct fit_report *report,
                                const struct tensor *w, const struct fit_spec *spec, int32_t begin,
                                int32_t end, int n_threads);

#endif
