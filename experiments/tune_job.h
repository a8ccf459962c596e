/* One `pmpd tune plan` on one rank, and how it reads what it is given.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_TUNE_JOB_H
#define PMPD_EXPERIMENTS_TUNE_JOB_H

#include "experiments/tune_answers.h"
#include "sched/plan_search.h"

struct tune_job {
    struct env *env;
    struct settings given, settings; /* as the user wrote them; with what the search needs */
    struct settings reference_settings;
    const char *config, *out, *levels, *grid_text, *loss_text, *reference, *seed_text;
    int32_t grid;
    double loss;
    uint64_t seed;
    struct engine e;
    struct tokenizer *tok;
    struct prompts validation, test;
    const struct prompt **prompt; /* owned: (n_validation + n_test) validation in a random order */
    char **target;                /* owned: the same; texts that answers are compared with */
    int32_t n_validation, n_test;
    char names[SCHEDULE_MAX_LEVELS][LEVEL_TEXT_BYTES];
    const char *name[SCHEDULE_MAX_LEVELS];
    double bits[SCHEDULE_MAX_LEVELS];
    int32_t n_levels;
    struct tune_answers answers;
    struct tune_model model;
    struct plan_search search;
    char digest[DIGEST_TEXT];
};

/* Command line (argv[0] is "plan") and configuration. Collective over the world. Errors: ST_USER,
 * ST_IO. */
MUST_CHECK enum status tune_read_settings(struct tune_job *j, int argc, char **argv);
/* --levels, or what the open engine's model holds, into its level table. Errors: ST_USER: fewer
 * than two, or not descending. */
MUST_CHECK enum status tune_read_levels(struct tune_job *j);
/* The two splits, encoded by the open tokenizer, validation in an order drawn by the seed. Errors:
 * those of prompts_read and prompts_encode; ST_USER: no prompt names a split. */
MUST_CHECK enum status tune_read_prompts(struct tune_job *j);

#endif
