/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/plan_search.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/sampler.h"

const char *const plan_verdict_name[PLAN_N_VERDICTS] = {"undecided", "worse", "unproven",
                                                        "lossless", "reference"};

/* ---- candidates ---- */

int32_t plan_candidate_level(const struct plan_search *s, const struct plan_candidate *c,
                             int32_t step)
{
    int32_t level = 0;
    while (level < s->n_levels - 1 && step >= c->at[level]) {
        level++;
    }
    return level;
}

static double average_bits(const struct plan_search *s, const struct plan_candidate *c,
                           const int64_t *n_steps)
{
    double bits = 0, n = 0;
    for (int32_t t = 0; t < s->max_new_tokens; t++) {
        int32_t level = t < s->lag - 1 ? c->prefill : plan_candidate_level(s, c, t);
        bits += (double)n_steps[t] * s->level_bits[level];
        n += (double)n_steps[t];
    }
    return n > 0 ? bits / n : s->level_bits[plan_candidate_level(s, c, 0)];
}

static int compare(const void *a, const void *b)
{
    const struct plan_candidate *x = a, *y = b;
    if (x->bits != y->bits) {
        return x->bits < y->bits ? -1 : 1;
    }
    if (x->prefill != y->prefill) { /* a larger place is fewer bits */
        return x->prefill > y->prefill ? -1 : 1;
    }
    for (int i = 0; i < SCHEDULE_MAX_LEVELS - 1; i++) { /* drops beyond every answer */
        if (x->at[i] != y->at[i]) {
            return x->at[i] > y->at[i] ? -1 : 1;
        }
    }
    return 0;
}

/* The next non-descending row of places in 0..n_places-1; false: that was the last one. */
static bool next_row(int32_t *place, int32_t n, int32_t n_places)
{
    int32_t i = n - 1;
    while (i >= 0 && place[i] == n_places - 1) {
        i--;
    }
    if (i < 0) {
        return false;
    }
    int32_t value = place[i] + 1;
    for (; i < n; i++) {
        place[i] = value;
    }
    return true;
}

static enum status add(struct plan_search *s, const struct plan_candidate *c)
{
    if (s->n == PLAN_SEARCH_MOST) {
        FAIL(ST_USER, "more than %d candidates; use fewer --levels or a smaller --grid",
             PLAN_SEARCH_MOST);
    }
    if (s->n == s->capacity) {
        int32_t more = s->capacity ? 2 * s->capacity : 64;
        TRY(mem_grow_array((void **)&s->candidate, (size_t)s->capacity, (size_t)more,
                           sizeof *s->candidate));
        s->capacity = more;
    }
    s->candidate[s->n++] = *c;
    return ST_OK;
}

static bool is_reference(const struct plan_search *s, const struct plan_candidate *c)
{
    return c->prefill == 0 && c->at[0] >= s->max_new_tokens;
}

static enum status enumerate(struct plan_search *s, const int32_t *steps, int32_t n_places,
                             const int64_t *n_steps)
{
    int32_t place[SCHEDULE_MAX_LEVELS - 1] = {0};
    do {
        struct plan_candidate c = {.verdict = PLAN_UNDECIDED};
        for (int32_t i = 0; i < s->n_levels - 1; i++) {
            c.at[i] = steps[place[i]];
        }
        for (c.prefill = 0; c.prefill < s->n_levels; c.prefill++) {
            c.bits = average_bits(s, &c, n_steps);
            c.prefill_bits = s->level_bits[c.prefill];
            TRY(add(s, &c));
        }
    } while (next_row(place, s->n_levels - 1, n_places));
    return ST_OK;
}

