/* SPDX-License-Identifier: Apache-2.0 */
#include "core/policy.h"

#include <string.h>

/* An answer that the level table does not hold. */
static enum status check_level(const struct policy *p, const struct prompt_facts *facts,
                               const char *what, int32_t least, int32_t level, int32_t n_levels)
{
    if (level < least || level >= n_levels) {
        FAIL(ST_USER, "policy \"%s\" gave %s %d of %d for prompt %lld", p->ops->name, what, level,
             n_levels, (long long)facts->ordinal);
    }
    return ST_OK;
}

enum status policy_begin(const struct policy *p, const struct prompt_facts *facts, void *state,
                         int32_t n_levels, int32_t *prefill_level)
{
    if (p->ops->state_bytes > 0) {
        memset(state, 0, p->ops->state_bytes);
    }
    TRY(p->ops->begin(p->impl, facts, state, prefill_level));
    return check_level(p, facts, "prefill level", 0, *prefill_level, n_levels);
}

static enum status check_plan(const struct policy *p, const struct prompt_facts *facts,
                              const struct plan *plan, int32_t n_levels)
{
    if (plan->n == 0) {
        FAIL(ST_USER, "policy \"%s\" gave an empty plan for prompt %lld", p->ops->name,
             (long long)facts->ordinal);
    }
    for (int32_t i = 0; i < plan->n; i++) {
        TRY(check_level(p, facts, "level", 0, plan->at[i].level, n_levels));
    }
    return ST_OK;
}

static enum status check_amendment(const struct policy *p, const struct prompt_facts *facts,
                                   const struct amendment *a, int32_t n_levels)
{
    TRY(check_level(p, facts, "level", -1, a->level, n_levels));
    TRY(check_level(p, facts, "a probe of level", -1, a->probe, n_levels));
    if (a->probe >= 0 && !p->ops->adds_tokens) {
        FAIL(ST_USER, "policy \"%s\" asked for a probe without adds_tokens", p->ops->name);
    }
    return ST_OK;
}

enum status policy_plan(const struct policy *p, const struct prompt_facts *facts,
                        const struct signals *signals, void *state, int32_t n_levels,
                        struct plan *plan)
{
    TRY(p->ops->plan(p->impl, facts, signals, state, plan));
    return check_plan(p, facts, plan, n_levels);
}

enum status policy_observe(const struct policy *p, const struct prompt_facts *facts,
                           const struct signals *signals, void *state, int32_t n_levels,
                           struct amendment *amendment)
{
    *amendment = (struct amendment){.level = -1, .probe = -1};
    TRY(p->ops->observe(p->impl, facts, signals, state, amendment));
    return check_amendment(p, facts, amendment, n_levels);
}

enum status policy_answer(const struct policy *p, struct policy_request *requests, int32_t n,
                          int32_t n_levels)
{
    for (int32_t i = 0; i < n; i++) {
        requests[i].amendment = (struct amendment){.level = -1, .probe = -1};
    }
    if (p->ops->answer) {
        TRY(p->ops->answer(p->impl, requests, n));
    }
    for (int32_t i = 0; i < n; i++) {
        struct policy_request *r = &requests[i];
        bool is_plan = r->signals->step < 0;
        if (p->ops->answer) {
            TRY(is_plan ? check_plan(p, r->facts, r->plan, n_levels)
                        : check_amendment(p, r->facts, &r->amendment, n_levels));
        } else if (is_plan) {
            TRY(policy_plan(p, r->facts, r->signals, r->state, n_levels, r->plan));
        } else {
            TRY(policy_observe(p, r->facts, r->signals, r->state, n_levels, &r->amendment));
        }
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
