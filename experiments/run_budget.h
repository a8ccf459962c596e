/* The budget of a run: sched/budget.h over its prompts in their fixed order (tokens descending,
 * then ordinal), what the journal says of earlier starts included. Rank 0 only.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_RUN_BUDGET_H
#define PMPD_EXPERIMENTS_RUN_BUDGET_H

#include "core/prompts.h"
#include "core/settings.h"
#include "dist/journal.h"
#include "experiments/cost_table.h"
#include "experiments/resume.h"
#include "sched/budget.h"

struct run_budget {
    struct budget law;
    double cost[LEVEL_TABLE_MAX]; /* of a step at each level, in the target's unit */
    int32_t n_levels;
    int64_t n;                         /* prompts */
    int64_t n_dials;                   /* leases 0..n_dials-1 have dials */
    int64_t n_resolved;                /* leases 0..n_resolved-1 are finished or failed */
    int32_t *ordinals;                 /* (n) owned: of lease i */
    int32_t *leases;                   /* (n) owned: of a prompt */
    float *dials;                      /* (n) owned, by lease */
    bool *resolved;                    /* (n) owned, by lease */
    struct budget_outcome *outcomes;   /* (n) owned, by lease */
    struct journal *journal;           /* borrowed */
    const struct resume_state *resume; /* borrowed */
};

/* "bits", "ms", or NULL: the settings ask for none. Errors: ST_USER: for both. */
MUST_CHECK enum status run_budget_unit(const char **unit, const struct settings *settings);
/* The target and the levels' costs (ms: of the table). Errors: ST_USER: a target that no mixture of
 * the levels has (says which have), or levels that all cost the same. */
MUST_CHECK enum status run_budget_law(struct run_budget *out, const struct settings *settings,
                                      const struct level_table *levels,
                                      const struct cost_table *costs);
/* The order, and what earlier starts did. resume has visited the journal with out->cost, and
 * outlives the budget. */
MUST_CHECK enum status run_budget_start(struct run_budget *b, const struct prompts *prompts,
                                        const struct settings *settings,
                                        const struct resume_state *resume, struct journal *journal);
void run_budget_free(struct run_budget *b);
/* Tokens of a prompt, those it reads and those it may make: what leases are ordered by. */
int32_t run_budget_tokens(const struct prompt *prompt, const struct settings *settings);
/* The dial of a prompt, journalled (not yet durable: the start that follows makes it so); *known
 * false: outcomes that it follows from are still to come. */
MUST_CHECK enum status run_budget_dial(struct run_budget *b, int64_t ordinal, bool *known,
                                       float *dial);
/* A prompt's packed record is durable. */
MUST_CHECK enum status run_budget_done(struct run_budget *b, int64_t ordinal, const void *packed,
                                       size_t bytes);

#endif