enum status plan_search_create(struct plan_search *out, const double *level_bits, int32_t n_levels,
                               int32_t max_new_tokens, int32_t grid, int32_t lag,
                               const int64_t *n_steps)
{
    struct plan_search s = {
        .n_levels = n_levels, .max_new_tokens = max_new_tokens, .lag = lag, .winner = -1};
    int32_t *steps = NULL, n_places = 0;
    enum status st = ST_OK;
    INVARIANT(n_levels >= 2 && n_levels <= SCHEDULE_MAX_LEVELS && max_new_tokens >= 1 && grid >= 1);
    for (int32_t i = 0; i < n_levels; i++) {
        s.level_bits[i] = level_bits[i];
        if (i > 0 && level_bits[i] >= level_bits[i - 1]) {
            FAIL(ST_USER, "levels must have fewer and fewer bits, found %g after %g", level_bits[i],
                 level_bits[i - 1]);
        }
    }
    TRY(MEM_NEW(&steps, grid + 1));
    for (int32_t i = 0; i <= grid; i++) {
        int32_t step = (int32_t)((int64_t)max_new_tokens * i / grid);
        bool once = n_places == 0 || steps[n_places - 1] != step; /* a fine grid of a few tokens */
        if (once && (step == max_new_tokens || n_steps[step] > 0)) {
            steps[n_places++] = step;
        }
    }
    TRY_GOTO(st, enumerate(&s, steps, n_places, n_steps), fail);
    qsort(s.candidate, (size_t)s.n, sizeof *s.candidate, compare);
    while (!is_reference(&s, &s.candidate[s.reference])) {
        s.reference++;
    }
    mem_free(steps);
    *out = s;
    return ST_OK;
fail:
    mem_free(steps);
    plan_search_free(&s);
    return st;
}

void plan_search_free(struct plan_search *s)
{
    mem_free(s->candidate);
    *s = (struct plan_search){0};
}

void plan_candidate_text(char *text, size_t bytes, const struct plan_search *s,
                         const struct plan_candidate *c, const char *const *names,
                         bool with_prefill)
{
    int32_t level = plan_candidate_level(s, c, 0);
    int n = with_prefill ? snprintf(text, bytes, "prefill:%s ", names[c->prefill]) : 0;
    n += snprintf(text + n, bytes - (size_t)n, "0:%s", names[level]);
    for (; level < s->n_levels - 1 && c->at[level] < s->max_new_tokens; level++) {
        bool passed = level + 2 < s->n_levels && c->at[level + 1] == c->at[level];
        if (!passed && (size_t)n < bytes) {
            n += snprintf(text + n, bytes - (size_t)n, " %d:%s", c->at[level], names[level + 1]);
        }
    }
}

/* ---- the interval ---- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double resampled_mean(const double *differences, int32_t n, uint64_t seed, uint32_t number)
{
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t random[4] = {0};
    double sum = 0;
    for (int32_t i = 0; i < n; i++) {
        if (i % 4 == 0) {
            const uint32_t counter[4] = {number, (uint32_t)i / 4, (uint32_t)n, 0xB007};
            philox4x32(random, counter, key);
        }
        sum += differences[(uint64_t)random[i % 4] * (uint64_t)n >> 32];
    }
    return sum / n;
}

enum status plan_interval(struct plan_interval *out, const double *differences, int32_t n,
                          uint64_t seed)
{
    double *means = NULL;
    TRY(MEM_NEW(&means, PLAN_SEARCH_RESAMPLES));
    out->mean = 0;
    for (int32_t i = 0; i < n; i++) {
        out->mean += differences[i] / n;
    }
    for (uint32_t r = 0; r < PLAN_SEARCH_RESAMPLES; r++) {
        means[r] = resampled_mean(differences, n, seed, r);
    }
    qsort(means, PLAN_SEARCH_RESAMPLES, sizeof *means, ascending);
    out->low = means[PLAN_SEARCH_RESAMPLES / 40]; /* 2.5 % below, 2.5 % above */
    out->high = means[PLAN_SEARCH_RESAMPLES - 1 - PLAN_SEARCH_RESAMPLES / 40];
    mem_free(means);
    return ST_OK;
}

/* ---- the search ---- */

int32_t plan_search_n_rungs(int32_t n)
{
    int32_t rungs = 1;
    while (n / PLAN_SEARCH_FACTOR >= PLAN_SEARCH_LEAST) {
        n /= PLAN_SEARCH_FACTOR;
        rungs++;
    }
    return rungs;
}

int32_t plan_search_rung(int32_t rung, int32_t n)
{
    for (int32_t r = plan_search_n_rungs(n) - 1; r > rung; r--) {
        n /= PLAN_SEARCH_FACTOR;
    }
    return n;
}

struct running {
    struct plan_search *s;
    const double *reference; /* (n_prompts) */
    double *quality;         /* (PLAN_SEARCH_WAVE, n_prompts) */
    double *difference;      /* (n_prompts) */
    int32_t n_prompts;
    double loss;
    uint64_t seed;
    plan_measure_fn *measure;
    void *ctx;
};

