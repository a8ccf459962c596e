/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/classifier.h"

#include <math.h>
#include <string.h>

#include "core/mem.h"

enum { LANES = 16 };

/* Loops compiled for several instruction sets, chosen when the program starts. All give the same
 * bits: nothing is contracted, and sums are written out in a fixed order. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* ---- shapes ---- */

static enum status check_size(const char *what, int32_t n, int32_t most)
{
    if (n < 1 || n > most) {
        FAIL(ST_SHAPE, "a classifier with %s %d; expected 1 to %d", what, n, most);
    }
    return ST_OK;
}

enum status classifier_shape_check(const struct classifier_shape *s)
{
    if (s->kind != CLASSIFIER_KV && s->kind != CLASSIFIER_STEP) {
        FAIL(ST_SHAPE, "a classifier of kind %d; expected 0 (kv) or 1 (step)", (int)s->kind);
    }
    TRY(check_size("n_in", s->n_in, CLASSIFIER_MAX_WIDTH));
    TRY(check_size("n_hidden", s->n_hidden, CLASSIFIER_MAX_WIDTH));
    TRY(check_size("n_classes", s->n_classes, CLASSIFIER_MAX_CLASSES));
    if (s->n_classes < 2) {
        FAIL(ST_SHAPE, "a classifier with one class decides nothing; expected 2 to %d",
             CLASSIFIER_MAX_CLASSES);
    }
    if (s->kind == CLASSIFIER_STEP) {
        return ST_OK;
    }
    TRY(check_size("head_dim", s->head_dim, CLASSIFIER_MAX_WIDTH));
    TRY(check_size("n_groups", s->n_groups, CLASSIFIER_MAX_WIDTH));
    TRY(check_size("n_queries", s->n_queries, CLASSIFIER_MAX_WIDTH));
    if ((int64_t)s->n_groups * s->head_dim != s->n_in) {
        FAIL(ST_SHAPE, "a classifier with n_in %d; expected n_groups * head_dim = %d * %d", s->n_in,
             s->n_groups, s->head_dim);
    }
    if (s->n_kv_heads != 1 && s->n_kv_heads != s->n_groups) {
        FAIL(ST_SHAPE, "a classifier of features with %d heads; expected 1 (their mean) or %d",
             s->n_kv_heads, s->n_groups);
    }
    return ST_OK;
}

/* Lengths of the seven parts in order. */
static void part_lengths(const struct classifier_shape *s, size_t n[7])
{
    size_t in = (size_t)s->n_in, hidden = (size_t)s->n_hidden, classes = (size_t)s->n_classes;
    n[0] = s->kind == CLASSIFIER_KV ? in * (size_t)s->n_queries : 0;
    n[1] = n[2] = in;
    n[3] = hidden * in;
    n[4] = hidden;
    n[5] = classes * hidden;
    n[6] = classes;
}

size_t classifier_n_params(const struct classifier_shape *s)
{
    size_t n[7], sum = 0;
    part_lengths(s, n);
    for (int i = 0; i < 7; i++) {
        sum += n[i];
    }
    return sum;
}

struct classifier_view classifier_view(const struct classifier_shape *s, float *params)
{
    struct classifier_view v;
    float **const part[7] = {&v.query, &v.gain, &v.bias, &v.w1, &v.b1, &v.w2, &v.b2};
    size_t n[7];
    part_lengths(s, n);
    for (int i = 0; i < 7; i++) {
        *part[i] = params;
        params += n[i];
    }
    return v;
}

int32_t classifier_switch_step(const struct classifier *c, int32_t i, int32_t max_new_tokens)
{
    /* the nudge: 1/3 and 2/3 in binary times a multiple of 3 must not fall below the integer */
    return (int32_t)(c->facts.class_at[i] * max_new_tokens + 1e-6);
}

