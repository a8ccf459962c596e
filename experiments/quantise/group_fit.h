/* The mathematics of one group of one row: at most FIT_MAX_GROUP weights in, codes and levels out.
 * No memory but the stack, no errors, no threads.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_GROUP_FIT_H
#define PMPD_EXPERIMENTS_QUANTISE_GROUP_FIT_H

#include "experiments/quantise/nested_buffer.h"

/* Fits n weights (all finite, 1 <= n <= FIT_MAX_GROUP).
 * code (n): spec->n_planes bits each, the first plane the most significant.
 * error[b] of every precision held: sum of (w - stored weight)^2, with the weights that
 * level_table_* of core/bitplane.h gives.
 */
void group_fit(uint8_t *code, struct group_levels *out, double error[BITS_ALL],
               const struct fit_spec *spec, const float *w, int n);

/* Levels before rounding: w = offset + sum_p alpha[p] * (+1 or -1); tied levels are those with
 * alpha[p] = alpha[p + 1] * 2. */
struct sign_levels {
    double alpha[FIT_MAX_BITS], offset;
};

/* Codes and levels of one group before error feedback: every precision b held has a target of its
 * own, target[b] (n), and columns weigh differently: weight (n). Starts from the mean of the
 * targets (weighed by lambda), then rounds of codes for all targets at once and weighted least
 * squares. */
void group_start(uint8_t *code, struct sign_levels levels[FIT_MAX_BITS + 1],
                 const struct fit_spec *spec, const float *const target[FIT_MAX_BITS + 1],
                 const float *weight, int n);
/* Scale, tail and offset of a tail on top of the 4-bit codes (n), by least squares. */
void group_start_tail(double fit[3], const uint8_t *code, const float *target, int n);

#endif
