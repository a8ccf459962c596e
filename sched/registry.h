/* The policies by name. A new policy is one file with a table and one line in registry.c.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_REGISTRY_H
#define PMPD_SCHED_REGISTRY_H

#include "core/policy.h"

/* Every level at which a prompt may run is added to levels here. Each rank of a replica opens the
 * policy with the same settings, so that level ids agree. Errors: ST_USER: unknown name (lists the
 * known ones), or the policy's own. The caller owns *out, back with policy_close. */
MUST_CHECK enum status registry_open_policy(struct policy *out, const struct settings *settings,
                                            struct level_table *levels);
/* Tables in order; NULL past the end. */
const struct policy_ops *registry_policy(int i);

/* The observe slot of policies that never amend a plan. */
enum status policy_observe_nothing(const void *impl, const struct prompt_facts *facts,
                                   const struct signals *signals, void *state,
                                   struct amendment *amendment);

/* The digest slot of policies that read no files. */
const char *policy_digest_nothing(const void *impl);

extern const struct policy_ops policy_fixed, policy_static, policy_reversed, policy_alternate,
    policy_random, policy_confidence, policy_activation, policy_learned, policy_learned_heads,
    policy_step_learned, policy_error_feedback, policy_oracle, policy_replay, policy_replay_slots;

#endif
