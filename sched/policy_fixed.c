/* One level for the whole answer, and a prefill level of its own. With policy.prefill above
 * policy.level this is PMPD's prefill-high baseline.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "sched/registry.h"

#include "core/mem.h"

struct fixed {
    int32_t prefill, level;
};

static enum status fixed_open(void **impl, const struct settings *settings,
                              struct level_table *levels)
{
    struct fixed f;
    TRY(level_table_add(levels, settings->policy.prefill, &f.prefill));
    TRY(level_table_add(levels, settings->policy.level, &f.level));
    TRY(mem_alloc_array(impl, 1, sizeof f));
    *(struct fixed *)*impl = f;
    return ST_OK;
}

static enum status fixed_begin(const void *impl, const struct prompt_facts *facts, void *state,
                               int32_t *prefill_level)
{
    (void)facts;
    (void)state;
    *prefill_level = ((const struct fixed *)impl)->prefill;
    return ST_OK;
}

static enum status fixed_plan(const void *impl, const struct prompt_facts *facts,
                              const struct signals *signals, void *state, struct plan *plan)
{
    (void)facts;
    (void)signals;
    (void)state;
    return plan_add(plan, 0, ((const struct fixed *)impl)->level);
}

static void fixed_close(void **impl)
{
    mem_free(*impl);
    *impl = NULL;
}

const struct policy_ops policy_fixed = {
    .name = "fixed",
    .help = "One level for all decode steps (policy.level), another for prefill (policy.prefill). "
            "The dial does not move it.",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = fixed_open,
    .begin = fixed_begin,
    .plan = fixed_plan,
    .observe = policy_observe_nothing,
    .digest = policy_digest_nothing,
    .close = fixed_close,
};
