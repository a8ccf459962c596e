/* Calibration activations, block by block: the tokens of all windows run through the model side by
 * side, each linear with the quantised weights that calibrator_put gave it, so that every matrix is
 * fitted to the inputs that it will really see. Memory: one block's weights, one input's second
 * moments, and the activations of all tokens (hidden, and the wider of attention and MLP).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_CALIBRATE_H
#define PMPD_EXPERIMENTS_QUANTISE_CALIBRATE_H

#include "core/checkpoint.h"
#include "core/model.h"
#include "experiments/quantise/hessian.h"
#include "experiments/windows.h"

struct calibrator;

struct calibrator_options {
    double damp; /* hessian_finish */
    int n_threads;
};

/* What it did so far; flop of matrix products only. */
struct calibrator_times {
    double forward_s, forward_flop, moments_s, moments_flop, factor_s, factor_flop;
};

/* ckpt, config and windows are borrowed and must outlive it. Needs the backend "cpu" registered.
 * Errors: ST_NOMEM (says how much is needed), those of the checkpoint and the backend. */
MUST_CHECK enum status calibrator_create(struct calibrator **out, const struct model_config *config,
                                         const struct checkpoint *ckpt,
                                         const struct windows *windows,
                                         const struct calibrator_options *options);
void calibrator_destroy(struct calibrator **cal);

/* Second moments of the input of matrix (layer, role), valid until the next call; layer n_layers:
 * of the head (role is not looked at). Matrices come in order, layer by layer and role by role; all
 * before this one have been put. Errors: ST_FORMAT (activations that are not finite), those of
 * hessian_finish. */
MUST_CHECK enum status calibrator_moments(struct calibrator *cal, int layer, enum matrix_role role,
                                          const struct hessian **out);
/* The quantised matrix: from here on the model runs with its highest precision. */
MUST_CHECK enum status calibrator_put(struct calibrator *cal, int layer, enum matrix_role role,
                                      const struct nested_source *w);
struct calibrator_times calibrator_times(const struct calibrator *cal);

#endif
