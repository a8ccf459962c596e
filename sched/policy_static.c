/* Switch points that are the same for every prompt: "static" as written, and its control
 * "reversed", which takes the levels in reverse order at the same steps.
 * Source: PMPD (arXiv 2410.13461), static scheduler; the reversed control was asked for in its
 * public reviews (OpenReview OVxmpus9NA).
 * SPDX-License-Identifier: Apache-2.0
 */
#include "sched/registry.h"

#include <math.h>

#include "core/mem.h"
#include "sched/schedule.h"

struct fixed_points {
    struct plan plan; /* owned */
    bool ascends;     /* the last level has more bits than the first */
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

static void find_direction(struct fixed_points *p, const struct level_table *levels)
{
    const struct level *first = &levels->level[p->plan.at[0].level];
    p->ascends = levels->level[p->plan.at[p->plan.n - 1].level].avg_bits > first->avg_bits;
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
    find_direction(p, levels);
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
    struct fixed_points *p = *impl;
    struct plan *plan = &p->plan;
    for (int32_t i = 0, j = plan->n - 1; i < j; i++, j--) {
        int32_t level = plan->at[i].level;
        plan->at[i].level = plan->at[j].level;
        plan->at[j].level = level;
    }
    find_direction(p, levels);
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
    const struct fixed_points *p = impl;
    double tilt = schedule_tilt(facts->dial), stretch = exp(p->ascends ? -tilt : tilt);
    (void)signals;
    (void)state;
    TRY(plan_add(plan, 0, p->plan.at[0].level));
    for (int32_t i = 1; i < p->plan.n; i++) {
        double step = round(p->plan.at[i].step * stretch); // inf at one end of the dial: never
        if (step < facts->max_new_tokens) {
            TRY(plan_amend(plan, (int32_t)step, p->plan.at[i].level));
        }
    }
    return ST_OK;
}

const struct policy_ops policy_static = {
    .name = "static",
    .help = "Levels change at fixed steps (policy.switches = \"0:4 85:3 170:2\"; prefill at "
            "policy.prefill unless it begins with prefill:LEVEL). The dial multiplies the steps of "
            "levels that go down by dial / (1 - dial), of levels that go up by (1 - dial) / dial.",
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
    .help =
        "The control of static: its levels in reverse order at the same steps, with the same dial.",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = reversed_open,
    .begin = points_begin,
    .plan = points_plan,
    .observe = policy_observe_nothing,
    .digest = policy_digest_nothing,
    .close = points_close,
};
