/* Finished blocks of a calibrated quantisation on disk, so that a killed run goes on where it was:
 * a folder OUT.tmp with a stamp of everything that decides the result, and one file per block.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_BLOCK_STORE_H
#define PMPD_EXPERIMENTS_QUANTISE_BLOCK_STORE_H

#include <stdbool.h>

#include "core/model.h"
#include "experiments/quantise/nested_buffer.h"
#include "experiments/quantise/out_folder.h"

struct block_store {
    char folder[OUT_PATH_BYTES]; /* empty: not begun */
};

/* One block: what is fitted of it; roles that the model has not stay empty. */
struct fitted_block {
    struct nested_buffer buffer[M_N_ROLES];
    struct fit_report report[M_N_ROLES];
};
void fitted_block_free(struct fitted_block *block);

/* Makes or finds the folder OUT.tmp. stamp: one line of text; a folder with another stamp is
 * refused. Errors: ST_USER (another stamp: shows both), ST_IO. */
MUST_CHECK enum status block_store_begin(struct block_store *s, const char *out, const char *stamp);
/* Reads block `layer` into *block, whose buffers have been created; *found: it was there and whole.
 * A damaged file is as none, with a warning. Errors: ST_NOMEM. */
MUST_CHECK enum status block_store_get(const struct block_store *s, int layer,
                                       struct fitted_block *block, bool *found);
MUST_CHECK enum status block_store_put(const struct block_store *s, int layer,
                                       const struct fitted_block *block);
/* Removes the folder with its files: the model is written. */
void block_store_remove(struct block_store *s);

#endif
