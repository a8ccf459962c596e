/* The learned scheduler's network against the definition written out in double precision, its file,
 * and what it refuses. SPDX-License-Identifier: Apache-2.0
 */
#include <hdf5.h>

#include "core/h5.h"
#include "core/mem.h"
#include "sched/classifier.h"
#include "sched/step_window.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { TOK_MAX = 23, MOST = 4096 };

static struct classifier_shape kv_shape(int32_t n_kv_heads)
{
    return (struct classifier_shape){.kind = CLASSIFIER_KV,
                                     .head_dim = 20,
                                     .n_kv_heads = n_kv_heads,
                                     .n_groups = 3,
                                     .n_queries = 5,
                                     .n_in = 60,
                                     .n_hidden = 37,
                                     .n_classes = 4};
}

static void fill(float *x, size_t n, struct gen_rng *rng, double scale)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(scale * gen_normal(rng));
    }
}

static void make(struct classifier *c, struct classifier_shape shape, uint64_t seed)
{
    struct gen_rng rng = {seed};
    CHECK_OK(classifier_create(c, &shape));
    fill(c->params, c->n_params, &rng, 0.4);
    strcpy(c->facts.model_digest, "0123456789abcdef0123456789abcdef");
    strcpy(c->facts.high, "4");
    strcpy(c->facts.low, "2");
    for (int i = 0; i < shape.n_classes; i++) {
        c->facts.class_at[i] = (double)i / (shape.n_classes - 1);
    }
}

/* The definition, as the header writes it: every softmax and every product apart, in f64. */
static void define(const struct classifier *c, const float *f, int n_tok, double *out)
{
    const struct classifier_shape *s = &c->shape;
    const float *p = c->params, *query = p;
    double x[256] = {0}, h[256], score[TOK_MAX], sum, mean = 0, variance = 0;
    int d = s->head_dim;
    if (s->kind == CLASSIFIER_KV) {
        p += s->n_groups * s->n_queries * d;
        for (int g = 0; g < s->n_groups; g++) {
            int head = s->n_kv_heads == 1 ? 0 : g;
            const float *k = f + head * n_tok * d, *v = f + (s->n_kv_heads + head) * n_tok * d;
            for (int q = 0; q < s->n_queries; q++) {
                sum = 0;
                for (int t = 0; t < n_tok; t++) {
                    score[t] = 0;
                    for (int i = 0; i < d; i++) {
                        score[t] +=
                            (double)query[(g * s->n_queries + q) * d + i] * (double)k[t * d + i];
                    }
                    score[t] = exp(score[t] / sqrt(d));
                    sum += score[t];
                }
                for (int t = 0; t < n_tok; t++) {
                    for (int i = 0; i < d; i++) {
                        x[g * d + i] += score[t] / sum * (double)v[t * d + i] / s->n_queries;
                    }
                }
            }
        }
    } else {
        for (int i = 0; i < s->n_in; i++) {
            x[i] = ((double)f[i] - (double)c->shift[i]) * (double)c->scale[i];
        }
    }
    for (int i = 0; i < s->n_in; i++) {
        mean += x[i] / s->n_in;
    }
    for (int i = 0; i < s->n_in; i++) {
        variance += (x[i] - mean) * (x[i] - mean) / s->n_in;
    }
    for (int i = 0; i < s->n_in; i++) {
        x[i] = (x[i] - mean) / sqrt(variance + 1e-5) * (double)p[i] + (double)p[s->n_in + i];
    }
    p += 2 * s->n_in;
    for (int i = 0; i < s->n_hidden; i++) {
        h[i] = (double)p[s->n_hidden * s->n_in + i];
        for (int j = 0; j < s->n_in; j++) {
            h[i] += (double)p[i * s->n_in + j] * x[j];
        }
        h[i] = h[i] < 0 ? 0 : h[i];
    }
    p += s->n_hidden * s->n_in + s->n_hidden;
    sum = 0;
    for (int i = 0; i < s->n_classes; i++) {
        out[i] = (double)p[s->n_classes * s->n_hidden + i];
        for (int j = 0; j < s->n_hidden; j++) {
            out[i] += (double)p[i * s->n_hidden + j] * h[j];
        }
        out[i] = exp(out[i]);
        sum += out[i];
    }
    for (int i = 0; i < s->n_classes; i++) {
        out[i] /= sum;
    }
}

