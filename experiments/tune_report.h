/* What `pmpd tune plan` found: a table for people, DIR/tune.h5, DIR/best.cfg.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_TUNE_REPORT_H
#define PMPD_EXPERIMENTS_TUNE_REPORT_H

#include "core/settings.h"
#include "sched/plan_search.h"

/* One answer that was scored. */
struct tune_score {
    int32_t trial; /* of the search's candidates */
    const char *id, *split;
    int32_t n_steps;
    double quality, decode_bits; /* decode_bits: average of the answer's steps */
};

/* The winner on the test split, beside the highest level. */
struct tune_test {
    int32_t n_prompts; /* 0: there is no such split */
    double quality, reference_quality;
    double decode_bits, reference_bits; /* averages over all decode steps of the split */
    struct plan_interval difference;
};

struct tune_report {
    const struct plan_search *search;
    const char *const *names;       /* (n_levels) of the levels */
    const double *decode_bits;      /* (candidates) measured average; NaN: not measured */
    const struct tune_score *score; /* (n_scores) by trial */
    int64_t n_scores;
    struct tune_test test;
    const char *reference; /* what quality is compared with */
    const char *model_digest, *prompts_digest, *provenance;
    double loss;
    uint64_t seed;
    int32_t n_validation;
};

void tune_report_print(const struct tune_report *r, const char *dir);
/* Errors: ST_HDF5, ST_IO. */
MUST_CHECK enum status tune_report_write(const struct tune_report *r, const char *path);
/* The settings of the search with policy static and the winner's plan, no budget, the dial in the
 * middle. Errors: ST_IO; ST_USER: the plan is longer than a setting may be. */
MUST_CHECK enum status tune_report_best(const struct tune_report *r, const struct settings *s,
                                        const char *path);

#endif
