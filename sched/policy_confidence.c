/* One level down when the model is sure of its tokens: when the largest probability of a step
 * reaches a threshold that the first steps at that level have set.
 * Source: PMPD's reference code, confidence scheduler (PMPD: arXiv 2410.13461): there the window is
 * 10 steps and the threshold mean + 1 std.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>

#include "core/mem.h"
#include "sched/registry.h"
#include "sched/schedule.h"

struct confidence {
    struct schedule s;
    int32_t window;
    double deviations;
};

static enum status confidence_open(void **impl, const struct settings *settings,
                                   struct level_table *levels)
{
    struct confidence c = {.window = settings->policy.window,
                           .deviations = settings->policy.deviations};
    TRY(schedule_read(&c.s, settings, levels));
    TRY(mem_alloc_array(impl, 1, sizeof c));
    *(struct confidence *)*impl = c;
    return ST_OK;
}

static enum status confidence_plan(const void *impl, const struct prompt_facts *facts,
                                   const struct signals *signals, void *state, struct plan *plan)
{
    const struct confidence *c = impl;
    bool done = false;
    (void)signals;
    (void)state;
    TRY(schedule_extreme(&c->s, facts->dial, plan, &done));
    return done ? ST_OK : plan_add(plan, 0, c->s.level[0]);
}

static enum status confidence_observe(const void *impl, const struct prompt_facts *facts,
                                      const struct signals *signals, void *state,
                                      struct amendment *amendment)
{
    const struct confidence *c = impl;
    double tilt = schedule_tilt(facts->dial);
    int32_t i = schedule_index(&c->s, signals->level);
    if (isinf(tilt) || i < 0 || i == c->s.n - 1) {
        return ST_OK;
    }
    if (crossing_look(state, i, (double)signals->max_prob, c->window, c->deviations + tilt)) {
        amendment->level = c->s.level[i + 1];
    }
    return ST_OK;
}

const struct policy_ops policy_confidence = {
    .name = "confidence",
    .help = "Goes down policy.levels: one level when a step's largest probability reaches mean + "
            "policy.deviations standard deviations of the first policy.window steps at its level. "
            "The dial adds ln(dial / (1 - dial)) deviations.",
    .needs = SIGNAL_LOGITS,
    .adds_tokens = false,
    .state_bytes = sizeof(struct crossing),
    .open = confidence_open,
    .begin = schedule_begin,
    .plan = confidence_plan,
    .observe = confidence_observe,
    .digest = policy_digest_nothing,
    .close = schedule_close,
};
