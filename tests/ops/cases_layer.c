/* Layer norm, the activations without a gate, and moments of rows.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "tests/ops/cases.h"

/* bias NULL: none */
static void layernorm(struct backend *be, float *y, const float *x, const float *gain,
                      const float *bias, int32_t n_tok, int32_t n, float eps, bool in_place)
{
    struct tensor x_t = rig_put(be, tensor_2d((void *)x, DT_F32, n_tok, n));
    struct tensor g_t = rig_put(be, tensor_1d((void *)gain, DT_F32, n));
    struct tensor b_t = rig_put(be, tensor_1d((void *)(bias ? bias : gain), DT_F32, n));
    struct tensor y_t = in_place ? x_t : rig_room(be, tensor_2d(NULL, DT_F32, n_tok, n));
    CHECK_OK(backend_layernorm(be, &y_t, &x_t, &g_t, bias ? &b_t : NULL, eps));
    rig_get(be, y, &y_t);
    rig_drop(be, &x_t);
    rig_drop(be, &g_t);
    rig_drop(be, &b_t);
    if (!in_place) {
        rig_drop(be, &y_t);
    }
}

static void test_layernorm(void)
{
    static const int32_t widths[] = {1, 7, 64, 1000, 20000};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        int32_t n = widths[i], n_tok = 4;
        size_t n_x = (size_t)n * (size_t)n_tok;
        float *x = floats(n_x), *gain = floats((size_t)n), *bias = floats((size_t)n);
        float *a = floats(n_x), *b = floats(n_x);
        for (size_t k = 0; k < (size_t)n; k++) {
            x[k] = x[k] / 64 + 100; /* the first token: a mean far from 0 */
        }
        for (int with_bias = 0; with_bias < 2; with_bias++) {
            const float *v = with_bias ? bias : NULL;
            layernorm(&ref, a, x, gain, v, n_tok, n, 1e-5f, false);
            layernorm(&dut, b, x, gain, v, n_tok, n, 1e-5f, false);
            COMPARE(OP_LAYERNORM, b, a, n_x);
            layernorm(&dut, a, x, gain, v, n_tok, n, 1e-5f, true);
            CHECK(memcmp(a, b, n_x * sizeof *a) == 0);
            layernorm(&dut, a, x + 2 * n, gain, v, 1, n, 1e-5f, false); /* the third token alone */
            CHECK(memcmp(a, b + 2 * n, (size_t)n * sizeof *a) == 0);
        }
        free(x);
        free(gain);
        free(bias);
        free(a);
        free(b);
    }
    /* mean 3, deviations -2 0 0 2, variance 2; eps 2: divided by 2, times the gain, plus the bias
     */
    const float x[] = {1, 3, 3, 5}, gain[] = {1, 9, 1, 3}, bias[] = {0.5f, 1, -1, 10};
    const float hand[] = {-0.5f, 1, -1, 13}, hand_plain[] = {-1, 0, 0, 3};
    float y[4];
    layernorm(&dut, y, x, gain, bias, 1, 4, 2, false);
    COMPARE(OP_LAYERNORM, y, hand, 4);
    layernorm(&dut, y, x, gain, NULL, 1, 4, 2, false);
    COMPARE(OP_LAYERNORM, y, hand_plain, 4);
}

static void activate(struct backend *be, float *y, const float *x, int32_t n_tok, int32_t n,
                     enum activation act, bool in_place)
{
    struct tensor x_t = rig_put(be, tensor_2d((void *)x, DT_F32, n_tok, n));
    struct tensor y_t = in_place ? x_t : rig_room(be, tensor_2d(NULL, DT_F32, n_tok, n));
    CHECK_OK(backend_activate(be, &y_t, &x_t, act));
    rig_get(be, y, &y_t);
    rig_drop(be, &x_t);
    if (!in_place) {
        rig_drop(be, &y_t);
    }
}

static void test_activate(void)
{
    enum { N_TOK = 3, N = 5000 };
    static const enum activation acts[] = {ACT_GELU_TANH, ACT_GELU_ERF};
    float *x = floats(N_TOK * N), *a = floats(N_TOK * N), *b = floats(N_TOK * N);
    for (int i = 0; i < N_TOK * N; i++) {
        x[i] *= 8;
    }
    for (int k = 0; k < 2; k++) {
        activate(&ref, a, x, N_TOK, N, acts[k], false);
        activate(&dut, b, x, N_TOK, N, acts[k], true);
        COMPARE(OP_ACTIVATE, b, a, N_TOK * N);
        activate(&dut, a, x + N, 1, N, acts[k], false);
        CHECK(memcmp(a, b + N, N * sizeof *a) == 0);
    }
    /* x P(normal <= x), from tables of the normal distribution; the tanh form by a calculator */
    static const float at[] = {0, 1, -1, 2, -3, 30, -30};
    static const float erf_values[] = {
        0, 0.8413447461f, -0.1586552539f, 1.9544997361f, -0.00404969409f, 30, 0};
    static const float tanh_values[] = {
        0, 0.8411919906f, -0.1588080094f, 1.9545976940f, -0.00363739208f, 30, 0};
    for (int k = 0; k < 2; k++) {
        const float *hand = k ? erf_values : tanh_values;
        activate(&dut, a, at, 1, 7, acts[k], false);
        for (int i = 0; i < 7; i++) {
            CHECK_NEAR(a[i], hand[i], 1e-6);
        }
    }
    free(x);
    free(a);
    free(b);
}

static void moments(struct backend *be, float *out, const float *x, int32_t n_tok, int32_t n,
                    const int32_t *cut, int32_t n_cuts)
{
    struct tensor x_t = rig_put(be, tensor_2d((void *)x, DT_F32, n_tok, n));
    struct tensor o_t = rig_room(be, tensor_3d(NULL, DT_F32, n_tok, n_cuts, 2));
    CHECK_OK(backend_moments(be, &o_t, &x_t, cut, n_cuts));
    rig_get(be, out, &o_t);
    rig_drop(be, &x_t);
    rig_drop(be, &o_t);
}

static void test_moments(void)
{
    enum { N_TOK = 3, N = 5003, N_CUTS = 4 };
    static const int32_t cut[N_CUTS + 1] = {0, 1, 70, 2070, N};
    float *x = floats(N_TOK * N), a[N_TOK * N_CUTS * 2], b[N_TOK * N_CUTS * 2], alone[2];
    moments(&ref, a, x, N_TOK, N, cut, N_CUTS);
    moments(&dut, b, x, N_TOK, N, cut, N_CUTS);
    COMPARE(OP_MOMENTS, b, a, N_TOK * N_CUTS * 2);
    for (int32_t t = 0; t < N_TOK; t++) { /* a part by itself is the same bits */
        for (int32_t c = 0; c < N_CUTS; c++) {
            moments(&dut, alone, x + t * N + cut[c], 1, cut[c + 1] - cut[c], NULL, 1);
            CHECK(memcmp(alone, b + 2 * (t * N_CUTS + c), sizeof alone) == 0);
        }
    }
    const float four[] = {1, -2, 3, -4}, hand[] = {-1, 5, -1, 25};
    static const int32_t halves[] = {0, 2, 4};
    moments(&dut, a, four, 1, 4, halves, 2);
    CHECK(memcmp(a, hand, sizeof hand) == 0);
    free(x);
}

int cases_layer(void)
{
    test_layernorm();
    test_activate();
    test_moments();
    printf("layer norm, activations, moments: %d checks, %d failed\n", check_n_run, check_n_failed);
    return check_n_failed;
}
