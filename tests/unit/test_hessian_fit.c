/* The joint fit with data: the factored second moments, the whole fit against an independent NumPy
 * implementation, and what each stage promises.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/mem.h"
#include "experiments/quantise/hessian_fit.h"
#include "experiments/quantise/joint_fit.h"
#include "experiments/quantise/row_chunk.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { BITS_234 = 1 << 2 | 1 << 3 | 1 << 4, ROWS = 48, TOKENS = 2048, COLS_MAX = 256 };

static const double PI = 3.14159265358979323846;
static const struct hessian_options joint_once = {.refit = true, .sweeps = 1};

/* Gaussian by Box and Muller from two numbers of SplitMix64 each, as float. */
static void fill_gaussian(float *w, uint64_t seed, size_t n)
{
    struct gen_rng rng = {seed};
    for (size_t i = 0; i < n; i++) {
        double u = ((double)(gen_next(&rng) >> 11) + 0.5) * 0x1p-53;
        double v = ((double)(gen_next(&rng) >> 11) + 0.5) * 0x1p-53;
        w[i] = (float)(sqrt(-2 * log(u)) * cos(2 * PI * v));
    }
}

/* Weights; inputs where each column follows the one before (correlation 0.8), every 16th times 4.
 */
struct problem {
    int32_t n;
    float *w, *x; /* (ROWS, n), (TOKENS, n) */
    struct hessian h;
};

static void problem_make(struct problem *p, int32_t n, bool heavy)
{
    *p = (struct problem){.n = n};
    CHECK_OK(MEM_NEW(&p->w, ROWS * n));
    CHECK_OK(MEM_NEW(&p->x, TOKENS * n));
    fill_gaussian(p->w, 11, (size_t)ROWS * (size_t)n);
    fill_gaussian(p->x, 12, (size_t)TOKENS * (size_t)n);
    for (int32_t i = 0; heavy && i < ROWS * n; i++) {
        double v = (double)p->w[i];
        p->w[i] = (float)(v * (1 + v * v) / 4);
    }
    for (int32_t i = 0; i < TOKENS; i++) {
        float *x = p->x + (size_t)i * (size_t)n;
        for (int32_t k = 1; k < n; k++) {
            x[k] = 0.8f * x[k - 1] + 0.6f * x[k];
        }
        for (int32_t k = 0; k < n; k += 16) {
            x[k] *= 4;
        }
    }
    CHECK_OK(hessian_create(&p->h, n));
    hessian_add(&p->h, p->x, 1000, 1); /* in two pieces */
    hessian_add(&p->h, p->x + 1000 * (size_t)n, TOKENS - 1000, 2);
    CHECK_OK(hessian_finish(&p->h, 0.01));
}

static void problem_free(struct problem *p)
{
    mem_free(p->w);
    mem_free(p->x);
    hessian_free(&p->h);
}

static struct fit_spec make_spec(uint32_t bits, enum level_kind kind, bool tail, int32_t group)
{
    struct fit_spec spec;
    CHECK_OK(fit_spec_make(&spec, bits, kind, tail, group, NULL));
    return spec;
}

static void fit(struct nested_buffer *out, struct fit_report *report, const struct problem *p,
                const struct fit_spec *spec, const struct hessian_options *options, int n_threads)
{
    struct tensor w = tensor_2d(p->w, DT_F32, ROWS, p->n);
    struct fit_times times = {0};
    *report = (struct fit_report){0};
    CHECK_OK(nested_buffer_create(out, spec, ROWS, p->n));
    CHECK_OK(hessian_fit_rows(out, report, &times, &w, &p->h, spec, options, 0, ROWS, n_threads));
}

/* ||X (W - decoded)^T|| / ||X W^T|| from the inputs themselves, in percent. */
static double output_percent(const struct nested_source *s, const struct problem *p, int bits)
{
    double error = 0, power = 0;
    for (int32_t row = 0; row < ROWS; row++) {
        double diff[COLS_MAX] = {0}, own[COLS_MAX] = {0};
        for (int32_t k = 0; k < p->n; k++) {
            own[k] = (double)p->w[row * p->n + k];
            diff[k] = own[k] - (double)bitplane_weight(s, row, k, bits);
        }
        for (int32_t i = 0; i < TOKENS; i++) {
            double e = 0, y = 0;
            for (int32_t k = 0; k < p->n; k++) {
                double x = (double)p->x[(size_t)i * (size_t)p->n + (size_t)k];
                e += x * diff[k];
                y += x * own[k];
            }
            error += e * e;
            power += y * y;
        }
    }
    return 100 * sqrt(error / power);
}

