/* The end of `pmpd run` on rank 0: run.h5 and answers.jsonl from the journal, and the closing
 * table. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_RUN_REPORT_H
#define PMPD_EXPERIMENTS_RUN_REPORT_H

#include "core/tokenizer.h"
#include "experiments/run_owner.h"

/* Whole files or none; what an earlier start left half-written is removed. as_json: the table.
 * replay: NULL, or the recorded run; its comparison then comes in place of the table. Errors: those
 * of journal and run file; replay_compare's. */
MUST_CHECK enum status run_report_write(const struct run_owner *o, const struct engine *e,
                                        const struct settings *s, const struct prompts *prompts,
                                        const struct tokenizer *tok, const struct replay *replay,
                                        bool as_json);

#endif
