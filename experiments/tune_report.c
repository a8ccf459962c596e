/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/tune_report.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "core/h5.h"
#include "core/mem.h"
#include "core/replace.h"
#include "experiments/tune_answers.h"

/* ---- for people ---- */

void tune_report_print(const struct tune_report *r, const char *dir)
{
    const struct plan_search *s = r->search;
    const struct tune_test *t = &r->test;
    char plan[TUNE_PLAN_BYTES];
    int32_t n_tried = 0;
    printf("%-36s %11s %12s %7s %8s   %-20s\n", "plan", "decode bits", "prefill bits", "prompts",
           "quality", "difference, 95 %");
    for (int32_t i = 0; i < s->n; i++) {
        const struct plan_candidate *c = &s->candidate[i];
        if (c->n_prompts == 0) {
            continue;
        }
        n_tried++;
        plan_candidate_text(plan, sizeof plan, s, c, r->names, true);
        printf("%-36s %11.3f %12.3f %7d %8.4f   %+.4f .. %+.4f  %s%s\n", plan, c->bits,
               c->prefill_bits, c->n_prompts, c->quality, c->difference.low, c->difference.high,
               plan_verdict_name[c->verdict], i == s->winner ? " <- best" : "");
    }
    printf("%d of %d plans tried on up to %d prompts; quality is ROUGE-L against %s\n", n_tried,
           s->n, r->n_validation, r->reference);
    if (t->n_prompts > 0) {
        printf("test split, %d prompts: quality %.4f, highest level %.4f, difference %+.4f "
               "(%+.4f .. %+.4f), %.3f decode bits: %s\n",
               t->n_prompts, t->quality, t->reference_quality, t->difference.mean,
               t->difference.low, t->difference.high, t->decode_bits,
               t->difference.low >= -r->loss ? "lossless there, too" : "not confirmed there");
    } else {
        printf("no prompts of split test: nothing to report the best plan on\n");
    }
    printf("%s/best.cfg runs it; %s/tune.h5 has every trial\n", dir, dir);
}

/* ---- tune.h5 ---- */

struct trial_row {
    char *plan, *switches; /* owned */
    const char *prefill, *verdict;
    double bits, prefill_bits, decode_bits, quality, difference, low, high;
    int32_t n_prompts;
};
#define COLUMN(row, name, kind, unit, about)                    \
    {                                                           \
#name, kind, offsetof(struct row, name), 0, unit, about \
    }
static const struct h5_column trial_columns[] = {
    COLUMN(trial_row, plan, COL_TEXT, "text", "prefill level and switch points"),
    COLUMN(trial_row, prefill, COL_TEXT, "text", "policy.prefill"),
    COLUMN(trial_row, switches, COL_TEXT, "text", "policy.switches"),
    COLUMN(trial_row, bits, COL_F64, "bits",
           "average over the decode steps of the highest level's validation answers; what is made "
           "small"),
    COLUMN(trial_row, prefill_bits, COL_F64, "bits", "of the prefill level"),
    COLUMN(trial_row, decode_bits, COL_F64, "bits",
           "average over the decode steps of its own answers; NaN: not tried"),
    COLUMN(trial_row, n_prompts, COL_I32, "prompts", "it was tried on"),
    COLUMN(trial_row, quality, COL_F64, "1", "mean over them; NaN: not tried"),
    COLUMN(trial_row, difference, COL_F64, "1", "mean of quality minus the highest level's"),
    COLUMN(trial_row, low, COL_F64, "1", "lower end of the difference's interval"),
    COLUMN(trial_row, high, COL_F64, "1", "upper end"),
    COLUMN(trial_row, verdict, COL_TEXT, "text",
           "worse, unproven, lossless, reference (the highest level alone), or undecided (not "
           "tried, or not "
           "to the end: it costs more than the best)"),
};
static const struct h5_column score_columns[] = {
    COLUMN(tune_score, trial, COL_I32, "1", "row of /trials"),
    COLUMN(tune_score, id, COL_TEXT, "text", "of the prompt"),
    COLUMN(tune_score, split, COL_TEXT, "text", "of the prompt"),
    COLUMN(tune_score, n_steps, COL_I32, "steps", "decode steps of the answer"),
    COLUMN(tune_score, quality, COL_F64, "1", "ROUGE-L against the reference"),
    COLUMN(tune_score, decode_bits, COL_F64, "bits", "average over the steps"),
};
#undef COLUMN
enum {
    N_TRIAL_COLUMNS = sizeof trial_columns / sizeof *trial_columns,
    N_SCORE_COLUMNS = sizeof score_columns / sizeof *score_columns
};

static enum status fill_trial(struct trial_row *row, const struct tune_report *r, int32_t i)
{
    const struct plan_candidate *c = &r->search->candidate[i];
    char text[TUNE_PLAN_BYTES];
    *row = (struct trial_row){.prefill = r->names[c->prefill],
                              .verdict = plan_verdict_name[c->verdict],
                              .bits = c->bits,
                              .prefill_bits = c->prefill_bits,
                              .decode_bits = r->decode_bits[i],
                              .quality = c->quality,
                              .difference = c->difference.mean,
                              .low = c->difference.low,
                              .high = c->difference.high,
                              .n_prompts = c->n_prompts};
    plan_candidate_text(text, sizeof text, r->search, c, r->names, true);
    TRY(mem_strdup(&row->plan, text));
    plan_candidate_text(text, sizeof text, r->search, c, r->names, false);
    return mem_strdup(&row->switches, text);
}

