/* A plan: what a policy decides for one prompt. The prefill level, then the level of step 0 and
 * switch points. The decoder is given a plan; it never asks how many bits. A recorded plan replays
 * a run.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_PLAN_H
#define PMPD_CORE_PLAN_H

#include <stdint.h>

#include "core/level.h"
#include "core/status.h"

/* From step on, the level is in force. */
struct plan_switch {
    int32_t step, level;
};

struct plan {
    int32_t prefill; /* level id */
    int32_t n, capacity;
    struct plan_switch *at; /* owned: (n) strictly ascending steps, the first is step 0 */
};

MUST_CHECK enum status plan_create(struct plan *plan, int32_t capacity);
void plan_free(struct plan *plan);
/* Empties it; keeps the memory. */
void plan_clear(struct plan *plan);
/* Appends a switch point; the same level as before is left out. Errors: ST_USER: steps not
 * ascending, the first step not 0, more points than capacity. */
MUST_CHECK enum status plan_add(struct plan *plan, int32_t step, int32_t level);
/* The level in force at a step; the plan is not empty. */
int32_t plan_level(const struct plan *plan, int32_t step);
/* Replaces everything from `step` on by one level (an amendment). Errors: as plan_add. */
MUST_CHECK enum status plan_amend(struct plan *plan, int32_t step, int32_t level);
/* Reads "prefill:4 0:4 16:2": words of STEP:LEVEL and at most one prefill:LEVEL, separated by
 * blanks; without one the prefill level is the one written as `prefill`. Levels are added to the
 * table. Errors: ST_USER. */
MUST_CHECK enum status plan_parse(struct plan *plan, struct level_table *levels, const char *text,
                                  const char *prefill);

#endif
