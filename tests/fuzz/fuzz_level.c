/* Texts of levels and plans, one per line, against a model that the first byte chooses.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/plan.h"
#include "tests/fuzz/fuzz.h"

enum { PLAN_POINTS = 16 };

static void check_levels(const struct level_table *t)
{
    INVARIANT(t->n >= 0 && t->n <= LEVEL_TABLE_MAX);
    for (int i = 0; i < t->n; i++) {
        const struct level *l = &t->level[i];
        int32_t id = -1;
        INVARIANT(strlen(l->text) > 0 && strlen(l->text) < LEVEL_TEXT_BYTES);
        INVARIANT(fuzz_ok(level_table_add((struct level_table *)t, l->text, &id)) && id == i);
        for (int k = 0; k < t->config->n_layers * M_N_ROLES; k++) {
            INVARIANT(t->held ? t->held >> l->bits[k] & 1 : l->bits[k] == 0);
        }
        INVARIANT(t->head_held ? t->head_held >> l->head_bits & 1 : l->head_bits == 0);
        INVARIANT(l->avg_bits > 0 && l->avg_bits <= (float)l->max_bits && l->head_avg_bits > 0);
    }
}

/* A plan that was read, written as text, reads back to the same. */
static void check_plan(const struct plan *plan, struct level_table *t)
{
    static char text[(PLAN_POINTS + 1) * (LEVEL_TEXT_BYTES + 16)];
    struct plan back;
    INVARIANT(plan->n >= 1 && plan->n <= plan->capacity && plan->at[0].step == 0);
    int used = sprintf(text, "prefill:%s", t->level[plan->prefill].text);
    for (int i = 0; i < plan->n; i++) {
        INVARIANT(plan->at[i].level >= 0 && plan->at[i].level < t->n);
        INVARIANT(i == 0 || plan->at[i].step > plan->at[i - 1].step);
        INVARIANT(plan_level(plan, plan->at[i].step) == plan->at[i].level);
        used += sprintf(text + used, " %d:%s", plan->at[i].step, t->level[plan->at[i].level].text);
    }
    INVARIANT(plan_create(&back, PLAN_POINTS) == ST_OK);
    INVARIANT(plan_parse(&back, t, text, "") == ST_OK);
    INVARIANT(back.n == plan->n && back.prefill == plan->prefill);
    INVARIANT(memcmp(back.at, plan->at, (size_t)plan->n * sizeof *plan->at) == 0);
    plan_free(&back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct {
        uint32_t held, head_held;
    } masks[] = {{0, 0}, {0x1C, 0}, {0x1C, 0x1C}, {0x11E, 0x10}};
    struct fuzz_bytes first = {data, data + size};
    unsigned kind = fuzz_u8(&first);
    struct model_config c = {.family = (enum model_family)(kind / 4 % FAMILY_N),
                             .hidden = 64,
                             .n_layers = 1 + (int)(kind / 64 * 11),
                             .n_heads = 4,
                             .n_kv_heads = 2,
                             .head_dim = 16,
                             .ffn = 96,
                             .vocab = 100};
    struct level_table levels;
    struct plan plan;
    level_table_init(&levels, &c, masks[kind % 4].held, masks[kind % 4].head_held, 16, 32);
    INVARIANT(plan_create(&plan, PLAN_POINTS) == ST_OK);
    struct fuzz_part rest = {(const char *)first.at, (size_t)(first.end - first.at)};
    char *text = fuzz_text(&rest), *at = text, *line;
    while ((line = strsep(&at, "\n")) != NULL) {
        int32_t id = -1;
        if (strchr(line, ':')) {
            if (fuzz_ok(plan_parse(&plan, &levels, line, "max"))) {
                check_plan(&plan, &levels);
            }
        } else if (fuzz_ok(level_table_add(&levels, line, &id))) {
            INVARIANT(id >= 0 && id < levels.n);
        }
    }
    check_levels(&levels);
    free(text);
    plan_free(&plan);
    level_table_release(&levels);
    return 0;
}
