/* Levels in turn, one step each: the control that asks whether the order of precisions matters at
 * all beside their average.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "sched/registry.h"

#include <math.h>
#include <string.h>

#include "core/mem.h"
#include "sched/schedule.h"

enum { MOST_LEVELS = 16 };

struct alternate {
    int32_t prefill, n, level[MOST_LEVELS];
    int32_t best, cheapest;
};

static enum status read_levels(struct alternate *a, struct level_table *levels, char *text)
{
    char *rest = text, *word;
    while ((word = strsep(&rest, " \t")) != NULL) {
        if (*word == '\0') {
            continue;
        }
        if (a->n == MOST_LEVELS) {
            FAIL(ST_USER, "policy.alternate names more than %d levels", MOST_LEVELS);
        }
        TRY(level_table_add(levels, word, &a->level[a->n]));
        float bits = levels->level[a->level[a->n]].avg_bits;
        if (a->n == 0 || bits > levels->level[a->best].avg_bits) {
            a->best = a->level[a->n];
        }
        if (a->n == 0 || bits < levels->level[a->cheapest].avg_bits) {
            a->cheapest = a->level[a->n];
        }
        a->n++;
    }
    if (a->n == 0) {
        FAIL(ST_USER, "policy.alternate is empty; expected levels in turn, e.g. \"4 2\"");
    }
    return ST_OK;
}

static void alternate_close(void **impl)
{
    mem_free(*impl);
    *impl = NULL;
}

static enum status alternate_open(void **impl, const struct settings *settings,
                                  struct level_table *levels)
{
    struct alternate a = {0};
    char text[SETTINGS_TEXT_BYTES];
    memcpy(text, settings->policy.alternate, sizeof text);
    TRY(read_levels(&a, levels, text));
    TRY(level_table_add(levels, settings->policy.prefill, &a.prefill));
    TRY(mem_alloc_array(impl, 1, sizeof a));
    *(struct alternate *)*impl = a;
    return ST_OK;
}

static enum status alternate_begin(const void *impl, const struct prompt_facts *facts, void *state,
                                   int32_t *prefill_level)
{
    (void)facts;
    (void)state;
    *prefill_level = ((const struct alternate *)impl)->prefill;
    return ST_OK;
}

/* The van der Corput sequence in base 2: every beginning of it spreads over [0, 1), so that the
 * rounds below a share are spread over the answer, and a larger share keeps those of a smaller. */
static double spread(uint32_t n)
{
    double x = 0, digit = 0.5;
    for (; n > 0; n /= 2, digit /= 2) {
        x += digit * (n % 2);
    }
    return x;
}

static enum status alternate_plan(const void *impl, const struct prompt_facts *facts,
                                  const struct signals *signals, void *state, struct plan *plan)
{
    const struct alternate *a = impl;
    double share = fabs(2 * (double)facts->dial - 1);
    int32_t end = facts->dial > 0.5f ? a->best : a->cheapest;
    (void)signals;
    (void)state;
    for (int32_t step = 0; step < facts->max_new_tokens; step++) {
        bool moved = spread((uint32_t)(step / a->n)) < share;
        TRY(plan_add(plan, step, moved ? end : a->level[step % a->n]));
    }
    return ST_OK;
}

const struct policy_ops policy_alternate = {
    .name = "alternate",
    .help =
        "Levels in turn, one step each (policy.alternate = \"4 2\"): a control. The dial turns a "
        "share |2 dial - 1| of the rounds into rounds at the best level (above 0.5) or the "
        "cheapest (below).",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = alternate_open,
    .begin = alternate_begin,
    .plan = alternate_plan,
    .observe = policy_observe_nothing,
    .digest = policy_digest_nothing,
    .close = alternate_close,
};
