/* What the readers of a run file share: runfile_read.c (for people), recorded.c (for replays).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_RUNFILE_INTERNAL_H
#define PMPD_CORE_RUNFILE_INTERNAL_H

#include <hdf5.h>
#include <stdint.h>

#include "core/status.h"

/* Opens a run file of the version that this program reads; *bytes is its size. The caller closes
 * *file. Errors: ST_IO (cannot be opened), ST_FORMAT (not HDF5, not a run file, another version),
 * ST_HDF5; all name the path. */
MUST_CHECK enum status runfile_open(hid_t *file, int64_t *bytes, const char *path);

#endif
