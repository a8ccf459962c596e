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

#include "core/tensor.h"
#include "experiments/quantise/nested_buffer.h"

/* Fits rows [begin, end) of w (n_rows, n_cols) F32, F16 or BF16 into `out` and adds to *report.
 * Threads: n_threads of OpenMP; neither the result nor the report depends on their number or on how
 * a matrix is cut into calls.
 * Errors: ST_FORMAT (NaN or infinity: gives row and column), ST_NOMEM. */
MUST_CHECK enum status fit_rows(struct nested_buffer *out, struct fit_report *report,
                                const struct tensor *w, const struct fit_spec *spec, int32_t begin,
                                int32_t end, int n_threads);
/* One row by another method: w (n_cols) and code (n_cols_padded, zeroed) are the caller's; levels
 * go to `out`, errors and clamped groups to *report. False: out of memory. */
typedef bool fit_row_fn(const struct nested_buffer *out, struct fit_report *report,
                        const struct fit_spec *spec, int32_t row, const float *w, uint8_t *code);
/* fit_rows with that. */
MUST_CHECK enum status fit_rows_by(struct nested_buffer *out, struct fit_report *report,
                                   const struct tensor *w, const struct fit_spec *spec,
                                   fit_row_fn *fit, int32_t begin, int32_t end, int n_threads);

#endif
