/* Training of classifiers (sched/classifier.h): cross-entropy on the scores before the softmax,
 * gradients by hand, AdamW, dropout on the hidden layer, early stopping on validation samples.
 *
 * AdamW and not Adam with an L2 term: with Adam's normalised steps an L2 term decays weights with
 * small gradients more than others, so that its strength means something else for each learning
 * rate; the decoupled form keeps the two settings apart. Gains, biases and queries are not decayed.
 * Sources: Adam: Kingma, Ba (arXiv 1412.6980), algorithm 1; AdamW: Loshchilov, Hutter (arXiv
 * 1711.05101), algorithm 2; dropout: Srivastava et al. (JMLR 15, 2014), scaled at training.
 *
 * The result depends on options and samples only: not on the number of ranks. A batch is cut into
 * TRAIN_LANES lanes of fixed samples; a rank computes whole lanes, and every rank adds the lanes in
 * order. Shuffling and dropout come from a counter-based generator (seed, epoch, sample).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_TRAIN_H
#define PMPD_SCHED_TRAIN_H

#include <stdbool.h>
#include <stdint.h>

#include "core/collective.h"
#include "core/status.h"
#include "sched/classifier.h"

enum { TRAIN_LANES = 8, TRAIN_MAX_BATCH = 4096 };

struct train_sample {
    const float *features; /* borrowed; as classifier_evaluate takes them, finite */
    int32_t n_tok;
    int32_t label; /* class */
    int32_t task;  /* a number that samples of one task share; for held_out.h only */
};

struct train_options {
    double learning_rate, weight_decay; /* of AdamW */
    double dropout;                     /* [0, 1): share of hidden units left out */
    int32_t batch;                      /* samples of one update, gradients accumulated */
    int32_t max_epochs;
    int32_t patience; /* epochs without a better validation loss before the end */
    bool balance;     /* weigh samples by the inverse frequency of their class, in training and in
                         validation: for few samples of some classes; probabilities then are those
                         of a world where classes are equally frequent */
    bool allow_empty; /* train although some class has no sample */
    bool warm;        /* start from the parameters that are there (and a STEP classifier's shift and
                         scale) instead of new ones */
    uint64_t seed;
};
/* 1e-3, 0.01, 0.1, 32, 60, 8, no, no, no, 1. */
struct train_options train_options_default(void);
/* Errors: ST_USER, naming the option, its value and the range. */
MUST_CHECK enum status train_options_check(const struct train_options *o);

/* Training: n samples and those that decide when to stop. */
struct train_data {
    const struct train_sample *train, *validation; /* borrowed */
    int32_t n_train, n_validation;
};

struct train_epoch {
    float train_loss, validation_loss; /* mean cross-entropy, nats; weighted when balanced */
    float validation_accuracy;
};
struct train_history {
    struct train_epoch *epochs; /* owned: (n) */
    int32_t n, best;            /* best: the epoch whose parameters were kept */
};

/* Sets c's parameters (whose shape is given) to those of the epoch with the smallest validation
 * loss. A STEP classifier's shift and scale become those of the training samples. Collective over
 * coll; every rank has all samples, ends with the same parameters, or fails with the others. The
 * first samples of a batch of n go to lane 0, and so on. Memory: (lanes of this rank + 5) *
 * n_params floats. history: owned by the caller, back with train_history_free. Errors: ST_USER: no
 * training or validation samples, a class without training samples (names it), options out of
 * range; ST_SHAPE: a label outside the classes; ST_NUMERIC: a loss that is no number (names epoch
 * and learning rate); ST_NOMEM; those of coll. */
MUST_CHECK enum status train_run(struct classifier *c, const struct train_data *data,
                                 const struct train_options *options, struct collective *coll,
                                 struct train_history *history);
void train_history_free(struct train_history *history);

/* Parameters as training starts with them: W ~ U(-1/sqrt(n), 1/sqrt(n)) for n inputs, as its bias;
 * queries normal with deviation 1/sqrt(head_dim), gain 1. */
void train_init(struct classifier *c, uint64_t seed);

/* Probabilities of n samples, (n, n_classes), on every rank; those of an evaluation that fails are
 * NaN. Collective. */
MUST_CHECK enum status train_predict(const struct classifier *c, const struct train_sample *samples,
                                     int32_t n, struct collective *coll, float *probabilities);

/* ---- for tests: one gradient ---- */

/* Scratch for gradients of up to n samples of up to max_tok tokens. */
struct gradient_work {
    float *block;                       /* owned */
    float *x, *rstd, *h, *dz, *dh, *dx; /* (n, n_in), (n), (n, n_hidden), ... */
    float *scores, *p, *dp;             /* (n_queries, max_tok), (max_tok), (max_tok) */
    int32_t n, max_tok;
};
MUST_CHECK enum status gradient_work_create(struct gradient_work *out,
                                            const struct classifier_shape *shape, int32_t n,
                                            int32_t max_tok);
void gradient_work_free(struct gradient_work *w);

/* Adds to gradient (n_params) that of sum_i weight_i * cross-entropy(sample_i), and returns the sum
 * in *loss and the number of samples whose largest score is their label in *n_right. order (n):
 * indices into samples; weight by class (n_classes). dropout_key: what masks depend on beside the
 * sample's index. */
void train_gradient(const struct classifier *c, const struct train_sample *samples,
                    const int32_t *order, int32_t n, const float *weight, double dropout,
                    const uint32_t dropout_key[2], struct gradient_work *w, float *gradient,
                    double *loss, int32_t *n_right);

#endif