/* ---- second moments ---- */

/* Worked by hand: rows (1, 2) and (3, 0): H = (5 1; 1 2), damped by 0.5 * 3.5 = 1.75:
 * (6.75 1; 1 3.75). U upper with U^T U = inverse: U[1][1]^2 = 1 / (3.75) of the Schur order:
 * inverse = (3.75 -1; -1 6.75) / 24.3125; U[0][0] = sqrt(3.75 / 24.3125), U[0][1] = -1 / 24.3125 /
 * U[0][0], U[1][1] = sqrt(6.75 / 24.3125 - U[0][1]^2). */
static void test_moments(void)
{
    const float x[4] = {1, 2, 3, 0};
    struct hessian h;
    CHECK_OK(hessian_create(&h, 2));
    hessian_add(&h, x, 2, 1);
    CHECK_OK(hessian_finish(&h, 0.5));
    const double want_h[4] = {5, 1, 1, 2};
    for (int i = 0; i < 4; i++) {
        CHECK_NEAR(h.h[i], want_h[i], 1e-6);
    }
    double u00 = sqrt(3.75 / 24.3125), u01 = -1 / 24.3125 / u00;
    CHECK_NEAR(h.u[0], u00, 1e-6);
    CHECK_NEAR(h.u[1], u01, 1e-6);
    CHECK_NEAR(h.u[2], 0, 0);
    CHECK_NEAR(h.u[3], sqrt(6.75 / 24.3125 - u01 * u01), 1e-6);
    CHECK_NEAR(h.mean_diag, 3.5, 1e-6);
    hessian_free(&h);

    const float nan[2] = {NAN, 1};
    CHECK_OK(hessian_create(&h, 2));
    CHECK_STATUS(hessian_finish(&h, 0.01), ST_FORMAT, "no calibration tokens");
    hessian_add(&h, nan, 1, 1);
    CHECK_STATUS(hessian_finish(&h, 0.01), ST_FORMAT, "not finite");
    hessian_free(&h);
    CHECK_OK(hessian_create(&h, 2)); /* two equal columns and no damping */
    const float same[2] = {1, 1};
    hessian_add(&h, same, 1, 1);
    CHECK_STATUS(hessian_finish(&h, 0), ST_USER, "larger --damp");
    hessian_free(&h);
}

/* ---- the whole fit ---- */

/* Output error in percent at 2, 3, 4 bits of an independent NumPy implementation on the same data:
 * joint (8 rounds, low start, one sweep), the same codes chosen one precision after the other
 * (2-bit codes frozen, then a plane more; feedback and refit), GPTQ for each precision by itself,
 * rounding to nearest for each precision by itself. */
struct reference {
    int32_t n, group;
    bool heavy;
    enum level_kind kind;
    double joint[3], sequential4, gptq[3], rtn[3];
};
static const struct reference references[] = {
    {256,
     64,
     false,
     LEVEL_TIED,
     {21.295, 10.375, 6.177},
     10.500,
     {21.584, 9.856, 4.899},
     {36.767, 17.563, 8.645}},
    {256,
     64,
     false,
     LEVEL_FREE,
     {20.238, 10.223, 5.429},
     9.318,
     {21.584, 9.856, 4.899},
     {36.767, 17.563, 8.645}},
    {172,
     32,
     false,
     LEVEL_TIED,
     {19.041, 9.405, 5.062},
     8.936,
     {19.282, 8.841, 4.312},
     {32.316, 16.155, 7.789}},
    {172,
     32,
     false,
     LEVEL_FREE,
     {16.378, 8.133, 4.050},
     7.031,
     {19.282, 8.841, 4.312},
     {32.316, 16.155, 7.789}},
    {256,
     64,
     true,
     LEVEL_TIED,
     {32.251, 17.898, 10.098},
     18.997,
     {25.393, 14.382, 7.562},
     {40.680, 22.824, 12.591}},
    {256,
     64,
     true,
     LEVEL_FREE,
     {26.860, 13.496, 7.150},
     13.146,
     {25.393, 14.382, 7.562},
     {40.680, 22.824, 12.591}},
    {172,
     32,
     true,
     LEVEL_TIED,
     {24.635, 13.036, 7.224},
     14.190,
     {21.962, 11.455, 6.048},
     {33.353, 18.356, 9.917}},
    {172,
     32,
     true,
     LEVEL_FREE,
     {19.705, 9.179, 4.531},
     7.985,
     {21.962, 11.455, 6.048},
     {33.353, 18.356, 9.917}},
};

