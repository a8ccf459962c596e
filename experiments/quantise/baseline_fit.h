/* What the joint fit is compared with: nested quantisation as others do it, from weights alone, and
 * the uniform grid that GPTQ starts its groups with. rtn         the highest precision rounded to a
 * uniform grid per group, clipped for the least error; lower ones are its first bits with scale and
 * offset by least squares bcq-greedy  a group's mean, then plane by plane the sign and mean size of
 * what is left kmeans      a table per row: k-means at the lowest precision, every cluster cut in
 * two by the best cut for each bit more Sources: AnyBCQ (arXiv 2510.10467) for greedy binary
 * coding; Any-Precision LLM (arXiv 2402.10517), section 3, for the clusters that are split, here
 * without its gradient weights. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_BASELINE_FIT_H
#define PMPD_EXPERIMENTS_QUANTISE_BASELINE_FIT_H

#include "experiments/quantise/joint_fit.h"

/* For fit_rows_by; rtn needs tied levels, greedy free ones, kmeans a LUT; none makes a tail. */
fit_row_fn baseline_rtn_row, baseline_greedy_row, baseline_kmeans_row;

/* Scale and offset of a tied level of `bits`: a uniform grid over the range of t (n), which always
 * holds 0, clipped to what has the least error weighed by weight (n; NULL: all 1). */
void grid_fit(double level[2], const float *t, const float *weight, int32_t n, int bits);

#endif
