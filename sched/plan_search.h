/* Search for the cheapest static plan that loses nothing: a prefill level and the steps at which
 * the decode level drops, jointly. Candidates are tried cheapest first, in waves; a wave's
 * candidates are measured on more and more prompts and dropped as soon as their quality is below
 * the highest level's beyond doubt (successive halving over prompts); the first that is confirmed
 * on all prompts wins, and what costs more is never tried.
 *
 * Quality is a number per prompt (larger is better); it is compared in pairs with the highest
 * level's on the same prompt. "Lossless" means: the lower end of the 95 % interval of the mean
 * difference is at least -loss. That is said of one candidate; the winner is the first of several
 * to be confirmed, so its own number is a little too good and another split must report it.
 *
 * Which candidates are tried, on what, and who wins depends on qualities, costs and seed only. Not
 * collective.
 * Source: static scheduler search of PMPD (arXiv 2410.13461: switches at 0, T/3, 2T/3), with more
 * levels and steps; percentile bootstrap: Efron, Tibshirani, "An Introduction to the Bootstrap"
 * (1993), chapter 13; halving: Jamieson, Talwalkar (arXiv 1502.07943), dropping by interval instead
 * of by rank. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_PLAN_SEARCH_H
#define PMPD_SCHED_PLAN_SEARCH_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "sched/schedule.h"

enum {
    PLAN_SEARCH_MOST = 100000, /* candidates */
    PLAN_SEARCH_WAVE = 8,      /* candidates that are measured together */
    PLAN_SEARCH_FACTOR = 3,    /* a rung has so many times the prompts of the one before */
    PLAN_SEARCH_LEAST = 8,     /* prompts of the first rung, at least (where there are so many) */
    PLAN_SEARCH_RESAMPLES = 10000
};

enum plan_verdict {
    PLAN_UNDECIDED, /* not tried, or not to the end: it costs more than the winner */
    PLAN_DROPPED,   /* worse beyond doubt: the interval's upper end is below -loss */
    PLAN_UNPROVEN,  /* measured on all prompts; neither worse nor lossless beyond doubt */
    PLAN_LOSSLESS,  /* confirmed on all prompts: the winner */
    PLAN_REFERENCE, /* the highest level alone */
    PLAN_N_VERDICTS
};
extern const char *const plan_verdict_name[PLAN_N_VERDICTS];

/* The mean difference of a candidate's quality from the highest level's, and its 95 % interval. */
struct plan_interval {
    double mean, low, high;
};

struct plan_candidate {
    int32_t prefill;                     /* place in the list of levels, 0 the highest */
    int32_t at[SCHEDULE_MAX_LEVELS - 1]; /* step at which level p drops to p + 1; ascending; the
                                            limit of tokens: never */
    double bits;                         /* average of the decode steps, of the highest level's
                                            answers: nothing is won by longer ones */
    double prefill_bits;
    int32_t n_prompts; /* that it was measured on, the first so many of the search's order */
    double quality;    /* mean over them; NaN: none */
    struct plan_interval difference;
    enum plan_verdict verdict;
};

struct plan_search {
    int32_t n_levels, max_new_tokens, lag;
    double level_bits[SCHEDULE_MAX_LEVELS]; /* (n_levels) descending */
    int32_t n, capacity;
    struct plan_candidate *candidate; /* owned: (n) cheapest first; the reference is among them */
    int32_t reference;                /* its place */
    int32_t winner; /* after plan_search_run; the reference when nothing cheaper is
                       lossless */
};

/* All candidates: levels by their average bits (descending, 2 to SCHEDULE_MAX_LEVELS), switch steps
 * max_new_tokens * i / grid for i = 0..grid, but for
 * those that no answer reaches: they are never. n_steps (max_new_tokens): how many of the highest
 * level's answers have a decode step t, which weighs it in the cost; lag (service.lag): steps
 * before lag - 1 run at the prefill level. Order: average decode bits, then prefill bits, then
 * later drops. Errors: ST_USER (too many candidates; levels that do not descend), ST_NOMEM. */
MUST_CHECK enum status plan_search_create(struct plan_search *out, const double *level_bits,
                                          int32_t n_levels, int32_t max_new_tokens, int32_t grid,
                                          int32_t lag, const int64_t *n_steps);
void plan_search_free(struct plan_search *s);

/* Place of the level of a step. */
int32_t plan_candidate_level(const struct plan_search *s, const struct plan_candidate *c,
                             int32_t step);
/* "prefill:4 0:4 80:2", or without the prefill word: what policy.switches takes. names: (n_levels)
 */
void plan_candidate_text(char *text, size_t bytes, const struct plan_search *s,
                         const struct plan_candidate *c, const char *const *names,
                         bool with_prefill);

/* The percentile bootstrap over n >= 1 differences. The draws depend on seed and n only. */
MUST_CHECK enum status plan_interval(struct plan_interval *out, const double *differences,
                                     int32_t n, uint64_t seed);
/* Prompts of rung r of n prompts, and the number of rungs. */
int32_t plan_search_n_rungs(int32_t n);
int32_t plan_search_rung(int32_t rung, int32_t n);

/* Measures n candidates (places) on prompts [first, last) of the search's order: quality[i * n_all
 * + p] of the i-th one. */
typedef enum status plan_measure_fn(void *ctx, const int32_t *candidates, int32_t n, int32_t first,
                                    int32_t last, double *quality);
/* The search; fills in the candidates and the winner. reference: (n_prompts) qualities of the
 * highest level. measure is never asked about the reference. Errors: those of measure, ST_NOMEM. */
MUST_CHECK enum status plan_search_run(struct plan_search *s, const double *reference,
                                       int32_t n_prompts, double loss, uint64_t seed,
                                       plan_measure_fn *measure, void *ctx);

#endif
