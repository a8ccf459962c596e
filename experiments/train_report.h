/* What `pmpd train` prints and writes into a classifier about its training.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_TRAIN_REPORT_H
#define PMPD_EXPERIMENTS_TRAIN_REPORT_H

#include <jansson.h>
#include <stdbool.h>

#include "sched/classifier.h"
#include "sched/held_out.h"

/* Measures of one split as a table for people, or as a JSON object (a new reference; NULL: out of
 * memory). switch_at: mean fraction at which predictions, and labels, switch. */
void train_report_print(const struct held_out *h, const struct classifier *c, const char *split);
json_t *train_report_json(const struct held_out *h, const struct classifier *c);

#endif
