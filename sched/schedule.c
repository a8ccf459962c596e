/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/schedule.h"

#include <math.h>
#include <string.h>

#include "core/mem.h"

enum status schedule_read(struct schedule *s, const struct settings *settings,
                          struct level_table *levels)
{
    char text[SETTINGS_TEXT_BYTES], *rest = text, *word = NULL;
    memcpy(text, settings->policy.levels, sizeof text);
    s->n = 0;
    while ((word = strsep(&rest, " \t")) != NULL) {
        if (*word == '\0') {
            continue;
        }
        if (s->n == SCHEDULE_MAX_LEVELS) {
            FAIL(ST_USER, "policy.levels names more than %d levels", SCHEDULE_MAX_LEVELS);
        }
        TRY(level_table_add(levels, word, &s->level[s->n]));
        const struct level *now = &levels->level[s->level[s->n]];
        const struct level *before = s->n > 0 ? &levels->level[s->level[s->n - 1]] : NULL;
        if (before && now->avg_bits >= before->avg_bits) {
            FAIL(
                ST_USER,
                "policy.levels goes from the best level to the cheapest: \"%s\" with %g bits comes "
                "after \"%s\" with %g",
                now->text, (double)now->avg_bits, before->text, (double)before->avg_bits);
        }
        s->n++;
    }
    if (s->n < 2) {
        FAIL(ST_USER,
             "policy.levels = \"%s\"; expected two levels or more, from the best to the cheapest, "
             "e.g. \"4 3 2\"",
             settings->policy.levels);
    }
    return level_table_add(levels, settings->policy.prefill, &s->prefill);
}

enum status schedule_begin(const void *impl, const struct prompt_facts *facts, void *state,
                           int32_t *prefill_level)
{
    (void)facts;
    (void)state;
    *prefill_level = ((const struct schedule *)impl)->prefill;
    return ST_OK;
}

void schedule_close(void **impl)
{
    mem_free(*impl);
    *impl = NULL;
}

int32_t schedule_index(const struct schedule *s, int32_t level)
{
    for (int32_t i = 0; i < s->n; i++) {
        if (s->level[i] == level) {
            return i;
        }
    }
    return -1;
}

double schedule_tilt(float dial)
{
    double d = (double)dial;
    return d <= 0 ? -HUGE_VAL : d >= 1 ? HUGE_VAL : log(d / (1 - d));
}

enum status schedule_extreme(const struct schedule *s, float dial, struct plan *plan, bool *done)
{
    *done = isinf(schedule_tilt(dial));
    return *done ? plan_add(plan, 0, s->level[dial <= 0 ? s->n - 1 : 0]) : ST_OK;
}

enum status schedule_plan(const struct schedule *s, const int32_t *at, int32_t n_steps,
                          struct plan *plan)
{
    int32_t step = 0;
    TRY(plan_amend(plan, 0, s->level[0]));
    for (int32_t p = 0; p < s->n - 1; p++) {
        step = at[p] > step ? at[p] : step;
        if (step < n_steps) {
            TRY(plan_amend(plan, step, s->level[p + 1]));
        }
    }
    return ST_OK;
}

bool crossing_look(struct crossing *c, int32_t index, double value, int32_t window,
                   double deviations)
{
    if (c->place != index + 1) {
        *c = (struct crossing){.place = index + 1};
    }
    if (c->n < window) {
        double off = value - c->mean;
        c->n++;
        c->mean += off / c->n;
        c->squares += off * (value - c->mean);
        return false;
    }
    return value >= c->mean + deviations * sqrt(c->squares / c->n);
}
