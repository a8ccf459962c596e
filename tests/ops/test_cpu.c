/* The cpu backend's loops of every instruction set that this machine has, against double precision,
 * the definition of the statistics and the definition of f16; and its operations for several
 * numbers of threads. SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/sampler.h"
#include "kernels/cpu.h"
#include "tests/ops/rig.h"

static const char *const isa_names[] = {"scalar", "avx2", "avx512"};
enum { N_ISAS = sizeof isa_names / sizeof *isa_names };
static struct rig_rng rng = {RIG_SEED};

static const struct cpu_loops *loops_of(const char *isa)
{
    const struct cpu_isa *const all[N_ISAS] = {&cpu_isa_scalar, cpu_isa_avx2(), cpu_isa_avx512()};
    for (int i = 0; i < N_ISAS; i++) {
        if (all[i] && strcmp(all[i]->name, isa) == 0) {
            return all[i]->loops;
        }
    }
    return NULL;
}

static float float_of(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* The distance between floats at f, for errors of a result near it. */
static double ulp_at(double f)
{
    int exponent;
    (void)frexp(f, &exponent);
    return ldexp(1, exponent - 24 < -149 ? -149 : exponent - 24);
}

/* Every 997th float there is. cpu.h promises 1.5 ulp. */
static void test_exp(const struct cpu_loops *loops, const char *isa)
{
    enum { N = 1 << 12, STEP = 997 };
    static float x[N], y[N];
    double worst = 0;
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32;) {
        size_t n = 0;
        for (; n < N && bits < (uint64_t)1 << 32; n++, bits += STEP) {
            x[n] = float_of((uint32_t)bits);
        }
        loops->exp(y, x, n);
        for (size_t i = 0; i < n; i++) {
            double e = exp((double)x[i]);
            if (isnan(x[i])) {
                CHECK(isnan(y[i]));
            } else if (e >= 0x1.ffffffp127) {
                CHECK(isinf(y[i]) && y[i] > 0);
            } else {
                double error = fabs((double)y[i] - e) / ulp_at(e);
                worst = error > worst ? error : worst;
            }
        }
    }
    printf("%-7s exp: at most %.2f ulp\n", isa, worst);
    CHECK(worst <= 1.5);
    const float at[] = {0, -0.0f, -INFINITY, INFINITY, -104, 88.72283f}, is[] = {1, 1, 0, INFINITY};
    loops->exp(y, at, 6);
    CHECK(memcmp(y, is, sizeof is) == 0);
    CHECK(y[4] < 0x1p-149f && y[5] < INFINITY);
}

/* One row of one head answers with its value, whatever it is: every f16 there is. */
static void test_halves(const struct cpu_loops *loops)
{
    enum { DIM = 64 };
    static const uint16_t zeros[DIM];
    float q[DIM] = {0}, part[DIM + 2], score[CPU_KV_BLOCK];
    for (uint32_t first = 0; first < 65536; first += DIM) {
        uint16_t v[DIM], again[DIM];
        for (uint32_t i = 0; i < DIM; i++) {
            v[i] = (uint16_t)(first + i);
        }
        const struct cpu_kv_block block = {
            .k_last = (const char *)zeros,
            .v_last = (const char *)v,
            .k_type = DT_F16,
            .v_type = DT_F16,
            .n_rows = 1,
            .head_dim = DIM,
        };
        loops->attend(part, score, q, 1, 1, &block);
        CHECK(part[DIM] >= 0 && part[DIM] <= 0 && part[DIM + 1] >= 1 && part[DIM + 1] <= 1);
        loops->to_f16(again, part, DIM);
        for (int i = 0; i < DIM; i++) {
            double value = rig_f16(v[i]);
            if (isnan(value)) {
                CHECK(isnan(part[i]) && isnan(rig_f16(again[i])));
            } else {
                CHECK((double)part[i] >= value && (double)part[i] <= value);
                CHECK(again[i] == v[i] || v[i] == 0x8000); /* 0 + -0 is 0 */
            }
        }
    }
    float f[37];
    uint16_t got[37];
    for (int round = 0; round < 2000; round++) {
        for (int i = 0; i < 37;
             i++) { /* exponents from below the smallest half to above the largest */
            f[i] = ldexpf(rig_float(&rng), rig_below(&rng, 46) - 28);
        }
        loops->to_f16(got, f, 37);
        for (int i = 0; i < 37; i++) {
            CHECK(got[i] == f32_to_f16(f[i]));
        }
    }
}

static bool same(float a, float b)
{
    return memcmp(&a, &b, sizeof a) == 0;
}

/* Sums are the definition's but for f32 sums of 2048 terms in 4 to 16 lanes and exp's error. */
static void check_stats(const struct logit_stats *a, const struct logit_stats *b)
{
    CHECK(same(a->max, b->max) && same(a->second, b->second) && a->argmax == b->argmax);
    CHECK(same(a->target, b->target) || isnan(b->target)); /* then sum_exp says it, too */
    CHECK(a->pick == b->pick);
    CHECK(same(a->pick_score, b->pick_score) && same(a->pick_logit, b->pick_logit));
    CHECK(isnan(a->sum_exp) == isnan(b->sum_exp));
    if (!isnan(b->sum_exp)) {
        CHECK_NEAR(a->sum_exp, b->sum_exp, 1e-5 * (double)b->sum_exp);
        CHECK_NEAR(a->sum_exp_l, b->sum_exp_l, 1e-5 * fabs((double)b->sum_exp_l));
        if (!isnan(b->sum_exp_t)) { /* a whole part of -inf: merging leaves it out */
            CHECK_NEAR(a->sum_exp_t, b->sum_exp_t, 1e-12 * b->sum_exp_t);
        }
    }
}

