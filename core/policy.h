/* DOOR 3: a policy turns signals into a plan. Tables are registered in sched/; the session calls
 * the policy_* wrappers on the first rank of a replica, which check what came back.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_POLICY_H
#define PMPD_CORE_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "core/level.h"
#include "core/plan.h"
#include "core/settings.h"
#include "core/status.h"

/* What a policy wants to see, as a mask. */
enum signal_mask {
    SIGNAL_NONE = 0,
    SIGNAL_LOGITS = 1 << 0,      /* logprob, entropy, margin of every step */
    SIGNAL_KV_FEATURES = 1 << 1, /* last layer's K and V after prefill, mean over heads */
};

/* Known before prefill. */
struct prompt_facts {
    int64_t ordinal; /* in the prompt file */
    int32_t turn;
    const char *task;      /* borrowed; "" when the file names none */
    int32_t n_prompt_tok;  /* of this turn */
    int32_t n_context_tok; /* already in the KV cache */
    int32_t max_new_tokens;
};

/* Known after prefill (step -1) and after every step. */
struct signals {
    int32_t step;                   /* -1: prefill */
    int32_t level;                  /* id it ran at */
    int32_t token;                  /* the token it yielded */
    float logprob, entropy, margin; /* core/sampler.h */
};

struct policy {
    const struct policy_ops *ops;
    void *impl; /* owned by the policy */
    float dial; /* in [0, 1]: how a budget moves a policy */
};

struct policy_ops {
    const char *name;
    const char *help; /* one or two sentences, with the settings it reads */
    uint32_t needs;   /* signal_mask */
    bool adds_tokens; /* may ask for probes: decode passes then use the SLOTS product */
    enum status (*open)(void **impl, const struct settings *settings, struct level_table *levels);
    enum status (*begin)(void *impl, const struct prompt_facts *facts, float dial,
                         int32_t *prefill_level);
    enum status (*plan)(void *impl, const struct prompt_facts *facts, const struct signals *signals,
                        float dial, struct plan *plan);
    enum status (*observe)(void *impl, const struct signals *signals, float dial,
                           int32_t *level_from_next);
    /* Of the files that its plans come from, for the resume key: other contents are another run.
     * "" without files. */
    const char *(*digest)(const void *impl);
    void (*close)(void **impl);
};

/* Level for prefill of a turn. */
MUST_CHECK enum status policy_begin(struct policy *p, const struct prompt_facts *facts,
                                    int32_t *prefill_level);
/* The plan of a turn; plan comes empty but for plan->prefill, which is set. Checked: not empty,
 * levels known. Errors: ST_USER (names the policy). */
MUST_CHECK enum status policy_plan(struct policy *p, const struct prompt_facts *facts,
                                   const struct signals *signals, int32_t n_levels,
                                   struct plan *plan);
/* After a step: *level_from_next is the level that takes effect at the next step and stays, or -1
 * for "as planned". */
MUST_CHECK enum status policy_observe(struct policy *p, const struct signals *signals,
                                      int32_t n_levels, int32_t *level_from_next);
const char *policy_digest(const struct policy *p);
void policy_close(struct policy *p);

#endif