static void test_definition(void)
{
    static float f[MOST], scratch[1024];
    for (int which = 0; which < 3; which++) {
        struct classifier c;
        struct gen_rng rng = {77 + (uint64_t)which};
        struct classifier_shape step = {
            .kind = CLASSIFIER_STEP, .n_in = 7, .n_hidden = 9, .n_classes = 2};
        make(&c, which == 2 ? step : kv_shape(which ? 3 : 1), 5);
        if (which == 2) {
            fill(c.shift, 7, &rng, 1);
            fill(c.scale, 7, &rng, 1);
        }
        CHECK(classifier_scratch(&c.shape, TOK_MAX) <= 1024);
        for (int n_tok = 1; n_tok <= TOK_MAX; n_tok += 11) {
            float p[4], sum = 0;
            double expected[4];
            fill(f, MOST, &rng, 1);
            uint64_t allocated = mem_alloc_count();
            CHECK_OK(classifier_evaluate(&c, f, n_tok, scratch, p));
            CHECK(mem_alloc_count() == allocated);
            define(&c, f, n_tok, expected);
            for (int i = 0; i < c.shape.n_classes; i++) {
                CHECK_NEAR(p[i], expected[i], 2e-6);
                sum += p[i];
            }
            CHECK_NEAR(sum, 1, 1e-6);
        }
        f[3] = NAN;
        float p[4];
        CHECK_STATUS(classifier_evaluate(&c, f, 2, scratch, p), ST_NUMERIC, "not numbers");
        CHECK_STATUS(classifier_evaluate(&c, f, 0, scratch, p), ST_SHAPE, "at least 1");
        classifier_free(&c);
    }
}

static void test_batch(void)
{
    static float f[3][MOST], scratch[1024];
    struct classifier c;
    struct gen_rng rng = {3};
    struct classifier_item items[3];
    float p[3][4], alone[4];
    make(&c, kv_shape(3), 6);
    for (int i = 0; i < 3; i++) {
        fill(f[i], MOST, &rng, 1);
        items[i] = (struct classifier_item){f[i], 3 + 9 * i, p[i]};
    }
    CHECK_OK(classifier_evaluate_batch(&c, items, 3, scratch));
    for (int i = 0; i < 3; i++) {
        CHECK_OK(classifier_evaluate(&c, f[i], items[i].n_tok, scratch, alone));
        CHECK(memcmp(alone, p[i], sizeof alone) == 0);
    }
    f[1][0] = INFINITY;
    CHECK_STATUS(classifier_evaluate_batch(&c, items, 3, scratch), ST_NUMERIC, "item 1 of");
    CHECK(classifier_argmax((const float[]){0.3f, 0.3f, 0.4f, 0.4f}, 4) == 2);
    classifier_free(&c);
}

static void test_file(void)
{
    char folder[GEN_PATH_BYTES], path[GEN_PATH_BYTES], a[DIGEST_TEXT], b[DIGEST_TEXT];
    struct classifier c, back;
    gen_folder(folder);
    gen_path(path, folder, "c.h5");
    for (int which = 0; which < 2; which++) {
        struct classifier_shape step = {
            .kind = CLASSIFIER_STEP, .n_in = 7, .n_hidden = 9, .n_classes = 2};
        make(&c, which ? step : kv_shape(1), 8);
        mem_free(c.training);
        CHECK_OK(mem_strdup(&c.training, "{\"seed\": 8}"));
        CHECK_OK(classifier_write(&c, path));
        CHECK_OK(classifier_read(&back, path));
        CHECK(memcmp(&c.shape, &back.shape, sizeof c.shape) == 0);
        CHECK(memcmp(&c.facts, &back.facts, sizeof c.facts) == 0);
        CHECK(c.n_params == back.n_params &&
              memcmp(c.params, back.params, c.n_params * sizeof *c.params) == 0);
        CHECK(strcmp(back.training, "{\"seed\": 8}") == 0);
        classifier_digest(&c, a);
        classifier_digest(&back, b);
        CHECK(strcmp(a, b) == 0 && strlen(a) == 32);
        back.params[c.n_params - 1] += 1;
        classifier_digest(&back, b);
        CHECK(strcmp(a, b) != 0);
        classifier_free(&back);
        c.params[c.n_params - 1] = INFINITY;
        CHECK_OK(classifier_write(&c, path));
        CHECK_STATUS(classifier_read(&back, path), ST_FORMAT, "/b2 holds values");
        c.params[c.n_params - 1] = 0;
        c.facts.class_at[1] = 0;
        CHECK_OK(classifier_write(&c, path));
        CHECK_STATUS(classifier_read(&back, path), ST_FORMAT, "ascending fractions");
        c.facts.class_at[1] = 1;
        classifier_free(&c);
    }
    CHECK_STATUS(classifier_read(&back, folder), ST_HDF5, folder);
    gen_write_file(path, "no HDF5", 7);
    CHECK_STATUS(classifier_read(&back, path), ST_HDF5, path);
    hid_t file;
    CHECK_OK(h5_create(&file, path));
    CHECK_OK(h5_save(file, path));
    H5Fclose(file);
    CHECK_STATUS(classifier_read(&back, path), ST_FORMAT, "not a classifier");
    gen_remove(folder);
}

