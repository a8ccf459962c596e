/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/run_report.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/replace.h"
#include "core/runfile.h"
#include "experiments/provenance.h"

/* A budget, and what a decode step cost on average. unit NULL: there was none. */
struct spending {
    const char *unit;
    double target, spent;
};

static enum status add_up(struct spending *out, const struct run_owner *o, const struct settings *s,
                          const struct run_contents *c)
{
    double cost = 0, n_steps = 0;
    *out = (struct spending){0};
    TRY(run_budget_unit(&out->unit, s));
    if (!out->unit || !o->has_costs) { // costs: of a run in which nothing was left to do
        out->unit = NULL;
        return ST_OK;
    }
    for (int32_t i = 0; i < c->n_finished; i++) {
        for (int32_t j = 0; j < c->finished[i].n_steps; j++) {
            cost += o->budget.cost[c->finished[i].steps[j].level];
            n_steps++;
        }
    }
    out->target = o->budget.law.target;
    out->spent = n_steps > 0 ? cost / n_steps : 0;
    return ST_OK;
}

static void print_json(const struct run_metrics *m, const struct spending *b, const char *path)
{
    json_t *j = json_pack("{s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:s}", "prompts",
                          (json_int_t)m->n_prompts, "finished", (json_int_t)m->n_finished, "failed",
                          (json_int_t)m->n_failed, "new_tokens", (json_int_t)m->n_new_tok, "steps",
                          (json_int_t)m->n_steps, "average_decode_bits", m->avg_decode_bits,
                          "average_prefill_bits", m->avg_prefill_bits, "decode_tokens_per_s",
                          m->decode_tok_s, "bytes_per_token", m->bytes_per_token, "mean_logprob",
                          m->mean_logprob, "run_file", path);
    if (b->unit) {
        json_object_set_new(
            j, "budget",
            json_pack("{s:s, s:f, s:f}", "unit", b->unit, "target", b->target, "spent", b->spent));
    }
    json_dumpf(j, stdout, JSON_REAL_PRECISION(9));
    json_decref(j);
    printf("\n");
}

static void print_table(const struct run_metrics *m, const struct spending *b, const char *path)
{
    printf("prompts finished     %lld of %lld%s\n", (long long)m->n_finished,
           (long long)m->n_prompts, m->n_failed ? " (some failed: see /failed in run.h5)" : "");
    printf("tokens               %lld prompt, %lld new, %lld decode steps\n",
           (long long)m->n_prompt_tok, (long long)m->n_new_tok, (long long)m->n_steps);
    printf("average decode bits  %.3f (first step included)\n", m->avg_decode_bits);
    if (b->unit) {
        printf("budget               %g %s per decode step; spent %.3f\n", b->target, b->unit,
               b->spent);
    }
    printf("prefill bits         %.3f\n", m->avg_prefill_bits);
    printf("decode tokens/s      %.1f\n", m->decode_tok_s);
    printf("bytes per token      %.0f\n", m->bytes_per_token);
    printf("mean log-probability %.4f nats\n", m->mean_logprob);
    printf("run file             %s\n", path);
}

static enum status gather_contents(const struct run_owner *o, const char *dir,
                                   const struct replay *replay, struct resume_state *kept,
                                   struct finished_record *finished, struct failed_prompt *failed,
                                   struct run_contents *out)
{
    for (int64_t i = 0; i < kept->n; i++) {
        memcpy(kept->prompts[i].key, o->resume.prompts[i].key, sizeof kept->prompts[i].key);
    }
    TRY(journal_read(dir, resume_visit, kept, NULL));
    if (replay) {
        replay_leave_out(replay, kept);
    }
    for (int64_t i = 0; i < kept->n; i++) {
        if (kept->prompts[i].finished) {
            finished[out->n_finished++] = kept->prompts[i].record;
        } else if (kept->prompts[i].failed) {
            failed[out->n_failed++] = kept->prompts[i].failure;
        }
    }
    return ST_OK;
}

static int by_lease(const void *pa, const void *pb)
{
    const struct budget_row *a = pa, *b = pb;
    return (a->lease > b->lease) - (a->lease < b->lease);
}

/* What the journal says of the budget's controller, by lease. */
static void gather_budget(const struct resume_state *kept, struct budget_row *rows,
                          struct run_contents *out)
{
    for (int64_t i = 0; i < kept->n; i++) {
        const struct journal_state *s = &kept->prompts[i].state;
        if (kept->prompts[i].has_dial) {
            rows[out->n_budget++] = (struct budget_row){.lease = s->lease,
                                                        .prompt = (int32_t)i,
                                                        .dial = s->dial,
                                                        .target = s->target,
                                                        .offset = s->offset,
                                                        .slope = s->slope,
                                                        .account = s->account};
        }
    }
    qsort(rows, (size_t)out->n_budget, sizeof *rows, by_lease);
    out->budget = rows;
}

enum status run_report_write(const struct run_owner *o, const struct engine *e,
                             const struct settings *s, const struct prompts *prompts,
                             const struct tokenizer *tok, const struct replay *replay, bool as_json)
{
    char path[SETTINGS_PATH_BYTES + 32], answers[SETTINGS_PATH_BYTES + 32];
    struct resume_state kept = {0};
    struct finished_record *finished = NULL;
    struct failed_prompt *failed = NULL;
    struct budget_row *budget = NULL;
    struct provenance *facts = NULL;
    char *config = NULL;
    enum status st = ST_OK;
    struct run_contents c = {.prompts = prompts, .levels = &e->levels, .tokenizer = tok};
    snprintf(path, sizeof path, "%s/run.h5", s->output.dir);
    snprintf(answers, sizeof answers, "%s/answers.jsonl", s->output.dir);
    TRY_GOTO(st, resume_create(&kept, prompts->n, true), done);
    TRY_GOTO(st, MEM_NEW(&finished, prompts->n), done);
    TRY_GOTO(st, MEM_NEW(&failed, prompts->n), done);
    TRY_GOTO(st, mem_alloc_array((void **)&facts, 1, sizeof *facts), done);
    TRY_GOTO(st, gather_contents(o, s->output.dir, replay, &kept, finished, failed, &c), done);
    TRY_GOTO(st, MEM_NEW(&budget, prompts->n), done);
    gather_budget(&kept, budget, &c);
    TRY_GOTO(st, settings_print(&config, s, false), done);
    provenance_fill(facts, e, s, prompts, o->digest, kept.n_epochs);
    c.model_id = s->run.name[0] ? s->run.name : s->model.path;
    c.finished = finished;
    c.failed = failed;
    c.facts = facts->fact;
    c.n_facts = facts->n;
    c.config_text = config;
    // the journal's lock is ours: nobody else is writing these
    replace_sweep(path);
    replace_sweep(answers);
    TRY_GOTO(st, runfile_write(path, &c), done);
    TRY_GOTO(st, answers_write(answers, &c), done);
    if (replay) {
        TRY_GOTO(st, replay_compare(replay, path, as_json), done);
        goto done;
    }
    struct run_metrics m;
    run_metrics_compute(&m, &c);
    struct spending spending;
    TRY_GOTO(st, add_up(&spending, o, s, &c), done);
    (as_json ? print_json : print_table)(&m, &spending, path);
    if (c.n_failed > 0) {
        log_warn("%d prompt%s failed; run again with --retry-failed when the cause is mended",
                 c.n_failed, c.n_failed == 1 ? "" : "s");
    }
done:
    mem_free(config);
    mem_free(facts);
    mem_free(budget);
    mem_free(failed);
    mem_free(finished);
    resume_free(&kept);
    return st;
}
