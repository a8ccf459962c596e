/* Training of classifiers: gradients and AdamW against vectors that PyTorch made
 * (tests/golden/make_classifier_vectors.py), gradients with dropout against finite differences,
 * learning, early stopping, the number of lanes, refusals, and the measures on held-out samples.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <hdf5.h>

#include "core/h5.h"
#include "core/mem.h"
#include "sched/held_out.h"
#include "sched/train.h"
#include "tests/check.h"
#include "tests/gen.h"

static const uint32_t no_key[2];
static const float ones[CLASSIFIER_MAX_CLASSES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* ---- PyTorch's vectors ---- */

enum { N_VECTORS = 5 };
static const int32_t vector_tok[N_VECTORS] = {3, 1, 7, 5, 2},
                     vector_label[N_VECTORS] = {2, 0, 1, 2, 1};

static double *vector(hid_t file, const char *name, hsize_t n)
{
    hsize_t dims[3];
    void *out = NULL;
    int rank = strstr(name, "probabilities") ? 2 : 1;
    CHECK_OK(h5_array_read(&out, file, name, H5T_NATIVE_DOUBLE, rank, dims, n));
    CHECK((rank == 1 ? dims[0] : dims[0] * dims[1]) == n);
    return out;
}

static void check_vector(const float *found, double *expected, size_t n, double tolerance)
{
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)found[i] - expected[i]);
        most = d > most || isnan(d) ? d : most;
    }
    CHECK_NEAR(most, 0, tolerance);
    mem_free(expected);
}

static void test_vectors(const char *kind, int32_t n_kv_heads)
{
    char name[64];
    hid_t file = H5I_INVALID_HID;
    struct classifier c;
    struct train_sample samples[N_VECTORS];
    struct collective coll;
    struct gradient_work work;
    struct train_history history;
    const int32_t order[N_VECTORS] = {0, 1, 2, 3, 4};
    bool step = n_kv_heads == 0;
    struct classifier_shape shape = {.kind = step ? CLASSIFIER_STEP : CLASSIFIER_KV,
                                     .head_dim = 4,
                                     .n_kv_heads = n_kv_heads,
                                     .n_groups = 2,
                                     .n_queries = 3,
                                     .n_in = step ? 7 : 8,
                                     .n_hidden = 6,
                                     .n_classes = 3};
#define NAME(part) (snprintf(name, sizeof name, "%s/%s", kind, part), name)
    CHECK_OK(h5_open(&file, PMPD_GOLDEN "/classifier.h5"));
    CHECK_OK(classifier_create(&c, &shape));
    collective_local(&coll);
    size_t n = c.n_params, total = 0;
    for (int i = 0; i < N_VECTORS; i++) {
        total += step ? 7 : 2 * (size_t)(n_kv_heads * vector_tok[i]) * 4;
    }
    double *from = vector(file, NAME("samples"), total);
    float features[512], *gradient = NULL, probabilities[N_VECTORS * 3];
    size_t at = 0;
    for (size_t i = 0; i < total; i++) {
        features[i] = (float)from[i];
    }
    mem_free(from);
    for (int i = 0; i < N_VECTORS; i++) {
        samples[i] =
            (struct train_sample){features + at, step ? 1 : vector_tok[i], vector_label[i], 0};
        at += step ? 7 : 2 * (size_t)(n_kv_heads * vector_tok[i]) * 4;
    }
    from = vector(file, NAME("params"), n);
    for (size_t i = 0; i < n; i++) {
        c.params[i] = (float)from[i];
    }
    mem_free(from);
    CHECK_OK(train_predict(&c, samples, N_VECTORS, &coll, probabilities));
    check_vector(probabilities, vector(file, NAME("probabilities"), N_VECTORS * 3), N_VECTORS * 3,
                 1e-6);
    double loss = 0, expected = 0;
    int32_t n_right = 0;
    from = vector(file, NAME("loss"), N_VECTORS);
    for (int i = 0; i < N_VECTORS; i++) {
        expected += from[i];
    }
    mem_free(from);
    CHECK_OK(gradient_work_create(&work, &shape, N_VECTORS, 7));
    CHECK_OK(MEM_NEW(&gradient, n));
    train_gradient(&c, samples, order, N_VECTORS, ones, 0, no_key, &work, gradient, &loss,
                   &n_right);
    CHECK_NEAR(loss, expected, 1e-5);
    check_vector(gradient, vector(file, NAME("gradient"), n), n, 1e-5);
    /* five updates over all samples; the last is the best, for the loss falls */
    struct train_options o = train_options_default();
    o.learning_rate = 0.01;
    o.weight_decay = 0.1;
    o.dropout = 0;
    o.max_epochs = 5;
    o.warm = true;
    struct train_data data = {samples, samples, N_VECTORS, N_VECTORS};
    CHECK_OK(train_run(&c, &data, &o, &coll, &history));
    CHECK(history.n == 5 && history.best == 4);
    check_vector(c.params, vector(file, NAME("after"), n), n, 2e-5);
    from = vector(file, NAME("after_loss"), N_VECTORS);
    expected = 0;
    for (int i = 0; i < N_VECTORS; i++) {
        expected += from[i] / N_VECTORS;
    }
    mem_free(from);
    CHECK_NEAR(history.epochs[4].validation_loss, expected, 1e-5);
#undef NAME
    train_history_free(&history);
    gradient_work_free(&work);
    mem_free(gradient);
    classifier_free(&c);
    H5Fclose(file);
}

