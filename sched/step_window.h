/* The input of step classifiers: what decoding looked like so far, as a fixed vector. One window
 * per prompt, fed with every step's signals; the training data are made with the same code.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_STEP_WINDOW_H
#define PMPD_SCHED_STEP_WINDOW_H

#include <stdint.h>

enum {
    STEP_N_SIGNALS = 3,                    /* logprob, entropy, margin: core/sampler.h */
    STEP_WINDOW_N = 3 * STEP_N_SIGNALS + 2 /* values of the vector */
};

struct step_window {
    int32_t n;
    double last[STEP_N_SIGNALS], mean[STEP_N_SIGNALS], recent[STEP_N_SIGNALS];
};

/* Starts a prompt. */
void step_window_clear(struct step_window *w);
/* The signals of the next step (those of prefill first). */
void step_window_add(struct step_window *w, float logprob, float entropy, float margin);
/* The vector before `step` of max_new_tokens: of each signal the last value, the mean over all and
 * the exponential mean with factor 1/8 (it starts at the first value); then step / max_new_tokens
 * and 1 / (1 + number of signals seen). All 0 while nothing was added, but the last two. */
void step_window_vector(const struct step_window *w, int32_t step, int32_t max_new_tokens,
                        float out[STEP_WINDOW_N]);

#endif
