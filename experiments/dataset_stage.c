/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/dataset_stage.h"

#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/rouge.h"
#include "experiments/branches.h"

/* A stage on one replica: groups of prompts through branches_run. */
struct stage {
    struct dataset_job *job;
    struct engine e;
    struct branches_options o;
    struct branches *branches;
    struct branches_prompt *group; /* (n_side) */
    struct work_item **items;      /* (n_side) of the group */
    int32_t n_side;
    int32_t *tokens, *n_new, *forced_tokens, *forced_new;
    float *signals, *features;
    struct top *top;    /* (n_side, T) stage 1 of kl */
    double *divergence; /* (n_side, 1 + n_branches, T) stage 2 of kl */
    bool is_forced;     /* logits are those of forced tokens */
};

static enum status on_reference_logits(void *ctx, int32_t p, int32_t sequence, int32_t t,
                                       const float *logits)
{
    struct stage *s = ctx;
    (void)sequence;
    top_take(&s->top[(size_t)p * (size_t)s->o.max_new_tokens + (size_t)t], logits,
             s->e.source.config.vocab);
    return ST_OK;
}

static enum status on_forced_logits(void *ctx, int32_t p, int32_t sequence, int32_t t,
                                    const float *logits)
{
    struct stage *s = ctx;
    if (s->is_forced && t < s->items[p]->n_reference) {
        size_t at = ((size_t)p * (size_t)(1 + s->o.n_branches) + (size_t)sequence) *
                        (size_t)s->o.max_new_tokens +
                    (size_t)t;
        s->divergence[at] = top_divergence(&s->items[p]->top[t], logits, s->e.source.config.vocab);
    }
    return ST_OK;
}

static void stage_close(struct stage *s)
{
    branches_destroy(&s->branches);
    engine_close(&s->e);
    mem_free(s->group);
    mem_free(s->items);
    mem_free(s->tokens);
    mem_free(s->n_new);
    mem_free(s->forced_tokens);
    mem_free(s->forced_new);
    mem_free(s->signals);
    mem_free(s->features);
    mem_free(s->top);
    mem_free(s->divergence);
    journal_close(&s->job->journal);
}

/* Of a prompt, at most. */
static size_t feature_floats(const struct dataset_job *j)
{
    return 2 * (size_t)j->facts.n_kv_heads * (size_t)j->options.most_tok *
           (size_t)j->facts.head_dim;
}

static enum status stage_allocate(struct stage *s)
{
    size_t side = (size_t)s->n_side, sequences = side * (size_t)(1 + s->o.n_branches);
    size_t t = (size_t)s->o.max_new_tokens;
    size_t feature = feature_floats(s->job);
    TRY(MEM_NEW(&s->group, side));
    TRY(MEM_NEW(&s->items, side));
    TRY(MEM_NEW(&s->tokens, sequences * t));
    TRY(MEM_NEW(&s->n_new, sequences));
    TRY(MEM_NEW(&s->forced_tokens, sequences * t));
    TRY(MEM_NEW(&s->forced_new, sequences));
    TRY(MEM_NEW(&s->signals, side * t * DATASET_N_SIGNALS));
    TRY(MEM_NEW(&s->features, side * feature));
    if (s->o.on_logits == on_reference_logits) {
        TRY(MEM_NEW(&s->top, side * t));
    } else if (s->o.on_logits) {
        TRY(MEM_NEW(&s->divergence, sequences * t));
    }
    return branches_create(&s->branches, &s->e, s->n_side, s->job->settings.decode.prefill_chunk,
                           &s->o);
}

static enum status no_records(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    (void)ctx;
    (void)kind;
    (void)payload;
    (void)bytes;
    return ST_OK;
}

static enum status add_levels(struct stage *s, bool is_reference)
{
    const struct dataset_facts *f = &s->job->facts;
    struct level_table *levels = &s->e.levels;
    if (is_reference) {
        TRY(level_table_add(levels, f->reference, &s->o.level));
    } else {
        TRY(level_table_add(levels, f->high, &s->o.level));
        TRY(level_table_add(levels, f->low, &s->o.branch_level));
    }
    s->o.prefill = s->o.level;
    return ST_OK;
}

