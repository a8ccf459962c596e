/* Hyper-parameters of a classifier by random search with successive halving: many trials of few
 * epochs, then the better ones with more, and so on. Which trials there are, what each tries and
 * who goes on depends on seed and results only. Source: Jamieson, Talwalkar, "Non-stochastic best
 * arm identification and hyperparameter optimization" (arXiv 1502.07943), algorithm 1. A trial that
 * goes on is trained again from its start, with more epochs: that costs at most a third more
 * (factor 3), and a trial is then one call. Ranges: around those of the reference code's search
 * (learning rate 1e-5 to 1e-4 for Adam without batches, weight decay 0.01 to 0.02, dropout 0.1 to
 * 0.3), wider. Not collective. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_SEARCH_H
#define PMPD_SCHED_SEARCH_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "sched/classifier.h"
#include "sched/train.h"

enum { SEARCH_FACTOR = 3, SEARCH_MAX_TRIALS = 10000 };

/* One training. Plain data without pointers: it is kept in a journal as it is. */
struct trial {
    int32_t number, rung;
    int32_t n_hidden, n_groups, n_queries; /* n_groups, n_queries: KV */
    int32_t batch, max_epochs;
    double learning_rate, weight_decay, dropout;
    /* results */
    int32_t is_done, n_epochs, best_epoch;
    double loss, accuracy; /* of validation; loss INFINITY: it diverged */
    double seconds;
};

/* Rungs of a search of n trials that ends with max_epochs: as many as leave at least one trial in
 * the last and one epoch in the first. */
int32_t search_n_rungs(int32_t n, int32_t max_epochs);
/* Epochs of a rung. */
int32_t search_epochs(int32_t rung, int32_t n_rungs, int32_t max_epochs);
/* What trial `number` tries in rung 0; n_in for STEP: the width of its input. */
void search_sample(struct trial *out, int32_t number, uint64_t seed, enum classifier_kind kind,
                   int32_t head_dim, int32_t n_in, int32_t max_epochs_of_rung);
/* The trials of a rung, all done, sorted: smaller loss first, then number. Returns how many go on:
 * n / SEARCH_FACTOR, at least 1. */
int32_t search_rank(struct trial *trials, int32_t n);
/* Shape and options of a trial. n_kv_heads of KV: above 1 it is the number of groups, too. */
struct classifier_shape search_shape(const struct trial *t, enum classifier_kind kind,
                                     int32_t n_kv_heads, int32_t head_dim, int32_t n_in,
                                     int32_t n_classes);
struct train_options search_options(const struct trial *t, const struct train_options *base);

/* Every trial of every rung as the table /trials of an HDF5 file. Errors: ST_HDF5, ST_IO. */
MUST_CHECK enum status search_write(const char *path, const struct trial *trials, int32_t n,
                                    const char *about);

#endif
