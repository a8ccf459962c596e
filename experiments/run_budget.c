/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/run_budget.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"

enum status run_budget_unit(const char **unit, const struct settings *settings)
{
    bool bits = settings->budget.average_bits > 0, ms = settings->budget.ms_per_token > 0;
    if (bits && ms) {
        FAIL(ST_USER,
             "budget.average_bits = %g and budget.ms_per_token = %g: one of them is the budget, "
             "the other 0",
             settings->budget.average_bits, settings->budget.ms_per_token);
    }
    *unit = bits ? "bits" : ms ? "ms" : NULL;
    return ST_OK;
}

enum status run_budget_law(struct run_budget *out, const struct settings *settings,
                           const struct level_table *levels, const struct cost_table *costs)
{
    const char *unit = NULL;
    TRY(run_budget_unit(&unit, settings));
    bool ms = strcmp(unit, "ms") == 0;
    double target = ms ? settings->budget.ms_per_token : settings->budget.average_bits;
    *out = (struct run_budget){.n_levels = levels->n,
                               .law = {.target = target, .window = settings->budget.window}};
    struct budget *law = &out->law;
    for (int32_t i = 0; i < levels->n; i++) {
        double c = ms ? costs->ms[i] : (double)levels->level[i].avg_bits;
        out->cost[i] = c;
        law->least = i == 0 || c < law->least ? c : law->least;
        law->most = i == 0 || c > law->most ? c : law->most;
    }
    if (target < law->least || target > law->most || law->most - law->least < 1e-9) {
        FAIL(ST_USER,
             "a budget of %g %s cannot be held: a decode step at the levels of policy \"%s\" costs "
             "%g to %g %s; set a target between, or a policy with other levels",
             target, unit, settings->policy.name, law->least, law->most, unit);
    }
    return ST_OK;
}

int32_t run_budget_tokens(const struct prompt *prompt, const struct settings *settings)
{
    int32_t n = 0;
    for (int32_t t = 0; t < prompt->n_turns; t++) {
        n += prompt->n_ids[t] + settings->decode.max_new_tokens;
    }
    return n;
}

struct place {
    int32_t ordinal, tokens;
};

static int in_order(const void *pa, const void *pb)
{
    const struct place *a = pa, *b = pb;
    if (a->tokens != b->tokens) {
        return a->tokens > b->tokens ? -1 : 1;
    }
    return (a->ordinal > b->ordinal) - (a->ordinal < b->ordinal);
}

static enum status put_in_order(struct run_budget *b, const struct prompts *prompts,
                                const struct settings *settings)
{
    struct place *places = NULL;
    TRY(MEM_NEW(&places, b->n));
    for (int32_t i = 0; i < prompts->n; i++) {
        places[i] = (struct place){i, run_budget_tokens(&prompts->prompt[i], settings)};
    }
    qsort(places, (size_t)b->n, sizeof *places, in_order);
    for (int32_t i = 0; i < prompts->n; i++) {
        b->ordinals[i] = places[i].ordinal;
        b->leases[places[i].ordinal] = i;
    }
    mem_free(places);
    return ST_OK;
}

static void move_on(struct run_budget *b)
{
    while (b->n_resolved < b->n && b->resolved[b->n_resolved]) {
        b->n_resolved++;
    }
}

enum status run_budget_start(struct run_budget *b, const struct prompts *prompts,
                             const struct settings *settings, const struct resume_state *resume,
                             struct journal *journal)
{
    b->n = b->law.n_leases = prompts->n;
    b->resume = resume;
    b->journal = journal;
    TRY(MEM_NEW(&b->ordinals, b->n));
    TRY(MEM_NEW(&b->leases, b->n));
    TRY(MEM_NEW(&b->dials, b->n));
    TRY(MEM_NEW(&b->resolved, b->n));
    TRY(MEM_NEW(&b->outcomes, b->n));
    TRY(put_in_order(b, prompts, settings));
    for (int64_t i = 0; i < b->n; i++) {
        const struct resume_prompt *p = &resume->prompts[b->ordinals[i]];
        b->resolved[i] = p->finished || p->failed;
        b->outcomes[i] = p->finished ? p->outcome : (struct budget_outcome){0};
    }
    move_on(b);
    return ST_OK;
}

void run_budget_free(struct run_budget *b)
{
    mem_free(b->ordinals);
    mem_free(b->leases);
    mem_free(b->dials);
    mem_free(b->resolved);
    mem_free(b->outcomes);
    *b = (struct run_budget){0};
}

/* The dial of the next lease: the one that an earlier start gave it, or a new one. */
static enum status next_dial(struct run_budget *b)
{
    int64_t i = b->n_dials;
    const struct resume_prompt *p = &b->resume->prompts[b->ordinals[i]];
    if (p->has_dial) {
        b->dials[i] = p->state.dial;
        b->n_dials++;
        return ST_OK;
    }
    struct budget_state now;
    budget_dial(&now, &b->law, i, b->dials, b->outcomes);
    struct journal_state state = {.lease = i,
                                  .ordinal = b->ordinals[i],
                                  .key = {p->key[0], p->key[1]},
                                  .dial = now.dial,
                                  .target = b->law.target,
                                  .offset = now.offset,
                                  .slope = now.slope,
                                  .account = now.account};
    unsigned char packed[JOURNAL_SMALL_BYTES];
    TRY(journal_append(b->journal, JOURNAL_STATE, packed, journal_pack_state(packed, &state),
                       false));
    log_debug("budget: lease %" PRId64 " (prompt %" PRId64 ") dial %.4f, account %+.3f", i,
              state.ordinal, (double)now.dial, now.account);
    b->dials[i] = now.dial;
    b->n_dials++;
    return ST_OK;
}

enum status run_budget_dial(struct run_budget *b, int64_t ordinal, bool *known, float *dial)
{
    int64_t lease = b->leases[ordinal];
    while (b->n_dials <= lease) {
        bool had = b->resume->prompts[b->ordinals[b->n_dials]].has_dial;
        *known = had || b->n_resolved > b->n_dials - b->law.window;
        if (!*known) {
            return ST_OK;
        }
        TRY(next_dial(b));
    }
    *known = true;
    *dial = b->dials[lease];
    return ST_OK;
}

enum status run_budget_done(struct run_budget *b, int64_t ordinal, const void *packed, size_t bytes)
{
    int64_t n_steps[LEVEL_TABLE_MAX] = {0}, lease = b->leases[ordinal];
    TRY(trace_count_levels(n_steps, b->n_levels, packed, bytes));
    b->outcomes[lease] = budget_outcome_of(n_steps, b->cost, b->n_levels);
    b->resolved[lease] = true;
    move_on(b);
    return ST_OK;
}
