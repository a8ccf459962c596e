/* `pmpd tune plan`: the cheapest static plan that loses nothing.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_TUNE_PLAN_H
#define PMPD_EXPERIMENTS_TUNE_PLAN_H

#include "dist/env.h"

/* argv[0] is "plan". Collective over the world. */
MUST_CHECK enum status tune_plan(struct env *env, int argc, char **argv);

#endif
