/* One block of a model fitted with calibration: its matrices in order, each to the second moments
 * of its input, each put back into the calibration before the next. Finished blocks are kept. The
 * rows of a matrix are shared out over the ranks of `coll`; all of it is collective over them.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_BLOCK_FIT_H
#define PMPD_EXPERIMENTS_QUANTISE_BLOCK_FIT_H

#include "core/log.h"
#include "experiments/quantise/block_store.h"
#include "experiments/quantise/calibrate.h"
#include "experiments/quantise/hessian_fit.h"
#include "experiments/quantise/share.h"

/* What all blocks share; all pointers borrowed. */
struct block_job {
    const struct model_config *config;
    const struct checkpoint *ckpt;
    const struct fit_spec *spec;
    const struct hessian_options *options;
    struct calibrator *cal;
    struct block_store *store; /* used on rank 0 */
    struct collective *coll;
    struct progress *progress; /* counts weights */
    double *n_done;
    struct fit_times *times;
    int n_threads;
    int n_resumed; /* out: blocks that were there */
};

/* Fits or reads block `layer`; the caller frees *out with fitted_block_free, after errors too.
 * Errors: those of calibrator_moments and hessian_fit_rows (naming the tensor), of the checkpoint
 * and the store. */
MUST_CHECK enum status block_fit(struct fitted_block *out, struct block_job *job, int layer);
/* One matrix, of the head too (layer n_layers): the buffer is created here. */
MUST_CHECK enum status block_fit_matrix(struct nested_buffer *out, struct fit_report *report,
                                        struct block_job *job, const struct fit_spec *spec,
                                        const struct tensor *w, const struct hessian *h,
                                        const char *name);

#endif
