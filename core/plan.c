/* SPDX-License-Identifier: Apache-2.0 */
#include "core/plan.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"

enum status plan_create(struct plan *plan, int32_t capacity)
{
    *plan = (struct plan){.capacity = capacity};
    return MEM_NEW(&plan->at, capacity);
}

void plan_free(struct plan *plan)
{
    mem_free(plan->at);
    *plan = (struct plan){0};
}

void plan_clear(struct plan *plan)
{
    plan->n = 0;
    plan->prefill = 0;
}

enum status plan_add(struct plan *plan, int32_t step, int32_t level)
{
    if (plan->n == 0 && step != 0) {
        FAIL(ST_USER, "a plan begins at step 0, found %d first", step);
    }
    if (plan->n > 0 && step <= plan->at[plan->n - 1].step) {
        FAIL(ST_USER, "the steps of a plan ascend: found %d after %d", step,
             plan->at[plan->n - 1].step);
    }
    if (plan->n > 0 && plan->at[plan->n - 1].level == level) {
        return ST_OK;
    }
    if (plan->n == plan->capacity) {
        FAIL(ST_USER, "a plan has more than %d switch points", plan->capacity);
    }
    plan->at[plan->n++] = (struct plan_switch){step, level};
    return ST_OK;
}

int32_t plan_level(const struct plan *plan, int32_t step)
{
    INVARIANT(plan->n > 0 && step >= 0);
    int32_t lo = 0, hi = plan->n; /* at[lo].step <= step < at[hi].step */
    while (hi - lo > 1) {
        int32_t mid = lo + (hi - lo) / 2;
        if (plan->at[mid].step <= step) {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    return plan->at[lo].level;
}

enum status plan_amend(struct plan *plan, int32_t step, int32_t level)
{
    while (plan->n > 0 && plan->at[plan->n - 1].step >= step) {
        plan->n--;
    }
    return plan_add(plan, step, level);
}

static enum status parse_word(struct plan *plan, struct level_table *levels, char *word,
                              bool *has_prefill)
{
    char *colon = strchr(word, ':');
    if (!colon) {
        FAIL(ST_USER, "a plan's words are STEP:LEVEL or prefill:LEVEL, found \"%s\"", word);
    }
    *colon = '\0';
    int32_t level = 0;
    TRY(level_table_add(levels, colon + 1, &level));
    if (strcmp(word, "prefill") == 0) {
        if (*has_prefill) {
            FAIL(ST_USER, "a plan has one prefill level, found two");
        }
        *has_prefill = true;
        plan->prefill = level;
        return ST_OK;
    }
    char *end = NULL;
    long step = strtol(word, &end, 10);
    if (end == word || *end != '\0' || step < 0 || step > INT32_MAX) {
        FAIL(ST_USER, "expected a step number before \":\", found \"%s\"", word);
    }
    return plan_add(plan, (int32_t)step, level);
}

enum status plan_parse(struct plan *plan, struct level_table *levels, const char *text,
                       const char *prefill)
{
    enum status st = ST_OK;
    char *copy = NULL, *rest = NULL, *word = NULL;
    bool has_prefill = false;
    plan_clear(plan);
    TRY(mem_strdup(&copy, text));
    rest = copy;
    while ((word = strsep(&rest, " \t\n")) != NULL) {
        if (*word) {
            TRY_GOTO(st, parse_word(plan, levels, word, &has_prefill), done);
        }
    }
    if (plan->n == 0) {
        FAIL_GOTO(st, ST_USER, done,
                  "the plan \"%s\" has no step; expected e.g. \"prefill:4 0:4 16:2\"", text);
    }
    if (!has_prefill) {
        TRY_GOTO(st, level_table_add(levels, prefill, &plan->prefill), done);
    }
done:
    mem_free(copy);
    return st;
}
