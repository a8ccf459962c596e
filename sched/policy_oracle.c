/* The best plan of every prompt, found by trying: with one switch each, the upper bound of what any
 * schedule of that kind can reach. experiments/report/oracle.py makes the file from scored runs.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/json.h"
#include "core/mem.h"
#include "sched/registry.h"

struct best_plan {
    char *id; /* owned */
    int32_t turn;
    struct plan plan; /* owned */
};

struct oracle {
    char path[SETTINGS_PATH_BYTES]; /* for messages */
    char digest[DIGEST_TEXT];
    int32_t n;
    struct best_plan *best; /* (n) owned, by id and turn */
};

static void oracle_close(void **impl)
{
    struct oracle *o = *impl;
    if (o) {
        for (int32_t i = 0; o->best && i < o->n; i++) {
            mem_free(o->best[i].id);
            plan_free(&o->best[i].plan);
        }
        mem_free(o->best);
        mem_free(o);
    }
    *impl = NULL;
}

static int by_id_and_turn(const void *a, const void *b)
{
    const struct best_plan *x = a, *y = b;
    int order = strcmp(x->id, y->id);
    return order != 0 ? order : (x->turn > y->turn) - (x->turn < y->turn);
}

static enum status take_object(struct best_plan *out, const json_t *object, const char *where,
                               struct level_table *levels, const char *prefill)
{
    const char *id = NULL, *text = NULL;
    int32_t n_points = 0;
    TRY(json_get_string(&id, object, "id", where));
    TRY(json_get_i32_or(&out->turn, object, "turn", 0, INT32_MAX, 0, where));
    TRY(json_get_string(&text, object, "plan", where));
    for (const char *c = text; *c; c++) {
        n_points += *c == ':';
    }
    TRY(mem_strdup(&out->id, id));
    TRY(plan_create(&out->plan, n_points > 0 ? n_points : 1));
    enum status st = plan_parse(&out->plan, levels, text, prefill);
    return st == ST_OK ? ST_OK : status_prefix(st, "%s: ", where);
}

static enum status read_lines(struct oracle *o, char *text, const struct settings *settings,
                              struct level_table *levels)
{
    char *rest = text, *line = NULL;
    size_t n_lines = 1;
    for (const char *c = text; *c; c++) {
        n_lines += *c == '\n';
    }
    TRY(MEM_NEW(&o->best, n_lines));
    for (int number = 1; (line = strsep(&rest, "\n")) != NULL; number++) {
        char where[SETTINGS_PATH_BYTES + 16];
        json_t *object = NULL;
        if (line[strspn(line, " \t\r")] == '\0') {
            continue;
        }
        snprintf(where, sizeof where, "%s:%d", o->path, number);
        TRY(json_read_text(&object, line, strlen(line), where));
        enum status st =
            take_object(&o->best[o->n++], object, where, levels, settings->policy.prefill);
        json_release(&object);
        TRY(st);
    }
    return ST_OK;
}

static enum status oracle_open(void **impl, const struct settings *settings,
                               struct level_table *levels)
{
    enum status st = ST_OK;
    struct oracle *o = NULL;
    char *text = NULL;
    if (settings->policy.oracle[0] == '\0') {
        FAIL(ST_USER, "policy.oracle is empty; expected the file with the plan of every prompt");
    }
    TRY(mem_alloc_array(impl, 1, sizeof *o));
    o = *impl;
    memcpy(o->path, settings->policy.oracle, sizeof o->path);
    TRY_GOTO(st, settings_read_file(&text, o->path), fail);
    XXH128_hash_t h = XXH3_128bits(text, strlen(text));
    snprintf(o->digest, sizeof o->digest, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
    TRY_GOTO(st, read_lines(o, text, settings, levels), fail);
    qsort(o->best, (size_t)o->n, sizeof *o->best, by_id_and_turn);
    for (int32_t i = 1; i < o->n; i++) {
        if (by_id_and_turn(&o->best[i - 1], &o->best[i]) == 0) {
            FAIL_GOTO(st, ST_FORMAT, fail,
                      "%s has two plans for prompt \"%s\", turn %d; expected one", o->path,
                      o->best[i].id, o->best[i].turn);
        }
    }
    mem_free(text);
    return ST_OK;
fail:
    mem_free(text);
    oracle_close(impl);
    return st;
}

static enum status find(const struct best_plan **out, const struct oracle *o,
                        const struct prompt_facts *facts)
{
    struct best_plan key = {.id = (char *)(uintptr_t)facts->id, .turn = facts->turn};
    *out = bsearch(&key, o->best, (size_t)o->n, sizeof key, by_id_and_turn);
    if (!*out) {
        FAIL(ST_USER,
             "%s has no plan for prompt \"%s\", turn %d; it holds %d plans: was it made for "
             "another prompt file or split?",
             o->path, facts->id, facts->turn, o->n);
    }
    return ST_OK;
}

static enum status oracle_begin(const void *impl, const struct prompt_facts *facts, void *state,
                                int32_t *prefill_level)
{
    const struct best_plan *best = NULL;
    (void)state;
    TRY(find(&best, impl, facts));
    *prefill_level = best->plan.prefill;
    return ST_OK;
}

static enum status oracle_plan(const void *impl, const struct prompt_facts *facts,
                               const struct signals *signals, void *state, struct plan *plan)
{
    const struct best_plan *best = NULL;
    (void)signals;
    (void)state;
    TRY(find(&best, impl, facts));
    for (int32_t i = 0; i < best->plan.n && best->plan.at[i].step < facts->max_new_tokens; i++) {
        TRY(plan_add(plan, best->plan.at[i].step, best->plan.at[i].level));
    }
    return ST_OK;
}

static const char *oracle_digest(const void *impl)
{
    return ((const struct oracle *)impl)->digest;
}

const struct policy_ops policy_oracle = {
    .name = "oracle",
    .help = "The plan that policy.oracle names for each prompt: the best that was found by trying, "
            "to hold others against. The dial does not move it.",
    .needs = SIGNAL_NONE,
    .adds_tokens = false,
    .open = oracle_open,
    .begin = oracle_begin,
    .plan = oracle_plan,
    .observe = policy_observe_nothing,
    .digest = oracle_digest,
    .close = oracle_close,
};
