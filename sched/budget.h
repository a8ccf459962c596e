/* The cluster's budget: a controller that moves the policies' dial from lease to lease so that the
 * mean cost of a decode step (average bits, or milliseconds by a table of costs), over all prompts
 * together, comes to a set point. Pure arithmetic: no clock, no rank, no memory of its own.
 *
 * Leases are numbered 0, 1, ... in their fixed order. The dial of lease i is a function of the
 * dials of 0..i-1 and the outcomes of leases 0..i-window only, so it does not depend on timing. An
 * outcome is what the prompt's decode steps cost by the levels they ran at; a prompt that failed
 * has the outcome {0, 0}: it spent nothing and counts for nothing.
 *
 * The law. The cost of a step is modelled as a + b dial; (a, b) is the ridge least squares fit to
 * the known leases (Tikhonov; Hoerl and Kennard, Technometrics 12, 1970), each lease weighted by
 * its steps over the mean steps, towards a prior that goes from the cheapest level at dial 0 to the
 * dearest at 1 and weighs BUDGET_PRIOR_LEASES leases. The account A, in cost times leases, is what
 * known leases spent beyond the set point, and what the model expects of those under way (which
 * takes the window's delay out of the loop: the predictor of O. J. M. Smith, Chemical Engineering
 * Progress 53, 1957). The dial asks for a cost that pays the account back over the next h leases,
 * h = min(window + BUDGET_HORIZON, leases left), but at least BUDGET_HORIZON:
 *     a + b dial = target - A / h,  dial clamped to [0, 1].
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_BUDGET_H
#define PMPD_SCHED_BUDGET_H

#include <stdint.h>

/* Chosen by simulation (tests/unit/test_budget.c): with less the dial swings, with more it is slow
 * to pay back in runs of 200 prompts. */
enum { BUDGET_HORIZON = 8, BUDGET_PRIOR_LEASES = 4 };

struct budget {
    double target;      /* cost of a decode step */
    double least, most; /* cost of a step at the cheapest and the dearest level; least < most */
    int32_t window;     /* >= 1; a small part of n_leases, or much is spent before it is seen */
    int64_t n_leases;   /* of the run */
};

/* What one prompt's decode steps cost: cost = sum over its steps. */
struct budget_outcome {
    double cost;
    int64_t n_steps;
};

/* The controller's state at one lease, for the log. */
struct budget_state {
    float dial;
    double offset, slope; /* a and b */
    double account;       /* A */
};

/* The dial of lease i: dials (i) of the leases before it; outcomes of 0..i-window (others are not
 * read). Costs O(i). */
void budget_dial(struct budget_state *out, const struct budget *b, int64_t i, const float *dials,
                 const struct budget_outcome *outcomes);

/* What n_steps[level] steps at each of n_levels levels cost by the levels' costs. */
struct budget_outcome budget_outcome_of(const int64_t *n_steps, const double *cost,
                                        int32_t n_levels);

#endif