/* ---- dropout and weights, by finite differences ---- */

static void fill(float *x, size_t n, struct gen_rng *rng, double scale)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(scale * gen_normal(rng));
    }
}

static void test_differences(void)
{
    enum { N = 3, TOK = 6 };
    struct classifier c;
    struct gen_rng rng = {4};
    static float features[N][2 * TOK * 4];
    struct classifier_shape shape = {.kind = CLASSIFIER_KV,
                                     .head_dim = 4,
                                     .n_kv_heads = 1,
                                     .n_groups = 2,
                                     .n_queries = 2,
                                     .n_in = 8,
                                     .n_hidden = 12,
                                     .n_classes = 3};
    struct train_sample samples[N];
    const int32_t order[N] = {2, 0, 1};
    const float weight[3] = {0.5f, 2, 1.25f};
    const uint32_t key[2] = {7, 9};
    struct gradient_work work;
    int32_t n_right = 0, n_bad = 0, n_zero = 0;
    double loss = 0, up = 0, down = 0;
    CHECK_OK(classifier_create(&c, &shape));
    fill(c.params, c.n_params, &rng, 0.5);
    for (int i = 0; i < N; i++) {
        fill(features[i], 2 * TOK * 4, &rng, 1);
        samples[i] = (struct train_sample){features[i], TOK - i, i, 0};
    }
    float *gradient = NULL, *unused = NULL;
    CHECK_OK(gradient_work_create(&work, &shape, N, TOK));
    CHECK_OK(MEM_NEW(&gradient, c.n_params));
    CHECK_OK(MEM_NEW(&unused, c.n_params));
    train_gradient(&c, samples, order, N, weight, 0.4, key, &work, gradient, &loss, &n_right);
    for (size_t i = 0; i < c.n_params; i++) {
        const float step = 2e-3f;
        float kept = c.params[i];
        c.params[i] = kept + step;
        train_gradient(&c, samples, order, N, weight, 0.4, key, &work, unused, &up, &n_right);
        c.params[i] = kept - step;
        train_gradient(&c, samples, order, N, weight, 0.4, key, &work, unused, &down, &n_right);
        c.params[i] = kept;
        double difference = (up - down) / (2 * (double)step);
        /* a unit may cross 0 within a step; f32 leaves about 1e-4 */
        n_bad += fabs(difference - (double)gradient[i]) > 2e-3 + 1e-2 * fabs(difference);
        n_zero += gradient[i] == 0;
    }
    CHECK(n_bad <= 2);
    CHECK(n_zero < (int32_t)c.n_params / 2);
    mem_free(gradient);
    mem_free(unused);
    gradient_work_free(&work);
    classifier_free(&c);
}

