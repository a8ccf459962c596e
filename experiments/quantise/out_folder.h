/* A model folder that appears whole or not at all: everything is written to OUT.tmp.<pid>, which
 * becomes OUT by a rename when all of it is on the disk. Knows the names of the files of a nested
 * model, and touches no other file.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_OUT_FOLDER_H
#define PMPD_EXPERIMENTS_QUANTISE_OUT_FOLDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

enum { OUT_PATH_BYTES = 4096 };

struct out_folder {
    char final[OUT_PATH_BYTES], temporary[OUT_PATH_BYTES];
    bool replaces; /* final exists and is to go */
};

/* Makes the temporary folder, and with it finds out whether one may write there. An existing OUT is
 * refused; with force a nested model of ours is accepted, to be replaced by out_folder_commit, but
 * nothing else is: a folder with any file that is not part of one is refused, too.
 * Errors: ST_USER (exists, or not to be replaced), ST_IO (cannot create). */
MUST_CHECK enum status out_folder_begin(struct out_folder *out, const char *path, bool force);
/* temporary/name into path. */
MUST_CHECK enum status out_folder_path(char path[OUT_PATH_BYTES], const struct out_folder *out,
                                       const char *name);
/* Writes a whole file and syncs it. Errors: ST_IO. */
MUST_CHECK enum status out_folder_write(const struct out_folder *out, const char *name,
                                        const void *data, size_t bytes);
/* Copies the tokenizer files and generation_config.json that `from` has; adds their sizes to *bytes
 * and says whether there was a tokenizer. Errors: ST_IO. */
MUST_CHECK enum status out_folder_copy_files(const struct out_folder *out, const char *from,
                                             uint64_t *bytes, bool *has_tokenizer);
/* Renames. After an error the old OUT, if there was one, is still there. Errors: ST_IO. */
MUST_CHECK enum status out_folder_commit(struct out_folder *out);
/* Removes the temporary folder when there is still one. */
void out_folder_abandon(struct out_folder *out);

#endif
