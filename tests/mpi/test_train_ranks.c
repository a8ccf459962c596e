/* Training on several ranks gives the bits of training on one, and fails on all of them.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/mem.h"
#include "dist/env.h"
#include "sched/train.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { N = 45, TOK = 4, D = 6 };

static void compare(struct collective *coll)
{
    static float features[N][2 * TOK * D];
    struct train_sample samples[N];
    struct gen_rng rng = {3};
    struct classifier alone, shared;
    struct collective local;
    struct train_history a, b;
    struct classifier_shape shape = {.kind = CLASSIFIER_KV,
                                     .head_dim = D,
                                     .n_kv_heads = 1,
                                     .n_groups = 2,
                                     .n_queries = 3,
                                     .n_in = 2 * D,
                                     .n_hidden = 10,
                                     .n_classes = 2};
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < 2 * TOK * D; j++) {
            features[i][j] = (float)gen_normal(&rng);
        }
        samples[i] = (struct train_sample){features[i], TOK, features[i][TOK * D] > 0, 0};
    }
    struct train_data data = {samples, samples + 30, 30, N - 30};
    struct train_options o = train_options_default();
    o.batch = 13;
    o.max_epochs = 6;
    collective_local(&local);
    CHECK_OK(classifier_create(&alone, &shape));
    CHECK_OK(classifier_create(&shared, &shape));
    CHECK_OK(train_run(&alone, &data, &o, &local, &a));
    CHECK_OK(train_run(&shared, &data, &o, coll, &b));
    CHECK(memcmp(alone.params, shared.params, alone.n_params * sizeof *alone.params) == 0);
    CHECK(a.n == b.n && a.best == b.best &&
          memcmp(a.epochs, b.epochs, (size_t)a.n * sizeof *a.epochs) == 0);
    train_history_free(&a);
    train_history_free(&b);
    features[7][0] = INFINITY; /* in one rank's lane: all fail */
    CHECK_STATUS(train_run(&shared, &data, &o, coll, &b), ST_NUMERIC, "the loss is");
    features[7][0] = 0;
    features[31][0] = INFINITY; /* a validation sample of one rank */
    CHECK_STATUS(train_run(&shared, &data, &o, coll, &b), ST_NUMERIC,
                 "validation gives no numbers");
    classifier_free(&alone);
    classifier_free(&shared);
}

int main(int argc, char **argv)
{
    struct env env;
    struct collective coll;
    CHECK_OK(env_start(&env, &argc, &argv));
    CHECK_OK(env_grid(&env, env.size));
    CHECK_OK(coll_mpi_open(&coll, &env, 60, 1 << 16));
    compare(&coll);
    collective_close(&coll);
    env_end(&env);
    return check_report();
}
