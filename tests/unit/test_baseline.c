/* The baselines against an independent NumPy implementation on the same weights.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/mem.h"
#include "experiments/quantise/baseline_fit.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { BITS_234 = 1 << 2 | 1 << 3 | 1 << 4, ROWS = 48 };

static const double PI = 3.14159265358979323846;

/* Gaussian by Box and Muller from two numbers of SplitMix64 each, as float; heavy: w (1 + w^2) / 4.
 */
static float *make_weights(int32_t n_cols, bool heavy)
{
    struct gen_rng rng = {11};
    float *w = NULL;
    CHECK_OK(MEM_NEW(&w, ROWS * n_cols));
    for (int32_t i = 0; i < ROWS * n_cols; i++) {
        double u = ((double)(gen_next(&rng) >> 11) + 0.5) * 0x1p-53;
        double v = ((double)(gen_next(&rng) >> 11) + 0.5) * 0x1p-53;
        w[i] = (float)(sqrt(-2 * log(u)) * cos(2 * PI * v));
        if (heavy) {
            double x = (double)w[i];
            w[i] = (float)(x * (1 + x * x) / 4);
        }
    }
    return w;
}

/* Weight error in percent at 2, 3, 4 bits, nested. */
struct reference {
    int32_t n, group;
    bool heavy;
    double rtn[3], greedy[3], kmeans[3];
};
static const struct reference references[] = {
    {256, 64, false, {34.433, 17.524, 8.776}, {35.124, 23.352, 17.205}, {33.543, 17.601, 8.533}},
    {172, 32, false, {31.273, 15.360, 7.774}, {33.958, 22.275, 15.867}, {33.301, 17.046, 8.039}},
    {256, 64, true, {48.200, 26.096, 13.028}, {66.574, 58.549, 51.761}, {43.306, 21.441, 10.446}},
    {172, 32, true, {39.849, 19.962, 10.094}, {60.926, 51.430, 43.794}, {40.843, 19.939, 9.585}},
};

static void check_method(const char *name, const struct reference *r, const float *w,
                         const double want[3], enum level_kind kind, fit_row_fn *by)
{
    struct fit_spec spec;
    struct nested_buffer buffer;
    struct fit_report report = {0};
    struct tensor t = tensor_2d((void *)(uintptr_t)w, DT_F32, ROWS, r->n);
    CHECK_OK(fit_spec_make(&spec, BITS_234, LEVEL_TIED, false, r->group, NULL));
    for (int b = 2; b <= 4; b++) {
        spec.kind[b] = kind;
    }
    CHECK_OK(nested_buffer_create(&buffer, &spec, ROWS, r->n));
    CHECK_OK(fit_rows_by(&buffer, &report, &t, &spec, by, 0, ROWS, 2));
    printf("%s %d g%d %s", r->heavy ? "heavy" : "gauss", r->n, r->group, name);
    for (int b = 2; b <= 4; b++) {
        double percent = 100 * fit_report_relative(&report, b), error = 0;
        printf("  %.3f (%.3f)", percent, want[b - 2]);
        CHECK(fabs(percent / want[b - 2] - 1) <= 2e-4);
        for (int32_t i = 0; i < ROWS * r->n; i++) { /* what the decoder will see */
            double d =
                (double)w[i] - (double)bitplane_weight(&buffer.source, i / r->n, i % r->n, b);
            error += d * d;
        }
        CHECK_NEAR(100 * sqrt(error / report.power), percent, 1e-3);
    }
    printf("\n");
    nested_buffer_free(&buffer);
}

/* Worked by hand: a row whose clusters are plain. 2 bits: four pairs, their means; 3 bits: each
 * pair apart. 1 group of greedy coding: mean 0, sizes 2 and 1. */
