/* What rank 0 of `pmpd run` keeps beside its replica: the journal, what it says about earlier
 * starts, the leases, and how this start of the program ended.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_RUN_OWNER_H
#define PMPD_EXPERIMENTS_RUN_OWNER_H

#include "core/checkpoint.h"
#include "core/log.h"
#include "core/policy.h"
#include "core/prompts.h"
#include "core/settings.h"
#include "dist/lease.h"
#include "dist/lifeline.h"
#include "dist/service.h"
#include "experiments/engine.h"
#include "experiments/replay.h"
#include "experiments/resume.h"
#include "experiments/run_budget.h"

struct run_owner {
    char digest[DIGEST_TEXT]; /* of the model: known before run_owner_open */
    struct journal *journal;
    struct resume_state resume;
    struct lease_owner *leases;
    struct service *service; /* owned; NULL: no policy of this run needs one */
    bool has_budget;
    struct run_budget budget;
    struct cost_table costs; /* of a budget in milliseconds */
    bool has_costs;          /* they are known; else they are measured before run_owner_lease */
    struct progress progress;
    bool has_begun; /* JOURNAL_RUN is written */
    int64_t n_left; /* prompts that this start has to do ... */
    int64_t n_done; /* ... and has done */
};

/* Opens the run's journal, decides from it what is left, and journals that a start begins. replay:
 * NULL, or the recorded run that is repeated. retry: earlier faults, failures and deaths do not
 * count. Errors: those of the journal; ST_USER (run.max_deaths). */
MUST_CHECK enum status run_owner_open(struct run_owner *o, const struct engine *e,
                                      const struct settings *s, const struct prompts *prompts,
                                      const struct policy *policy, const struct replay *replay,
                                      bool retry);
/* The costs of a run whose budget needs them and that had none: stores them; the prompts get their
 * keys. Errors: ST_IO, those of run_budget_law. */
MUST_CHECK enum status run_owner_set_costs(struct run_owner *o, const struct cost_table *costs,
                                           const struct engine *e, const struct settings *s,
                                           const struct prompts *prompts,
                                           const struct policy *policy);
/* Makes the leases of what is left, suspects last, and starts the deadline (run.deadline_s, from
 * the start of the program). o->service is set by then, where there is one. */
MUST_CHECK enum status run_owner_lease(struct run_owner *o, struct env *env,
                                       const struct settings *s, const struct prompts *prompts,
                                       size_t max_record_bytes);
/* Journals a rank's fault; safe beside the main thread from run_owner_open to run_owner_close. */
void run_owner_take_fault(struct run_owner *o, const struct lifeline_fault *f);
/* Journals how this start ended, if it has begun. reason: one line, "" for JOURNAL_DONE. */
MUST_CHECK enum status run_owner_end(struct run_owner *o, enum journal_how how, const char *reason);
void run_owner_close(struct run_owner *o);

#endif
