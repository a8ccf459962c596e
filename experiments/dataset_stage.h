/* The decoding of `pmpd dataset`: one stage after the other on each replica, groups of prompts side
 * by side, what is finished appended to the replica's journal. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_DATASET_STAGE_H
#define PMPD_EXPERIMENTS_DATASET_STAGE_H

#include "core/tokenizer.h"
#include "experiments/dataset_work.h"
#include "experiments/engine.h"

/* One `pmpd dataset` on one rank. */
struct dataset_job {
    struct env *env;
    struct settings settings;
    const char *config, *out, *reference, *reference_level;
    enum criterion criterion;
    bool all_heads;
    struct work_options options;
    struct dataset_facts facts;
    struct model_config model;
    int32_t context;
    struct tokenizer *tok;
    struct prompts prompts;
    struct work work;
    char parts[SETTINGS_PATH_BYTES + 16];
    char depends[4 * LEVEL_TEXT_BYTES + 2048];
    struct journal *journal; /* first rank of a replica, while decoding */
};

/* Stage 1 (is_reference): the reference model's texts; stage 2: those of the high level and of
 * every candidate switch, their scores, features and labels. Does what is missing, then reads all
 * journals again, so that every rank knows what the others did. Collective over the world. */
MUST_CHECK enum status dataset_stage_run(struct dataset_job *j, bool is_reference);

#endif