/* ---- learning ---- */

enum { N_TRAIN = 96, N_VALID = 40, TOK = 5, D = 8 };
struct problem {
    float features[N_TRAIN + N_VALID][2 * TOK * D];
    struct train_sample samples[N_TRAIN + N_VALID];
    struct train_data data;
};

/* The class is told by the sign pattern of one token's value, found by its key. */
static void make_problem(struct problem *p, bool learnable)
{
    struct gen_rng rng = {12};
    for (int i = 0; i < N_TRAIN + N_VALID; i++) {
        fill(p->features[i], 2 * TOK * D, &rng, 0.3);
        int32_t label = i % 3 == 0 ? 0 : (int32_t)gen_below(&rng, 3),
                t = (int32_t)gen_below(&rng, TOK);
        p->features[i][t * D] += 3;
        p->features[i][(TOK + t) * D + 1 + (learnable ? label : 0)] += 2;
        p->samples[i] = (struct train_sample){p->features[i], TOK, label, 0};
    }
    p->data = (struct train_data){p->samples, p->samples + N_TRAIN, N_TRAIN, N_VALID};
}

static struct classifier_shape small_shape(void)
{
    return (struct classifier_shape){.kind = CLASSIFIER_KV,
                                     .head_dim = D,
                                     .n_kv_heads = 1,
                                     .n_groups = 2,
                                     .n_queries = 2,
                                     .n_in = 2 * D,
                                     .n_hidden = 16,
                                     .n_classes = 3};
}

static void test_learning(void)
{
    static struct problem p;
    struct classifier c, again;
    struct classifier_shape shape = small_shape();
    struct collective coll;
    struct train_history history, second;
    struct train_options o = train_options_default();
    float probabilities[N_VALID * 3];
    struct held_out out;
    collective_local(&coll);
    CHECK_OK(classifier_create(&c, &shape));
    CHECK_OK(classifier_create(&again, &shape));
    o.learning_rate = 0.01;
    o.batch = 20; /* no multiple of the lanes, and a smaller batch at the end */
    o.balance = true;
    make_problem(&p, true);
    CHECK_OK(train_run(&c, &p.data, &o, &coll, &history));
    CHECK_OK(train_run(&again, &p.data, &o, &coll, &second));
    CHECK(memcmp(c.params, again.params, c.n_params * sizeof *c.params) == 0);
    CHECK(history.epochs[history.best].validation_accuracy > 0.9f);
    train_history_free(&second);
    o.seed = 2;
    CHECK_OK(train_run(&again, &p.data, &o, &coll, &second));
    CHECK(memcmp(c.params, again.params, c.n_params * sizeof *c.params) != 0);
    train_history_free(&second);
    CHECK_OK(train_predict(&c, p.data.validation, N_VALID, &coll, probabilities));
    held_out_measure(&out, probabilities, p.data.validation, N_VALID, 3, p.samples, N_TRAIN);
    CHECK_NEAR(out.accuracy, history.epochs[history.best].validation_accuracy, 1e-6);
    CHECK(out.nll < out.prior_nll && out.accuracy > out.prior_accuracy);
    train_history_free(&history);
    make_problem(&p, false); /* nothing to learn: it stops early, and no worse than the start */
    CHECK_OK(train_run(&c, &p.data, &o, &coll, &history));
    CHECK(history.n < o.max_epochs && history.n - 1 - history.best == o.patience);
    train_history_free(&history);
    classifier_free(&c);
    classifier_free(&again);
}

/* ---- held-out measures, by hand ---- */

