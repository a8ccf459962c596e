/* How good a classifier is on samples that it was not trained on, beside what knowing only the
 * frequencies of the classes gives. Not collective.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_HELD_OUT_H
#define PMPD_SCHED_HELD_OUT_H

#include <stdint.h>

#include "core/status.h"
#include "sched/train.h"

enum { HELD_OUT_BINS = 10 };

/* Predictions whose largest probability lies in [i / 10, (i + 1) / 10), the last with 1. */
struct reliability_bin {
    int32_t n;
    double confidence, accuracy; /* means; 0 of none */
};

struct held_out {
    int32_t n, n_classes;
    int32_t confusion[CLASSIFIER_MAX_CLASSES][CLASSIFIER_MAX_CLASSES]; /* [label][predicted] */
    double accuracy, nll;             /* nll: mean -log probability of the label, nats */
    double prior_accuracy, prior_nll; /* of always giving the training samples' frequencies, with
                                         one more sample of each class so that none is 0 */
    double task_accuracy, task_nll;   /* of giving those of the training samples of the same task:
                                         what knowing the task alone is worth */
    double earlier, later; /* shares predicted to switch before, after the label's class */
    double ece;            /* sum over bins of n/N |accuracy - confidence| */
    struct reliability_bin bins[HELD_OUT_BINS];
};

/* probabilities (n, n_classes); labels in range; train: the training samples. n may be 0: all 0.
 * Source of the expected calibration error: Guo et al. (arXiv 1706.04599), equation 3, with ten
 * equal bins. */
void held_out_measure(struct held_out *out, const float *probabilities,
                      const struct train_sample *samples, int32_t n, int32_t n_classes,
                      const struct train_sample *train, int32_t n_train);

#endif
