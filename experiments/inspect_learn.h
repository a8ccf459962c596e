/* `pmpd inspect` of what pmpd dataset and pmpd train write.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_INSPECT_LEARN_H
#define PMPD_EXPERIMENTS_INSPECT_LEARN_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "sched/dataset.h"

/* Prints a dataset or a classifier, for people or as JSON, and sets *known; another file is left
 * alone. Errors: those of dataset_read and classifier_read. */
MUST_CHECK enum status inspect_learn(const char *path, bool as_json, bool *known);

/* Rows of a dataset by split and class. */
struct label_table {
    int32_t count[SPLIT_N][CLASSIFIER_MAX_CLASSES], total[SPLIT_N];
    double high_score; /* mean */
};
struct label_table label_table_count(const struct dataset *d);
void label_table_print(const struct label_table *t, const struct dataset *d);

#endif
