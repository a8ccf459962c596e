/* A calibrated fit shared out over ranks: every rank runs the calibration, fits its own rows of
 * each matrix, and gets the others' rows, so that all go on with the same quantised model. Rows are
 * independent, so the model does not depend on the number of ranks. Everything here is collective.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_SHARE_H
#define PMPD_EXPERIMENTS_QUANTISE_SHARE_H

#include "core/collective.h"
#include "experiments/quantise/nested_buffer.h"

/* Rows [*begin, *end) of a matrix that rank r of coll fits; borders are multiples of `unit`. */
void share_rows(int32_t *begin, int32_t *end, int32_t n_rows, int32_t unit,
                const struct collective *coll, int rank);
/* Every rank gets ST_OK, or every rank fails: with its own status, or the first failing rank's, its
 * message prefixed with "rank N: ". */
MUST_CHECK enum status share_agree(struct collective *coll, enum status st);
/* The buffer's rows from the ranks that fitted them (share_rows with the same unit). */
MUST_CHECK enum status share_gather(struct collective *coll, struct nested_buffer *buffer,
                                    int32_t unit);
/* *report = the sum over the ranks, added in rank order. */
MUST_CHECK enum status share_report(struct collective *coll, struct fit_report *report);
/* n bytes of rank 0 on every rank. */
MUST_CHECK enum status share_broadcast(struct collective *coll, void *data, size_t n);

#endif
