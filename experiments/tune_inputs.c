/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/sampler.h"
#include "experiments/args.h"
#include "experiments/tune_job.h"

/* ---- the command line ---- */

static enum status parse_numbers(struct tune_job *j)
{
    long long grid = 3, seed = 42;
    char *end = NULL;
    const char *text = j->loss_text ? j->loss_text : "0.01";
    TRY(j->grid_text ? args_number(&grid, "--grid", j->grid_text, 1, 10000) : ST_OK);
    TRY(j->seed_text ? args_number(&seed, "--seed", j->seed_text, 0, INT64_MAX) : ST_OK);
    double loss = strtod(text, &end);
    bool percent = strcmp(end, "%") == 0;
    loss = percent ? loss / 100 : loss;
    if (end == text || (*end != '\0' && !percent) || !(loss >= 0 && loss <= 1)) {
        FAIL(ST_USER, "--loss: expected a share of quality such as 0.01 or 1%%, found \"%s\"",
             text);
    }
    j->grid = (int32_t)grid;
    j->seed = (uint64_t)seed;
    j->loss = loss;
    return ST_OK;
}

static enum status parse_command(struct tune_job *j, int argc, char **argv)
{
    const struct arg_text options[] = {{"--out", &j->out},
                                       {"--levels", &j->levels},
                                       {"--grid", &j->grid_text},
                                       {"--loss", &j->loss_text},
                                       {"--reference", &j->reference},
                                       {"--seed", &j->seed_text},
                                       {NULL, NULL}};
    TRY(args_config(&j->config, options, "tune plan", argc, argv));
    if (!j->config || !j->out) {
        FAIL(ST_USER, "tune plan needs FILE.cfg and --out DIR; pmpd tune plan --help explains");
    }
    if (strlen(j->out) + 16 >= SETTINGS_PATH_BYTES) {
        FAIL(ST_USER, "--out is too long");
    }
    return parse_numbers(j);
}

static enum status check_settings(const struct settings *s)
{
    if (s->prompts.path[0] == '\0' || s->model.path[0] == '\0') {
        FAIL(ST_USER, "model.path or prompts.path is empty; expected a model and a JSONL file");
    }
    if (s->decode.temperature > 0) {
        FAIL(ST_USER, "decode.temperature is %g, but tune plan compares greedy texts: set it to 0",
             s->decode.temperature);
    }
    return ST_OK;
}

/* Rank 0 reads; all parse the same text. */
enum status tune_read_settings(struct tune_job *j, int argc, char **argv)
{
    char *text = NULL;
    enum status st = parse_command(j, argc, argv);
    if (st == ST_OK && j->env->rank == 0) {
        st = settings_read_file(&text, j->config);
    }
    TRY_GOTO(st, env_agree(j->env, st), done);
    TRY_GOTO(st, env_broadcast_text(j->env, &text), done);
    settings_default(&j->settings);
    st = settings_parse(&j->settings, text, j->config);
    for (int i = 1; st == ST_OK && i + 1 < argc; i++) {
        if (strcmp(argv[i], "--set") == 0) {
            st = settings_set(&j->settings, argv[++i]);
        }
    }
    st = st ? st : check_settings(&j->settings);
    st = env_agree(j->env, st);
    j->given = j->settings; /* the search: all ranks decode */
    snprintf(j->settings.service.rank, sizeof j->settings.service.rank, "inline");
done:
    mem_free(text);
    return st;
}

/* ---- prompts ---- */

static enum status count_splits(struct tune_job *j, int32_t *n_test)
{
    const char *path = j->settings.prompts.path;
    struct prompts all;
    int32_t n_split = 0;
    TRY(prompts_read(&all, path, "", 0));
    for (int32_t i = 0; i < all.n; i++) {
        n_split += all.prompt[i].split[0] != '\0';
        *n_test += strcmp(all.prompt[i].split, "test") == 0;
    }
    prompts_free(&all);
    if (n_split == 0) {
        FAIL(ST_USER,
             "%s: no prompt names its split; tune plan chooses on lines with \"split\": "
             "\"validation\" and reports on those with \"test\"",
             path);
    }
    return ST_OK;
}

struct drawn {
    uint32_t draw;
    int32_t which;
};

static int by_draw(const void *a, const void *b)
{
    const struct drawn *x = a, *y = b;
    return x->draw != y->draw ? (x->draw < y->draw ? -1 : 1)
                              : (x->which > y->which) - (x->which < y->which);
}

