/* SPDX-License-Identifier: Apache-2.0 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/journal.h"
#include "experiments/provenance.h"
#include "experiments/train_job.h"

enum { RECORD_TRIAL = 66 };

/* A finished trial in the journal. */
struct record {
    uint64_t key;
    struct trial trial;
};

struct search {
    struct train_job *job;
    uint64_t key;
    int32_t n_rungs, n_all, n_done;
    struct trial *all; /* (n_all) of every rung, those that are done */
    struct journal *journal;
    char dir[PATH_MAX];
};

/* What every trial depends on beside its own numbers. */
static uint64_t search_key(const struct train_job *j)
{
    char text[512];
    int n = snprintf(text, sizeof text, "trials 1\n%s\n%d\n%llu\n%d\n%d\n%d\n", j->digest,
                     (int)j->kind, (unsigned long long)j->options.seed, j->options.patience,
                     j->options.balance, j->options.allow_empty);
    return XXH3_64bits(text, (size_t)n);
}

static enum status visit(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct search *s = ctx;
    struct record r;
    if (kind != RECORD_TRIAL || bytes != sizeof r) {
        FAIL(ST_FORMAT, "%s/journal.bin holds something else than trials; choose another --out",
             s->dir);
    }
    memcpy(&r, payload, sizeof r);
    if (r.key == s->key && r.trial.is_done && s->n_done < s->n_all) {
        s->all[s->n_done++] = r.trial;
    }
    return ST_OK;
}

/* The trial as it was done before, in t; false: not yet. A trial is known by what it tries. */
static bool find(const struct search *s, struct trial *t)
{
    for (int32_t i = 0; i < s->n_done; i++) {
        if (s->all[i].number == t->number && s->all[i].max_epochs == t->max_epochs) {
            int32_t rung = t->rung;
            *t = s->all[i];
            t->rung = rung;
            return true;
        }
    }
    return false;
}

static enum status train_one(struct train_job *j, struct trial *t)
{
    struct classifier c;
    struct collective alone;
    struct train_history history;
    struct classifier_shape shape =
        search_shape(t, j->kind, j->dataset.facts.n_kv_heads, j->dataset.facts.head_dim,
                     train_job_n_in(j), train_job_n_classes(j));
    struct train_options options = search_options(t, &j->options);
    struct train_data data = {j->samples[SPLIT_TRAIN].sample, j->samples[SPLIT_VALIDATION].sample,
                              j->samples[SPLIT_TRAIN].n, j->samples[SPLIT_VALIDATION].n};
    double start = clock_s();
    collective_local(&alone);
    TRY(classifier_create(&c, &shape));
    enum status st = train_run(&c, &data, &options, &alone, &history);
    t->loss = INFINITY;
    if (st == ST_OK) {
        const struct train_epoch *best = &history.epochs[history.best];
        t->loss = (double)best->validation_loss;
        t->accuracy = (double)best->validation_accuracy;
        t->n_epochs = history.n;
        t->best_epoch = history.best;
        train_history_free(&history);
    } else if (st == ST_NUMERIC) { /* a result, too */
        status_clear();
        st = ST_OK;
    }
    t->is_done = 1;
    t->seconds = clock_s() - start;
    classifier_free(&c);
    return st;
}

/* Each rank trains one of the n missing trials from `first` on; all learn all results. */
static enum status run_round(struct search *s, struct trial *trials, const int32_t *missing,
                             int32_t n)
{
    struct train_job *j = s->job;
    struct trial own = {0}, *gathered = NULL;
    TRY(MEM_NEW(&gathered, j->env->size));
    enum status st = ST_OK;
    if (j->env->rank < n) {
        own = trials[missing[j->env->rank]];
        st = train_one(j, &own);
    }
    TRY_GOTO(st, env_agree(j->env, st), done);
    if (MPI_Allgather(&own, (int)sizeof own, MPI_BYTE, gathered, (int)sizeof own, MPI_BYTE,
                      j->env->world) != MPI_SUCCESS) {
        FAIL_GOTO(st, ST_MPI, done, "the ranks could not exchange their trials");
    }
    for (int32_t i = 0; i < n; i++) {
        trials[missing[i]] = gathered[i];
        if (s->n_done < s->n_all) {
            s->all[s->n_done++] = gathered[i];
        }
        if (j->env->rank == 0 && st == ST_OK) {
            struct record r;
            memset(&r, 0, sizeof r);
            r.key = s->key;
            r.trial = gathered[i];
            st = journal_append(s->journal, RECORD_TRIAL, &r, sizeof r, true);
        }
    }
    st = env_agree(j->env, st);
done:
    mem_free(gathered);
    return st;
}

