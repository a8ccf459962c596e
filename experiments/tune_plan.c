/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/tune_plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/rouge.h"
#include "experiments/provenance.h"
#include "experiments/tune_job.h"
#include "experiments/tune_report.h"

static const char usage[] =
    "usage: [mpirun -n N] pmpd tune plan FILE.cfg --out DIR [options]\n"
    "Finds the static plan (prefill level and steps at which the level drops) with the fewest\n"
    "average decode bits that loses nothing: on the prompts of split \"validation\" of\n"
    "prompts.path the lower end of the 95 % interval of quality minus that of the highest level\n"
    "alone is at least -LOSS. Plans are tried cheapest first; those that are worse beyond doubt "
    "on\n"
    "a part of the prompts are dropped. At the end the best one is tried once on split \"test\".\n"
    "  --levels \"4 3 2\"   of model.path, best first (default: all that it holds)\n"
    "  --grid N           switches at decode.max_new_tokens * i / N (default 3)\n"
    "  --loss L           of quality that may be lost, such as 0.01 (default) or 1%\n"
    "  --reference R      what a text is compared with (ROUGE-L): answers (of the prompt file;\n"
    "                     default where all prompts have one), high (the highest level's texts),\n"
    "                     or a model's folder (its texts at its most bits)\n"
    "  --seed S           of the intervals and of the order of prompts (default 42)\n"
    "  --set key=value    overrides a setting; prompts.limit is that of each split\n"
    "Leaves DIR/best.cfg (for pmpd run), DIR/tune.h5 (every trial) and DIR/trials (every answer, "
    "on\n"
    "a folder that all ranks see): the same command does only what is missing. The result does "
    "not\n"
    "depend on the number of ranks.\n"
    "Example:\n"
    "  mpirun -n 2 pmpd tune plan configs/tiny.cfg --out results/tuned \\\n"
    "      --set prompts.path=experiments/tasks/tiny_summary.jsonl\n";

/* ---- answers and their quality ---- */

/* Answers of prompts [first, last) under a plan, for all ranks. */
static enum status answer(struct tune_job *j, struct tune_model *m, const char *plan, int32_t first,
                          int32_t last)
{
    struct tune_request *requests = NULL;
    TRY(MEM_NEW(&requests, last - first));
    for (int32_t i = first; i < last; i++) {
        requests[i - first] = (struct tune_request){j->prompt[i], plan};
    }
    enum status st = tune_decode(&j->answers, m, requests, last - first);
    mem_free(requests);
    return st;
}

static const struct tune_answer *find(const struct tune_job *j, const char *plan, int32_t prompt)
{
    const struct tune_request request = {j->prompt[prompt], plan};
    const struct tune_answer *a = tune_find(&j->answers, &j->model, &request);
    INVARIANT(a != NULL);
    return a;
}

static enum status quality(const struct tune_job *j, const char *plan, int32_t prompt, double *out)
{
    return rouge_l(out, find(j, plan, prompt)->text, j->target[prompt]);
}

static void plan_text(const struct tune_job *j, int32_t candidate, char text[TUNE_PLAN_BYTES])
{
    plan_candidate_text(text, TUNE_PLAN_BYTES, &j->search, &j->search.candidate[candidate], j->name,
                        true);
}

/* The slot of plan_search_run. */
static enum status measure(void *ctx, const int32_t *candidates, int32_t n, int32_t first,
                           int32_t last, double *out)
{
    struct tune_job *j = ctx;
    int32_t each = last - first;
    struct tune_request *requests = NULL;
    char(*plans)[TUNE_PLAN_BYTES] = NULL;
    enum status st = MEM_NEW(&plans, n);
    st = st ? st : MEM_NEW(&requests, n * each);
    for (int32_t i = 0; st == ST_OK && i < n; i++) {
        plan_text(j, candidates[i], plans[i]);
        for (int32_t p = first; p < last; p++) {
            requests[i * each + p - first] = (struct tune_request){j->prompt[p], plans[i]};
        }
    }
    st = env_agree(j->env, st);
    st = st ? st : tune_decode(&j->answers, &j->model, requests, n * each);
    for (int32_t i = 0; st == ST_OK && i < n; i++) {
        for (int32_t p = first; st == ST_OK && p < last; p++) {
            st = quality(j, plans[i], p, &out[i * j->n_validation + p]);
        }
        log_info("%s: %d of %d prompts", plans[i], last, j->n_validation);
    }
    mem_free(plans);
    mem_free(requests);
    return env_agree(j->env, st);
}