static void test_measures(void)
{
    const float p[] = {0.7f, 0.2f, 0.1f, 0.25f, 0.4f, 0.35f, 0.1f, 0.15f, 0.75f, 0, 0, 1};
    const struct train_sample samples[] = {
        {NULL, 1, 0, 8}, {NULL, 1, 2, 8}, {NULL, 1, 0, 9}, {NULL, 1, 2, 9}};
    /* five of class 0, two of class 2; of task 8 one and two */
    const struct train_sample train[] = {{NULL, 1, 0, 9}, {NULL, 1, 0, 9}, {NULL, 1, 0, 9},
                                         {NULL, 1, 0, 9}, {NULL, 1, 0, 8}, {NULL, 1, 2, 8},
                                         {NULL, 1, 2, 8}};
    struct held_out out;
    held_out_measure(&out, p, samples, 4, 3, train, 7);
    CHECK_NEAR(out.accuracy, 0.5, 1e-12);
    CHECK_NEAR(out.earlier, 0.25, 1e-12);
    CHECK_NEAR(out.later, 0.25, 1e-12);
    CHECK(out.confusion[0][0] == 1 && out.confusion[2][1] == 1 && out.confusion[0][2] == 1 &&
          out.confusion[2][2] == 1);
    CHECK_NEAR(out.nll, -(log(0.7) + log(0.35) + log(0.1) + log(1)) / 4, 1e-6);
    CHECK_NEAR(out.prior_nll, -(2 * log(6 / 10.0) + 2 * log(3 / 10.0)) / 4, 1e-12);
    CHECK_NEAR(out.prior_accuracy, 0.5, 1e-12);
    CHECK_NEAR(out.task_accuracy, 0.5, 1e-12); /* 8: class 2; 9: class 0 */
    CHECK_NEAR(out.task_nll, -(log(2 / 6.0) + log(3 / 6.0) + log(5 / 7.0) + log(1 / 7.0)) / 4,
               1e-12);
    /* bins: 0.4 (wrong), 0.7 (right), 0.75 (wrong), 1 (right) */
    CHECK(out.bins[4].n == 1 && out.bins[7].n == 2 && out.bins[9].n == 1);
    CHECK_NEAR(out.ece, 0.25 * 0.4 + 0.5 * (0.725 - 0.5) + 0, 1e-6);
}

static void test_refusals(void)
{
    static struct problem p;
    struct classifier c;
    struct classifier_shape shape = small_shape();
    struct collective coll;
    struct train_history history;
    struct train_options o = train_options_default(), bad = o;
    collective_local(&coll);
    make_problem(&p, true);
    CHECK_OK(classifier_create(&c, &shape));
    bad.dropout = 1;
    CHECK_STATUS(train_run(&c, &p.data, &bad, &coll, &history), ST_USER, "dropout 1; expected");
    bad = o;
    bad.learning_rate = NAN;
    CHECK_STATUS(train_run(&c, &p.data, &bad, &coll, &history), ST_USER, "learning rate nan");
    struct train_data d = p.data;
    d.n_validation = 0;
    CHECK_STATUS(train_run(&c, &d, &o, &coll, &history), ST_USER, "no validation samples");
    d = p.data;
    p.samples[5].label = 3;
    CHECK_STATUS(train_run(&c, &d, &o, &coll, &history), ST_SHAPE, "sample 5 has class 3");
    for (int i = 0; i < N_TRAIN; i++) {
        p.samples[i].label = i % 2;
    }
    CHECK_STATUS(train_run(&c, &d, &o, &coll, &history), ST_USER, "no training sample has class 2");
    o.allow_empty = true;
    o.balance = true;
    o.max_epochs = 2;
    CHECK_OK(train_run(&c, &d, &o, &coll, &history));
    train_history_free(&history);
    p.features[3][4] = NAN;
    CHECK_STATUS(train_run(&c, &d, &o, &coll, &history), ST_NUMERIC, "the loss is nan in epoch 0");
    CHECK(history.epochs == NULL);
    classifier_free(&c);
}

int main(void)
{
    h5_quiet();
    test_vectors("kv1", 1);
    test_vectors("kv2", 2);
    test_vectors("step", 0);
    test_differences();
    test_learning();
    test_measures();
    test_refusals();
    return check_report();
}
