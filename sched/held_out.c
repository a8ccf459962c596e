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

/* Frequencies of classes among training samples, of one task (or of all). */
struct prior {
    int32_t count[CLASSIFIER_MAX_CLASSES], n, usual;
};

static struct prior prior_of(const struct train_sample *train, int32_t n_train, int32_t n_classes,
                             const int32_t *task)
{
    struct prior p = {0};
    for (int32_t i = 0; i < n_train; i++) {
        if (!task || train[i].task == *task) {
            p.count[train[i].label]++;
            p.n++;
        }
    }
    for (int32_t k = 0; k < n_classes; k++) {
        p.usual = p.count[k] > p.count[p.usual] ? k : p.usual;
    }
    return p;
}

static double prior_nll(const struct prior *p, int32_t label, int32_t n_classes)
{
    return minus_log((p->count[label] + 1) / (double)(p->n + n_classes));
}

void held_out_measure(struct held_out *out, const float *probabilities,
                      const struct train_sample *samples, int32_t n, int32_t n_classes,
                      const struct train_sample *train, int32_t n_train)
{
    *out = (struct held_out){.n = n, .n_classes = n_classes};
    struct prior all = prior_of(train, n_train, n_classes, NULL);
    for (int32_t i = 0; i < n; i++) {
        const float *p = probabilities + (size_t)i * (size_t)n_classes;
        int32_t label = samples[i].label, guess = classifier_argmax(p, n_classes);
        int b = (int)(p[guess] * HELD_OUT_BINS);
        struct reliability_bin *bin = &out->bins[b >= HELD_OUT_BINS ? HELD_OUT_BINS - 1 : b];
        struct prior own = prior_of(train, n_train, n_classes, &samples[i].task);
        bin->n++;
        bin->confidence += (double)p[guess];
        bin->accuracy += guess == label;
        out->confusion[label][guess]++;
        out->accuracy += (double)(guess == label) / n;
        out->earlier += (double)(guess < label) / n;
        out->later += (double)(guess > label) / n;
        out->nll += minus_log((double)p[label]) / n;
        out->prior_accuracy += (double)(label == all.usual) / n;
        out->prior_nll += prior_nll(&all, label, n_classes) / n;
        out->task_accuracy += (double)(label == own.usual) / n;
        out->task_nll += prior_nll(&own, label, n_classes) / n;
    }
    finish_bins(out);
}
