/* Sums over finished records: the ordered passes, and the scalars of /metrics.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/metrics.h"

#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"

/* ---- passes ---- */

static int compare_pass(const struct pass_row *a, int32_t epoch, int32_t replica, uint32_t pass)
{
    if (a->epoch != epoch) {
        return a->epoch < epoch ? -1 : 1;
    }
    if (a->replica != replica) {
        return a->replica < replica ? -1 : 1;
    }
    return (a->pass->pass > pass) - (a->pass->pass < pass);
}

static int compare_rows(const void *a, const void *b)
{
    const struct pass_row *y = b;
    return compare_pass(a, y->epoch, y->replica, y->pass->pass);
}

enum status passes_collect(struct pass_row **rows, size_t *n_rows, const struct run_contents *run)
{
    size_t n = 0;
    for (int i = 0; i < run->n_finished; i++) {
        n += (size_t)run->finished[i].n_passes;
    }
    struct pass_row *all = NULL;
    TRY(MEM_NEW(&all, n));
    size_t at = 0;
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        for (int j = 0; j < r->n_passes; j++) {
            all[at++] = (struct pass_row){r->epoch, r->replica, &r->passes[j]};
        }
    }
    qsort(all, n, sizeof *all, compare_rows);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (kept == 0 || compare_rows(&all[kept - 1], &all[i]) != 0) {
            all[kept++] = all[i];
        }
    }
    *rows = all;
    *n_rows = kept;
    return ST_OK;
}

int64_t passes_find(const struct pass_row *rows, size_t n_rows, int32_t epoch, int32_t replica,
                    uint32_t pass)
{
    size_t low = 0, high = n_rows;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_pass(&rows[middle], epoch, replica, pass);
        if (order == 0) {
            return (int64_t)middle;
        }
        low = order < 0 ? middle + 1 : low;
        high = order < 0 ? high : middle;
    }
    return -1;
}

/* ---- checks ---- */

static enum status check_level(const struct run_contents *run, int64_t ordinal, int32_t level)
{
    if (level < 0 || level >= run->levels->n) {
        FAIL(ST_FORMAT,
             "record of prompt %lld names level %d; the run has %d levels: was it written "
             "with another configuration?",
             (long long)ordinal, level, run->levels->n);
    }
    return ST_OK;
}

enum status run_contents_check(const struct run_contents *run)
{
    int32_t dim = 0;
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        if (r->ordinal < 0 || r->ordinal >= run->prompts->n) {
            FAIL(ST_FORMAT, "record of prompt %lld; the prompt file has %d prompts",
                 (long long)r->ordinal, run->prompts->n);
        }
        if (i > 0 && r->ordinal <= run->finished[i - 1].ordinal) {
            FAIL(ST_FORMAT,
                 "record of prompt %lld comes after that of prompt %lld; expected one "
                 "record of each prompt, in order",
                 (long long)r->ordinal, (long long)run->finished[i - 1].ordinal);
        }
        for (int j = 0; j < r->n_turns; j++) {
            TRY(check_level(run, r->ordinal, r->turns[j].prefill_level));
        }
        for (int j = 0; j < r->n_steps; j++) {
            TRY(check_level(run, r->ordinal, r->steps[j].level));
        }
        for (int j = 0; j < r->n_switches; j++) {
            TRY(check_level(run, r->ordinal, r->switches[j].level));
        }
        for (int j = 0; j < r->n_decisions; j++) {
            const struct decision_record *d = &r->decisions[j];
            TRY(check_level(run, r->ordinal, d->level < 0 ? 0 : d->level));
            TRY(check_level(run, r->ordinal, d->probe < 0 ? 0 : d->probe));
        }
        if (r->n_feature_tok > 0 && dim > 0 && r->feature_dim != dim) {
            FAIL(ST_FORMAT,
                 "record of prompt %lld has KV features of width %d; those before have "
                 "%d",
                 (long long)r->ordinal, r->feature_dim, dim);
        }
        dim = r->n_feature_tok > 0 ? r->feature_dim : dim;
    }
    for (int i = 0; i < run->n_failed; i++) {
        if (run->failed[i].ordinal < 0 || run->failed[i].ordinal >= run->prompts->n) {
            FAIL(ST_FORMAT, "failed prompt %lld; the prompt file has %d prompts",
                 (long long)run->failed[i].ordinal, run->prompts->n);
        }
    }
    return ST_OK;
}

/* ---- scalars ---- */

/* Decode steps and the time of decode passes of one (epoch, replica), in pieces. */
struct share {
    int32_t epoch, replica;
    int64_t steps;
    double time_s;
};

