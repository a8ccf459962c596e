/* Files that appear whole or not at all: written under a temporary name in the same folder,
 * fsynced, renamed over the target, and the folder fsynced. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_REPLACE_H
#define PMPD_CORE_REPLACE_H

#include <stddef.h>

#include "core/status.h"

/* "PATH.tmp.PID" into *temporary (mem_free). */
MUST_CHECK enum status replace_name(char **temporary, const char *path);
/* Makes the finished, closed temporary file the target. On failure the temporary is removed and an
 * older target is as it was. Errors: ST_IO, naming both. */
MUST_CHECK enum status replace_commit(const char *temporary, const char *path);
/* All of it at once: bytes become the file at path. Errors: ST_IO (no such folder, disk full). */
MUST_CHECK enum status replace_with(const char *path, const void *data, size_t bytes);
/* What to do about a write that failed with this errno, to end a message with. */
const char *replace_advice(int error);
/* Removes a temporary file that will not be finished; its absence is no error. */
void replace_abandon(const char *temporary);
/* Removes what killed processes left beside path under temporary names. Nobody may be writing path.
 */
void replace_sweep(const char *path);

#endif
