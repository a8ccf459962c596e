/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/step_window.h"

#define RECENT_FACTOR 0.125

void step_window_clear(struct step_window *w)
{
    *w = (struct step_window){0};
}

void step_window_add(struct step_window *w, float logprob, float entropy, float margin)
{
    const float value[STEP_N_SIGNALS] = {logprob, entropy, margin};
    w->n++;
    for (int i = 0; i < STEP_N_SIGNALS; i++) {
        double v = (double)value[i];
        w->last[i] = v;
        w->mean[i] += (v - w->mean[i]) / w->n;
        w->recent[i] = w->n == 1 ? v : w->recent[i] + RECENT_FACTOR * (v - w->recent[i]);
    }
}

void step_window_vector(const struct step_window *w, int32_t step, int32_t max_new_tokens,
                        float out[STEP_WINDOW_N])
{
    for (int i = 0; i < STEP_N_SIGNALS; i++) {
        out[3 * i] = (float)w->last[i];
        out[3 * i + 1] = (float)w->mean[i];
        out[3 * i + 2] = (float)w->recent[i];
    }
    out[3 * STEP_N_SIGNALS] = (float)step / (float)max_new_tokens;
    out[3 * STEP_N_SIGNALS + 1] = 1 / (float)(1 + w->n);
}