static enum status write_trials(hid_t file, const struct tune_report *r)
{
    int32_t n = r->search->n;
    struct trial_row *rows = NULL;
    struct h5_table t;
    enum status st = ST_OK;
    TRY(MEM_NEW(&rows, n));
    for (int32_t i = 0; st == ST_OK && i < n; i++) {
        st = fill_trial(&rows[i], r, i);
    }
    if (st == ST_OK) {
        st = h5_table_begin(&t, file, "trials", "one per plan, the cheapest first", trial_columns,
                            N_TRIAL_COLUMNS, sizeof *rows, (uint64_t)n);
        for (int32_t i = 0; st == ST_OK && i < n; i++) {
            st = h5_table_put(&t, &rows[i]);
        }
        st = st ? st : h5_table_end(&t);
        h5_table_close(&t);
    }
    for (int32_t i = 0; i < n; i++) {
        mem_free(rows[i].plan);
        mem_free(rows[i].switches);
    }
    mem_free(rows);
    return st;
}

static enum status write_scores(hid_t file, const struct tune_report *r)
{
    struct h5_table t;
    enum status st = h5_table_begin(&t, file, "scores", "one per answer", score_columns,
                                    N_SCORE_COLUMNS, sizeof *r->score, (uint64_t)r->n_scores);
    for (int64_t i = 0; st == ST_OK && i < r->n_scores; i++) {
        st = h5_table_put(&t, &r->score[i]);
    }
    st = st ? st : h5_table_end(&t);
    h5_table_close(&t);
    return st;
}

static enum status write_test(hid_t file, const struct tune_report *r)
{
    const struct tune_test *t = &r->test;
    const struct {
        const char *name, *unit, *about;
        double value;
    } rows[] = {
        {"quality", "1", "mean", t->quality},
        {"reference_quality", "1", "mean of the highest level's", t->reference_quality},
        {"difference", "1", "mean of quality minus the highest level's", t->difference.mean},
        {"low", "1", "lower end of the difference's 95 % interval", t->difference.low},
        {"high", "1", "upper end", t->difference.high},
        {"decode_bits", "bits", "average over its decode steps", t->decode_bits},
        {"reference_bits", "bits", "the same of the highest level", t->reference_bits}};
    hid_t group = H5I_INVALID_HID;
    TRY(h5_group(&group, file, "test", "the best plan on the test split, decoded once at the end"));
    enum status st = h5_scalar_i64(group, "n_prompts", t->n_prompts, "prompts", "of the split");
    for (size_t i = 0; t->n_prompts > 0 && st == ST_OK && i < sizeof rows / sizeof *rows; i++) {
        st = h5_scalar_f64(group, rows[i].name, rows[i].value, rows[i].unit, rows[i].about);
    }
    H5Gclose(group);
    return st;
}

static enum status write_all(hid_t file, const struct tune_report *r)
{
    TRY(h5_attribute(file, "format", "pmpd tune"));
    TRY(h5_attribute(file, "format_version", "1"));
    TRY(h5_attribute(file, "model_digest", r->model_digest));
    TRY(h5_attribute(file, "prompts_digest", r->prompts_digest));
    TRY(h5_attribute(file, "reference", r->reference));
    TRY(h5_scalar_text(file, "provenance", r->provenance, "how it was made"));
    TRY(h5_scalar_f64(file, "loss", r->loss, "1",
                      "lossless: the interval's lower end is at least minus this"));
    TRY(h5_scalar_f64(file, "confidence", 0.95, "1", "of the percentile bootstrap intervals"));
    TRY(h5_scalar_i64(file, "resamples", PLAN_SEARCH_RESAMPLES, "1", "of the bootstrap"));
    TRY(h5_scalar_i64(file, "seed", (int64_t)r->seed, "1", "of the bootstrap and the order"));
    TRY(h5_scalar_i64(file, "n_validation", r->n_validation, "prompts", "of the validation split"));
    TRY(h5_scalar_i64(file, "best", r->search->winner, "1", "row of /trials"));
    TRY(write_trials(file, r));
    TRY(write_scores(file, r));
    return write_test(file, r);
}

enum status tune_report_write(const struct tune_report *r, const char *path)
{
    hid_t file = H5I_INVALID_HID;
    h5_quiet();
    TRY(h5_create(&file, path));
    enum status st = write_all(file, r);
    st = st ? st : h5_save(file, path);
    H5Fclose(file);
    return st;
}

/* ---- best.cfg ---- */

enum status tune_report_best(const struct tune_report *r, const struct settings *s,
                             const char *path)
{
    const struct plan_candidate *c = &r->search->candidate[r->search->winner];
    struct settings best = *s;
    char *text = NULL;
    char switches[TUNE_PLAN_BYTES];
    plan_candidate_text(switches, sizeof switches, r->search, c, r->names, false);
    if (strlen(switches) >= sizeof best.policy.switches) {
        FAIL(ST_USER,
             "the best plan has %zu characters, policy.switches takes %zu; use levels with "
             "shorter names",
             strlen(switches), sizeof best.policy.switches - 1);
    }
    snprintf(best.policy.name, sizeof best.policy.name, "static");
    snprintf(best.policy.prefill, sizeof best.policy.prefill, "%s", r->names[c->prefill]);
    snprintf(best.policy.switches, sizeof best.policy.switches, "%s", switches);
    best.policy.dial = 0.5;
    best.budget.average_bits = best.budget.ms_per_token = 0;
    TRY(settings_print(&text, &best, false));
    enum status st = replace_with(path, text, strlen(text));
    mem_free(text);
    return st;
}