static void test_refusals(void)
{
    struct classifier c;
    struct classifier_shape s = kv_shape(1);
    s.n_in = 61;
    CHECK_STATUS(classifier_create(&c, &s), ST_SHAPE, "3 * 20");
    s = kv_shape(2);
    CHECK_STATUS(classifier_create(&c, &s), ST_SHAPE, "2 heads; expected 1 (their mean) or 3");
    s = kv_shape(1);
    s.n_classes = 1;
    CHECK_STATUS(classifier_create(&c, &s), ST_SHAPE, "decides nothing");
    s.n_classes = 17;
    CHECK_STATUS(classifier_create(&c, &s), ST_SHAPE, "expected 1 to 16");
    make(&c, kv_shape(1), 1);
    struct classifier_use use = {.kind = CLASSIFIER_KV,
                                 .high = "4",
                                 .low = "2",
                                 .n_kv_heads = 1,
                                 .head_dim = 20},
                          other = use;
    CHECK_OK(classifier_check_use(&c, "c.h5", &use));
    other.model_digest = "ffff";
    CHECK_STATUS(classifier_check_use(&c, "c.h5", &other), ST_USER, "this run has ffff");
    other = use;
    other.low = "3";
    CHECK_STATUS(classifier_check_use(&c, "c.h5", &other), ST_USER, "low level 2, this run has 3");
    other = use;
    other.n_kv_heads = 8;
    CHECK_STATUS(classifier_check_use(&c, "c.h5", &other), ST_USER, "heads of 1, this run has 8");
    other = use;
    other.head_dim = 64;
    CHECK_STATUS(classifier_check_use(&c, "c.h5", &other), ST_USER, "of 20, this run has 64");
    other.kind = CLASSIFIER_STEP;
    CHECK_STATUS(classifier_check_use(&c, "c.h5", &other), ST_USER, "signals of steps");
    /* T/3 and 2T/3 as integer division gives them */
    c.facts.class_at[1] = 1.0 / 3;
    c.facts.class_at[2] = 2.0 / 3;
    for (int32_t t = 1; t < 5000; t++) {
        CHECK(classifier_switch_step(&c, 1, t) == t / 3);
        CHECK(classifier_switch_step(&c, 2, t) == 2 * t / 3);
        CHECK(classifier_switch_step(&c, 3, t) == t);
    }
    classifier_free(&c);
}

static void test_window(void)
{
    struct step_window w;
    float x[STEP_WINDOW_N];
    step_window_clear(&w);
    step_window_vector(&w, 0, 10, x);
    CHECK(x[0] == 0 && x[9] == 0 && x[10] == 1);
    step_window_add(&w, -1, 2, 3);
    step_window_add(&w, -3, 4, 11);
    step_window_vector(&w, 5, 10, x);
    const float expected[STEP_WINDOW_N] = {-3, -2, -1.25f, 4, 3, 2.25f, 11, 7, 4, 0.5f, 1 / 3.0f};
    for (int i = 0; i < STEP_WINDOW_N; i++) {
        CHECK_NEAR(x[i], expected[i], 1e-6);
    }
}

int main(void)
{
    h5_quiet();
    test_definition();
    test_batch();
    test_file();
    test_refusals();
    test_window();
    return check_report();
}
