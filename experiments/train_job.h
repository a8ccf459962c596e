/* `pmpd train` on one rank: the dataset, what is to be trained, and the search for
 * hyper-parameters. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_TRAIN_JOB_H
#define PMPD_EXPERIMENTS_TRAIN_JOB_H

#include <stdbool.h>

#include "dist/env.h"
#include "sched/dataset.h"
#include "sched/search.h"

struct train_job {
    struct env *env; /* borrowed */
    const char *dataset_path, *out, *from;
    enum classifier_kind kind;
    int32_t n_groups, n_queries, n_hidden; /* 0: the default */
    int32_t n_trials;                      /* 0: no search */
    bool json, test;
    struct train_options options;
    struct dataset dataset;
    struct dataset_samples samples[SPLIT_N];
    char digest[DIGEST_TEXT]; /* of the dataset's rows */
};

/* Width of the classifier's input: of STEP the signals. */
int32_t train_job_n_in(const struct train_job *j);
int32_t train_job_n_classes(const struct train_job *j);

/* Random search with successive halving over the world's ranks, a trial per rank at a time; *best
 * is the winner. Finished trials are kept in OUT.trials/journal.bin, so that the same command goes
 * on; at the end all of them are in OUT.trials/trials.h5. Collective over the world. Errors:
 * ST_NUMERIC when every trial diverged; those of train_run. */
MUST_CHECK enum status train_search(struct train_job *j, struct trial *best);

#endif
