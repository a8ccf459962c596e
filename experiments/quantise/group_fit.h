/* The mathematics of one group of one row: at most FIT_MAX_GROUP weights in, codes and levels out.
 * No memory but the stack, no errors, no threads. Used by joint_fit.c only.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_GROUP_FIT_H
#define PMPD_EXPERIMENTS_QUANTISE_GROUP_FIT_H

#include "experiments/quantise/joint_fit.h"

/* Levels of one group as they are stored (F16); entries of precisions not held are not written. */
struct group_levels {
    uint16_t scale[BITS_ALL], offset[BITS_ALL];
    uint16_t alpha[BITS_ALL][FIT_MAX_BITS];
    uint16_t tail;
    bool clamped; /* a level was outside the range of F16 and is now its end */
};

/* Fits n weights (all finite, 1 <= n <= FIT_MAX_GROUP).
 * code (n): spec->n_planes bits each, the first plane the most significant.
 * error[b] of every precision held: sum of (w - stored weight)^2, with the weights that
 * level_table_* of core/bitplane.h gives.
 */
void group_fit(uint8_t *code, struct group_levels *out, double error[BITS_ALL],
               const struct fit_spec *spec, const float *w, int n);

#endif