/* A candidate's qualities of the first n prompts are known. */
static enum status judge(const struct running *r, int32_t place, const double *quality, int32_t n)
{
    struct plan_candidate *c = &r->s->candidate[place];
    c->n_prompts = n;
    c->quality = 0;
    for (int32_t p = 0; p < n; p++) {
        c->quality += quality[p] / n;
        r->difference[p] = quality[p] - r->reference[p];
    }
    TRY(plan_interval(&c->difference, r->difference, n, r->seed));
    c->verdict = c->difference.high < -r->loss  ? PLAN_DROPPED
                 : n < r->n_prompts             ? PLAN_UNDECIDED
                 : c->difference.low < -r->loss ? PLAN_UNPROVEN
                                                : PLAN_LOSSLESS;
    return ST_OK;
}

/* Measures the wave's n candidates, whose rows are known up to `first`, up to `last`; those that
 * are left come first in the wave, in order. */
static enum status measure_rung(const struct running *r, int32_t *wave, int32_t *n, int32_t first,
                                int32_t last)
{
    size_t row = (size_t)r->n_prompts;
    int32_t n_left = 0;
    TRY(r->measure(r->ctx, wave, *n, first, last, r->quality));
    for (int32_t i = 0; i < *n; i++) {
        TRY(judge(r, wave[i], r->quality + (size_t)i * row, last));
        if (r->s->candidate[wave[i]].verdict == PLAN_UNDECIDED) {
            memmove(r->quality + (size_t)n_left * row, r->quality + (size_t)i * row,
                    row * sizeof *r->quality);
            wave[n_left++] = wave[i];
        }
    }
    *n = n_left;
    return ST_OK;
}

/* Sets the winner when one of the wave is confirmed. */
static enum status run_wave(const struct running *r, int32_t *wave, int32_t n)
{
    int32_t n_rungs = plan_search_n_rungs(r->n_prompts), first = 0;
    size_t row = (size_t)r->n_prompts;
    for (int32_t rung = 0; n > 0 && rung < n_rungs - 1; rung++) {
        int32_t last = plan_search_rung(rung, r->n_prompts);
        TRY(measure_rung(r, wave, &n, first, last));
        first = last;
    }
    for (int32_t i = 0; i < n && r->s->winner < 0; i++) { /* all prompts: one by one */
        memmove(r->quality, r->quality + (size_t)i * row, row * sizeof *r->quality);
        TRY(r->measure(r->ctx, &wave[i], 1, first, r->n_prompts, r->quality));
        TRY(judge(r, wave[i], r->quality, r->n_prompts));
        if (r->s->candidate[wave[i]].verdict == PLAN_LOSSLESS) {
            r->s->winner = wave[i];
        }
    }
    return ST_OK;
}

enum status plan_search_run(struct plan_search *s, const double *reference, int32_t n_prompts,
                            double loss, uint64_t seed, plan_measure_fn *measure, void *ctx)
{
    struct running r = {.s = s,
                        .reference = reference,
                        .n_prompts = n_prompts,
                        .loss = loss,
                        .seed = seed,
                        .measure = measure,
                        .ctx = ctx};
    enum status st = ST_OK;
    INVARIANT(n_prompts >= 1);
    s->winner = -1;
    for (int32_t i = 0; i < s->n; i++) {
        struct plan_candidate *c = &s->candidate[i];
        c->verdict = PLAN_UNDECIDED;
        c->n_prompts = 0;
        c->quality = c->difference.mean = c->difference.low = c->difference.high = (double)NAN;
    }
    TRY_GOTO(st, MEM_NEW(&r.quality, (size_t)PLAN_SEARCH_WAVE * (size_t)n_prompts), done);
    TRY_GOTO(st, MEM_NEW(&r.difference, n_prompts), done);
    TRY_GOTO(st, judge(&r, s->reference, reference, n_prompts), done);
    s->candidate[s->reference].verdict = PLAN_REFERENCE;
    for (int32_t next = 0; s->winner < 0 && next < s->reference;) {
        int32_t wave[PLAN_SEARCH_WAVE], n = 0;
        while (n < PLAN_SEARCH_WAVE && next < s->reference) {
            wave[n++] = next++;
        }
        TRY_GOTO(st, run_wave(&r, wave, n), done);
    }
    if (s->winner < 0) { /* nothing below it is lossless */
        s->winner = s->reference;
    }
done:
    mem_free(r.quality);
    mem_free(r.difference);
    return st;
}
