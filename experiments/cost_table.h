/* What a decode step costs at each level of a run, in milliseconds per token with full slots:
 * measured at the first start, kept in the run directory as costs.txt (one line per level:
 * milliseconds, a blank, the level), and read back when the run is resumed, so that a budget in
 * milliseconds decides the same. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_COST_TABLE_H
#define PMPD_EXPERIMENTS_COST_TABLE_H

#include <stdbool.h>

#include "core/checkpoint.h"
#include "core/settings.h"
#include "experiments/engine.h"

struct cost_table {
    int32_t n;                  /* levels, as in the level table */
    double ms[LEVEL_TABLE_MAX]; /* of a decode step of one token */
    char digest[DIGEST_TEXT];   /* XXH3-128 of the levels and costs as they are written */
};

/* costs.txt of a run directory. *found: it is there. Errors: ST_IO; ST_FORMAT: a line that is not
 * one, a cost that is no positive number, a level that is missing (names file, line, what to do).
 */
MUST_CHECK enum status cost_table_read(struct cost_table *out, bool *found, const char *dir,
                                       const struct level_table *levels);
MUST_CHECK enum status cost_table_write(struct cost_table *t, const char *dir,
                                        const struct level_table *levels);
/* Times passes of all slots, each at some tokens of context, at every level; the least of a few.
 * Empties the slots. Collective over the world (all replicas measure at the same time, as they will
 * decode; the first one's figures count); a service of its own only learns them. */
MUST_CHECK enum status cost_table_measure(struct cost_table *out, struct engine *e,
                                          const struct settings *settings);

#endif
