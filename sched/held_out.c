/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/held_out.h"

#include <math.h>

static double minus_log(double p)
{
    return -log(p < 1e-37 ? 1e-37 : p);
}

static void finish_bins(struct held_out *out)
{
    for (int b = 0; b < HELD_OUT_BINS; b++) {
        struct reliability_bin *bin = &out->bins[b];
        if (bin->n > 0) {
            bin->confidence /= bin->n;
            bin->accuracy /= bin->n;
            out->ece += (double)bin->n / out->n * fabs(bin->accuracy - bin->confidence);
        }
    }
}

void held_out_measure(struct held_out *out, const float *probabilities,
                      const struct train_sample *samples, int32_t n, int32_t n_classes,
                      const int32_t *train_count)
{
    *out = (struct held_out){.n = n, .n_classes = n_classes};
    double n_train = 0;
    int32_t usual = 0;
    for (int32_t k = 0; k < n_classes; k++) {
        n_train += train_count[k];
        usual = train_count[k] > train_count[usual] ? k : usual;
    }
    for (int32_t i = 0; i < n; i++) {
        const float *p = probabilities + (size_t)i * (size_t)n_classes;
        int32_t label = samples[i].label, guess = classifier_argmax(p, n_classes);
        int b = (int)(p[guess] * HELD_OUT_BINS);
        struct reliability_bin *bin = &out->bins[b >= HELD_OUT_BINS ? HELD_OUT_BINS - 1 : b];
        bin->n++;
        bin->confidence += (double)p[guess];
        bin->accuracy += guess == label;
        out->confusion[label][guess]++;
        out->accuracy += (double)(guess == label) / n;
        out->earlier += (double)(guess < label) / n;
        out->later += (double)(guess > label) / n;
        out->nll += minus_log((double)p[label]) / n;
        out->prior_accuracy += (double)(label == usual) / n;
        out->prior_nll += minus_log((train_count[label] + 1) / (n_train + n_classes)) / n;
    }
    finish_bins(out);
}
