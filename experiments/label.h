/* How good a text is beside the reference's: what labels of learned schedulers are made from.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_LABEL_H
#define PMPD_EXPERIMENTS_LABEL_H

#include <stdint.h>

#include "core/status.h"

enum criterion { CRITERION_ROUGE_L, CRITERION_AGREEMENT, CRITERION_KL, CRITERION_N };
extern const char *const criterion_name[CRITERION_N];
/* Errors: ST_USER with the known names. */
MUST_CHECK enum status criterion_parse(enum criterion *out, const char *name);

/* Places at which both have the same token, over the length of the longer one: 1 for equal texts,
 * 0 for two empty ones. */
double label_agreement(const int32_t *a, int32_t n_a, const int32_t *b, int32_t n_b);

/* A distribution over tokens: the most likely ones, the rest as one. */
enum { TOP_N = 32 };
struct top {
    int32_t n, id[TOP_N];
    float logprob[TOP_N];
};
void top_take(struct top *out, const float *logits, int32_t vocab);
/* Kullback-Leibler divergence from p to the softmax of logits, in nats, both with all but p's ids
 * taken together: at most that of the whole distributions, and 0 for equal ones. */
double top_divergence(const struct top *p, const float *logits, int32_t vocab);

#endif