static int compare_shares(const void *a, const void *b)
{
    const struct share *x = a, *y = b;
    if (x->epoch != y->epoch) {
        return x->epoch < y->epoch ? -1 : 1;
    }
    return (x->replica > y->replica) - (x->replica < y->replica);
}

/* Replicas of one epoch work side by side: their rates add up. Epochs follow each other: their
 * times add up, an epoch lasting as long as its steps take at its own aggregate rate. */
static double aggregate_rate(struct share *share, size_t n)
{
    qsort(share, n, sizeof *share, compare_shares);
    double all_steps = 0, all_time_s = 0;
    for (size_t i = 0; i < n;) {
        int32_t epoch = share[i].epoch;
        double epoch_rate = 0, epoch_steps = 0;
        while (i < n && share[i].epoch == epoch) {
            int32_t replica = share[i].replica;
            double steps = 0, time_s = 0;
            for (; i < n && share[i].epoch == epoch && share[i].replica == replica; i++) {
                steps += (double)share[i].steps;
                time_s += share[i].time_s;
            }
            if (steps > 0 && time_s > 0) {
                epoch_rate += steps / time_s;
                epoch_steps += steps;
            }
        }
        if (epoch_rate > 0) {
            all_steps += epoch_steps;
            all_time_s += epoch_steps / epoch_rate;
        }
    }
    return all_time_s > 0 ? all_steps / all_time_s : 0;
}

static double level_bits(const struct run_contents *run, int32_t level)
{
    return level >= 0 && level < run->levels->n ? (double)run->levels->level[level].avg_bits : 0;
}

static void add_records(struct run_metrics *m, const struct run_contents *run)
{
    double step_bits = 0, prompt_bits = 0, logprob = 0, n_logprob = 0;
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        for (int j = 0; j < r->n_turns; j++) {
            const struct turn_record *t = &r->turns[j];
            m->n_prompt_tok += t->n_prompt_tok;
            m->n_new_tok += t->n_new_tok;
            prompt_bits += t->n_prompt_tok * level_bits(run, t->prefill_level);
            logprob += (double)t->logprob0;
        }
        for (int j = 0; j < r->n_steps; j++) {
            step_bits += level_bits(run, r->steps[j].level);
            logprob += (double)r->steps[j].logprob;
        }
        m->n_steps += r->n_steps;
        n_logprob += (double)r->n_turns + (double)r->n_steps;
    }
    m->avg_decode_bits = m->n_steps > 0 ? step_bits / (double)m->n_steps : 0;
    m->avg_prefill_bits = m->n_prompt_tok > 0 ? prompt_bits / (double)m->n_prompt_tok : 0;
    m->mean_logprob = n_logprob > 0 ? logprob / n_logprob : 0;
}

static enum status add_passes(struct run_metrics *m, const struct run_contents *run)
{
    enum status st = ST_OK;
    struct pass_row *rows = NULL;
    struct share *share = NULL;
    size_t n_rows = 0, n = 0;
    double bytes = 0;
    TRY_GOTO(st, passes_collect(&rows, &n_rows, run), done);
    TRY_GOTO(st, MEM_NEW(&share, n_rows + (size_t)run->n_finished), done);
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        share[n++] = (struct share){r->epoch, r->replica, r->n_steps, 0};
    }
    for (size_t i = 0; i < n_rows; i++) {
        const struct pass_record *p = rows[i].pass;
        double time_s = (double)p->time_us * 1e-6;
        if (p->kind == PASS_DECODE) {
            m->decode_s += time_s;
            bytes += (double)p->weight_bytes + (double)p->kv_bytes;
            share[n++] = (struct share){rows[i].epoch, rows[i].replica, 0, time_s};
        } else {
            m->prefill_s += time_s;
        }
    }
    m->n_passes = (int64_t)n_rows;
    m->bytes_per_token = m->n_steps > 0 ? bytes / (double)m->n_steps : 0;
    m->decode_tok_s = aggregate_rate(share, n);
done:
    mem_free(share);
    mem_free(rows);
    return st;
}

void run_metrics_compute(struct run_metrics *out, const struct run_contents *run)
{
    memset(out, 0, sizeof *out);
    out->n_prompts = run->prompts->n;
    out->n_finished = run->n_finished;
    out->n_failed = run->n_failed;
    add_records(out, run);
    if (add_passes(out, run) != ST_OK) {
        log_warn("metrics without speed and bytes: %s", status_message());
        status_clear();
    }
}