static void check_reference(const struct reference *r, const struct problem *p)
{
    struct fit_spec spec = make_spec(BITS_234, r->kind, false, r->group);
    struct nested_buffer buffer;
    struct fit_report report;
    fit(&buffer, &report, p, &spec, &joint_once, 2);
    double cost = 0, reference_cost = 0;
    printf("%s %s %d g%d", r->heavy ? "heavy" : "gauss", level_kind_name(r->kind), r->n, r->group);
    for (int b = 2; b <= 4; b++) {
        double percent = 100 * fit_report_output(&report, b), want = r->joint[b - 2];
        printf("  %.3f (%.3f)", percent, want);
        cost += spec.lambda[b] * percent * percent;
        reference_cost += spec.lambda[b] * want * want;
        CHECK(percent <= 1.06 * want);
        CHECK(percent < r->rtn[b - 2]);
    }
    printf("  weighted sum %.3f of the reference's\n", cost / reference_cost);
    CHECK(cost <= 1.01 * reference_cost);
    CHECK(100 * fit_report_output(&report, 4) <= r->sequential4);
    CHECK(report.n_weights == (int64_t)ROWS * r->n && report.n_clamped == 0);
    CHECK_NEAR(output_percent(&buffer.source, p, 3), 100 * fit_report_output(&report, 3), 1e-3);
    nested_buffer_free(&buffer);
}

/* GPTQ: one precision by itself on a uniform grid, no refit, no sweeps. */
static void check_gptq(const struct reference *r, const struct problem *p)
{
    const struct hessian_options gptq = {.grid = true};
    for (int b = 2; b <= 4; b++) {
        struct fit_spec spec = make_spec(1u << b, LEVEL_TIED, false, r->group);
        struct nested_buffer buffer;
        struct fit_report report;
        fit(&buffer, &report, p, &spec, &gptq, 1);
        double percent = 100 * fit_report_output(&report, b), want = r->gptq[b - 2];
        printf("    gptq %d bits %.3f (%.3f)\n", b, percent, want);
        CHECK(fabs(percent / want - 1) < 0.02);
        nested_buffer_free(&buffer);
    }
}

static void test_references(void)
{
    for (size_t i = 0; i < sizeof references / sizeof *references; i++) {
        struct problem p;
        problem_make(&p, references[i].n, references[i].heavy);
        check_reference(&references[i], &p);
        if (references[i].kind == LEVEL_TIED) {
            check_gptq(&references[i], &p);
        }
        problem_free(&p);
    }
}

/* ---- stages ---- */

static double chunk_error(struct row_chunk *c, const struct problem *p, int bits)
{
    double error = 0;
    chunk_difference(c->scratch, c, bits);
    for (int32_t row = 0; row < c->rows; row++) {
        const float *e = c->scratch + row * c->n;
        for (int32_t i = 0; i < c->n; i++) {
            for (int32_t j = 0; j < c->n; j++) {
                error += (double)e[i] * (double)p->h.h[i * c->n + j] * (double)e[j];
            }
        }
    }
    return error;
}

/* A refit never raises the output error, whatever the codes and levels before; one sweep never
 * raises the weighted sum by more than its ridge. */
