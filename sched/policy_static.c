/* Switch points that are the same for every prompt: "static" as written, and its control
 * "reversed", which takes the levels in reverse order at the same steps.
 * Source: PMPD (arXiv 2410.13461), static scheduler; the reversed control was asked for in its
 * public reviews (OpenReview OVxmpus9NA).
 * SPDX-License-Identifier: Apache-2.0
 */
#include "sched/registry.h"

#include "core/mem.h"

struct fixed_points {
    struct plan plan; /* owned */
};

enum { MOST_POINTS = 4096 };

static void points_close(void **impl)
{
    struct fixed_points *p = *impl;
    if (p) {
        plan_free(&p->plan);
        mem_free(p);
    }
    *impl = NULL;
}

static enum status static_open(void **impl, const struct settings *settings,
                               struct level_table *levels)
{
    struct fixed_points *p = NULL;
    void *owned = NULL;
    enum status st = ST_OK;
    if (settings->policy.switches[0] == '\0') {
        FAIL(ST_USER, "policy.switches is empty; expected steps and levels, e.g. \"0:4 85:3\"");
    }
    TRY(mem_alloc_array((void **)&p, 1, sizeof *p));
    owned = p;
    TRY_GOTO(st, plan_create(&p->plan, MOST_POINTS), fail);
    TRY_GOTO(st, plan_parse(&p->plan, levels, settings->policy.switches, settings->policy.prefill),
             fail);
    *impl = p;
    return ST_OK;
fail:
    points_close(&owned);
    return st;
}

static enum status reversed_open(void **impl, const struct settings *settings,
                                 struct level_table *levels)
{
    TRY(static_open(impl, settings, levels));
    struct plan *plan = &((struct fixed_points *)*impl)->plan;
    for (int32_t i = 0, j = plan->n - 1; i < j; i++, j--) {
        int32_t level = plan->at[i].level;
        plan->at[i].level = plan->at[j].level;
        plan->at[j].level = level;
    }
    return ST_OK;
}

static enum status points_begin(const void *impl, const struct prompt_facts *facts, void *state,
                                int32_t *prefill_level)
{
    (void)facts;
    (void)state;
    *prefill_level = ((const struct fixed_points *)impl)->plan.prefill;
    return ST_OK;
}

static enum status points_plan(const void *impl, const struct prompt_facts *facts,
                               const struct signals *signals, void *state, struct plan *plan)
{
    const struct plan *mine = &((const struct fixed_points *)impl)->plan;
    (void)signals;
    (void)state;
    for (int32_t i = 0; i < mine->n && mine->at[i].step < facts->max_new_tokens; i++) {
        TRY(plan_add(plan, mine->at[i].step, mine->at[i].level));
    }
    return ST_OK;
}

const struct policy_ops policy_static = {
    .name = "static",
    .help = "Levels change at fixed steps (policy.switches = \"0:4 85:3 170:2\"; prefill at "
            "policy.prefill unless it begins with prefill:LEVEL).",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = static_open,
    .begin = points_begin,
    .plan = points_plan,
    .observe = policy_observe_nothing,
    .digest = policy_digest_nothing,
    .close = points_close,
};

const struct policy_ops policy_reversed = {
    .name = "reversed",
    .help = "The control of static: its levels in reverse order at the same steps.",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = reversed_open,
    .begin = points_begin,
    .plan = points_plan,
    .observe = policy_observe_nothing,
    .digest = policy_digest_nothing,
    .close = points_close,
};