/* Collective over the world. */
static enum status stage_open(struct stage *s, struct dataset_job *j, bool is_reference)
{
    struct settings settings = j->settings;
    const struct dataset_facts *f = &j->facts;
    char dir[sizeof j->parts + 32];
    *s = (struct stage){.job = j, .n_side = settings.decode.slots};
    s->o = (struct branches_options){.n_branches = is_reference ? 0 : f->n_candidates,
                                     .max_new_tokens = f->max_new_tokens,
                                     .stop_at_eos = settings.decode.stop_at_eos,
                                     .all_heads = j->all_heads,
                                     .ctx = s};
    if (j->criterion == CRITERION_KL) {
        s->o.on_logits = is_reference ? on_reference_logits : on_forced_logits;
    }
    for (int32_t i = 0; i < s->o.n_branches; i++) {
        s->o.at[i] = dataset_switch_step(f, i);
    }
    snprintf(settings.service.rank, sizeof settings.service.rank, "inline"); /* all ranks decode */
    settings.decode.slots *= 1 + s->o.n_branches;
    settings.decode.context = j->options.most_tok + f->max_new_tokens;
    snprintf(settings.model.path, sizeof settings.model.path, "%s",
             is_reference ? j->reference : j->settings.model.path);
    TRY(engine_open(&s->e, j->env, &settings));
    TRY(env_agree(j->env, add_levels(s, is_reference)));
    TRY(engine_load(&s->e, &settings, true));
    enum status st = stage_allocate(s);
    if (st == ST_OK && j->env->tensor_rank == 0) {
        snprintf(dir, sizeof dir, "%s/replica-%04d", j->parts, j->env->replica);
        st = journal_open(&j->journal, dir, no_records, NULL);
    }
    return env_agree(j->env, st);
}

/* The group's prompts, and where what comes out goes. */
static void fill_group(struct stage *s, int32_t n)
{
    size_t t = (size_t)s->o.max_new_tokens, sequences = (size_t)(1 + s->o.n_branches);
    size_t feature = feature_floats(s->job);
    for (int32_t i = 0; i < n; i++) {
        size_t k = (size_t)i;
        s->group[i] = (struct branches_prompt){
            .ids = s->items[i]->ids,
            .n_ids = s->items[i]->n_ids,
            .tokens = s->tokens + k * sequences * t,
            .n_new = s->n_new + k * sequences,
            .signals = s->o.n_branches ? s->signals + k * t * DATASET_N_SIGNALS : NULL,
            .features = s->o.n_branches ? s->features + k * feature : NULL};
    }
}

static enum status finish_references(struct stage *s, int32_t n)
{
    for (int32_t i = 0; i < n && s->job->env->tensor_rank == 0; i++) {
        struct work_item item = *s->items[i]; /* the arrays are the stage's */
        item.reference = s->group[i].tokens;
        item.n_reference = s->group[i].n_new[0];
        item.top = s->top ? s->top + (size_t)i * (size_t)s->o.max_new_tokens : NULL;
        TRY(work_put_reference(s->job->journal, &item));
    }
    return ST_OK;
}

/* ---- stage 2 ---- */

/* Minus the mean divergence of a sequence; before a branch left it is the main sequence's. */
static double minus_divergence(const struct stage *s, int32_t i, int32_t sequence)
{
    size_t t = (size_t)s->o.max_new_tokens;
    const double *main = s->divergence + (size_t)i * (size_t)(1 + s->o.n_branches) * t;
    const double *own = main + (size_t)sequence * t;
    int32_t n = s->items[i]->n_reference, shared = sequence ? s->o.at[sequence - 1] + 1 : 0;
    double sum = 0;
    for (int32_t k = 0; k < n; k++) {
        sum += k < shared ? main[k] : own[k];
    }
    return -sum / n;
}

static enum status score(const struct stage *s, int32_t i, int32_t sequence, const char *text,
                         const char *reference, float *out)
{
    const struct work_item *item = s->items[i];
    const int32_t *tokens = s->group[i].tokens + (size_t)sequence * (size_t)s->o.max_new_tokens;
    double value = 0;
    switch (s->job->criterion) {
    case CRITERION_ROUGE_L:
        TRY(rouge_l(&value, text, reference));
        break;
    case CRITERION_AGREEMENT:
        value = label_agreement(tokens, s->group[i].n_new[sequence], item->reference,
                                item->n_reference);
        break;
    default:
        value = minus_divergence(s, i, sequence);
    }
    *out = (float)value;
    return ST_OK;
}