/* ---- what texts are compared with ---- */

static enum status take_targets(struct tune_job *j, const struct tune_model *m, const char *plan,
                                int32_t first, int32_t last)
{
    for (int32_t p = first; p < last; p++) {
        const struct tune_request request = {j->prompt[p], plan};
        TRY(mem_strdup(&j->target[p],
                       m ? tune_find(&j->answers, m, &request)->text : j->prompt[p]->reference));
    }
    return ST_OK;
}

/* Collective over the world; rank 0 reads. */
static enum status find_digest(struct engine *e, const char *path, char digest[DIGEST_TEXT])
{
    enum status st = e->env->rank == 0 ? checkpoint_digest(e->source.ckpt, path, digest) : ST_OK;
    TRY(env_agree(e->env, st));
    TRY_MPI(MPI_Bcast(digest, DIGEST_TEXT, MPI_CHAR, 0, e->env->world));
    return ST_OK;
}

/* The engine without weights, once more. Collective over the world. */
static enum status reopen(struct tune_job *j)
{
    int32_t id = 0;
    TRY(engine_open(&j->e, j->env, &j->settings));
    enum status st = ST_OK;
    for (int32_t i = 0; st == ST_OK && i < j->n_levels; i++) {
        st = level_table_add(&j->e.levels, j->name[i], &id);
    }
    return env_agree(j->env, st);
}

/* Every text of another model, whose engine must not be open beside the first one's. Collective
 * over the world. */
static enum status decode_reference(struct tune_job *j)
{
    static const char plan[] = "prefill:max 0:max";
    struct settings *s = &j->reference_settings;
    struct engine e;
    struct tune_model m = {.e = &e, .settings = s, .tok = j->tok};
    int32_t level = 0, n = j->n_validation + j->n_test;
    int32_t vocab = j->e.source.config.vocab, context = j->e.context;
    char digest[DIGEST_TEXT];
    engine_close(&j->e);
    j->e = (struct engine){.env = j->env};
    *s = j->settings;
    snprintf(s->model.path, sizeof s->model.path, "%s", j->reference);
    enum status st = engine_open(&e, j->env, s);
    if (st == ST_OK) {
        st = level_table_add(&e.levels, "max", &level);
        if (st == ST_OK && (e.source.config.vocab != vocab || e.context < context)) {
            st =
                status_raise(ST_USER, __FILE__, __LINE__, __func__,
                             "--reference %s has a vocabulary of %d and a context of %d, the model "
                             "%d and %d: it cannot continue the same prompts (see decode.context)",
                             j->reference, e.source.config.vocab, e.context, vocab, context);
        }
        st = env_agree(j->env, st);
    }
    st = st ? st : find_digest(&e, s->model.path, digest);
    st = st ? st : engine_load(&e, s, false);
    if (st == ST_OK) {
        tune_model_describe(&m, digest);
        st = answer(j, &m, plan, 0, n);
        st = st ? st : take_targets(j, &m, plan, 0, n);
    }
    engine_close(&e);
    return st ? st : reopen(j);
}

static bool all_have_answers(const struct tune_job *j)
{
    for (int32_t i = 0; i < j->n_validation + j->n_test; i++) {
        if (j->prompt[i]->reference[0] == '\0') {
            return false;
        }
    }
    return true;
}

/* Targets that do not come from the highest level. Collective over the world. */
static enum status prepare_targets(struct tune_job *j)
{
    bool have = all_have_answers(j);
    j->reference = j->reference ? j->reference : have ? "answers" : "high";
    if (strcmp(j->reference, "answers") == 0) {
        if (!have) {
            FAIL(ST_USER,
                 "--reference answers: not every prompt of splits validation and test of %s has a "
                 "\"reference\"; use --reference high or a model",
                 j->settings.prompts.path);
        }
        return take_targets(j, NULL, NULL, 0, j->n_validation + j->n_test);
    }
    return strcmp(j->reference, "high") == 0 ? ST_OK : decode_reference(j);
}

/* ---- the search ---- */

static void highest_plan(const struct tune_job *j, char text[TUNE_PLAN_BYTES])
{
    snprintf(text, TUNE_PLAN_BYTES, "prefill:%s 0:%s", j->name[0], j->name[0]);
}

/* The highest level's answers to prompts [first, last), as targets too where they are. */
static enum status answer_highest(struct tune_job *j, int32_t first, int32_t last)
{
    char plan[TUNE_PLAN_BYTES];
    highest_plan(j, plan);
    TRY(answer(j, &j->model, plan, first, last));
    return strcmp(j->reference, "high") == 0 ? take_targets(j, &j->model, plan, first, last)
                                             : ST_OK;
}

