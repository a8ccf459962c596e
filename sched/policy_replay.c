/* The realised plans of a recorded run again, prompt by prompt and turn by turn; what a policy of
 * that run amended is part of them. A turn that goes on for longer than the recorded one stays at
 * its last level; one that took no step decodes at its prefill level.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "sched/registry.h"

#include <string.h>

#include "core/mem.h"
#include "core/recorded.h"

struct replay {
    struct recorded run;            /* owned */
    int32_t *id;                    /* owned: (run.n_levels) ids of its levels in this run */
    char path[SETTINGS_PATH_BYTES]; /* for messages */
};

static void replay_close(void **impl)
{
    struct replay *r = *impl;
    if (r) {
        recorded_free(&r->run);
        mem_free(r->id);
        mem_free(r);
    }
    *impl = NULL;
}

static enum status replay_open(void **impl, const struct settings *settings,
                               struct level_table *levels)
{
    struct replay *r = NULL;
    void *owned = NULL;
    enum status st = ST_OK;
    const char *path = settings->policy.replay;
    if (path[0] == '\0') {
        FAIL(ST_USER, "policy.replay is empty; expected the run file whose plans to repeat");
    }
    TRY(mem_alloc_array(&owned, 1, sizeof *r));
    r = owned;
    memcpy(r->path, path, sizeof r->path);
    TRY_GOTO(st, recorded_read(&r->run, path, false), fail);
    TRY_GOTO(st, MEM_NEW(&r->id, r->run.n_levels), fail);
    for (int32_t i = 0; i < r->run.n_levels; i++) {
        st = level_table_add(levels, r->run.level[i], &r->id[i]);
        if (st != ST_OK) {
            status_prefix(st, "%s: ", path);
            goto fail;
        }
    }
    *impl = r;
    return ST_OK;
fail:
    replay_close(&owned);
    return st;
}

static enum status find(const struct recorded_turn **out, const struct replay *r,
                        const struct prompt_facts *facts)
{
    *out = recorded_find(&r->run, facts->ordinal, facts->turn);
    if (!*out) {
        FAIL(ST_USER, "%s has no plan for prompt %lld, turn %d; it holds the plans of %lld turns",
             r->path, (long long)facts->ordinal, facts->turn, (long long)r->run.n_turns);
    }
    return ST_OK;
}

static enum status replay_begin(const void *impl, const struct prompt_facts *facts, void *state,
                                int32_t *prefill_level)
{
    const struct replay *r = impl;
    const struct recorded_turn *turn = NULL;
    (void)state;
    TRY(find(&turn, r, facts));
    *prefill_level = r->id[turn->prefill_level];
    return ST_OK;
}

static enum status replay_plan(const void *impl, const struct prompt_facts *facts,
                               const struct signals *signals, void *state, struct plan *plan)
{
    const struct replay *r = impl;
    const struct recorded_turn *turn = NULL;
    (void)signals;
    (void)state;
    TRY(find(&turn, r, facts));
    if (turn->n_switches == 0) {
        return plan_add(plan, 0, r->id[turn->prefill_level]);
    }
    for (int32_t i = 0; i < turn->n_switches; i++) {
        const struct plan_switch *at = &turn->switches[i];
        if (at->step < facts->max_new_tokens) {
            TRY(plan_add(plan, at->step, r->id[at->level]));
        }
    }
    return ST_OK;
}

static const char *replay_digest(const void *impl)
{
    return ((const struct replay *)impl)->run.digest;
}

const struct policy_ops policy_replay = {
    .name = "replay",
    .help = "The recorded plans of the run file policy.replay; pmpd run --replay sets it.",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = replay_open,
    .begin = replay_begin,
    .plan = replay_plan,
    .observe = policy_observe_nothing,
    .digest = replay_digest,
    .close = replay_close,
};

const struct policy_ops policy_replay_slots = {
    .name = "replay_slots",
    .help = "replay of a run with one slot whose policy added tokens: its passes used the product "
            "of several slots.",
    .needs = SIGNAL_NONE,
    .adds_tokens = true,
    .open = replay_open,
    .begin = replay_begin,
    .plan = replay_plan,
    .observe = policy_observe_nothing,
    .digest = replay_digest,
    .close = replay_close,
};