static void check_stages(const struct problem *p, enum level_kind kind, int32_t group)
{
    struct fit_spec spec = make_spec(BITS_234, kind, true, group);
    struct chunk_job job = {.spec = &spec,
                            .options = &joint_once,
                            .h = &p->h,
                            .n_slots = 3,
                            .slot_bits = {2, 3, 4},
                            .n_groups = (p->n + group - 1) / group};
    float weight[COLS_MAX], *sums = NULL;
    struct fit_times times = {0};
    struct row_chunk c;
    for (int32_t k = 0; k < p->n; k++) {
        weight[k] = 1;
    }
    CHECK_OK(MEM_NEW(&sums, job.n_groups * p->n));
    for (int32_t k = 0; k < p->n * p->n; k++) {
        sums[k / p->n / group * p->n + k % p->n] += p->h.h[k];
    }
    job.column_weight = weight;
    job.group_sums = sums;
    CHECK_OK(chunk_create(&c, &job, 8, &times));
    memcpy(c.w, p->w, (size_t)(8 * p->n) * sizeof *c.w);
    blas_gemm(8, p->n, p->n, 1, c.w, p->n, p->h.h, p->n, 0, c.wh, p->n);
    chunk_feedback(&c);
    double before[5], after[5], sum[2] = {0};
    for (int round = 0; round < 2; round++) {
        for (int b = 2; b <= 4; b++) {
            before[b] = chunk_error(&c, p, b);
            CHECK_OK(chunk_refit(&c, b));
            after[b] = chunk_error(&c, p, b);
            CHECK(after[b] <= before[b] * (1 + 1e-6));
            CHECK(round == 1 || after[b] < before[b]);
            sum[0] += round == 0 ? spec.lambda[b] * after[b] : 0;
        }
        if (round == 0) {
            chunk_sweep(&c);
            for (int b = 2; b <= 4; b++) {
                sum[1] += spec.lambda[b] * chunk_error(&c, p, b);
            }
        }
    }
    CHECK(sum[1] < sum[0]);
    chunk_tail(&c);
    before[4] = chunk_error(&c, p, 8);
    CHECK_OK(chunk_refit(&c, 8));
    CHECK(chunk_error(&c, p, 8) <= before[4] * (1 + 1e-6));
    CHECK(chunk_error(&c, p, 8) < 0.2 * chunk_error(&c, p, 4));
    chunk_free(&c);
    mem_free(sums);
}

static void test_stages(void)
{
    struct problem p;
    problem_make(&p, 172, true);
    check_stages(&p, LEVEL_TIED, 32);
    check_stages(&p, LEVEL_FREE, 64);
    problem_free(&p);
}

/* The refit against the minimum worked out otherwise: one group, tied, 2 bits: two unknowns, whose
 * normal equations are written out here. */
static void test_refit_minimum(void)
{
    enum { N = 40 };
    struct problem p;
    problem_make(&p, N, false);
    struct fit_spec spec = make_spec(1 << 2, LEVEL_TIED, false, 64);
    struct nested_buffer buffer;
    struct fit_report report;
    const struct hessian_options no_sweep = {.refit = true};
    fit(&buffer, &report, &p, &spec, &no_sweep, 1);
    for (int32_t row = 0; row < ROWS; row++) {
        double a[2][2] = {{0}}, b[2] = {0};
        for (int32_t i = 0; i < N; i++) {
            double fi = (double)bitplane_code(&buffer.source, row, i, 2) - 1.5;
            for (int32_t j = 0; j < N; j++) {
                double fj = (double)bitplane_code(&buffer.source, row, j, 2) - 1.5;
                double h = (double)p.h.h[i * N + j] + (i == j ? 1e-4 * p.h.mean_diag : 0);
                a[0][0] += fi * h * fj;
                a[0][1] += fi * h;
                a[1][1] += h;
                b[0] += fi * h * (double)p.w[row * N + j];
                b[1] += h * (double)p.w[row * N + j];
            }
        }
        double det = a[0][0] * a[1][1] - a[0][1] * a[0][1];
        double scale = (b[0] * a[1][1] - b[1] * a[0][1]) / det;
        double offset = (a[0][0] * b[1] - a[0][1] * b[0]) / det;
        CHECK_NEAR(f16_to_f32(buffer.source.scale[2][row]), scale, 1e-3 * fabs(scale));
        CHECK_NEAR(f16_to_f32(buffer.source.offset[2][row]), offset, 1e-3 * fabs(scale));
    }
    nested_buffer_free(&buffer);
    problem_free(&p);
}

