/* What a run directory's journal says, for `pmpd inspect`: starts, finished and failed prompts,
 * suspects, how the last start ended; over all settings that the directory has seen.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_INSPECT_JOURNAL_H
#define PMPD_EXPERIMENTS_INSPECT_JOURNAL_H

#include <jansson.h>

#include "core/status.h"

/* *out: {starts, finished, failed: [{prompt, attempts, reason}], suspects: [{prompt, reason}],
 * silent_deaths, last_start, reason}; the caller's (json_decref). Errors: those of journal_read. */
MUST_CHECK enum status inspect_journal(json_t **out, const char *dir);
/* For people. */
void inspect_journal_print(const json_t *journal, const char *dir);

#endif
