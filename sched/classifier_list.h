/* The classifiers of a policy: one per neighbouring pair of its levels, held against the run.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_CLASSIFIER_LIST_H
#define PMPD_SCHED_CLASSIFIER_LIST_H

#include "sched/classifier.h"
#include "sched/schedule.h"

struct classifier_list {
    int32_t n;
    struct classifier classifier[SCHEDULE_MAX_LEVELS]; /* (n) owned; pair p goes from level p */
    float *scratch;                                    /* owned: for the largest of them */
    char digest[DIGEST_TEXT];                          /* of all */
};

/* policy.classifier: as many files as the schedule has pairs. `use` says what the run has but for
 * the model and the levels, which come from the table. Errors: ST_USER: another number of files;
 * those of classifier_read and classifier_check_use. On failure *out is empty. */
MUST_CHECK enum status classifier_list_read(struct classifier_list *out, const struct schedule *s,
                                            const struct level_table *levels,
                                            const struct settings *settings,
                                            const struct classifier_use *use);
void classifier_list_free(struct classifier_list *list);

#endif
