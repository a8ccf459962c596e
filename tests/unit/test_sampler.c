/* core/sampler: the generator against published vectors, merging of every split, sampling against
 * softmax, results against the formulas in double.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/sampler.h"

enum { N = 41 };

static float noise(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) * 0x1p-23f - 1.0f;
}

/* Source: known-answer vectors of the Random123 distribution, philox4x32 with 10 rounds. */
static void test_philox(void)
{
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < 3; i++) {
        uint32_t out[4];
        philox4x32(out, known[i].counter, known[i].key);
        CHECK(memcmp(out, known[i].out, sizeof out) == 0);
    }
}

static void test_keys(void)
{
    /* every argument changes the key, and nothing else is in it */
    uint64_t base[2], other[2];
    sampler_key(base, 1, 2, 3, 4);
    sampler_key(other, 1, 2, 3, 4);
    CHECK(memcmp(base, other, sizeof base) == 0);
    static const uint64_t args[][4] = {{2, 2, 3, 4},
                                       {1, 3, 3, 4},
                                       {1, 2, 4, 4},
                                       {1, 2, 3, 5},
                                       {1 | 1ull << 32, 2, 3, 4},
                                       {1, 2 | 1ull << 32, 3, 4},
                                       {1, 2, 4, 3}};
    for (size_t i = 0; i < 7; i++) {
        sampler_key(other, args[i][0], args[i][1], (uint32_t)args[i][2], (uint32_t)args[i][3]);
        CHECK(base[0] != other[0] && base[1] != other[1]);
    }
}

static void test_gumbel(void)
{
    /* mean = Euler's constant, variance = pi^2 / 6 */
    const uint64_t key[2] = {123, 456};
    double sum = 0, squares = 0;
    enum { DRAWS = 100000 };
    for (int32_t i = 0; i < DRAWS; i++) {
        double g = (double)sampler_gumbel(key, i);
        sum += g;
        squares += g * g;
    }
    double mean = sum / DRAWS, variance = squares / DRAWS - mean * mean;
    CHECK_NEAR(mean, 0.5772157, 0.02); /* standard error 0.004 */
    CHECK_NEAR(variance, 1.6449341, 0.05);
    const uint64_t key2[2] = {123, 457};
    CHECK(sampler_gumbel(key, 7) != sampler_gumbel(key2, 7));
}

static bool same_stats(const struct logit_stats *a, const struct logit_stats *b)
{
    return a->max == b->max && a->second == b->second && a->argmax == b->argmax &&
           a->target == b->target && a->pick_score == b->pick_score && a->pick == b->pick &&
           a->pick_logit == b->pick_logit && fabsf(a->sum_exp - b->sum_exp) <= 1e-5f * b->sum_exp &&
           fabsf(a->sum_exp_l - b->sum_exp_l) <= 1e-5f * (1 + fabsf(b->sum_exp_l)) &&
           fabs(a->sum_exp_t - b->sum_exp_t) <= 1e-13 * b->sum_exp_t;
}

static void test_merge(void)
{
    uint32_t state = 5;
    for (int round = 0; round < 6; round++) {
        float logits[N];
        for (int i = 0; i < N; i++) {
            logits[i] = 8 * noise(&state);
        }
        if (round >= 3) { /* ties of the two largest, in one part or in two */
            logits[(7 * round) % N] = logits[(11 * round) % N] = 9;
        }
        struct logit_want want = {.target = 100 + 5 * round, .key = {9, 10}};
        want.temperature = round % 2 ? 0.8f : 0;
        want.restricted = round == 3;
        struct logit_stats whole, parts[3], merged;
        sampler_part_stats(&whole, logits, N, 100, &want);
        for (int a = 0; a <= N; a++) { /* every split in three, empty parts included */
            for (int b = a; b <= N; b++) {
                sampler_part_stats(&parts[0], logits, a, 100, &want);
                sampler_part_stats(&parts[1], logits + a, b - a, 100 + a, &want);
                sampler_part_stats(&parts[2], logits + b, N - b, 100 + b, &want);
                sampler_merge(&merged, parts, 3, &want);
                CHECK(same_stats(&merged, &whole));
                sampler_merge(parts, parts, 3, &want); /* in place */
                CHECK(same_stats(&parts[0], &merged) && parts[0].sum_exp_t == merged.sum_exp_t);
            }
        }
    }
}

/* One NaN anywhere is seen in the end, and a part of nothing but -inf changes nothing. */
static void test_no_numbers(void)
{
    uint32_t state = 9;
    float logits[N];
    struct logit_want want = {.target = -1};
    struct logit_stats parts[3], merged, whole;
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < N; i++) {
            logits[i] = 8 * noise(&state);
        }
        int from = round == 0 ? 3 : 10; /* one, or all of the middle part */
        for (int i = from; i < (round == 0 ? 4 : 20); i++) {
            logits[i] = round < 3 ? NAN : -INFINITY;
        }
        logits[10] = round == 2 ? -INFINITY : logits[10];
        want.temperature = round == 4 ? 0.7f : 0;
        sampler_part_stats(&whole, logits, N, 0, &want);
        sampler_part_stats(&parts[0], logits, 10, 0, &want);
        sampler_part_stats(&parts[1], logits + 10, 10, 10, &want);
        sampler_part_stats(&parts[2], logits + 20, N - 20, 20, &want);
        sampler_merge(&merged, parts, 3, &want);
        if (round < 3) {
            CHECK(isnan(whole.sum_exp) && isnan(merged.sum_exp));
        } else {
            CHECK(same_stats(&merged, &whole) && isfinite(merged.sum_exp));
        }
        CHECK(merged.argmax >= 0 && merged.argmax < N && merged.pick >= 0 && merged.pick < N);
    }
}

