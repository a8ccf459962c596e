/* SPDX-License-Identifier: Apache-2.0 */
#include "core/policy.h"

enum status policy_begin(struct policy *p, const struct prompt_facts *facts, int32_t *prefill_level)
{
    return p->ops->begin(p->impl, facts, p->dial, prefill_level);
}

enum status policy_plan(struct policy *p, const struct prompt_facts *facts,
                        const struct signals *signals, int32_t n_levels, struct plan *plan)
{
    TRY(p->ops->plan(p->impl, facts, signals, p->dial, plan));
    if (plan->n == 0) {
        FAIL(ST_USER, "policy \"%s\" gave an empty plan for prompt %lld", p->ops->name,
             (long long)facts->ordinal);
    }
    for (int32_t i = 0; i < plan->n; i++) {
        if (plan->at[i].level < 0 || plan->at[i].level >= n_levels) {
            FAIL(ST_USER, "policy \"%s\" gave level %d of %d for prompt %lld", p->ops->name,
                 plan->at[i].level, n_levels, (long long)facts->ordinal);
        }
    }
    return ST_OK;
}

enum status policy_observe(struct policy *p, const struct signals *signals, int32_t n_levels,
                           int32_t *level_from_next)
{
    *level_from_next = -1;
    TRY(p->ops->observe(p->impl, signals, p->dial, level_from_next));
    if (*level_from_next < -1 || *level_from_next >= n_levels) {
        FAIL(ST_USER, "policy \"%s\" asked for level %d of %d", p->ops->name, *level_from_next,
             n_levels);
    }
    return ST_OK;
}

const char *policy_digest(const struct policy *p)
{
    return p->ops->digest(p->impl);
}

void policy_close(struct policy *p)
{
    if (p && p->ops) {
        p->ops->close(&p->impl);
        *p = (struct policy){0};
    }
}
