/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/train.h"

#include <cblas.h>
#include <math.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/sampler.h"

#define ADAM_BETA1 0.9 /* the defaults of the Adam paper, section 2 */
#define ADAM_BETA2 0.999
#define ADAM_EPS 1e-8

/* What a key of the generator is for. */
enum { PURPOSE_INIT = 1, PURPOSE_SHUFFLE, PURPOSE_DROPOUT };
enum { N_SUMS = 2 }; /* behind a lane's gradient: its loss and its right answers */

struct train_options train_options_default(void)
{
    return (struct train_options){.learning_rate = 1e-3,
                                  .weight_decay = 0.01,
                                  .dropout = 0.1,
                                  .batch = 32,
                                  .max_epochs = 60,
                                  .patience = 8,
                                  .seed = 1};
}

static enum status check_range(const char *name, double value, double least, double most)
{
    if (!(value >= least && value <= most)) {
        FAIL(ST_USER, "training with %s %g; expected %g to %g", name, value, least, most);
    }
    return ST_OK;
}

enum status train_options_check(const struct train_options *o)
{
    TRY(check_range("learning rate", o->learning_rate, 1e-9, 10));
    TRY(check_range("weight decay", o->weight_decay, 0, 10));
    TRY(check_range("dropout", o->dropout, 0, 0.95));
    TRY(check_range("batch", o->batch, 1, TRAIN_MAX_BATCH));
    TRY(check_range("epochs", o->max_epochs, 1, 1e6));
    return check_range("patience", o->patience, 1, 1e6);
}

/* ---- random numbers ---- */

static uint32_t word(uint64_t seed, uint32_t purpose, uint32_t epoch, uint32_t i)
{
    uint32_t out[4];
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t counter[4] = {i, epoch, purpose, 0};
    philox4x32(out, counter, key);
    return out[0];
}

/* (0, 1) */
static double uniform(uint64_t seed, uint32_t purpose, uint32_t epoch, uint32_t i)
{
    return ((double)word(seed, purpose, epoch, i) + 0.5) / 4294967296.0;
}

