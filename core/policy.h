/* DOOR 3: a policy turns signals into a plan. Tables are registered in sched/; the session calls
 * the policy_* wrappers, which check what came back, on the first rank of a replica or wherever the
 * replica's plans are made.
 *
 * A policy is asked about one turn of one prompt at a time: begin before its prefill, plan after
 * it, observe after every step if it needs SIGNAL_LOGITS. What it remembers of the turn lies in
 * `state`: ops->state_bytes of memory of the caller's, aligned for any type, zeroed before begin.
 * impl is constant after open. Answers depend on facts, signals and state only: never on time, on
 * ranks or threads, or on which other prompts are there.
 *
 * The dial, facts->dial in [0, 1], is how a budget moves a policy: 1 asks for the best quality, 0
 * for the fewest bits. A policy's help says what it does with it. With two levels, an equal prompt
 * and equal signals, a larger dial never gives the lower level where a smaller one gives the
 * higher. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_POLICY_H
#define PMPD_CORE_POLICY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/level.h"
#include "core/plan.h"
#include "core/settings.h"
#include "core/status.h"

/* What a policy wants to see, as a mask. What stands without a bit is always there. */
enum signal_mask {
    SIGNAL_NONE = 0,
    SIGNAL_LOGITS = 1 << 0,      /* asks observe() after every step; else it is never called */
    SIGNAL_KV_FEATURES = 1 << 1, /* features after prefill, mean over heads */
    SIGNAL_KV_HEADS = 1 << 2,    /* the same, every head */
    SIGNAL_HIDDEN = 1 << 3,      /* hidden_mean, hidden_rms */
    SIGNAL_KV_NORMS = 1 << 4,    /* k_norm, v_norm */
    SIGNAL_ACTIVATION = 1 << 5,  /* activation */
    SIGNALS_MEASURED = SIGNAL_HIDDEN | SIGNAL_KV_NORMS | SIGNAL_ACTIVATION, /* core/meter.h */
};

/* Known before prefill. */
struct prompt_facts {
    int64_t ordinal; /* in the prompt file */
    int32_t turn;
    const char *id, *task; /* borrowed, of the prompt; "" when the file names none. No id where
                              another rank than the prompt's replica answers */
    int32_t n_prompt_tok;  /* of this turn */
    int32_t n_context_tok; /* already in the KV cache */
    int32_t max_new_tokens;
    float dial; /* of this prompt's lease */
};

/* Known after prefill (step -1) and after every step, of the position that yielded the token. All
 * of them are the same bits for every number of tensor ranks under parallel.reproducible. */
struct signals {
    int32_t step;   /* -1: prefill */
    int32_t level;  /* id it ran at */
    int32_t token;  /* the token it yielded */
    float logprob;  /* nats, of that token at temperature 1 */
    float entropy;  /* nats */
    float margin;   /* largest minus second largest logit */
    float max_prob; /* probability of the most likely token */

    /* NaN without their bit. SIGNAL_HIDDEN: of the final norm's input (hidden): its mean and root
     * of the mean square. */
    float hidden_mean, hidden_rms;
    /* SIGNAL_KV_NORMS: Euclidean norms of the new K and V rows of the last layer, all KV heads
     * together. */
    float k_norm, v_norm;
    /* SIGNAL_ACTIVATION: (n_layers, M_N_ROLES, 2) borrowed for the call: mean and variance of the
     * input of every linear layer; zeros for matrices that the family lacks. Else NULL. */
    const float *activation;
    int32_t n_layers;
    /* SIGNAL_KV_FEATURES, SIGNAL_KV_HEADS, step -1 only: K and V of the last layer, (2,
     * n_feature_heads, n_feature_tok, feature_dim), K first, borrowed for the call; one head is the
     * mean over heads. Of the slot's whole context, n_context_tok + n_prompt_tok tokens. Else NULL.
     */
    const float *features;
    int32_t n_feature_heads, n_feature_tok, feature_dim;

    /* The answer to a probe: the token of this step also ran at probe_level; -1 without one.
     * probe_kl, nats: KL(p || q) of the distribution p at probe_level from q of the step. */
    int32_t probe_level;
    float probe_kl;
};

/* What observe answers. It takes effect at the next step (with a service, service.lag steps on). */
struct amendment {
    int32_t level; /* in force from there on; -1: as planned */
    int32_t probe; /* run that one step's token at this level, too; -1: no probe */
};

/* One question to a policy, and its answer. */
struct policy_request {
    const struct prompt_facts *facts;
    const struct signals *signals; /* step -1: a plan is asked for, else an amendment */
    void *state;                   /* of this turn */
    struct plan *plan;             /* answer to step -1; comes empty but for plan->prefill */
    struct amendment amendment;    /* answer to other steps; comes as {-1, -1} */
};

struct policy {
    const struct policy_ops *ops;
    void *impl; /* owned by the policy */
    float dial; /* policy.dial: of every prompt where no budget moves it */
};

struct policy_ops {
    const char *name;
    const char *help; /* one or two sentences, with the settings it reads and what the dial does */
    uint32_t needs;   /* signal_mask */
    bool adds_tokens; /* may ask for probes: decode passes then use the SLOTS product */
    size_t state_bytes; /* of one turn; 0: none, state is then NULL */
    enum status (*open)(void **impl, const struct settings *settings, struct level_table *levels);
    enum status (*begin)(const void *impl, const struct prompt_facts *facts, void *state,
                         int32_t *prefill_level);
    enum status (*plan)(const void *impl, const struct prompt_facts *facts,
                        const struct signals *signals, void *state, struct plan *plan);
    /* amendment comes as {-1, -1} */
    enum status (*observe)(const void *impl, const struct prompt_facts *facts,
                           const struct signals *signals, void *state, struct amendment *amendment);
    /* Answers n requests of different turns together, each as plan() or observe() would, bit for
     * bit, whatever company it is in. A policy with this slot is asked by the scheduler service
     * (dist/service.h), which gathers requests of waiting replicas; NULL: nothing is won by that,
     * and plan() and observe() are called on the first rank of the replica. */
    enum status (*answer)(const void *impl, struct policy_request *requests, int32_t n);
    /* Of the files that its plans come from, for the resume key: other contents are another run.
     * "" without files. */
    const char *(*digest)(const void *impl);
    void (*close)(void **impl);
};

/* Level for prefill of a turn. Zeroes state. Errors: ST_USER (names the policy). */
MUST_CHECK enum status policy_begin(const struct policy *p, const struct prompt_facts *facts,
                                    void *state, int32_t n_levels, int32_t *prefill_level);
/* The plan of a turn; plan comes empty but for plan->prefill, which is set. Checked: not empty,
 * levels known. Errors: ST_USER (names the policy). */
MUST_CHECK enum status policy_plan(const struct policy *p, const struct prompt_facts *facts,
                                   const struct signals *signals, void *state, int32_t n_levels,
                                   struct plan *plan);
/* After a step. Errors: ST_USER (names the policy). */
MUST_CHECK enum status policy_observe(const struct policy *p, const struct prompt_facts *facts,
                                      const struct signals *signals, void *state, int32_t n_levels,
                                      struct amendment *amendment);
/* n requests at once: through ops->answer where there is one, else one by one; the answers are
 * checked as those of policy_plan and policy_observe. Errors: ST_USER (names the policy). */
MUST_CHECK enum status policy_answer(const struct policy *p, struct policy_request *requests,
                                     int32_t n, int32_t n_levels);
const char *policy_digest(const struct policy *p);
void policy_close(struct policy *p);

#endif
