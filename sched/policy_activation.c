/* One level down when what goes into the matrices is small: a weight that is off by e puts out an
 * error of power e^2 times the mean square of its input, so that small inputs bear fewer bits. The
 * number watched is the mean over matrices of ln(mean square of the input), with its sign turned;
 * the threshold is set by the first steps at a level, as for confidence.
 * Source: PMPD's reference code knows activations (last layer, or mean and variance of all layers)
 * as a scheduler's input; this rule is ours.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <string.h>

#include "core/mem.h"
#include "sched/registry.h"
#include "sched/schedule.h"

struct activation_rule {
    struct schedule s;
    int32_t window;
    double deviations;
    bool last_only;
};

static enum status activation_open(void **impl, const struct settings *settings,
                                   struct level_table *levels)
{
    struct activation_rule a = {.window = settings->policy.window,
                                .deviations = settings->policy.deviations,
                                .last_only = strcmp(settings->policy.activation, "last") == 0};
    TRY(schedule_read(&a.s, settings, levels));
    TRY(mem_alloc_array(impl, 1, sizeof a));
    *(struct activation_rule *)*impl = a;
    return ST_OK;
}

static enum status activation_plan(const void *impl, const struct prompt_facts *facts,
                                   const struct signals *signals, void *state, struct plan *plan)
{
    const struct activation_rule *a = impl;
    bool done = false;
    (void)signals;
    (void)state;
    TRY(schedule_extreme(&a->s, facts->dial, plan, &done));
    return done ? ST_OK : plan_add(plan, 0, a->s.level[0]);
}

/* The mean over matrices of the logarithm of their input's mean square. */
static double log_power(const struct activation_rule *a, const struct signals *signals)
{
    const float tiny = 1e-30f; /* the logarithm of a zero input stays a number */
    double sum = 0;
    int32_t n = 0, first = a->last_only ? signals->n_layers - 1 : 0;
    for (int32_t i = first * M_N_ROLES; i < signals->n_layers * M_N_ROLES; i++) {
        float mean = signals->activation[2 * i], variance = signals->activation[2 * i + 1];
        if (variance > 0 || mean > 0 || mean < 0) { /* else the family has no such matrix */
            sum += log((double)(mean * mean + variance + tiny));
            n++;
        }
    }
    return n > 0 ? sum / n : 0;
}

static enum status activation_observe(const void *impl, const struct prompt_facts *facts,
                                      const struct signals *signals, void *state,
                                      struct amendment *amendment)
{
    const struct activation_rule *a = impl;
    double tilt = schedule_tilt(facts->dial);
    int32_t i = schedule_index(&a->s, signals->level);
    if (isinf(tilt) || i < 0 || i == a->s.n - 1) {
        return ST_OK;
    }
    if (crossing_look(state, i, -log_power(a, signals), a->window, a->deviations + tilt)) {
        amendment->level = a->s.level[i + 1];
    }
    return ST_OK;
}

const struct policy_ops policy_activation = {
    .name = "activation",
    .help = "Goes down policy.levels: one level when the logarithm of the power that goes into the "
            "matrices (policy.activation: of the last layer, or of all) falls policy.deviations "
            "standard deviations below its mean over the first policy.window steps at its level. "
            "The dial adds ln(dial / (1 - dial)) deviations.",
    .needs = SIGNAL_LOGITS | SIGNAL_ACTIVATION,
    .adds_tokens = false,
    .state_bytes = sizeof(struct crossing),
    .open = activation_open,
    .begin = schedule_begin,
    .plan = activation_plan,
    .observe = activation_observe,
    .digest = policy_digest_nothing,
    .close = schedule_close,
};