/* A file may be in order of task; the first rungs shall see all of it. */
static enum status order_prompts(struct tune_job *j)
{
    const uint32_t key[2] = {(uint32_t)j->seed, (uint32_t)(j->seed >> 32)};
    struct drawn *drawn = NULL;
    j->n_validation = j->validation.n;
    j->n_test = j->test.n;
    TRY(MEM_NEW(&j->prompt, j->n_validation + j->n_test));
    TRY(MEM_NEW(&j->target, j->n_validation + j->n_test));
    TRY(MEM_NEW(&drawn, j->n_validation));
    for (int32_t i = 0; i < j->n_validation; i++) {
        const uint32_t counter[4] = {(uint32_t)i, 0, 0, 0x0EDE};
        uint32_t random[4];
        philox4x32(random, counter, key);
        drawn[i] = (struct drawn){random[0], i};
    }
    qsort(drawn, (size_t)j->n_validation, sizeof *drawn, by_draw);
    for (int32_t i = 0; i < j->n_validation; i++) {
        j->prompt[i] = &j->validation.prompt[drawn[i].which];
    }
    for (int32_t i = 0; i < j->n_test; i++) {
        j->prompt[j->n_validation + i] = &j->test.prompt[i];
    }
    mem_free(drawn);
    return ST_OK;
}

enum status tune_read_prompts(struct tune_job *j)
{
    const struct settings *s = &j->settings;
    int32_t n_test = 0;
    TRY(count_splits(j, &n_test));
    TRY(prompts_read(&j->validation, s->prompts.path, "validation", s->prompts.limit));
    TRY(n_test > 0 ? prompts_read(&j->test, s->prompts.path, "test", s->prompts.limit) : ST_OK);
    TRY(prompts_encode(&j->validation, j->tok, j->e.context, s->decode.max_new_tokens));
    TRY(prompts_encode(&j->test, j->tok, j->e.context, s->decode.max_new_tokens));
    TRY(order_prompts(j));
    if (j->n_validation < PLAN_SEARCH_LEAST) {
        log_warn("%s has %d validation prompts: an interval from so few says little",
                 s->prompts.path, j->n_validation);
    }
    return ST_OK;
}

/* ---- levels ---- */

static enum status add_level(struct tune_job *j, const char *text)
{
    int32_t id = 0;
    if (j->n_levels == SCHEDULE_MAX_LEVELS) {
        FAIL(ST_USER, "--levels: more than %d", SCHEDULE_MAX_LEVELS);
    }
    TRY(level_table_add(&j->e.levels, text, &id));
    snprintf(j->names[j->n_levels], sizeof *j->names, "%s", text);
    j->name[j->n_levels] = j->names[j->n_levels];
    j->bits[j->n_levels++] = (double)j->e.levels.level[id].avg_bits;
    return ST_OK;
}

enum status tune_read_levels(struct tune_job *j)
{
    char copy[SETTINGS_TEXT_BYTES], *rest = copy, *word = NULL;
    snprintf(copy, sizeof copy, "%s", j->levels ? j->levels : "");
    if (j->levels && strlen(j->levels) >= sizeof copy) {
        FAIL(ST_USER, "--levels is too long");
    }
    while (j->levels && (word = strsep(&rest, " ")) != NULL) {
        TRY(*word ? add_level(j, word) : ST_OK);
    }
    for (int b = BITS_MAX; !j->levels && b >= 1; b--) {
        char name[8];
        snprintf(name, sizeof name, "%d", b);
        TRY(j->e.source.held >> b & 1 ? add_level(j, name) : ST_OK);
    }
    if (j->n_levels < 2) {
        FAIL(ST_USER, "%s: %s, and a plan needs two levels at least%s", j->settings.model.path,
             j->e.source.held == 0 ? "the model is not nested"
             : j->n_levels == 0    ? "no level is given"
                                   : "there is one level",
             j->levels ? "; name more with --levels" : "; quantise it to more (pmpd quantize)");
    }
    for (int32_t i = 1; i < j->n_levels; i++) {
        if (j->bits[i] >= j->bits[i - 1]) {
            FAIL(ST_USER,
                 "--levels: %s has %g bits on average, not less than the %g of %s before it",
                 j->name[i], j->bits[i], j->bits[i - 1], j->name[i - 1]);
        }
    }
    return ST_OK;
}
