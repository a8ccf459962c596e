/* What policies that go down a list of levels share: the list, the dial, plans made of one switch
 * step per neighbouring pair, and the threshold rule.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_SCHEDULE_H
#define PMPD_SCHED_SCHEDULE_H

#include "core/policy.h"

enum { SCHEDULE_MAX_LEVELS = 16 };

/* First member of a policy's impl, so that schedule_begin can serve as its slot. */
struct schedule {
    int32_t prefill;
    int32_t n, level[SCHEDULE_MAX_LEVELS]; /* ids, average bits strictly descending; n >= 2 */
};

/* policy.levels and policy.prefill. Errors: ST_USER: fewer than two levels, too many, or average
 * bits that do not descend. */
MUST_CHECK enum status schedule_read(struct schedule *s, const struct settings *settings,
                                     struct level_table *levels);
/* The begin slot: policy.prefill. */
MUST_CHECK enum status schedule_begin(const void *impl, const struct prompt_facts *facts,
                                      void *state, int32_t *prefill_level);
/* The close slot of an impl that owns nothing but its own memory. */
void schedule_close(void **impl);
/* Place of a level in the list, or -1. */
int32_t schedule_index(const struct schedule *s, int32_t level);

/* ln(d / (1 - d)): 0 at 0.5, -inf at 0, inf at 1. */
double schedule_tilt(float dial);
/* At dial 1 every step is at the first level, at dial 0 at the last: *plan is then made and nothing
 * is left to decide. */
MUST_CHECK enum status schedule_extreme(const struct schedule *s, float dial, struct plan *plan,
                                        bool *done);
/* Pair p drops from level p to level p + 1 at step at[p] (n - 1 of them), but not before the pair
 * in front of it; a step of n_steps or more is never. */
MUST_CHECK enum status schedule_plan(const struct schedule *s, const int32_t *at, int32_t n_steps,
                                     struct plan *plan);
/* A number that is watched at one level after the other: the first `window` values at a level give
 * mean and (population) standard deviation, every later one at or above mean + deviations * std is
 * a crossing. Source: PMPD's reference code, confidence scheduler (PMPD: arXiv 2410.13461). */
struct crossing {
    int32_t place; /* 1 + index of the level that is watched; 0: none yet */
    int32_t n;
    double mean, squares; /* Welford's running sums */
};
bool crossing_look(struct crossing *c, int32_t index, double value, int32_t window,
                   double deviations);

#endif