static void one_stats(const float *logits, int32_t n, struct logit_want want, const char *name)
{
    enum { FIRST = 77 };
    struct logit_stats expected, first = {0};
    sampler_part_stats(&expected, logits, n, FIRST, &want);
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        struct logit_stats got = {0};
        struct backend be = rig_open(name, n_threads);
        struct tensor t = tensor_2d((void *)logits, DT_F32, 1, n);
        CHECK_OK(backend_logit_stats(&be, &got, &t, FIRST, NULL, 1, &want));
        backend_close(&be);
        check_stats(&got, &expected);
        if (n_threads == 1) {
            first = got;
        } else if (!isnan(got.sum_exp)) {
            CHECK(same(got.sum_exp, first.sum_exp) && same(got.sum_exp_l, first.sum_exp_l));
            CHECK(got.sum_exp_t >= first.sum_exp_t && got.sum_exp_t <= first.sum_exp_t);
        }
    }
}

static void test_stats(const char *name)
{
    enum { MOST = 70001 };
    static const int32_t lengths[] = {1, 5, 2047, 2048, 2049, 10007, MOST};
    float *logits = rig_alloc(MOST, sizeof *logits);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        int32_t n = lengths[i];
        for (int kind = 0; kind < 8; kind++) {
            for (int32_t k = 0; k < n; k++) {
                float l = rig_float(&rng) * 12;
                logits[k] = kind == 1   ? floorf(l)              /* many ties */
                            : kind == 2 ? -INFINITY              /* nothing at all */
                            : kind == 3 ? (float)k * 1e-3f - 300 /* the largest last */
                            : kind == 4 && k % 3000 < 2500 ? -INFINITY
                                                           : l;
            }
            logits[n / 2] = kind == 5 ? NAN : kind == 6 ? INFINITY : logits[n / 2];
            struct logit_want want = {.target = 77 + n - 1,
                                      .temperature = kind == 7 ? 0.05f : 0.9f};
            for (int round = 0; round < 3; round++) {
                want.key[0] = rig_next(&rng);
                want.key[1] = rig_next(&rng);
                want.restricted = round == 1 && kind != 2 && (kind < 5 || kind > 6);
                want.temperature = round == 2 ? 0 : want.temperature;
                one_stats(logits, n, want, name);
            }
        }
    }
    free(logits);
}

/* Many samples: the pick is the definition's whatever its noise, also where all scores are equal
 * but for the rounding of a sum. */
static void test_picks(const struct cpu_loops *loops)
{
    enum { N = 2000, ROUNDS = 150 };
    static float logits[N];
    for (int round = 0; round < ROUNDS; round++) {
        struct logit_want want = {.target = -1, .temperature = round % 2 ? 1 : 30};
        want.key[0] = rig_next(&rng);
        want.key[1] = rig_next(&rng);
        rig_floats(&rng, logits, N);
        for (int32_t i = 0; round % 4 == 1 && i < N; i++) {
            logits[i] = 20 - sampler_gumbel(want.key, round * 1000 + i);
        }
        struct logit_stats got, expected;
        loops->stats(&got, logits, N, round * 1000, &want);
        sampler_part_stats(&expected, logits, N, round * 1000, &want);
        check_stats(&got, &expected);
    }
}

/* Operations big enough for a team give the same bits with and without one. */
static void test_threads(const char *name)
{
    enum { N_TOK = 70, N = 4001 };
    size_t n = (size_t)N_TOK * N;
    float *x = rig_alloc(n, sizeof *x), *up = rig_alloc(n, sizeof *up), *y[4][5];
    rig_floats(&rng, x, n);
    rig_floats(&rng, up, n);
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        struct backend be = rig_open(name, n_threads);
        struct tensor x_t = tensor_2d(x, DT_F32, N_TOK, N), up_t = tensor_2d(up, DT_F32, N_TOK, N);
        struct tensor gain = tensor_1d(up, DT_F32, N), out[5];
        for (int i = 0; i < 5; i++) {
            y[n_threads][i] = rig_alloc(n, sizeof *x);
            out[i] = tensor_2d(y[n_threads][i], DT_F32, N_TOK, N);
        }
        CHECK_OK(backend_rmsnorm(&be, &out[0], &x_t, &gain, 1e-5f));
        CHECK_OK(backend_layernorm(&be, &out[1], &x_t, &gain, NULL, 1e-5f));
        CHECK_OK(backend_glu(&be, &out[2], &x_t, &up_t, ACT_SILU));
        CHECK_OK(backend_activate(&be, &out[3], &x_t, ACT_GELU_TANH));
        CHECK_OK(backend_activate(&be, &out[4], &x_t, ACT_GELU_ERF));
        backend_close(&be);
        for (int i = 0; i < 5; i++) {
            CHECK(memcmp(y[n_threads][i], y[1][i], n * sizeof *x) == 0);
        }
    }
    for (int i = 0; i < 5; i++) {
        free(y[1][i]);
        free(y[2][i]);
        free(y[3][i]);
    }
    free(x);
    free(up);
}

int main(void)
{
    rig_register();
    printf("seed %d\n", RIG_SEED);
    for (int i = 0; i < N_ISAS; i++) {
        char name[32];
        snprintf(name, sizeof name, "cpu/%s", isa_names[i]);
        if (!rig_has(name)) {
            printf("%s: not here\n", name);
            continue;
        }
        test_exp(loops_of(isa_names[i]), isa_names[i]);
        test_halves(loops_of(isa_names[i]));
        test_picks(loops_of(isa_names[i]));
        test_stats(name);
        test_threads(name);
    }
    return check_report();
}
