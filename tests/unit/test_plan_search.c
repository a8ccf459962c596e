/* The search for the cheapest lossless plan: candidates by hand, the interval against the normal
 * distribution, the search against trying everything on synthetic qualities.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sched/plan_search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { N_TOK = 12, N_PROMPTS = 72 };

static const double bits[] = {4, 3, 2};
static const char *const names[] = {"4", "3", "2"};

static void weights(int64_t *n_steps)
{
    for (int32_t t = 0; t < N_TOK; t++) { /* answers of 6 or 12 tokens: 5 or 11 steps */
        n_steps[t] = t < 5 ? 2 : t < 11 ? 1 : 0;
    }
}

static int32_t find(const struct plan_search *s, const char *text)
{
    char own[128];
    for (int32_t i = 0; i < s->n; i++) {
        plan_candidate_text(own, sizeof own, s, &s->candidate[i], names, true);
        if (strcmp(own, text) == 0) {
            return i;
        }
    }
    return -1;
}

static void test_candidates(void)
{
    struct plan_search s;
    int64_t n_steps[N_TOK];
    char text[128];
    weights(n_steps);
    CHECK_OK(plan_search_create(&s, bits, 3, N_TOK, 3, 1, n_steps));
    CHECK(s.n == 30); /* 3 prefill levels, 4 + 3 + 2 + 1 pairs of steps of 0, 4, 8, never */
    static const struct {
        const char *text;
        double bits, prefill;
    } rows[] = {{"prefill:4 0:4", 4, 4},
                {"prefill:2 0:2", 2, 2},
                {"prefill:3 0:3 4:2", (8 * 3 + 8 * 2) / 16.0, 3},
                {"prefill:4 0:4 4:3 8:2", (8 * 4 + 5 * 3 + 3 * 2) / 16.0, 4},
                {"prefill:2 0:4 8:2", (13 * 4 + 3 * 2) / 16.0, 2}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int32_t at = find(&s, rows[i].text);
        CHECK(at >= 0);
        CHECK_NEAR(s.candidate[at].bits, rows[i].bits, 1e-12);
        CHECK(s.candidate[at].prefill_bits == rows[i].prefill);
    }
    CHECK(find(&s, "prefill:4 0:4") == s.reference && find(&s, "prefill:2 0:2") == 0);
    for (int32_t i = 1; i < s.n; i++) {
        const struct plan_candidate *a = &s.candidate[i - 1], *b = &s.candidate[i];
        CHECK(a->bits < b->bits || (a->bits == b->bits && a->prefill_bits <= b->prefill_bits));
        plan_candidate_text(text, sizeof text, &s, b, names, true);
        CHECK(find(&s, text) == i); /* each once */
    }
    plan_candidate_text(text, sizeof text, &s, &s.candidate[s.reference], names, false);
    CHECK(strcmp(text, "0:4") == 0);
    plan_search_free(&s);

    CHECK_OK(plan_search_create(&s, bits, 3, 2, 10, 1, n_steps)); /* steps 0, 1, never */
    CHECK(s.n == 18);
    plan_search_free(&s);
    CHECK_OK(plan_search_create(&s, bits, 3, N_TOK, 3, 3, n_steps)); /* steps 0 and 1 as prefill */
    CHECK_NEAR(s.candidate[find(&s, "prefill:4 0:3 4:2")].bits, (4 * 4 + 4 * 3 + 8 * 2) / 16.0,
               1e-12);
    plan_search_free(&s);
    CHECK_OK(plan_search_create(&s, bits, 3, N_TOK, 12, 1, n_steps)); /* no answer has a step 11 */
    CHECK(s.n == 3 * 12 * 13 / 2);
    plan_search_free(&s);
    const double wrong[] = {4, 4};
    CHECK_STATUS(plan_search_create(&s, wrong, 2, N_TOK, 3, 1, n_steps), ST_USER,
                 "fewer and fewer");
    double many[SCHEDULE_MAX_LEVELS];
    for (int i = 0; i < SCHEDULE_MAX_LEVELS; i++) {
        many[i] = 20 - i;
    }
    CHECK_STATUS(plan_search_create(&s, many, SCHEDULE_MAX_LEVELS, N_TOK, 12, 1, n_steps), ST_USER,
                 "smaller --grid");
}