static enum status run_rung(struct search *s, struct trial *trials, int32_t n, int32_t rung)
{
    int32_t *missing = NULL, n_missing = 0;
    struct progress progress;
    enum status st = ST_OK;
    char what[64];
    TRY(MEM_NEW(&missing, n));
    for (int32_t i = 0; i < n; i++) {
        trials[i].rung = rung;
        trials[i].is_done = 0;
        trials[i].max_epochs = search_epochs(rung, s->n_rungs, s->job->options.max_epochs);
        if (!find(s, &trials[i])) {
            missing[n_missing++] = i;
        }
    }
    snprintf(what, sizeof what, "rung %d of %d", rung + 1, s->n_rungs);
    progress_begin(&progress, what, "trials", n_missing);
    int32_t size = s->job->env->size;
    for (int32_t i = 0; i < n_missing; i += size) {
        int32_t m = n_missing - i < size ? n_missing - i : size;
        TRY_GOTO(st, run_round(s, trials, missing + i, m), done);
        progress_update(&progress, i + m);
    }
    progress_end(&progress);
done:
    mem_free(missing);
    return st;
}

/* Rank 0 reads what is done; all get it. */
static enum status begin(struct search *s)
{
    struct env *env = s->job->env;
    enum status st = ST_OK;
    if (env->rank == 0) {
        st = journal_open(&s->journal, s->dir, visit, s);
    }
    TRY(env_agree(env, st));
    TRY_MPI(MPI_Bcast(&s->n_done, 1, MPI_INT, 0, env->world));
    TRY_MPI(MPI_Bcast(s->all, (int)((size_t)s->n_done * sizeof *s->all), MPI_BYTE, 0, env->world));
    if (s->n_done > 0) {
        log_info("%d trainings are done already", s->n_done);
    }
    return ST_OK;
}

/* Every training of this search, by rung and number. */
static enum status write_trials(struct search *s, const struct trial *done, int32_t n)
{
    char path[PATH_MAX + 16], about[512];
    snprintf(path, sizeof path, "%s/trials.h5", s->dir);
    snprintf(about, sizeof about,
             "random search with successive halving, factor %d; program %s; dataset rows %s; seed "
             "%llu",
             SEARCH_FACTOR, provenance_version(), s->job->digest,
             (unsigned long long)s->job->options.seed);
    return search_write(path, done, n, about);
}

static enum status run_search(struct search *s, struct trial *trials, struct trial *done,
                              struct trial *best)
{
    struct train_job *j = s->job;
    int32_t n = j->n_trials, n_written = 0;
    enum status st = ST_OK;
    TRY(begin(s));
    for (int32_t i = 0; i < n; i++) {
        search_sample(&trials[i], i, j->options.seed, j->kind, j->dataset.facts.head_dim,
                      train_job_n_in(j), 0);
    }
    for (int32_t rung = 0; rung < s->n_rungs; rung++) {
        TRY(run_rung(s, trials, n, rung));
        int32_t left = search_rank(trials, n);
        memcpy(done + n_written, trials, (size_t)n * sizeof *trials);
        n_written += n;
        log_info("rung %d of %d: %d trials of at most %d epochs, smallest validation loss %.4f",
                 rung + 1, s->n_rungs, n, trials[0].max_epochs, trials[0].loss);
        n = left;
    }
    *best = trials[0];
    if (j->env->rank == 0) {
        st = write_trials(s, done, n_written);
    }
    TRY(env_agree(j->env, st));
    if (!isfinite(best->loss)) {
        FAIL(ST_NUMERIC, "every trial diverged: the dataset's features hold extreme values");
    }
    return ST_OK;
}

enum status train_search(struct train_job *j, struct trial *best)
{
    struct search s = {.job = j, .key = search_key(j)};
    struct trial *trials = NULL, *done = NULL;
    enum status st = ST_OK;
    s.n_rungs = search_n_rungs(j->n_trials, j->options.max_epochs);
    s.n_all = 2 * j->n_trials * s.n_rungs; /* a journal may know more than is asked for now */
    if (snprintf(s.dir, sizeof s.dir, "%s.trials", j->out) >= (int)sizeof s.dir) {
        FAIL(ST_USER, "--out is too long");
    }
    TRY_GOTO(st, MEM_NEW(&s.all, s.n_all), done);
    TRY_GOTO(st, MEM_NEW(&trials, j->n_trials), done);
    TRY_GOTO(st, MEM_NEW(&done, j->n_trials * s.n_rungs), done);
    st = run_search(&s, trials, done, best);
done:
    journal_close(&s.journal);
    mem_free(s.all);
    mem_free(trials);
    mem_free(done);
    return st;
}
