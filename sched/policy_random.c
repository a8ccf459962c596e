/* Switch points drawn per prompt and pair of levels from a few classes, all alike or by a prior:
 * the control of learned. Drawn by the counter-based generator from (decode.seed, prompt, turn,
 * pair), so that a prompt's plan depends on nothing else. Source: PMPD's reference code, random
 * scheduler (PMPD: arXiv 2410.13461), whose classes are 0, T/3, 2T/3 and T of T = max_new_tokens.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/sampler.h"
#include "sched/registry.h"
#include "sched/schedule.h"

enum { MOST_CLASSES = 64, MOST_PARTS = 1000000 };

struct random_switches {
    struct schedule s;
    uint64_t seed;
    int32_t n;
    int64_t part[MOST_CLASSES], of[MOST_CLASSES]; /* class c switches at step T * part / of */
    double upto[MOST_CLASSES];                    /* sum of the weights of classes 0..c */
};

/* "1/3" or "0.25", in [0, 1]. */
static enum status read_class(const char *word, int64_t *part, int64_t *of)
{
    char *end = NULL;
    double x = strtod(word, &end);
    *part = llround(x * MOST_PARTS);
    *of = MOST_PARTS;
    if (end != word && *end == '/') {
        const char *below = end + 1;
        *part = strtoll(word, &end, 10);
        *of = *end == '/' ? strtoll(below, &end, 10) : 0;
        x = *of > 0 ? (double)*part / (double)*of : -1;
    }
    if (end == word || *end != '\0' || !(x >= 0 && x <= 1) || *of > MOST_PARTS) {
        FAIL(ST_USER,
             "policy.classes: \"%s\" is no part of the whole; expected 0 to 1, as 1/3 or "
             "0.25",
             word);
    }
    return ST_OK;
}

static enum status read_classes(struct random_switches *r, const char *setting)
{
    char text[SETTINGS_TEXT_BYTES], *rest = text, *word = NULL;
    memcpy(text, setting, sizeof text);
    while ((word = strsep(&rest, " \t")) != NULL) {
        if (*word == '\0') {
            continue;
        }
        if (r->n == MOST_CLASSES) {
            FAIL(ST_USER, "policy.classes names more than %d", MOST_CLASSES);
        }
        TRY(read_class(word, &r->part[r->n], &r->of[r->n]));
        if (r->n > 0 && r->part[r->n] * r->of[r->n - 1] <= r->part[r->n - 1] * r->of[r->n]) {
            FAIL(ST_USER, "policy.classes ascend; \"%s\" does not", word);
        }
        r->n++;
    }
    if (r->n == 0) {
        FAIL(ST_USER, "policy.classes is empty; expected e.g. \"0 1/3 2/3 1\"");
    }
    return ST_OK;
}

/* Without a prior all classes weigh alike. */
static enum status read_prior(struct random_switches *r, const char *setting)
{
    char text[SETTINGS_TEXT_BYTES], *rest = text, *word = NULL;
    double sum = 0;
    int32_t n = 0;
    memcpy(text, setting, sizeof text);
    while ((word = strsep(&rest, " \t")) != NULL) {
        if (*word == '\0') {
            continue;
        }
        char *end = NULL;
        double weight = strtod(word, &end);
        if (*end != '\0' || !(weight >= 0) || isinf(weight)) {
            FAIL(ST_USER, "policy.prior: \"%s\" is no weight; expected a number from 0 up", word);
        }
        sum += weight;
        if (n < r->n) {
            r->upto[n] = sum;
        }
        n++;
    }
    for (int32_t c = 0; n == 0 && c < r->n; c++) {
        r->upto[c] = sum += 1;
    }
    if ((n != 0 && n != r->n) || !(sum > 0)) {
        FAIL(
            ST_USER,
            "policy.prior = \"%s\": expected %d weights, one for each of policy.classes, not all 0",
            setting, r->n);
    }
    return ST_OK;
}

static enum status random_open(void **impl, const struct settings *settings,
                               struct level_table *levels)
{
    struct random_switches r = {.seed = (uint64_t)settings->decode.seed};
    TRY(schedule_read(&r.s, settings, levels));
    TRY(read_classes(&r, settings->policy.classes));
    TRY(read_prior(&r, settings->policy.prior));
    TRY(mem_alloc_array(impl, 1, sizeof r));
    *(struct random_switches *)*impl = r;
    return ST_OK;
}

/* Uniform in (0, 1). */
static double draw(const struct random_switches *r, const struct prompt_facts *facts, int32_t pair)
{
    const uint32_t purpose = 0x80000000u; /* sampling counts its steps below this */
    uint64_t key[2];
    sampler_key(key, r->seed, (uint64_t)facts->ordinal, (uint32_t)facts->turn,
                purpose + (uint32_t)pair);
    return ((double)(uint32_t)key[0] + 0.5) * 0x1p-32;
}

static enum status random_plan(const void *impl, const struct prompt_facts *facts,
                               const struct signals *signals, void *state, struct plan *plan)
{
    const struct random_switches *r = impl;
    int32_t at[SCHEDULE_MAX_LEVELS];
    (void)signals;
    (void)state;
    for (int32_t p = 0; p < r->s.n - 1; p++) {
        double u = draw(r, facts, p) + 2 * (double)facts->dial - 1;
        int32_t c = 0;
        while (c < r->n - 1 && r->upto[c] <= u * r->upto[r->n - 1]) {
            c++;
        }
        at[p] = (int32_t)(facts->max_new_tokens * r->part[c] / r->of[c]);
    }
    return schedule_plan(&r->s, at, facts->max_new_tokens, plan);
}

const struct policy_ops policy_random = {
    .name = "random",
    .help = "Goes down policy.levels at steps drawn per prompt from policy.classes, weighted by "
            "policy.prior: the control of learned. The dial moves the drawn number u to u + 2 dial "
            "- 1: towards later classes above 0.5, earlier ones below.",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = random_open,
    .begin = schedule_begin,
    .plan = random_plan,
    .observe = policy_observe_nothing,
    .digest = policy_digest_nothing,
    .close = schedule_close,
};
