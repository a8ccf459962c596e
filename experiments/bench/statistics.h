/* Minimum, median and maximum of repeated timings. Plain arithmetic.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_STATISTICS_H
#define PMPD_EXPERIMENTS_BENCH_STATISTICS_H

#include "core/status.h"

struct spread {
    double min, median, max;
};

/* Of n >= 1 values, which are sorted in place. The median of an even number of values is the mean
 * of the two in the middle. */
struct spread spread_of(double *values, int n);

/* A list of timings that is made before the loop that fills it. */
struct samples {
    double *value; /* (room) owned */
    int n, room;
};
MUST_CHECK enum status samples_create(struct samples *out, int room);
void samples_free(struct samples *s);
/* INVARIANT: there is room. */
void samples_add(struct samples *s, double value);
/* Of what was added so far (at least one); the order of the list is lost. */
struct spread samples_spread(struct samples *s);

#endif
