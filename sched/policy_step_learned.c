/* A small classifier per neighbouring pair of levels looks again and again at what decoding has
 * looked like so far (sched/step_window.h) and says "stay" or "drop now". Ours: PMPD's learned
 * scheduler sees the prompt only.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>

#include "core/mem.h"
#include "sched/classifier_list.h"
#include "sched/registry.h"
#include "sched/schedule.h"
#include "sched/step_window.h"

struct step_learned {
    struct schedule s;
    int32_t every;
    struct classifier_list list; /* owned */
};

enum { STAY, DROP, N_ANSWERS };

static void step_learned_close(void **impl)
{
    struct step_learned *l = *impl;
    if (l) {
        classifier_list_free(&l->list);
    }
    schedule_close(impl);
}

static enum status step_learned_open(void **impl, const struct settings *settings,
                                     struct level_table *levels)
{
    enum status st = ST_OK;
    struct step_learned *l = NULL;
    const struct classifier_use use = {.kind = CLASSIFIER_STEP, .n_in = STEP_WINDOW_N};
    TRY(mem_alloc_array(impl, 1, sizeof *l));
    l = *impl;
    l->every = settings->policy.every;
    TRY_GOTO(st, schedule_read(&l->s, settings, levels), fail);
    TRY_GOTO(st, classifier_list_read(&l->list, &l->s, levels, settings, &use), fail);
    for (int32_t p = 0; p < l->list.n; p++) {
        if (l->list.classifier[p].shape.n_classes != N_ANSWERS) {
            FAIL_GOTO(st, ST_USER, fail,
                      "the step classifier of pair %d has %d classes; expected \"stay\" and "
                      "\"drop now\"",
                      p, l->list.classifier[p].shape.n_classes);
        }
    }
    return ST_OK;
fail:
    step_learned_close(impl);
    return st;
}

/* Is `step` the one at which pair i drops? */
static enum status look(const struct step_learned *l, int32_t i, const struct step_window *w,
                        int32_t step, const struct prompt_facts *facts, bool *drop)
{
    float x[STEP_WINDOW_N], probability[CLASSIFIER_MAX_CLASSES];
    step_window_vector(w, step, facts->max_new_tokens, x);
    TRY(classifier_evaluate(&l->list.classifier[i], x, 1, l->list.scratch, probability));
    *drop = log((double)probability[DROP]) - log((double)probability[STAY]) >
            schedule_tilt(facts->dial);
    return ST_OK;
}

static enum status step_learned_plan(const void *impl, const struct prompt_facts *facts,
                                     const struct signals *signals, void *state, struct plan *plan)
{
    const struct step_learned *l = impl;
    struct step_window *w = state;
    bool done = false;
    TRY(schedule_extreme(&l->s, facts->dial, plan, &done));
    if (done) {
        return ST_OK;
    }
    step_window_add(w, signals->logprob, signals->entropy, signals->margin);
    TRY(look(l, 0, w, 0, facts, &done));
    return plan_add(plan, 0, l->s.level[done ? 1 : 0]);
}

static enum status step_learned_observe(const void *impl, const struct prompt_facts *facts,
                                        const struct signals *signals, void *state,
                                        struct amendment *amendment)
{
    const struct step_learned *l = impl;
    struct step_window *w = state;
    bool drop = false;
    int32_t i = schedule_index(&l->s, signals->level), next = signals->step + 1;
    step_window_add(w, signals->logprob, signals->entropy, signals->margin);
    if (isinf(schedule_tilt(facts->dial)) || i < 0 || i == l->s.n - 1 || next % l->every != 0) {
        return ST_OK;
    }
    TRY(look(l, i, w, next, facts, &drop));
    if (drop) {
        amendment->level = l->s.level[i + 1];
    }
    return ST_OK;
}

static const char *step_learned_digest(const void *impl)
{
    return ((const struct step_learned *)impl)->list.digest;
}

const struct policy_ops policy_step_learned = {
    .name = "step-learned",
    .help = "Goes down policy.levels when a step classifier (policy.classifier), asked before step "
            "0 and every policy.every steps, says so from the log-probabilities, entropies and "
            "margins so far. The dial: it drops when the odds of \"drop now\" exceed dial / (1 - "
            "dial).",
    .needs = SIGNAL_LOGITS,
    .adds_tokens = false,
    .state_bytes = sizeof(struct step_window),
    .open = step_learned_open,
    .begin = schedule_begin,
    .plan = step_learned_plan,
    .observe = step_learned_observe,
    .digest = step_learned_digest,
    .close = step_learned_close,
};
