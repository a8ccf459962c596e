/* Scores of labels against values worked out by hand. SPDX-License-Identifier: Apache-2.0 */
#include "experiments/label.h"
#include "tests/check.h"
#include "tests/gen.h"

static void test_agreement(void)
{
    const int32_t a[] = {1, 2, 3, 4}, b[] = {1, 5, 3};
    CHECK_NEAR(label_agreement(a, 4, b, 3), 0.5, 1e-12);
    CHECK_NEAR(label_agreement(b, 3, a, 4), 0.5, 1e-12);
    CHECK_NEAR(label_agreement(a, 4, a, 4), 1, 1e-12);
    CHECK_NEAR(label_agreement(a, 0, b, 0), 0, 1e-12);
    enum criterion c = CRITERION_N;
    CHECK_OK(criterion_parse(&c, "kl"));
    CHECK(c == CRITERION_KL);
    CHECK_STATUS(criterion_parse(&c, "bleu"), ST_USER, "expected rouge-l, agreement or kl");
}

static double whole_divergence(const float *a, const float *b, int n)
{
    double sa = 0, sb = 0, sum = 0;
    for (int i = 0; i < n; i++) {
        sa += exp((double)a[i]);
        sb += exp((double)b[i]);
    }
    for (int i = 0; i < n; i++) {
        double p = exp((double)a[i]) / sa;
        sum += p * (log(p) - (double)b[i] + log(sb));
    }
    return sum;
}

static void test_divergence(void)
{
    enum { N = 500 };
    float a[N], b[N];
    struct gen_rng rng = {5};
    struct top top;
    for (int i = 0; i < N; i++) {
        a[i] = (float)(3 * gen_normal(&rng));
        b[i] = a[i] + (float)gen_normal(&rng);
    }
    top_take(&top, a, N);
    CHECK(top.n == TOP_N);
    for (int i = 0; i < TOP_N; i++) { /* the largest, in order */
        int larger = 0;
        for (int j = 0; j < N; j++) {
            larger += a[j] > a[top.id[i]];
        }
        CHECK(larger == i);
    }
    CHECK_NEAR(top_divergence(&top, a, N), 0, 1e-6);
    double part = top_divergence(&top, b, N), whole = whole_divergence(a, b, N);
    CHECK(part > 0.01 && part <= whole + 1e-6);
    double sa = 0, sb = 0, ta = 0, tb = 0, cells = 0;
    for (int i = 0; i < N; i++) {
        sa += exp((double)a[i]);
        sb += exp((double)b[i]);
    }
    for (int i = 0; i < TOP_N; i++) {
        double x = exp((double)a[top.id[i]]) / sa, y = exp((double)b[top.id[i]]) / sb;
        cells += x * log(x / y);
        ta += x;
        tb += y;
    }
    CHECK(ta < 0.999); /* the rest counts */
    CHECK_NEAR(part, cells + (1 - ta) * log((1 - ta) / (1 - tb)), 1e-5);
    /* a vocabulary that fits: all of it, whatever is added to all logits */
    top_take(&top, a, 20);
    CHECK(top.n == 20);
    CHECK_NEAR(top_divergence(&top, b, 20), whole_divergence(a, b, 20), 1e-5);
    for (int i = 0; i < 20; i++) {
        b[i] += 20;
    }
    CHECK_NEAR(top_divergence(&top, b, 20), whole_divergence(a, b, 20), 1e-5);
    /* two cells by hand: 1/2, 1/2 against 3/4, 1/4 */
    const float p[] = {0, 0}, q[] = {logf(3), 0};
    top_take(&top, p, 2);
    CHECK_NEAR(top_divergence(&top, q, 2), 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25), 1e-6);
}

int main(void)
{
    test_agreement();
    test_divergence();
    return check_report();
}
