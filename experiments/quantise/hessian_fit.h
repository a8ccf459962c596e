/* The joint nested fit with data: the mathematics of one matrix W (n_rows, n_cols) given the second
 * moments H of its input (hessian.h). What is made small is, for every precision b held, the output
 * error tr((W - W_b) H (W - W_b)^T); codes are shared by all precisions, levels are not.
 *
 *   feedback  column by column. Each precision keeps a target t_b of its own, at first W. The code
 * of a weight is argmin sum_b lambda_b (t_b - L_b(code))^2; then every t_b moves the error it got
 * to the columns not yet done: t_b[j] -= (t_b[k] - L_b) U[k][j] / U[k][k]. Levels of a group are
 * started when it is reached (group_start, columns weighed by 1 / U[k][k]^2). refit     codes
 * fixed: least squares over all levels of a row on H, by reduced normal equations and block
 * Gauss-Seidel over the groups. sweeps    coordinate descent over the codes on sum_b lambda_b of
 * the output errors; a refit each. tail      four planes more on the final 4-bit codes: feedback of
 * its own, refit. end       levels rounded to F16; codes stay. Rows are independent of each other:
 * a chunk of rows goes through all stages in one thread. Source: GPTQ (arXiv 2210.17323), section
 * 3, for error feedback with U and its lazy blocks; the joint form is this project's own.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_HESSIAN_FIT_H
#define PMPD_EXPERIMENTS_QUANTISE_HESSIAN_FIT_H

#include <stdbool.h>

#include "core/tensor.h"
#include "experiments/quantise/hessian.h"
#include "experiments/quantise/nested_buffer.h"

struct hessian_options {
    bool grid; /* levels of a group: a uniform grid from its smallest to its largest target with the
                  best clipping (GPTQ), instead of the joint start; tied, one precision */
    bool refit; /* also after each sweep */
    int sweeps;
};

enum fit_stage {
    FIT_START,
    FIT_FEEDBACK,
    FIT_REFIT,
    FIT_SWEEP,
    FIT_TAIL,
    FIT_MEASURE,
    N_FIT_STAGES
};
/* "feedback" */
const char *fit_stage_name(enum fit_stage stage);

/* Seconds of all threads together, and the floating-point operations of the products in them. */
struct fit_times {
    double thread_s[N_FIT_STAGES], flop[N_FIT_STAGES];
};

enum { FIT_CHUNK_ROWS = 64 }; /* rows that go through the stages together */

/* Fits rows [begin, end) of w (n_rows, n_cols) F32, F16 or BF16 into `out`; adds to *report (errors
 * of the weights and of the output on H) and to *times. begin is a multiple of FIT_CHUNK_ROWS, end
 * too or n_rows. Threads: n_threads of OpenMP; the result does not depend on their number.
 * Errors: ST_FORMAT (NaN or infinity: gives row and column), ST_NOMEM. */
MUST_CHECK enum status hessian_fit_rows(struct nested_buffer *out, struct fit_report *report,
                                        struct fit_times *times, const struct tensor *w,
                                        const struct hessian *h, const struct fit_spec *spec,
                                        const struct hessian_options *options, int32_t begin,
                                        int32_t end, int n_threads);

#endif
