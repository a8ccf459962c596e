/* Which prompts of a run are done: the resume key of each prompt, and the journal read against it.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_RESUME_H
#define PMPD_EXPERIMENTS_RESUME_H

#include "core/prompts.h"
#include "core/runfile.h"
#include "core/settings.h"
#include "dist/journal.h"
#include "dist/lease.h"
#include "experiments/engine.h"
#include "sched/budget.h"

/* Version of everything that decides which tokens come out; part of every key. */
enum { RESUME_FORMAT_VERSION = 1 };

/* The key of one prompt: XXH3-128 of the model's digest, the plan-relevant and generation settings,
 * what tells the policy's files apart ("" without), the prompt's tokens and ordinal, and the
 * arithmetic class (backend, instruction set, product, prefill chunk, KV format, and either the
 * segments (reproducible) or the number of tensor ranks); service.lag; with a budget, what it
 * follows from (budget: "" without). Never the number of replicas or threads. */
void resume_key(uint64_t key[2], const struct prompt *prompt, int64_t ordinal,
                const char *model_digest, const char *policy_files, const char *budget,
                const struct settings *settings, const struct engine *e, bool policy_adds_tokens);

/* An attempt that ended the job twice is not tried again. */
enum { RESUME_MOST_FAULTS = 2 };

/* What the journal says about the prompts of this run. */
struct resume_state {
    struct resume_prompt {
        uint64_t key[2];
        int32_t attempts; /* starts with this key */
        int32_t n_faults; /* starts of the program that it may have ended */
        bool finished;
        bool failed;
        bool has_dial;                 /* the budget gave it one: */
        struct journal_state state;    /* the last */
        struct budget_outcome outcome; /* when finished, with level_cost */
        struct finished_record record; /* owned, when finished and kept */
        struct failed_prompt failure;
        struct journal_fault fault; /* the last one, when n_faults > 0 */
    } * prompts;                    /* (n) owned, by ordinal */
    int64_t n;
    int32_t n_epochs; /* starts of the program on this directory */
    int64_t n_finished, n_failed;
    int64_t n_other;          /* finished records with keys of other settings: kept, not used */
    const double *level_cost; /* (n_levels) borrowed: of the budget; NULL: there is none */
    int32_t n_levels;
    bool keep_records; /* unpack and keep finished records (for the run file) */
    int32_t n_deaths;  /* silent ones, since the last finished prompt of any settings; without */
    bool is_open;      /* ... the last start: nothing says how it ended ... */
    bool has_finished; /* ... and whether it finished a prompt */
};

/* Starts since the last finished prompt that nothing says the end of. */
int32_t resume_n_deaths(const struct resume_state *r);
MUST_CHECK enum status resume_create(struct resume_state *out, int64_t n, bool keep_records);
void resume_free(struct resume_state *r);
/* A journal_visit_fn; ctx is a struct resume_state whose keys are filled. */
enum status resume_visit(void *ctx, uint32_t kind, const void *payload, size_t bytes);

/* What follows are a new start's decisions, after the whole journal has been visited. */

/* Journals that earlier faults, failures and deaths do not count, and forgets them. */
MUST_CHECK enum status resume_retry(struct resume_state *r, struct journal *journal);
/* Errors: ST_USER: max_deaths starts (0: any number) in a row have died silently without finishing
 * a prompt; says what to do. dir: the run directory. */
MUST_CHECK enum status resume_check_deaths(const struct resume_state *r, int32_t max_deaths,
                                           const char *dir);
/* Journals as failed, with the last fault as the reason, each prompt with RESUME_MOST_FAULTS. */
MUST_CHECK enum status resume_fail_broken(struct resume_state *r, struct journal *journal);

#endif
