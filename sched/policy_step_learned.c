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
enum { MOST_TOGETHER = 64 }; /* prompts in a batch */

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

/* Takes in what a request tells. *pair: the pair that is asked now whether it drops; -1: none. A
 * plan that needs no question is made. */
static enum status take_in(const struct step_learned *l, struct policy_request *r, int32_t *pair)
{
    const struct signals *signals = r->signals;
    bool done = false;
    *pair = -1;
    step_window_add(r->state, signals->logprob, signals->entropy, signals->margin);
    if (signals->step < 0) {
        TRY(schedule_extreme(&l->s, r->facts->dial, r->plan, &done));
        *pair = done ? -1 : 0;
    } else if (!isinf(schedule_tilt(r->facts->dial)) && (signals->step + 1) % l->every == 0) {
        int32_t i = schedule_index(&l->s, signals->level);
        *pair = i < l->s.n - 1 ? i : -1;
    }
    return ST_OK;
}

static enum status decide(const struct step_learned *l, struct policy_request *r, int32_t pair,
                          const float *probability)
{
    double odds = log((double)probability[DROP]) - log((double)probability[STAY]);
    int32_t level = l->s.level[odds > schedule_tilt(r->facts->dial) ? pair + 1 : pair];
    if (r->signals->step < 0) {
        return plan_add(r->plan, 0, level);
    }
    r->amendment.level = level == r->signals->level ? -1 : level;
    return ST_OK;
}

/* At most MOST_TOGETHER prompts: pair by pair, one batch each. */
static enum status answer_some(const struct step_learned *l, struct policy_request *requests,
                               int32_t n)
{
    struct classifier_item items[MOST_TOGETHER];
    float probability[MOST_TOGETHER][CLASSIFIER_MAX_CLASSES], x[MOST_TOGETHER][STEP_WINDOW_N];
    int32_t pair[MOST_TOGETHER], who[MOST_TOGETHER];
    for (int32_t i = 0; i < n; i++) {
        TRY(take_in(l, &requests[i], &pair[i]));
    }
    for (int32_t p = 0; p < l->list.n; p++) {
        int32_t n_items = 0;
        for (int32_t i = 0; i < n; i++) {
            if (pair[i] == p) {
                step_window_vector(requests[i].state, requests[i].signals->step + 1,
                                   requests[i].facts->max_new_tokens, x[i]);
                items[n_items] = (struct classifier_item){
                    .features = x[i], .n_tok = 1, .probabilities = probability[i]};
                who[n_items++] = i;
            }
        }
        if (n_items > 0) {
            TRY(classifier_evaluate_batch(&l->list.classifier[p], items, n_items, l->list.scratch));
        }
        for (int32_t k = 0; k < n_items; k++) {
            TRY(decide(l, &requests[who[k]], p, probability[who[k]]));
        }
    }
    return ST_OK;
}

static enum status step_learned_answer(const void *impl, struct policy_request *requests, int32_t n)
{
    for (int32_t from = 0; from < n; from += MOST_TOGETHER) {
        int32_t left = n - from;
        TRY(answer_some(impl, requests + from, left < MOST_TOGETHER ? left : MOST_TOGETHER));
    }
    return ST_OK;
}

static enum status step_learned_plan(const void *impl, const struct prompt_facts *facts,
                                     const struct signals *signals, void *state, struct plan *plan)
{
    struct policy_request r = {.facts = facts, .signals = signals, .state = state, .plan = plan};
    return step_learned_answer(impl, &r, 1);
}

static enum status step_learned_observe(const void *impl, const struct prompt_facts *facts,
                                        const struct signals *signals, void *state,
                                        struct amendment *amendment)
{
    struct policy_request r = {
        .facts = facts, .signals = signals, .state = state, .amendment = *amendment};
    TRY(step_learned_answer(impl, &r, 1));
    *amendment = r.amendment;
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
    .answer = step_learned_answer,
    .digest = step_learned_digest,
    .close = step_learned_close,
};