enum status classifier_create(struct classifier *out, const struct classifier_shape *shape)
{
    enum status st = ST_OK;
    *out = (struct classifier){0};
    TRY(classifier_shape_check(shape));
    out->shape = *shape;
    out->n_params = classifier_n_params(shape);
    TRY_GOTO(st, MEM_NEW(&out->params, out->n_params), fail);
    TRY_GOTO(st, mem_strdup(&out->training, ""), fail);
    struct classifier_view v = classifier_view(shape, out->params);
    for (int32_t i = 0; i < shape->n_in; i++) {
        v.gain[i] = 1;
    }
    if (shape->kind == CLASSIFIER_STEP) {
        TRY_GOTO(st, MEM_NEW(&out->shift, shape->n_in), fail);
        TRY_GOTO(st, MEM_NEW(&out->scale, shape->n_in), fail);
        for (int32_t i = 0; i < shape->n_in; i++) {
            out->scale[i] = 1;
        }
    }
    return ST_OK;
fail:
    classifier_free(out);
    return st;
}

void classifier_free(struct classifier *c)
{
    mem_free(c->params);
    mem_free(c->shift);
    mem_free(c->scale);
    mem_free(c->training);
    *c = (struct classifier){0};
}

/* ---- evaluation ---- */

size_t classifier_scratch(const struct classifier_shape *s, int32_t max_tok)
{
    size_t n = (size_t)s->n_in + (size_t)s->n_hidden;
    return s->kind == CLASSIFIER_KV ? n + 2 * (size_t)max_tok : n;
}

WIDE static float dot(const float *a, const float *b, int32_t n)
{
    float lane[LANES] = {0};
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] += a[i + j] * b[i + j];
        }
    }
    for (int j = 0; i < n; i++, j++) {
        lane[j] += a[i] * b[i];
    }
    for (int step = LANES / 2; step > 0; step /= 2) {
        for (int j = 0; j < step; j++) {
            lane[j] += lane[j + step];
        }
    }
    return lane[0];
}

WIDE static void add_scaled(float *y, float a, const float *x, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        y[i] += a * x[i];
    }
}

/* In place; x are scores. */
static void softmax(float *x, int32_t n)
{
    float most = x[0], sum = 0;
    for (int32_t i = 1; i < n; i++) {
        most = x[i] > most ? x[i] : most;
    }
    for (int32_t i = 0; i < n; i++) {
        x[i] = expf(x[i] - most);
        sum += x[i];
    }
    for (int32_t i = 0; i < n; i++) {
        x[i] /= sum;
    }
}

/* x (n_groups, head_dim). The mean over queries of p V is (the mean of p) V: V is read once per
 * group. p, mean: (n_tok). */
static void pool(const struct classifier *c, const float *features, int32_t n_tok, float *x,
                 float *p, float *mean)
{
    const struct classifier_shape *s = &c->shape;
    int32_t d = s->head_dim;
    size_t head = (size_t)n_tok * (size_t)d;
    const float *query = classifier_view(s, c->params).query;
    float root = 1 / sqrtf((float)d);
    for (int32_t g = 0; g < s->n_groups; g++) {
        const float *k = features + (s->n_kv_heads == 1 ? 0 : (size_t)g * head);
        const float *v = k + (size_t)s->n_kv_heads * head;
        memset(mean, 0, (size_t)n_tok * sizeof *mean);
        for (int32_t q = 0; q < s->n_queries; q++, query += d) {
            for (int32_t t = 0; t < n_tok; t++) {
                p[t] = dot(query, k + (size_t)t * (size_t)d, d) * root;
            }
            softmax(p, n_tok);
            add_scaled(mean, 1 / (float)s->n_queries, p, n_tok);
        }
        memset(x, 0, (size_t)d * sizeof *x);
        for (int32_t t = 0; t < n_tok; t++) {
            add_scaled(x, mean[t], v + (size_t)t * (size_t)d, d);
        }
        x += d;
    }
}

/* In place, with f64 sums. */
static void layer_norm(float *x, const float *gain, const float *bias, int32_t n)
{
    double mean = 0, variance = 0;
    for (int32_t i = 0; i < n; i++) {
        mean += (double)x[i];
    }
    mean /= n;
    for (int32_t i = 0; i < n; i++) {
        double d = (double)x[i] - mean;
        variance += d * d;
    }
    float m = (float)mean, r = (float)(1 / sqrt(variance / n + (double)CLASSIFIER_NORM_EPS));
    for (int32_t i = 0; i < n; i++) {
        x[i] = (x[i] - m) * r * gain[i] + bias[i];
    }
}

