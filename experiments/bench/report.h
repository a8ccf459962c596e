/* What a benchmark found: rows of named numbers that print as tables that line up, or as one JSON
 * object. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_REPORT_H
#define PMPD_EXPERIMENTS_BENCH_REPORT_H

#include <jansson.h>

#include "core/status.h"

/* One column of a table: a member of the rows. */
struct column {
    const char *key, *title; /* a NULL key ends the list */
    int decimals;            /* of numbers with a fraction */
};

/* Member `key` of root, an array that is made when it is missing, gets row (its reference is
 * taken; NULL: out of memory, as jansson's packers have it). */
MUST_CHECK enum status report_add(json_t *root, const char *key, json_t *row);
/* Prints array `key` of root under its titles, numbers to the right; nothing when it is missing. */
void report_table(const json_t *root, const char *key, const struct column *columns);

#endif