static void test_result(void)
{
    uint32_t state = 77;
    for (int round = 0; round < 20; round++) {
        float logits[N];
        double max = -1e9, second = -1e9, sum = 0, entropy = 0;
        int best = 0;
        for (int i = 0; i < N; i++) {
            double l = (double)(logits[i] = 6 * noise(&state));
            if (l > max) {
                second = max;
                max = l;
                best = i;
            } else if (l > second) {
                second = l;
            }
        }
        for (int i = 0; i < N; i++) {
            sum += exp((double)logits[i]);
        }
        for (int i = 0; i < N; i++) {
            double p = exp((double)logits[i]) / sum;
            entropy -= p * log(p);
        }
        struct logit_stats s;
        struct token_result r;
        struct logit_want want = {.target = -1};
        sampler_part_stats(&s, logits, N, 0, &want);
        sampler_result(&r, &s, &want);
        CHECK(r.token == best && r.argmax == best);
        CHECK_NEAR(r.logprob, (double)logits[best] - log(sum), 1e-5);
        CHECK_NEAR(r.entropy, entropy, 1e-5);
        CHECK_NEAR(r.margin, max - second, 1e-5);
        want.target = (best + 3) % N;
        sampler_part_stats(&s, logits, N, 0, &want);
        sampler_result(&r, &s, &want);
        CHECK_NEAR(r.logprob, (double)logits[want.target] - log(sum), 1e-5);
    }
    /* two equal logits: entropy ln 2, margin 0, the lower id */
    const float even[] = {3, 3};
    const struct logit_want want = {.target = 1};
    struct logit_stats s;
    struct token_result r;
    sampler_part_stats(&s, even, 2, 40, &want);
    sampler_result(&r, &s, &want);
    CHECK(r.token == 40);
    CHECK_NEAR(r.entropy, log(2.0), 1e-6);
    CHECK_NEAR(r.margin, 0, 0);
    CHECK(s.target == -INFINITY); /* id 1 is not in this part */
}

/* A sample's logprob is of temperature 1, whatever the temperature it was drawn at. */
static void test_sampling(void)
{
    enum { DRAWS = 40000, K = 5 };
    static const float logits[K] = {1.0f, 0.0f, 2.0f, -1.0f, 1.5f},
                       temperatures[] = {1.0f, 0.5f, 2.0f};
    for (int c = 0; c < 3; c++) {
        int count[K] = {0};
        double p[K], sum = 0, sum_1 = 0, chi2 = 0;
        for (int i = 0; i < K; i++) {
            sum += p[i] = exp((double)logits[i] / (double)temperatures[c]);
            sum_1 += exp((double)logits[i]);
        }
        for (uint32_t step = 0; step < DRAWS; step++) {
            struct logit_want want = {.target = -1, .temperature = temperatures[c]};
            struct logit_stats s;
            struct token_result r;
            sampler_key(want.key, 42, 7, 0, step);
            sampler_part_stats(&s, logits, K, 10, &want);
            sampler_result(&r, &s, &want);
            count[r.token - 10]++;
            if (step < 50) {
                CHECK_NEAR(r.logprob, (double)logits[r.token - 10] - log(sum_1), 1e-5);
            }
        }
        for (int i = 0; i < K; i++) {
            double expected = p[i] / sum * DRAWS, d = count[i] - expected;
            chi2 += d * d / expected;
        }
        CHECK(chi2 < 18.47); /* 4 degrees of freedom: p = 0.001; the draws are fixed */
    }
}

/* Broken numbers give broken results, not crashes. */
static void test_not_finite(void)
{
    const float bad[] = {NAN, NAN}, low[] = {-INFINITY, 1, -INFINITY}, one[] = {2};
    const struct logit_want greedy = {.target = -1}, sample = {.target = 0, .temperature = 1};
    struct logit_stats s;
    struct token_result r;
    sampler_part_stats(&s, bad, 2, 0, &sample);
    CHECK(s.argmax == -1 && s.pick == -1 && isnan(s.sum_exp));
    sampler_part_stats(&s, low, 3, 0, &greedy);
    sampler_result(&r, &s, &greedy);
    CHECK(r.token == 1);
    CHECK_NEAR(r.entropy, 0, 1e-7);
    CHECK_NEAR(r.logprob, 0, 1e-7);
    sampler_part_stats(&s, one, 1, 9, &greedy);
    CHECK(s.second == -INFINITY && s.argmax == 9);
}

int main(void)
{
    test_philox();
    test_keys();
    test_gumbel();
    test_merge();
    test_no_numbers();
    test_result();
    test_sampling();
    test_not_finite();
    return check_report();
}
