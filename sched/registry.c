/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/registry.h"

#include <stdio.h>
#include <string.h>

static const struct policy_ops *const policies[] = {
    &policy_fixed,        &policy_static,         &policy_reversed,
    &policy_alternate,    &policy_random,         &policy_confidence,
    &policy_activation,   &policy_learned,        &policy_learned_heads,
    &policy_step_learned, &policy_error_feedback, &policy_oracle,
    &policy_replay,       &policy_replay_slots,   NULL,
};

enum status policy_observe_nothing(const void *impl, const struct prompt_facts *facts,
                                   const struct signals *signals, void *state,
                                   struct amendment *amendment)
{
    (void)impl;
    (void)facts;
    (void)signals;
    (void)state;
    (void)amendment;
    return ST_OK;
}

const char *policy_digest_nothing(const void *impl)
{
    (void)impl;
    return "";
}

const struct policy_ops *registry_policy(int i)
{
    return i >= 0 && (size_t)i < sizeof policies / sizeof *policies ? policies[i] : NULL;
}

enum status registry_open_policy(struct policy *out, const struct settings *settings,
                                 struct level_table *levels)
{
    const char *name = settings->policy.name;
    char known[256] = "";
    for (int i = 0; policies[i]; i++) {
        if (strcmp(policies[i]->name, name) == 0) {
            *out = (struct policy){.ops = policies[i], .dial = (float)settings->policy.dial};
            enum status st = policies[i]->open(&out->impl, settings, levels);
            if (st != ST_OK) {
                *out = (struct policy){0};
                return status_prefix(st, "policy \"%s\": ", name);
            }
            return ST_OK;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", policies[i]->name);
    }
    FAIL(ST_USER, "unknown policy.name \"%s\"; known: %s", name, known);
}