static enum status make_candidates(struct tune_job *j)
{
    char plan[TUNE_PLAN_BYTES];
    int32_t most = j->settings.decode.max_new_tokens;
    int64_t *n_steps = NULL;
    highest_plan(j, plan);
    TRY(MEM_NEW(&n_steps, most));
    for (int32_t p = 0; p < j->n_validation; p++) {
        const struct tune_answer *a = find(j, plan, p);
        for (int32_t t = 0; t < a->n_turns; t++) {
            for (int32_t i = 0; i < a->n_steps[t] && i < most; i++) {
                n_steps[i]++;
            }
        }
    }
    enum status st = plan_search_create(&j->search, j->bits, j->n_levels, most, j->grid,
                                        j->settings.service.lag, n_steps);
    mem_free(n_steps);
    return st;
}

static enum status search(struct tune_job *j)
{
    char plan[TUNE_PLAN_BYTES];
    double *reference = NULL;
    highest_plan(j, plan);
    TRY(answer_highest(j, 0, j->n_validation));
    enum status st = make_candidates(j);
    st = st ? st : MEM_NEW(&reference, j->n_validation);
    for (int32_t p = 0; st == ST_OK && p < j->n_validation; p++) {
        st = quality(j, plan, p, &reference[p]);
    }
    st = env_agree(j->env, st);
    st = st ? st
            : plan_search_run(&j->search, reference, j->n_validation, j->loss, j->seed, measure, j);
    mem_free(reference);
    return st;
}

/* ---- the end ---- */

/* Average level of the decode steps of prompts [first, last). */
static double decode_bits(const struct tune_job *j, const char *plan, int32_t first, int32_t last)
{
    double bits = 0, n = 0;
    for (int32_t p = first; p < last; p++) {
        const struct tune_answer *a = find(j, plan, p);
        bits += a->bits;
        for (int32_t t = 0; t < a->n_turns; t++) {
            n += a->n_steps[t];
        }
    }
    return n > 0 ? bits / n : (double)NAN;
}

/* The winner, once, on prompts that had no say in choosing it. Collective over the world. */
static enum status try_test(struct tune_job *j, struct tune_test *out)
{
    char best[TUNE_PLAN_BYTES], highest[TUNE_PLAN_BYTES];
    int32_t first = j->n_validation, last = first + j->n_test;
    double *differences = NULL;
    *out = (struct tune_test){.n_prompts = j->n_test};
    if (j->n_test == 0) {
        return ST_OK;
    }
    plan_text(j, j->search.winner, best);
    highest_plan(j, highest);
    TRY(answer_highest(j, first, last));
    TRY(answer(j, &j->model, best, first, last));
    enum status st = MEM_NEW(&differences, j->n_test);
    for (int32_t p = first; st == ST_OK && p < last; p++) {
        double a = 0, b = 0;
        st = quality(j, best, p, &a);
        st = st ? st : quality(j, highest, p, &b);
        out->quality += a / j->n_test;
        out->reference_quality += b / j->n_test;
        differences[p - first] = a - b;
    }
    st = st ? st : plan_interval(&out->difference, differences, j->n_test, j->seed);
    out->decode_bits = decode_bits(j, best, first, last);
    out->reference_bits = decode_bits(j, highest, first, last);
    mem_free(differences);
    return env_agree(j->env, st);
}

static enum status add_score(const struct tune_job *j, int32_t trial, int32_t p,
                             struct tune_score *out)
{
    char plan[TUNE_PLAN_BYTES];
    plan_text(j, trial, plan);
    const struct tune_answer *a = find(j, plan, p);
    *out = (struct tune_score){.trial = trial,
                               .id = j->prompt[p]->id,
                               .split = p < j->n_validation ? "validation" : "test",
                               .decode_bits = decode_bits(j, plan, p, p + 1)};
    for (int32_t t = 0; t < a->n_turns; t++) {
        out->n_steps += a->n_steps[t];
    }
    return quality(j, plan, p, &out->quality);
}

static enum status add_scores(const struct tune_job *j, struct tune_score *scores, double *bits,
                              int64_t *n)
{
    for (int32_t c = 0; c < j->search.n; c++) {
        char plan[TUNE_PLAN_BYTES];
        int32_t n_prompts = j->search.candidate[c].n_prompts;
        plan_text(j, c, plan);
        bits[c] = decode_bits(j, plan, 0, n_prompts);
        for (int32_t p = 0; p < n_prompts; p++) {
            TRY(add_score(j, c, p, &scores[(*n)++]));
        }
        bool on_test = c == j->search.winner || c == j->search.reference;
        for (int32_t p = 0; on_test && p < j->n_test; p++) {
            TRY(add_score(j, c, j->n_validation + p, &scores[(*n)++]));
        }
    }
    return ST_OK;
}