/* ---- the rest ---- */

/* Neither threads nor cutting change a byte; with a tail the planes of 4 bits are the same. */
static void test_repeats(void)
{
    enum { N = 172, TALL = 150 };
    struct problem p;
    problem_make(&p, N, false);
    float *w = NULL;
    CHECK_OK(MEM_NEW(&w, TALL * N));
    fill_gaussian(w, 5, TALL * N);
    struct tensor t = tensor_2d(w, DT_F32, TALL, N);
    struct fit_spec spec = make_spec(BITS_234, LEVEL_TIED, true, 64);
    struct fit_spec plain = make_spec(BITS_234, LEVEL_TIED, false, 64);
    struct nested_buffer one, other, without;
    struct fit_report a = {0}, b = {0}, c = {0};
    struct fit_times times = {0};
    CHECK_OK(nested_buffer_create(&one, &spec, TALL, N));
    CHECK_OK(nested_buffer_create(&other, &spec, TALL, N));
    CHECK_OK(nested_buffer_create(&without, &plain, TALL, N));
    CHECK_OK(hessian_fit_rows(&one, &a, &times, &t, &p.h, &spec, &joint_once, 0, TALL, 1));
    CHECK_OK(hessian_fit_rows(&other, &b, &times, &t, &p.h, &spec, &joint_once, 0, 64, 3));
    CHECK_OK(hessian_fit_rows(&other, &b, &times, &t, &p.h, &spec, &joint_once, 64, TALL, 2));
    CHECK_OK(hessian_fit_rows(&without, &c, &times, &t, &p.h, &plain, &joint_once, 0, TALL, 2));
    CHECK(one.total_bytes == other.total_bytes &&
          memcmp(one.block, other.block, one.total_bytes) == 0);
    CHECK(memcmp(one.block, without.block, without.planes_bytes) == 0);
    CHECK(!(a.output_error[8] != b.output_error[8]) && a.n_weights == b.n_weights);
    CHECK(fit_report_output(&a, 8) < 0.25 * fit_report_output(&a, 4));
    CHECK(times.flop[FIT_REFIT] > 0 && times.thread_s[FIT_SWEEP] > 0);
    nested_buffer_free(&one);
    nested_buffer_free(&other);
    nested_buffer_free(&without);

    w[70 * N + 9] = NAN;
    CHECK_OK(nested_buffer_create(&one, &spec, TALL, N));
    CHECK_STATUS(hessian_fit_rows(&one, &a, &times, &t, &p.h, &spec, &joint_once, 0, TALL, 2),
                 ST_FORMAT, "weight (70, 9) is not a finite number");
    nested_buffer_free(&one);
    mem_free(w);
    problem_free(&p);
}

/* Inputs that are always zero, in some columns or in all: finite levels, weights not far off. */
static void test_dead_columns(void)
{
    for (int all = 0; all < 2; all++) {
        struct problem p;
        problem_make(&p, 128, false);
        hessian_free(&p.h);
        CHECK_OK(hessian_create(&p.h, 128));
        for (int32_t i = 0; i < TOKENS * 128; i++) {
            p.x[i] = all || i % 128 < 40 ? 0 : p.x[i];
        }
        hessian_add(&p.h, p.x, TOKENS, 2);
        CHECK_OK(hessian_finish(&p.h, 0.01));
        struct fit_spec spec = make_spec(BITS_234, LEVEL_FREE, true, 32);
        struct nested_buffer buffer;
        struct fit_report report;
        fit(&buffer, &report, &p, &spec, &joint_once, 1);
        for (int b = 2; b <= 8; b++) {
            if (spec.kind[b] != LEVEL_NONE) {
                CHECK(isfinite(report.error[b]) && isfinite(report.output_error[b]));
                CHECK(fit_report_relative(&report, b) < 1.0);
            }
        }
        nested_buffer_free(&buffer);
        problem_free(&p);
    }
}

int main(void)
{
    hessian_blas_begin();
    test_moments();
    test_references();
    test_stages();
    test_refit_minimum();
    test_repeats();
    test_dead_columns();
    return check_report();
}
