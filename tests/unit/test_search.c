/* Random search with successive halving: its arithmetic. SPDX-License-Identifier: Apache-2.0 */
#include "sched/search.h"
#include "tests/check.h"

static void test_rungs(void)
{
    CHECK(search_n_rungs(1, 60) == 1 && search_n_rungs(2, 60) == 1 && search_n_rungs(3, 60) == 2);
    CHECK(search_n_rungs(27, 60) == 4 && search_n_rungs(27, 5) == 2 && search_n_rungs(81, 81) == 5);
    CHECK(search_epochs(3, 4, 60) == 60 && search_epochs(2, 4, 60) == 20 &&
          search_epochs(0, 4, 60) == 2);
    for (int32_t n = 1; n < 200; n++) { /* the first rung has an epoch, the last a trial */
        for (int32_t epochs = 1; epochs < 100; epochs++) {
            int32_t rungs = search_n_rungs(n, epochs), left = n;
            CHECK(search_epochs(0, rungs, epochs) >= 1);
            for (int32_t r = 1; r < rungs; r++) {
                left /= SEARCH_FACTOR;
            }
            CHECK(left >= 1);
        }
    }
}

static void test_samples(void)
{
    double least = 1, most = 0;
    int32_t n_wide = 0;
    for (int32_t i = 0; i < 1000; i++) {
        struct trial a, b;
        search_sample(&a, i, 7, CLASSIFIER_KV, 32, 0, 5);
        search_sample(&b, i, 7, CLASSIFIER_KV, 32, 0, 5);
        CHECK(a.learning_rate == b.learning_rate && a.n_hidden == b.n_hidden);
        struct classifier_shape shape = search_shape(&a, CLASSIFIER_KV, 1, 32, 0, 4);
        struct train_options base = train_options_default(), o;
        base.balance = true;
        o = search_options(&a, &base);
        CHECK_OK(classifier_shape_check(&shape));
        CHECK_OK(train_options_check(&o));
        CHECK(o.balance && o.max_epochs == 5 && o.batch == a.batch);
        least = a.learning_rate < least ? a.learning_rate : least;
        most = a.learning_rate > most ? a.learning_rate : most;
        n_wide += a.n_hidden == 2 * shape.n_in;
        search_sample(&b, i, 7, CLASSIFIER_STEP, 0, 11, 5);
        shape = search_shape(&b, CLASSIFIER_STEP, 1, 0, 11, 2);
        CHECK_OK(classifier_shape_check(&shape));
        shape = search_shape(&a, CLASSIFIER_KV, 5, 32, 0, 4);
        CHECK_OK(classifier_shape_check(&shape));
    }
    CHECK(least >= 1e-4 && least < 1.1e-4 && most <= 1e-2 && most > 0.9e-2);
    CHECK_NEAR(n_wide, 333, 60);
}

static void test_rank(void)
{
    struct trial t[7] = {{.number = 0, .loss = 3},        {.number = 1, .loss = 1},
                         {.number = 2, .loss = INFINITY}, {.number = 3, .loss = 2},
                         {.number = 4, .loss = 1},        {.number = 5, .loss = 0.5},
                         {.number = 6, .loss = INFINITY}};
    const int32_t order[] = {5, 1, 4, 3, 0, 2, 6};
    CHECK(search_rank(t, 7) == 2);
    for (int i = 0; i < 7; i++) {
        CHECK(t[i].number == order[i]);
    }
    CHECK(search_rank(t, 2) == 1);
}

int main(void)
{
    test_rungs();
    test_samples();
    test_rank();
    return check_report();
}