static void test_by_hand(void)
{
    const float pairs[8] = {8, -8, 1, 9, -9, -1, 2, -2};
    const uint8_t code3[8] = {6, 1, 4, 7, 0, 3, 5, 2};
    struct fit_spec spec = {.group_cols = 32, .lo = 2, .hi = 3, .n_planes = 3};
    struct nested_buffer buffer;
    struct fit_report report = {0};
    struct tensor t = tensor_2d((void *)(uintptr_t)pairs, DT_F32, 1, 8);
    spec.kind[2] = spec.kind[3] = LEVEL_LUT;
    CHECK_OK(nested_buffer_create(&buffer, &spec, 1, 8));
    CHECK_OK(fit_rows_by(&buffer, &report, &t, &spec, baseline_kmeans_row, 0, 1, 1));
    for (int32_t i = 0; i < 8; i++) {
        CHECK(bitplane_code(&buffer.source, 0, i, 3) == code3[i]);
        CHECK_NEAR(bitplane_weight(&buffer.source, 0, i, 3), pairs[i], 0);
        float size = fabsf(pairs[i]) > 4 ? 8.5f : 1.5f;
        CHECK_NEAR(bitplane_weight(&buffer.source, 0, i, 2), pairs[i] > 0 ? size : -size, 0);
    }
    CHECK(report.error[3] <= 0);
    nested_buffer_free(&buffer);

    const float steps[4] = {3, -3, 1, -1};
    t = tensor_2d((void *)(uintptr_t)steps, DT_F32, 1, 4);
    spec = (struct fit_spec){.group_cols = 32, .lo = 2, .hi = 2, .n_planes = 2};
    spec.kind[2] = LEVEL_FREE;
    report = (struct fit_report){0};
    CHECK_OK(nested_buffer_create(&buffer, &spec, 1, 4));
    CHECK_OK(fit_rows_by(&buffer, &report, &t, &spec, baseline_greedy_row, 0, 1, 1));
    CHECK_NEAR(f16_to_f32(buffer.source.alpha[2][0]), 2, 0);
    CHECK_NEAR(f16_to_f32(buffer.source.alpha[2][1]), 1, 0);
    CHECK(report.error[2] <= 0);
    nested_buffer_free(&buffer);
}

/* Rows of one value, and of fewer values than clusters. */
static void test_degenerate(void)
{
    float w[40];
    for (int i = 0; i < 40; i++) {
        w[i] = i < 20 ? 0.25f : 0.5f;
    }
    for (int few = 0; few < 2; few++) {
        fit_row_fn *const by[] = {baseline_rtn_row, baseline_greedy_row, baseline_kmeans_row};
        const enum level_kind kind[] = {LEVEL_TIED, LEVEL_FREE, LEVEL_LUT};
        struct tensor t = tensor_2d(w, DT_F32, 1, few ? 3 : 40);
        for (int i = 0; i < 3; i++) {
            struct fit_spec spec;
            struct nested_buffer buffer;
            struct fit_report report = {0};
            CHECK_OK(fit_spec_make(&spec, BITS_234, LEVEL_TIED, false, 32, NULL));
            for (int b = 2; b <= 4; b++) {
                spec.kind[b] = kind[i];
            }
            CHECK_OK(nested_buffer_create(&buffer, &spec, 1, t.dims[1]));
            CHECK_OK(fit_rows_by(&buffer, &report, &t, &spec, by[i], 0, 1, 1));
            CHECK(isfinite(report.error[2]) && fit_report_relative(&report, 4) < 0.05);
            nested_buffer_free(&buffer);
        }
    }
}

int main(void)
{
    for (size_t i = 0; i < sizeof references / sizeof *references; i++) {
        const struct reference *r = &references[i];
        float *w = make_weights(r->n, r->heavy);
        check_method("rtn", r, w, r->rtn, LEVEL_TIED, baseline_rtn_row);
        check_method("greedy", r, w, r->greedy, LEVEL_FREE, baseline_greedy_row);
        check_method("kmeans", r, w, r->kmeans, LEVEL_LUT, baseline_kmeans_row);
        mem_free(w);
    }
    test_by_hand();
    test_degenerate();
    return check_report();
}
