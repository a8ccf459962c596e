/* The error is measured while decoding: every policy.every steps the token also runs at the best
 * level, as a probe of the same pass, and the divergence of the two distributions moves the level:
 * up when it is above policy.divergence, down when it is below a quarter of it, so that it does not
 * swing between two levels. At the best level itself the probe runs at the next one down: what a
 * drop would cost is seen before it is taken. Ours.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>

#include "core/mem.h"
#include "sched/registry.h"
#include "sched/schedule.h"

#define CALM_PART 0.25 /* of the divergence at which a level is given up */

struct error_feedback {
    struct schedule s;
    int32_t every;
    double divergence;
};

static enum status error_feedback_open(void **impl, const struct settings *settings,
                                       struct level_table *levels)
{
    struct error_feedback e = {.every = settings->policy.every,
                               .divergence = settings->policy.divergence};
    TRY(schedule_read(&e.s, settings, levels));
    TRY(mem_alloc_array(impl, 1, sizeof e));
    *(struct error_feedback *)*impl = e;
    return ST_OK;
}

static enum status error_feedback_plan(const void *impl, const struct prompt_facts *facts,
                                       const struct signals *signals, void *state,
                                       struct plan *plan)
{
    const struct error_feedback *e = impl;
    bool done = false;
    (void)signals;
    (void)state;
    TRY(schedule_extreme(&e->s, facts->dial, plan, &done));
    return done ? ST_OK : plan_add(plan, 0, e->s.level[0]);
}

static enum status error_feedback_observe(const void *impl, const struct prompt_facts *facts,
                                          const struct signals *signals, void *state,
                                          struct amendment *amendment)
{
    const struct error_feedback *e = impl;
    double tilt = schedule_tilt(facts->dial);
    int32_t i = schedule_index(&e->s, signals->level), last = e->s.n - 1;
    (void)state;
    if (isinf(tilt) || i < 0) {
        return ST_OK;
    }
    if (signals->probe_level >= 0) {
        double bound = e->divergence * exp(-tilt), kl = (double)signals->probe_kl;
        if (kl > bound && i > 0) {
            amendment->level = e->s.level[i - 1];
        } else if (kl < bound * CALM_PART && i < last) {
            amendment->level = e->s.level[i + 1];
        }
    }
    if ((signals->step + 2) % e->every == 0) { /* the next step ends a run of policy.every */
        amendment->probe = e->s.level[i == 0 ? 1 : 0];
    }
    return ST_OK;
}

const struct policy_ops policy_error_feedback = {
    .name = "error-feedback",
    .help = "Moves through policy.levels by the divergence (KL, nats) that a probe at the best "
            "level measures every policy.every steps: up above policy.divergence, down below a "
            "quarter of it. The dial multiplies that bound by (1 - dial) / dial.",
    .needs = SIGNAL_LOGITS,
    .adds_tokens = true,
    .open = error_feedback_open,
    .begin = schedule_begin,
    .plan = error_feedback_plan,
    .observe = error_feedback_observe,
    .digest = policy_digest_nothing,
    .close = schedule_close,
};