enum status classifier_evaluate(const struct classifier *c, const float *features, int32_t n_tok,
                                float *scratch, float *probabilities)
{
    const struct classifier_shape *s = &c->shape;
    struct classifier_view w = classifier_view(s, c->params);
    float *x = scratch, *h = x + s->n_in, *p = h + s->n_hidden;
    if (n_tok < 1) {
        FAIL(ST_SHAPE, "features of %d tokens; expected at least 1", n_tok);
    }
    if (s->kind == CLASSIFIER_KV) {
        pool(c, features, n_tok, x, p, p + n_tok);
    } else {
        for (int32_t i = 0; i < s->n_in; i++) {
            x[i] = (features[i] - c->shift[i]) * c->scale[i];
        }
    }
    layer_norm(x, w.gain, w.bias, s->n_in);
    for (int32_t i = 0; i < s->n_hidden; i++) {
        float y = dot(w.w1 + (size_t)i * (size_t)s->n_in, x, s->n_in) + w.b1[i];
        h[i] = y < 0 ? 0 : y; /* not a number stays so */
    }
    bool finite = true;
    for (int32_t i = 0; i < s->n_classes; i++) {
        probabilities[i] = dot(w.w2 + (size_t)i * (size_t)s->n_hidden, h, s->n_hidden) + w.b2[i];
        finite = finite && isfinite(probabilities[i]);
    }
    if (!finite) {
        FAIL(ST_NUMERIC,
             "a classifier's scores are not numbers: its features (%d tokens) hold values that are "
             "not finite or far outside those of its training",
             n_tok);
    }
    softmax(probabilities, s->n_classes);
    return ST_OK;
}

enum status classifier_evaluate_batch(const struct classifier *c,
                                      const struct classifier_item *items, int32_t n,
                                      float *scratch)
{
    for (int32_t i = 0; i < n; i++) {
        enum status st = classifier_evaluate(c, items[i].features, items[i].n_tok, scratch,
                                             items[i].probabilities);
        if (st != ST_OK) {
            return status_prefix(st, "item %d of a batch of %d: ", i, n);
        }
    }
    return ST_OK;
}

int32_t classifier_argmax(const float *probabilities, int32_t n_classes)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n_classes; i++) {
        best = probabilities[i] > probabilities[best] ? i : best;
    }
    return best;
}

/* ---- use ---- */

static enum status check_text(const char *path, const char *what, const char *made,
                              const char *have, const char *advice)
{
    if (have && made[0] && strcmp(made, have) != 0) {
        FAIL(ST_USER, "classifier %s was trained for %s %s, this run has %s; %s", path, what, made,
             have, advice);
    }
    return ST_OK;
}

static enum status check_number(const char *path, const char *what, int32_t made, int32_t have)
{
    if (made != have) {
        FAIL(ST_USER,
             "classifier %s was trained for %s %d, this run has %d; train one on a dataset of this "
             "model (pmpd dataset, pmpd train)",
             path, what, made, have);
    }
    return ST_OK;
}

enum status classifier_check_use(const struct classifier *c, const char *path,
                                 const struct classifier_use *use)
{
    static const char *const kinds[] = {"the KV features of a prompt", "the signals of steps"};
    if (c->shape.kind != use->kind) {
        FAIL(ST_USER, "classifier %s looks at %s; this policy needs one that looks at %s", path,
             kinds[c->shape.kind], kinds[use->kind]);
    }
    TRY(check_text(path, "the model with digest", c->facts.model_digest, use->model_digest,
                   "train one on a dataset of this model (pmpd dataset, pmpd train)"));
    TRY(check_text(path, "the high level", c->facts.high, use->high,
                   "name the classifier of this pair of levels"));
    TRY(check_text(path, "the low level", c->facts.low, use->low,
                   "name the classifier of this pair of levels"));
    if (use->kind == CLASSIFIER_STEP) {
        return check_number(path, "a number of signals of", c->shape.n_in, use->n_in);
    }
    TRY(check_number(path, "features with a number of heads of", c->shape.n_kv_heads,
                     use->n_kv_heads));
    return check_number(path, "a head dimension of", c->shape.head_dim, use->head_dim);
}
