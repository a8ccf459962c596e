/* A classifier per neighbouring pair of levels looks at the last layer's K and V after prefill and
 * names the class at which the pair switches. "learned" sees the mean over heads, "learned-heads"
 * every head.
 * Source: the PMPD paper (arXiv 2410.13461), learned scheduler.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>

#include "core/mem.h"
#include "sched/classifier_list.h"
#include "sched/registry.h"
#include "sched/schedule.h"

enum { MOST_TOGETHER = 64 }; /* prompts in a batch */

struct learned {
    struct schedule s;
    struct classifier_list list; /* owned */
};

static void learned_close(void **impl)
{
    struct learned *l = *impl;
    if (l) {
        classifier_list_free(&l->list);
    }
    schedule_close(impl);
}

static enum status open_with(void **impl, const struct settings *settings,
                             struct level_table *levels, int32_t n_heads)
{
    enum status st = ST_OK;
    struct learned *l = NULL;
    struct classifier_use use = {
        .kind = CLASSIFIER_KV, .n_kv_heads = n_heads, .head_dim = levels->config->head_dim};
    TRY(mem_alloc_array(impl, 1, sizeof *l));
    l = *impl;
    TRY_GOTO(st, schedule_read(&l->s, settings, levels), fail);
    TRY_GOTO(st, classifier_list_read(&l->list, &l->s, levels, settings, &use), fail);
    return ST_OK;
fail:
    learned_close(impl);
    return st;
}

static enum status learned_open(void **impl, const struct settings *settings,
                                struct level_table *levels)
{
    return open_with(impl, settings, levels, 1);
}

static enum status learned_heads_open(void **impl, const struct settings *settings,
                                      struct level_table *levels)
{
    return open_with(impl, settings, levels, levels->config->n_kv_heads);
}

/* The class with the largest ln(probability) + tilt * (its part of max_new_tokens): a larger tilt
 * never chooses an earlier one. The first of equals. */
static int32_t choose(const struct classifier *c, const float *probability, double tilt)
{
    int32_t n = c->shape.n_classes, best = 0;
    double best_score = -INFINITY;
    if (isinf(tilt)) {
        return tilt > 0 ? n - 1 : 0;
    }
    for (int32_t i = 0; i < n; i++) {
        double score = log((double)probability[i]) + tilt * c->facts.class_at[i];
        if (score > best_score) {
            best = i;
            best_score = score;
        }
    }
    return best;
}

/* At most MOST_TOGETHER prompts: pair by pair, one batch each. */
static enum status answer_some(const struct learned *l, struct policy_request *requests, int32_t n)
{
    struct classifier_item items[MOST_TOGETHER];
    float probability[MOST_TOGETHER][CLASSIFIER_MAX_CLASSES];
    int32_t at[MOST_TOGETHER][SCHEDULE_MAX_LEVELS];
    for (int32_t i = 0; i < n; i++) {
        items[i] = (struct classifier_item){.features = requests[i].signals->features,
                                            .n_tok = requests[i].signals->n_feature_tok,
                                            .probabilities = probability[i]};
    }
    for (int32_t p = 0; p < l->list.n; p++) {
        const struct classifier *c = &l->list.classifier[p];
        TRY(classifier_evaluate_batch(c, items, n, l->list.scratch));
        for (int32_t i = 0; i < n; i++) {
            const struct prompt_facts *facts = requests[i].facts;
            at[i][p] = classifier_switch_step(
                c, choose(c, probability[i], schedule_tilt(facts->dial)), facts->max_new_tokens);
        }
    }
    for (int32_t i = 0; i < n; i++) {
        TRY(schedule_plan(&l->s, at[i], requests[i].facts->max_new_tokens, requests[i].plan));
    }
    return ST_OK;
}

static enum status learned_answer(const void *impl, struct policy_request *requests, int32_t n)
{
    for (int32_t from = 0; from < n; from += MOST_TOGETHER) {
        int32_t left = n - from;
        TRY(answer_some(impl, requests + from, left < MOST_TOGETHER ? left : MOST_TOGETHER));
    }
    return ST_OK;
}

static enum status learned_plan(const void *impl, const struct prompt_facts *facts,
                                const struct signals *signals, void *state, struct plan *plan)
{
    struct policy_request r = {.facts = facts, .signals = signals, .state = state, .plan = plan};
    return learned_answer(impl, &r, 1);
}

static const char *learned_digest(const void *impl)
{
    return ((const struct learned *)impl)->list.digest;
}

const struct policy_ops policy_learned = {
    .name = "learned",
    .help = "Goes down policy.levels at steps that classifiers (policy.classifier) choose from the "
            "last layer's K and V after prefill, mean over heads. The dial weighs each class's "
            "probability by (dial / (1 - dial)) to the power of its part of max_new_tokens.",
    .needs = SIGNAL_KV_FEATURES,
    .adds_tokens = false,
    .open = learned_open,
    .begin = schedule_begin,
    .plan = learned_plan,
    .observe = policy_observe_nothing,
    .answer = learned_answer,
    .digest = learned_digest,
    .close = learned_close,
};

const struct policy_ops policy_learned_heads = {
    .name = "learned-heads",
    .help = "learned with classifiers that look at every KV head.",
    .needs = SIGNAL_KV_HEADS,
    .adds_tokens = false,
    .open = learned_heads_open,
    .begin = schedule_begin,
    .plan = learned_plan,
    .observe = policy_observe_nothing,
    .answer = learned_answer,
    .digest = learned_digest,
    .close = learned_close,
};