static void shuffle(int32_t *order, int32_t n, uint64_t seed, int32_t epoch)
{
    for (int32_t i = 0; i < n; i++) {
        order[i] = i;
    }
    for (int32_t i = n - 1; i > 0; i--) { /* Fisher, Yates */
        int32_t j =
            (int32_t)(uniform(seed, PURPOSE_SHUFFLE, (uint32_t)epoch, (uint32_t)i) * (i + 1));
        int32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

static void init_uniform(float *w, size_t n, int32_t n_inputs, uint64_t seed, uint32_t which)
{
    double bound = 1 / sqrt((double)n_inputs);
    for (size_t i = 0; i < n; i++) {
        w[i] = (float)(bound * (2 * uniform(seed, PURPOSE_INIT, which, (uint32_t)i) - 1));
    }
}

void train_init(struct classifier *c, uint64_t seed)
{
    const struct classifier_shape *s = &c->shape;
    struct classifier_view p = classifier_view(s, c->params);
    size_t n_query = (size_t)(p.gain - p.query), hidden = (size_t)s->n_hidden;
    double deviation = s->kind == CLASSIFIER_KV ? 1 / sqrt((double)s->head_dim) : 0;
    for (size_t i = 0; i < n_query; i++) { /* Box, Muller */
        double u = uniform(seed, PURPOSE_INIT, 4, (uint32_t)i);
        double v = uniform(seed, PURPOSE_INIT, 5, (uint32_t)i);
        p.query[i] = (float)(deviation * sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v));
    }
    for (int32_t i = 0; i < s->n_in; i++) {
        p.gain[i] = 1;
        p.bias[i] = 0;
    }
    init_uniform(p.w1, hidden * (size_t)s->n_in, s->n_in, seed, 0);
    init_uniform(p.b1, hidden, s->n_in, seed, 1);
    init_uniform(p.w2, (size_t)s->n_classes * hidden, s->n_hidden, seed, 2);
    init_uniform(p.b2, (size_t)s->n_classes, s->n_hidden, seed, 3);
}

/* ---- what is trained ---- */

struct run {
    struct classifier *c;
    const struct train_data *data;
    const struct train_options *o;
    struct collective *coll;
    size_t n_vector;              /* n_params + N_SUMS */
    int32_t lane_begin, lane_end; /* this rank's */
    float *lanes;                 /* (own lanes, n_vector) */
    float *sum, *passing;         /* (n_vector) the gradient; another rank's lane on its way */
    float *m, *v, *best;          /* (n_params) */
    float *probabilities;         /* (n_validation, n_classes) */
    int32_t *order;               /* (n_train) */
    float weight[CLASSIFIER_MAX_CLASSES];
    struct gradient_work work;
};

static void run_free(struct run *r)
{
    mem_free(r->lanes);
    mem_free(r->sum);
    mem_free(r->passing);
    mem_free(r->m);
    mem_free(r->v);
    mem_free(r->best);
    mem_free(r->probabilities);
    mem_free(r->order);
    gradient_work_free(&r->work);
}

static enum status check_samples(const struct classifier *c, const struct train_sample *samples,
                                 int32_t n, const char *what, int32_t *max_tok)
{
    if (n < 1) {
        FAIL(ST_USER,
             "there are no %s samples; the split of a prompt follows from its hash, so that few "
             "prompts may leave one empty: make a dataset of more prompts",
             what);
    }
    for (int32_t i = 0; i < n; i++) {
        if (samples[i].label < 0 || samples[i].label >= c->shape.n_classes) {
            FAIL(ST_SHAPE, "%s sample %d has class %d; the classifier has %d", what, i,
                 samples[i].label, c->shape.n_classes);
        }
        *max_tok = samples[i].n_tok > *max_tok ? samples[i].n_tok : *max_tok;
    }
    return ST_OK;
}

/* Weights of classes, mean 1 over the training samples. */
static enum status weigh_classes(struct run *r)
{
    int32_t count[CLASSIFIER_MAX_CLASSES] = {0}, n_filled = 0;
    for (int32_t i = 0; i < r->data->n_train; i++) {
        count[r->data->train[i].label]++;
    }
    for (int32_t k = 0; k < r->c->shape.n_classes; k++) {
        n_filled += count[k] > 0;
        if (count[k] == 0 && !r->o->allow_empty) {
            FAIL(ST_USER,
                 "no training sample has class %d (%s %.3g) of %d, so that it could never be "
                 "learned; make a dataset of more prompts or of fewer candidates, or allow empty "
                 "classes",
                 k, r->c->shape.kind == CLASSIFIER_KV ? "switch at the fraction" : "value",
                 r->c->facts.class_at[k], r->c->shape.n_classes);
        }
    }
    for (int32_t k = 0; k < r->c->shape.n_classes; k++) {
        r->weight[k] = !r->o->balance ? 1
                       : count[k] == 0
                           ? 0
                           : (float)r->data->n_train / ((float)n_filled * (float)count[k]);
    }
    return ST_OK;
}

static void standardise(struct classifier *c, const struct train_data *data)
{
    for (int32_t j = 0; j < c->shape.n_in; j++) {
        double mean = 0, variance = 0;
        for (int32_t i = 0; i < data->n_train; i++) {
            mean += (double)data->train[i].features[j] / data->n_train;
        }
        for (int32_t i = 0; i < data->n_train; i++) {
            double d = (double)data->train[i].features[j] - mean;
            variance += d * d / data->n_train;
        }
        c->shift[j] = (float)mean;
        c->scale[j] = variance > 1e-12 ? (float)(1 / sqrt(variance)) : 1;
    }
}

/* Memory may lack on one rank only. */
static enum status agree(struct collective *coll, enum status st)
{
    float failed = st != ST_OK;
    struct tensor t = tensor_1d(&failed, DT_F32, 1);
    if (coll->size == 1) {
        return st;
    }
    TRY(collective_all_reduce_sum(coll, &t));
    if (st == ST_OK && failed > 0) {
        FAIL(ST_NOMEM, "another rank has no memory for the training: start fewer ranks per "
                       "node, or train a smaller classifier");
    }
    return st;
}

static enum status run_check(struct run *r, int32_t *max_tok)
{
    TRY(train_options_check(r->o));
    TRY(check_samples(r->c, r->data->train, r->data->n_train, "training", max_tok));
    TRY(check_samples(r->c, r->data->validation, r->data->n_validation, "validation", max_tok));
    return weigh_classes(r);
}

static enum status run_allocate(struct run *r, int32_t max_tok)
{
    const struct classifier *c = r->c;
    r->n_vector = c->n_params + N_SUMS;
    r->lane_begin = TRAIN_LANES * r->coll->rank / r->coll->size;
    r->lane_end = TRAIN_LANES * (r->coll->rank + 1) / r->coll->size;
    size_t n_own = (size_t)(r->lane_end - r->lane_begin);
    TRY(MEM_NEW(&r->lanes, n_own * r->n_vector));
    TRY(MEM_NEW(&r->sum, r->n_vector));
    TRY(MEM_NEW(&r->passing, r->coll->size > 1 ? r->n_vector : 1));
    TRY(MEM_NEW(&r->m, c->n_params));
    TRY(MEM_NEW(&r->v, c->n_params));
    TRY(MEM_NEW(&r->best, c->n_params));
    TRY(MEM_NEW(&r->probabilities, (size_t)r->data->n_validation * (size_t)c->shape.n_classes));
    TRY(MEM_NEW(&r->order, r->data->n_train));
    TRY(gradient_work_create(&r->work, &c->shape, r->o->batch / TRAIN_LANES + 1, max_tok));
    return ST_OK;
}

/* r->sum = the gradient of the batch of n samples from `first` on in r->order, on every rank. */
static enum status batch_gradient(struct run *r, int32_t first, int32_t n, int32_t epoch)
{
    const uint32_t key[2] = {word(r->o->seed, PURPOSE_DROPOUT, (uint32_t)epoch, 0),
                             word(r->o->seed, PURPOSE_DROPOUT, (uint32_t)epoch, 1)};
    for (int32_t l = r->lane_begin; l < r->lane_end; l++) {
        float *lane = r->lanes + (size_t)(l - r->lane_begin) * r->n_vector;
        int32_t begin = n * l / TRAIN_LANES, end = n * (l + 1) / TRAIN_LANES, n_right = 0;
        double loss = 0;
        memset(lane, 0, r->n_vector * sizeof *lane);
        if (end > begin) {
            train_gradient(r->c, r->data->train, r->order + first + begin, end - begin, r->weight,
                           r->o->dropout, key, &r->work, lane, &loss, &n_right);
        }
        lane[r->c->n_params] = (float)loss;
        lane[r->c->n_params + 1] = (float)n_right;
    }
    memset(r->sum, 0, r->n_vector * sizeof *r->sum);
    for (int32_t l = 0; l < TRAIN_LANES; l++) {
        int owner = 0;
        while (TRAIN_LANES * (owner + 1) / r->coll->size <= l) {
            owner++;
        }
        float *lane = owner == r->coll->rank ? r->lanes + (size_t)(l - r->lane_begin) * r->n_vector
                                             : r->passing;
        struct tensor t = tensor_1d(lane, DT_F32, (int32_t)r->n_vector);
        if (r->coll->size > 1) {
            TRY(collective_broadcast(r->coll, &t, owner));
        }
        for (size_t i = 0; i < r->n_vector; i++) {
            r->sum[i] += lane[i];
        }
    }
    return ST_OK;
}

/* One step of AdamW, the `update`th from 1 on, with the mean gradient over n samples. */
static void adamw(struct run *r, int32_t n, int64_t update)
{
    struct classifier_view p = classifier_view(&r->c->shape, r->c->params);
    double fix1 = 1 - pow(ADAM_BETA1, (double)update), fix2 = 1 - pow(ADAM_BETA2, (double)update);
    size_t w1 = (size_t)(p.w1 - r->c->params), b1 = (size_t)(p.b1 - r->c->params),
           w2 = (size_t)(p.w2 - r->c->params), b2 = (size_t)(p.b2 - r->c->params);
    for (size_t i = 0; i < r->c->n_params; i++) {
        double g = (double)r->sum[i] / n;
        double m = ADAM_BETA1 * (double)r->m[i] + (1 - ADAM_BETA1) * g;
        double v = ADAM_BETA2 * (double)r->v[i] + (1 - ADAM_BETA2) * g * g;
        bool decays = (i >= w1 && i < b1) || (i >= w2 && i < b2);
        double x = (double)r->c->params[i];
        x -= decays ? r->o->learning_rate * r->o->weight_decay * x : 0;
        x -= r->o->learning_rate * (m / fix1) / (sqrt(v / fix2) + ADAM_EPS);
        r->m[i] = (float)m;
        r->v[i] = (float)v;
        r->c->params[i] = (float)x;
    }
}

static enum status run_epoch(struct run *r, int32_t epoch, int64_t *update, double *mean_loss)
{
    double loss = 0;
    shuffle(r->order, r->data->n_train, r->o->seed, epoch);
    for (int32_t first = 0; first < r->data->n_train; first += r->o->batch) {
        int32_t left = r->data->n_train - first, n = left < r->o->batch ? left : r->o->batch;
        TRY(batch_gradient(r, first, n, epoch));
        double of_batch = (double)r->sum[r->c->n_params];
        if (!isfinite(of_batch)) { /* the same on every rank */
            FAIL(ST_NUMERIC,
                 "the loss is %g in epoch %d, samples %d to %d of it: the learning rate (%g) is "
                 "too large, or the features hold extreme values",
                 of_batch, epoch, first, first + n - 1, r->o->learning_rate);
        }
        loss += of_batch;
        adamw(r, n, ++*update);
    }
    *mean_loss = loss / r->data->n_train;
    return ST_OK;
}

/* ---- held-out samples ---- */

enum status train_predict(const struct classifier *c, const struct train_sample *samples, int32_t n,
                          struct collective *coll, float *probabilities)
{
    enum status st = ST_OK;
    size_t classes = (size_t)c->shape.n_classes;
    float *scratch = NULL;
    int32_t max_tok = 1;
    for (int32_t i = 0; i < n; i++) {
        max_tok = samples[i].n_tok > max_tok ? samples[i].n_tok : max_tok;
    }
    TRY(MEM_NEW(&scratch, classifier_scratch(&c->shape, max_tok)));
    memset(probabilities, 0, (size_t)n * classes * sizeof *probabilities);
    for (int32_t i = coll->rank; i < n; i += coll->size) {
        float *p = probabilities + (size_t)i * classes;
        if (classifier_evaluate(c, samples[i].features, samples[i].n_tok, scratch, p) != ST_OK) {
            status_clear();
            for (size_t k = 0; k < classes; k++) {
                p[k] = NAN;
            }
        }
    }
    if (coll->size > 1) { /* the others' are 0, so that sums are exact */
        struct tensor t = tensor_1d(probabilities, DT_F32, (int32_t)((size_t)n * classes));
        TRY_GOTO(st, collective_all_reduce_sum(coll, &t), done);
    }
done:
    mem_free(scratch);
    return st;
}

static enum status validate(struct run *r, int32_t epoch, struct train_epoch *out)
{
    int32_t n = r->data->n_validation, n_right = 0;
    double loss = 0, weight = 0;
    TRY(train_predict(r->c, r->data->validation, n, r->coll, r->probabilities));
    for (int32_t i = 0; i < n; i++) {
        const float *p = r->probabilities + (size_t)i * (size_t)r->c->shape.n_classes;
        int32_t label = r->data->validation[i].label;
        double w = (double)r->weight[label];
        /* f32 probabilities end at 1e-38 or so; beyond that the loss stays finite */
        loss -= w * log(p[label] < 1e-37f ? 1e-37 : (double)p[label]);
        weight += w;
        n_right += classifier_argmax(p, r->c->shape.n_classes) == label;
    }
    if (!isfinite(loss)) {
        FAIL(ST_NUMERIC,
             "validation gives no numbers after epoch %d: the learning rate (%g) is too large, or "
             "the features hold extreme values",
             epoch, r->o->learning_rate);
    }
    out->validation_loss = (float)(weight > 0 ? loss / weight : loss);
    out->validation_accuracy = (float)n_right / (float)n;
    return ST_OK;
}

static enum status run_epochs(struct run *r, struct train_history *h)
{
    int64_t update = 0;
    for (int32_t epoch = 0; epoch < r->o->max_epochs && epoch - h->best <= r->o->patience;
         epoch++) {
        struct train_epoch *e = &h->epochs[epoch];
        double loss = 0;
        TRY(run_epoch(r, epoch, &update, &loss));
        e->train_loss = (float)loss;
        TRY(validate(r, epoch, e));
        h->n = epoch + 1;
        log_debug("epoch %d: training loss %.4f, validation loss %.4f, accuracy %.3f", epoch,
                  (double)e->train_loss, (double)e->validation_loss,
                  (double)e->validation_accuracy);
        if (epoch == 0 || e->validation_loss < h->epochs[h->best].validation_loss) {
            h->best = epoch;
            memcpy(r->best, r->c->params, r->c->n_params * sizeof *r->best);
        }
    }
    memcpy(r->c->params, r->best, r->c->n_params * sizeof *r->best);
    return ST_OK;
}

enum status train_run(struct classifier *c, const struct train_data *data,
                      const struct train_options *options, struct collective *coll,
                      struct train_history *history)
{
    struct run r = {.c = c, .data = data, .o = options, .coll = coll};
    enum status st = ST_OK;
    *history = (struct train_history){0};
    int32_t max_tok = 1;
    TRY_GOTO(st, run_check(&r, &max_tok), done); /* the same on every rank */
    st = run_allocate(&r, max_tok);
    if (st == ST_OK) {
        st = MEM_NEW(&history->epochs, options->max_epochs);
    }
    TRY_GOTO(st, agree(coll, st), done);
    openblas_set_num_threads(1); /* ranks share the work; sums then do not depend on threads */
    if (!options->warm && c->shape.kind == CLASSIFIER_STEP) {
        standardise(c, data);
    }
    if (!options->warm) {
        train_init(c, options->seed);
    }
    TRY_GOTO(st, run_epochs(&r, history), done);
done:
    run_free(&r);
    if (st != ST_OK) {
        train_history_free(history);
    }
    return st;
}

void train_history_free(struct train_history *h)
{
    mem_free(h->epochs);
    *h = (struct train_history){0};
}