static enum status describe(const struct tune_job *j, char **out)
{
    char *config = NULL;
    enum status st = ST_OK;
    TRY(settings_print(&config, &j->given, false));
    size_t bytes = strlen(config) + strlen(j->model.depends) + 2 * SETTINGS_PATH_BYTES;
    st = mem_alloc_array((void **)out, bytes, 1);
    if (st == ST_OK) {
        snprintf(*out, bytes, "program %s\nreference %s\ngrid %d\nranks %d\n%s\n%s",
                 provenance_version(), j->reference, j->grid, j->env->size, j->model.depends,
                 config);
    }
    mem_free(config);
    return st;
}

static enum status report(const struct tune_job *j, const struct tune_test *test)
{
    char path[SETTINGS_PATH_BYTES + 16];
    char *provenance = NULL;
    double *bits = NULL;
    struct tune_score *scores = NULL;
    struct tune_report r = {.search = &j->search,
                            .names = j->name,
                            .test = *test,
                            .reference = j->reference,
                            .model_digest = j->digest,
                            .prompts_digest = j->validation.digest,
                            .loss = j->loss,
                            .seed = j->seed,
                            .n_validation = j->n_validation};
    int64_t most = 2 * (int64_t)j->n_test;
    for (int32_t c = 0; c < j->search.n; c++) {
        most += j->search.candidate[c].n_prompts;
    }
    enum status st = MEM_NEW(&scores, most);
    st = st ? st : MEM_NEW(&bits, j->search.n);
    st = st ? st : add_scores(j, scores, bits, &r.n_scores);
    st = st ? st : describe(j, &provenance);
    r.score = scores;
    r.decode_bits = bits;
    r.provenance = provenance;
    snprintf(path, sizeof path, "%s/tune.h5", j->out);
    st = st ? st : tune_report_write(&r, path);
    snprintf(path, sizeof path, "%s/best.cfg", j->out);
    st = st ? st : tune_report_best(&r, &j->given, path);
    if (st == ST_OK) {
        tune_report_print(&r, j->out);
    }
    mem_free(scores);
    mem_free(bits);
    mem_free(provenance);
    return st;
}

static enum status open_inputs(struct tune_job *j)
{
    TRY(tune_read_levels(j));
    TRY(tokenizer_open(&j->tok, j->settings.model.path, j->e.source.config.vocab));
    return tune_read_prompts(j);
}

static enum status run(struct tune_job *j)
{
    struct tune_test test;
    TRY(engine_open(&j->e, j->env, &j->settings));
    TRY(env_agree(j->env, open_inputs(j)));
    TRY(find_digest(&j->e, j->settings.model.path, j->digest));
    j->model = (struct tune_model){.e = &j->e, .settings = &j->settings, .tok = j->tok};
    tune_model_describe(&j->model, j->digest);
    TRY(tune_answers_open(&j->answers, j->env, j->out));
    if (j->answers.n > 0) {
        log_info("%s has %d answers already", j->answers.dir, j->answers.n);
    }
    TRY(env_agree(j->env, prepare_targets(j)));
    TRY(engine_load(&j->e, &j->settings, false));
    TRY(search(j));
    TRY(try_test(j, &test));
    log_info("%d answers decoded", j->answers.n_decoded);
    return env_agree(j->env, j->env->rank == 0 ? report(j, &test) : ST_OK);
}

enum status tune_plan(struct env *env, int argc, char **argv)
{
    struct tune_job *j = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(env->rank == 0 ? usage : "", stdout);
            return ST_OK;
        }
    }
    TRY(MEM_NEW(&j, 1));
    j->env = env;
    enum status st = tune_read_settings(j, argc, argv);
    if (st == ST_OK) {
        st = run(j);
        engine_close(&j->e);
    }
    for (int32_t i = 0; j->target && i < j->n_validation + j->n_test; i++) {
        mem_free(j->target[i]);
    }
    mem_free(j->target);
    mem_free(j->prompt);
    tune_answers_close(&j->answers);
    plan_search_free(&j->search);
    prompts_free(&j->validation);
    prompts_free(&j->test);
    tokenizer_close(&j->tok);
    mem_free(j);
    return st;
}