static void test_interval(void)
{
    struct plan_interval a, b;
    double x[400], sum = 0, squares = 0;
    for (int i = 0; i < 400; i++) {
        x[i] = 0.25;
    }
    CHECK_OK(plan_interval(&a, x, 7, 1));
    CHECK_NEAR(a.mean, 0.25, 1e-12);
    CHECK(a.low == 0.25 && a.high == 0.25);
    struct gen_rng rng = {.state = 11};
    for (int i = 0; i < 400; i++) {
        x[i] = 0.3 + gen_normal(&rng);
        sum += x[i];
        squares += x[i] * x[i];
    }
    double mean = sum / 400, error = sqrt((squares / 400 - mean * mean) / 400);
    CHECK_OK(plan_interval(&a, x, 400, 1));
    CHECK_NEAR(a.mean, mean, 1e-12);
    CHECK_NEAR(a.low, mean - 1.96 * error, 0.1 * error);
    CHECK_NEAR(a.high, mean + 1.96 * error, 0.1 * error);
    CHECK_OK(plan_interval(&b, x, 400, 1));
    CHECK(memcmp(&a, &b, sizeof a) == 0);
    CHECK_OK(plan_interval(&b, x, 400, 2));
    CHECK(a.low != b.low);
}

static void test_rungs(void)
{
    CHECK(plan_search_n_rungs(1) == 1 && plan_search_n_rungs(23) == 1);
    CHECK(plan_search_n_rungs(24) == 2 && plan_search_rung(0, 24) == 8);
    CHECK(plan_search_n_rungs(72) == 3 && plan_search_rung(0, 72) == 8 &&
          plan_search_rung(1, 72) == 24 && plan_search_rung(2, 72) == 72);
}

/* ---- the search ---- */

struct world {
    const struct plan_search *s;
    double *quality; /* (n, N_PROMPTS) of every candidate */
    int32_t *known;  /* (n) prompts that were asked for */
    int64_t n_measured;
};

static enum status measure(void *ctx, const int32_t *candidates, int32_t n, int32_t first,
                           int32_t last, double *quality)
{
    struct world *w = ctx;
    for (int32_t i = 0; i < n; i++) {
        int32_t c = candidates[i];
        CHECK(c != w->s->reference && w->known[c] == first && last > first && last <= N_PROMPTS);
        w->known[c] = last;
        w->n_measured += last - first;
        for (int32_t p = first; p < last; p++) {
            quality[i * N_PROMPTS + p] = w->quality[c * N_PROMPTS + p];
        }
    }
    return ST_OK;
}

/* All candidates on all prompts: the first that is lossless. */
static int32_t brute_force(const struct world *w, double loss, uint64_t seed)
{
    double d[N_PROMPTS];
    for (int32_t c = 0; c < w->s->reference; c++) {
        struct plan_interval interval;
        for (int32_t p = 0; p < N_PROMPTS; p++) {
            d[p] = w->quality[c * N_PROMPTS + p] - w->quality[w->s->reference * N_PROMPTS + p];
        }
        CHECK_OK(plan_interval(&interval, d, N_PROMPTS, seed));
        if (interval.low >= -loss) {
            return c;
        }
    }
    return w->s->reference;
}

/* Quality falls with the bits that are missing, of decoding and of prefill, and is noisy. */
static void make_world(struct world *w, double per_bit, double per_prefill_bit, double noise,
                       uint64_t seed)
{
    struct gen_rng rng = {.state = seed};
    for (int32_t c = 0; c < w->s->n; c++) {
        const struct plan_candidate *k = &w->s->candidate[c];
        double less = 4 - k->bits > 0.7 ? per_bit * (4 - k->bits - 0.7) : 0;
        less += per_prefill_bit * (4 - k->prefill_bits);
        w->known[c] = 0;
        for (int32_t p = 0; p < N_PROMPTS; p++) {
            double off = c == w->s->reference ? 0 : noise * (gen_uniform(&rng) - 0.5);
            w->quality[c * N_PROMPTS + p] = 0.6 + 0.005 * p - less + off;
        }
    }
    w->n_measured = 0;
}