static enum status fill_row(const struct stage *s, int32_t i, struct dataset_row *row)
{
    const struct work_item *item = s->items[i];
    const struct branches_prompt *p = &s->group[i];
    const struct tokenizer *tok = s->job->tok;
    struct dataset_facts *f = &s->job->facts;
    *row = (struct dataset_row){.key = {item->key[0], item->key[1]},
                                .prompt_hash = item->prompt_hash,
                                .ordinal = item->ordinal,
                                .prefix = item->prefix,
                                .n_tok = p->n_ids,
                                .n_new = p->n_new[0]};
    TRY(mem_strdup(&row->id, item->prompt->id));
    TRY(mem_strdup(&row->task, item->prompt->task));
    TRY(tokenizer_decode(tok, item->ids, item->n_ids, true, &row->prompt));
    TRY(tokenizer_decode(tok, item->reference, item->n_reference, false, &row->reference));
    for (int32_t q = 0; q <= s->o.n_branches; q++) {
        char **text = q ? &row->candidate[q - 1] : &row->high;
        TRY(tokenizer_decode(tok, p->tokens + (size_t)q * (size_t)s->o.max_new_tokens, p->n_new[q],
                             false, text));
        TRY(score(s, i, q, *text, row->reference, q ? &row->scores[q - 1] : &row->high_score));
    }
    row->label = dataset_label(f, row->scores, row->high_score);
    row->features = p->features; /* lent */
    row->signals = p->signals;
    return ST_OK;
}

static enum status finish_rows(struct stage *s, int32_t n)
{
    for (int32_t i = 0; i < n && s->job->env->tensor_rank == 0; i++) {
        struct dataset_row row = {0};
        enum status st = fill_row(s, i, &row);
        st = st ? st : work_put_row(s->job->journal, &row, &s->job->facts);
        row.features = row.signals = NULL;
        dataset_row_free(&row);
        TRY(st);
    }
    return ST_OK;
}

/* The same prompts again, fed with the reference's tokens. */
static enum status force_group(struct stage *s, int32_t n)
{
    size_t t = (size_t)s->o.max_new_tokens, sequences = (size_t)(1 + s->o.n_branches);
    struct branches_prompt *forced = NULL;
    TRY(MEM_NEW(&forced, n));
    for (int32_t i = 0; i < n; i++) {
        forced[i] = (struct branches_prompt){.ids = s->items[i]->ids,
                                             .n_ids = s->items[i]->n_ids,
                                             .forced = s->items[i]->reference,
                                             .n_forced = s->items[i]->n_reference,
                                             .tokens = s->forced_tokens + (size_t)i * sequences * t,
                                             .n_new = s->forced_new + (size_t)i * sequences};
    }
    s->is_forced = true;
    enum status st = branches_run(s->branches, forced, n);
    s->is_forced = false;
    mem_free(forced);
    return st;
}

/* ---- both stages ---- */

static bool is_missing(const struct work_item *item, bool is_reference)
{
    return !item->is_done && (!is_reference || !item->reference);
}

static enum status run_group(struct stage *s, int32_t n, bool is_reference)
{
    fill_group(s, n);
    TRY(branches_run(s->branches, s->group, n));
    if (is_reference) {
        return finish_references(s, n);
    }
    if (s->divergence) {
        TRY(force_group(s, n));
    }
    return finish_rows(s, n);
}

/* This replica's part of what is missing. Collective over the replica. */
static enum status run_items(struct stage *s, bool is_reference, int32_t n_missing)
{
    struct dataset_job *j = s->job;
    struct progress progress;
    int32_t n = 0, at = 0, done = 0;
    progress_begin(&progress, is_reference ? "reference texts" : "labels", "prompts", n_missing);
    for (int32_t i = 0; i < j->work.n; i++) {
        struct work_item *item = &j->work.items[i];
        bool last = i + 1 == j->work.n;
        if (is_missing(item, is_reference) && at++ % j->env->n_replicas == j->env->replica) {
            s->items[n++] = item;
        }
        if (n == s->n_side || (last && n > 0)) {
            enum status st = run_group(s, n, is_reference);
            if (st != ST_OK) {
                return status_prefix(st, "prompts %s to %s: ", s->items[0]->prompt->id,
                                     s->items[n - 1]->prompt->id);
            }
            done += n;
            n = 0;
            progress_update(&progress, (double)done * j->env->n_replicas < n_missing
                                           ? done * j->env->n_replicas
                                           : n_missing);
        }
    }
    progress_end(&progress);
    return ST_OK;
}

enum status dataset_stage_run(struct dataset_job *j, bool is_reference)
{
    struct stage s;
    int32_t n_missing = 0;
    for (int32_t i = 0; i < j->work.n; i++) {
        n_missing += is_missing(&j->work.items[i], is_reference);
    }
    if (n_missing == 0) {
        return ST_OK;
    }
    enum status st = stage_open(&s, j, is_reference);
    if (st == ST_OK) {
        st = engine_loop_end(j->env, run_items(&s, is_reference, n_missing));
        st = env_agree(j->env, st);
    }
    stage_close(&s);
    TRY(st);
    return env_agree(j->env, work_read(&j->work, j->parts, &j->facts, NULL));
}
