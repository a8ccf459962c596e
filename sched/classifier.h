/* Learned schedulers as data: a small network that looks at one prompt and gives a probability for
 * each switch point of a (high, low) pair of levels. Two kinds share the second half:
 *
 *   KV    p[g,q,:] = softmax over tokens of (Q[g,q] . K_t / sqrt d);  x[g] = mean over q of p V
 *         K, V: after prefill, last layer: (2, n_kv_heads, n_tok, head_dim), n_kv_heads 1 (mean
 *         over the model's heads, what core/kvcache.h gives) or n_groups (group g sees head g)
 *   STEP  x = (signals - shift) * scale: what decoding looked like so far (sched/step_window.h)
 *   both  h = relu(W1 layer_norm(x) + b1);  probabilities = softmax(W2 h + b2)
 *
 * Source: the PMPD paper (arXiv 2410.13461), learned scheduler: its query is (H, H, d), so that
 * n_groups = n_queries = H; layer norm's epsilon is PyTorch's default 1e-5. Ours differs where its
 * public code takes a softmax of a softmax in training: sched/train.h takes the logits. The step
 * kind is ours.
 *
 * Arithmetic is f32 in a fixed order: a row of a batch has the same bits as alone, on every machine
 * with the same C library. Nothing here allocates but create, read and free. Not collective.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_CLASSIFIER_H
#define PMPD_SCHED_CLASSIFIER_H

#include <stddef.h>
#include <stdint.h>

#include "core/checkpoint.h"
#include "core/level.h"
#include "core/status.h"

#define CLASSIFIER_FORMAT "pmpd classifier"
#define CLASSIFIER_FORMAT_VERSION "1"
#define CLASSIFIER_NORM_EPS 1e-5f

enum classifier_kind { CLASSIFIER_KV, CLASSIFIER_STEP };
enum { CLASSIFIER_MAX_CLASSES = 16, CLASSIFIER_MAX_WIDTH = 1 << 16 };

struct classifier_shape {
    enum classifier_kind kind;
    int32_t head_dim, n_kv_heads; /* KV: of the features; n_kv_heads: 1 or n_groups */
    int32_t n_groups, n_queries;  /* KV */
    int32_t n_in;                 /* of layer norm; KV: n_groups * head_dim */
    int32_t n_hidden, n_classes;  /* n_classes 2..CLASSIFIER_MAX_CLASSES */
};

/* What a classifier was made for. */
struct classifier_facts {
    char model_digest[DIGEST_TEXT]; /* "": unknown (imported); then any model with this shape */
    char high[LEVEL_TEXT_BYTES], low[LEVEL_TEXT_BYTES];
    /* KV: (n_classes) ascending fractions of max_new_tokens in [0, 1] at which class i switches
     * from high to low: step (int)(class_at[i] * T), so 1/3 and 2/3 are stored as such; 1: never.
     * STEP: 0 for "stay", 1 for "drop now"; of two classes. */
    double class_at[CLASSIFIER_MAX_CLASSES];
};

struct classifier {
    struct classifier_shape shape;
    struct classifier_facts facts;
    float *params; /* owned: (n_params), order as in struct classifier_view */
    size_t n_params;
    float *shift, *scale; /* owned: STEP (n_in) each, not trained; KV NULL */
    char *training;       /* owned: how it was made, JSON or plain text; "" when nobody said */
};

/* One parameter vector cut up; the same for gradients and moments. */
struct classifier_view {
    float *query;       /* (n_groups, n_queries, head_dim); STEP: empty */
    float *gain, *bias; /* (n_in) layer norm */
    float *w1, *b1;     /* (n_hidden, n_in), (n_hidden) */
    float *w2, *b2;     /* (n_classes, n_hidden), (n_classes) */
};

/* Errors: ST_SHAPE: a size below 1 or above CLASSIFIER_MAX_WIDTH, n_in or n_kv_heads that do not
 * fit, too few or too many classes. */
MUST_CHECK enum status classifier_shape_check(const struct classifier_shape *shape);
size_t classifier_n_params(const struct classifier_shape *shape);
struct classifier_view classifier_view(const struct classifier_shape *shape, float *params);
/* Step at which class i switches for T new tokens: 0..T (T: never). */
int32_t classifier_switch_step(const struct classifier *c, int32_t i, int32_t max_new_tokens);

/* Parameters 0 but the gain, which is 1; shift 0, scale 1; facts empty. The caller owns *out.
 * Errors: those of classifier_shape_check, ST_NOMEM. */
MUST_CHECK enum status classifier_create(struct classifier *out,
                                         const struct classifier_shape *shape);
void classifier_free(struct classifier *c);

/* Floats of scratch for features of up to max_tok tokens (STEP: max_tok does not matter). */
size_t classifier_scratch(const struct classifier_shape *shape, int32_t max_tok);

/* One prompt: features (2, n_kv_heads, n_tok, head_dim), or (n_in) signals with n_tok 1;
 * probabilities (n_classes), summing to 1. Errors: ST_SHAPE (n_tok < 1), ST_NUMERIC (features that
 * are not finite, or that overflow). */
MUST_CHECK enum status classifier_evaluate(const struct classifier *c, const float *features,
                                           int32_t n_tok, float *scratch, float *probabilities);

struct classifier_item {
    const float *features; /* as above */
    int32_t n_tok;
    float *probabilities; /* (n_classes) */
};
/* n prompts, each with the bits that classifier_evaluate gives; scratch for the longest. A bad item
 * fails the call; the message names its index. */
MUST_CHECK enum status classifier_evaluate_batch(const struct classifier *c,
                                                 const struct classifier_item *items, int32_t n,
                                                 float *scratch);

/* The class with the largest probability; the first of equals. */
int32_t classifier_argmax(const float *probabilities, int32_t n_classes);

/* Files: HDF5, whole or not at all. Attributes kind, model_digest, high, low; datasets shape,
 * class_at, the seven parameters by name, shift and scale, training. A file is not believed: sizes
 * and finiteness of everything are checked. Errors: ST_IO, ST_HDF5, ST_FORMAT (not a classifier, or
 * a damaged one), ST_NOMEM. */
MUST_CHECK enum status classifier_write(const struct classifier *c, const char *path);
MUST_CHECK enum status classifier_read(struct classifier *out, const char *path);
/* 32 hexadecimal digits of XXH3-128 over shape, facts and parameters, not over `training`: for the
 * digest slot of policies. */
void classifier_digest(const struct classifier *c, char out[DIGEST_TEXT]);

/* What a run has, to be held against a classifier before the run. */
struct classifier_use {
    enum classifier_kind kind;
    const char *model_digest; /* NULL: not known here, not compared */
    const char *high, *low;   /* levels as the settings write them; NULL: any */
    int32_t n_kv_heads;       /* KV: heads that the features will have: 1 for their mean */
    int32_t head_dim;         /* KV */
    int32_t n_in;             /* STEP */
};
/* Errors: ST_USER, naming path, what the classifier was made for, what the run has, and the next
 * step. */
MUST_CHECK enum status classifier_check_use(const struct classifier *c, const char *path,
                                            const struct classifier_use *use);

#endif