/* What is said of a candidate is what its first prompts say. */
static void check_candidate(const struct world *w, int32_t c, uint64_t seed)
{
    const struct plan_candidate *k = &w->s->candidate[c];
    const double *reference = w->quality + w->s->reference * N_PROMPTS;
    double d[N_PROMPTS], sum = 0;
    struct plan_interval interval;
    CHECK(k->n_prompts == w->known[c] || c == w->s->reference);
    if (k->n_prompts == 0) {
        return;
    }
    for (int32_t p = 0; p < k->n_prompts; p++) {
        sum += w->quality[c * N_PROMPTS + p];
        d[p] = w->quality[c * N_PROMPTS + p] - reference[p];
    }
    CHECK_OK(plan_interval(&interval, d, k->n_prompts, seed));
    CHECK_NEAR(k->quality, sum / k->n_prompts, 1e-12);
    CHECK(memcmp(&interval, &k->difference, sizeof interval) == 0);
}

static void test_search(void)
{
    static const double per_bit[] = {0, 0.1, 0.1, 2}, per_prefill[] = {0, 0, 0.3, 0.5};
    static const char *const winner[] = {"prefill:2 0:2", NULL, NULL, NULL};
    struct plan_search s;
    int64_t n_steps[N_TOK];
    weights(n_steps);
    CHECK_OK(plan_search_create(&s, bits, 3, N_TOK, 3, 1, n_steps));
    struct world w = {.s = &s};
    CHECK_OK(MEM_NEW(&w.quality, s.n * N_PROMPTS));
    CHECK_OK(MEM_NEW(&w.known, s.n));
    int32_t last = -1, n_unproven = 0;
    for (uint32_t i = 0; i < 4; i++) {
        make_world(&w, per_bit[i], per_prefill[i], i == 0 ? 0.02 : 0.2, i + 1);
        const double *reference = w.quality + s.reference * N_PROMPTS;
        int32_t expected = brute_force(&w, 0.01, 5);
        CHECK_OK(plan_search_run(&s, reference, N_PROMPTS, 0.01, 5, measure, &w));
        CHECK(s.winner == expected && s.winner >= last);
        CHECK(!winner[i] || s.winner == find(&s, winner[i]));
        CHECK(w.n_measured < (int64_t)(s.winner + PLAN_SEARCH_WAVE) * N_PROMPTS);
        for (int32_t c = 0; c < s.n; c++) {
            const struct plan_candidate *k = &s.candidate[c];
            check_candidate(&w, c, 5);
            n_unproven += k->verdict == PLAN_UNPROVEN;
            CHECK(w.known[c] == 0 || c < s.winner + PLAN_SEARCH_WAVE);
            if (c < s.winner) { /* all that is cheaper was refuted, or measured to the end */
                CHECK(k->verdict == PLAN_DROPPED || k->verdict == PLAN_UNPROVEN);
                CHECK(i < 3 || c > 0 || k->n_prompts == 8); /* far off: the first rung */
                CHECK(k->verdict == PLAN_DROPPED ? k->difference.high < -0.01
                                                 : k->n_prompts == N_PROMPTS);
            }
        }
        last = s.winner;
    }
    CHECK(n_unproven > 0);

    make_world(&w, 5, 5, 0.2, 9); /* nothing but what is as the reference */
    for (int32_t c = 0; c < s.reference; c++) {
        for (int32_t p = 0; p < N_PROMPTS; p++) {
            w.quality[c * N_PROMPTS + p] = 0;
        }
    }
    CHECK_OK(
        plan_search_run(&s, w.quality + s.reference * N_PROMPTS, N_PROMPTS, 0.01, 5, measure, &w));
    CHECK(s.winner == s.reference && s.candidate[s.winner].verdict == PLAN_REFERENCE);

    make_world(&w, 5, 5, 0.2, 9); /* good on the first prompts only */
    for (int32_t p = 0; p < 24; p++) {
        w.quality[p] = 2;
    }
    CHECK_OK(
        plan_search_run(&s, w.quality + s.reference * N_PROMPTS, N_PROMPTS, 0.01, 5, measure, &w));
    CHECK(s.winner > 0 && s.candidate[0].n_prompts == N_PROMPTS);
    mem_free(w.quality);
    mem_free(w.known);
    plan_search_free(&s);
}

int main(void)
{
    test_candidates();
    test_interval();
    test_rungs();
    test_search();
    return check_report();
}
