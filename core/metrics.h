/* What the run file and the metrics share: the passes of all records as one ordered table, and
 * checks of records against the run's prompts and levels. run_metrics_compute itself:
 * core/runfile.h. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_METRICS_H
#define PMPD_CORE_METRICS_H

#include <stddef.h>
#include <stdint.h>

#include "core/runfile.h"
#include "core/status.h"

struct pass_row {
    int32_t epoch, replica;
    const struct pass_record *pass; /* borrowed from its record */
};

/* All passes by (epoch, replica, pass), each once; *rows is owned by the caller (mem_free). */
MUST_CHECK enum status passes_collect(struct pass_row **rows, size_t *n_rows,
                                      const struct run_contents *run);
/* Row of a pass, or -1: a pass whose record was lost with a killed replica. */
int64_t passes_find(const struct pass_row *rows, size_t n_rows, int32_t epoch, int32_t replica,
                    uint32_t pass);

/* Everything that writers index by: ordinals inside the prompt file, ascending, each once; level
 * ids inside the table; one width of KV features. Errors: ST_FORMAT. */
MUST_CHECK enum status run_contents_check(const struct run_contents *run);

#endif
