/* core/candidates: what top-k, top-p and min-p keep against a sort in double, the choice against an
 * argmax over it, frequencies against the renormalised softmax, any split of the vocabulary against
 * one part.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/candidates.h"
#include "core/sampler.h"

enum { N_MAX = 3000, PARTS_MAX = 8, WIDTH = CANDIDATES_MAX };

static uint64_t rng = 12345;

static uint32_t next_u32(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(rng >> 32);
}

static int below(int n)
{
    return (int)((uint64_t)next_u32() * (uint64_t)n >> 32);
}

static double uniform(void)
{
    return next_u32() * 0x1p-32;
}

/* ---- the oracle ---- */

static const float *sorting;

static int by_order(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;
    return sorting[x] > sorting[y] ? -1 : sorting[x] < sorting[y] ? 1 : x - y;
}

/* The ids that the filters keep, one filter after the other on an array of probabilities, as the
 * header words it. Returns how many; *close: a sum is so near the goal that rounding could decide.
 */
static int oracle(int *order, const float *logits, int n, float temperature,
                  const struct candidate_filter *f, bool *close)
{
    static double p[N_MAX];
    double sum = 0, reached = 0;
    int n_kept = n;
    for (int i = 0; i < n; i++) {
        order[i] = i;
    }
    sorting = logits;
    qsort(order, (size_t)n, sizeof *order, by_order);
    *close = false;
    for (int i = 0; i < n; i++) {
        double d = (double)logits[order[i]] - (double)logits[order[0]];
        p[i] = exp(d / (double)temperature);
    }
    if (f->top_k > 0 && f->top_k < n_kept) {
        n_kept = f->top_k;
    }
    for (int i = 0; i < n_kept; i++) {
        sum += p[i];
    }
    for (int i = 0; f->top_p < 1 && i < n_kept; i++) {
        reached += p[i] / sum;
        double goal = f->top_p * (1 - 1e-9);
        *close = *close || fabs(reached - goal) < 1e-12;
        if (reached >= goal) {
            n_kept = i + 1;
        }
    }
    for (int i = n_kept - 1; i > 0 && p[i] < f->min_p * p[0]; i--) {
        n_kept--;
    }
    return n_kept;
}

static int oracle_choice(const int *order, int n_kept, const float *logits,
                         const struct logit_want *want)
{
    int best = order[0];
    for (int i = 1; i < n_kept; i++) {
        float a =
            logits[order[i]] * (1.0f / want->temperature) + sampler_gumbel(want->key, order[i]);
        float b = logits[best] * (1.0f / want->temperature) + sampler_gumbel(want->key, best);
        best = a > b ? order[i] : best;
    }
    return best;
}

/* ---- the code under test, in parts ---- */

struct outcome {
    int id;       /* what candidates_choose gives, or candidates_choose_all after it gave nothing */
    int all;      /* what candidates_choose_all gives */
    bool settled; /* by the candidates of the parts */
};

static struct outcome choose(const float *logits, int n, int n_parts,
                             const struct candidate_filter *f, const struct logit_want *want)
{
    static struct logit_candidate offered[PARTS_MAX][WIDTH], scratch[2 * N_MAX];
    struct logit_stats stats[PARTS_MAX], merged;
    struct candidate_list lists[PARTS_MAX];
    struct logit_candidate choice = {0, -7}, all = {0, -7};
    int width = candidate_filter_width(f);
    for (int p = 0; p < n_parts; p++) {
        int begin = n * p / n_parts, held = n * (p + 1) / n_parts - begin;
        sampler_part_stats(&stats[p], logits + begin, held, begin, want);
        candidates_select(offered[p], width, logits + begin, held, begin);
        lists[p] = (struct candidate_list){offered[p], held < width ? held : width, held <= width};
    }
    sampler_merge(&merged, stats, n_parts, want);
    struct outcome out = {0};
    out.settled = candidates_choose(&choice, lists, n_parts, &merged, f, want, scratch);
    CHECK(out.settled == (choice.id != -7));
    candidates_choose_all(&all, logits, n, &merged, f, want, scratch);
    out.all = all.id;
    out.id = out.settled ? choice.id : all.id;
    CHECK(out.id >= 0 && out.id < n && all.id >= 0 && all.id < n);
    return out;
}

/* kind 0: flat; 1: peaked; 2: ties; 3: all equal; 4: a few masked with -inf; 5: typical. */
static void make_logits(float *logits, int n, int kind)
{
    for (int i = 0; i < n; i++) {
        double u = uniform();
        logits[i] = (float)(kind == 0   ? 0.1 * u
                            : kind == 1 ? -4 * log(u + 1e-9) * (below(20) == 0)
                            : kind == 2 ? 0.5 * below(6)
                            : kind == 3 ? -3
                            : kind == 4 ? (below(3) == 0 ? (double)-INFINITY : 8 * u)
                                        : 3 * log(u / (1 - u + 1e-9) + 1e-9));
    }
    if (kind == 4) {
        logits[below(n)] = 1; /* never all of them */
    }
}

static void test_against_sort(void)
{
    static const double ps[] = {1, 1, 0.95, 0.9, 0.5, 0.1, 1e-6, 0, 0.999999};
    static const double ms[] = {0, 0, 0, 0.05, 0.5, 1, 1e-4};
    static const int ks[] = {0, 0, 0, 1, 2, 40, 255, 256, 257, 1000, 100000};
    static const float ts[] = {1, 0.7f, 0.05f, 1e-6f, 3, 100, 1e20f};
    static const int ns[] = {1, 2, 17, 255, 256, 257, 288, 700, N_MAX};
    static float logits[N_MAX];
    static int order[N_MAX];
    long n_settled = 0, n_all = 0, n_close = 0;
    for (int round = 0; round < 6000; round++) {
        int n = ns[below(round % 3 == 0 ? 9 : 8)];
        struct candidate_filter f = {
            .top_k = ks[below(11)], .top_p = ps[below(9)], .min_p = ms[below(7)]};
        struct logit_want want = {.target = -1, .temperature = ts[below(7)], .restricted = true};
        bool close = false;
        sampler_key(want.key, 99, 0, 0, (uint32_t)round);
        make_logits(logits, n, round % 6);
        int n_kept = oracle(order, logits, n, want.temperature, &f, &close);
        int expected = oracle_choice(order, n_kept, logits, &want);
        n_close += close;
        if (close) {
            continue;
        }
        for (int n_parts = 1; n_parts <= PARTS_MAX; n_parts *= 2) {
            struct outcome o = choose(logits, n, n_parts, &f, &want);
            n_settled += o.settled;
            n_all++;
            if (!CHECK(o.id == expected && o.all == expected)) {
                fprintf(stderr,
                        "    round %d: n %d, T %g, top_k %d, top_p %g, min_p %g, %d parts: %d and "
                        "%d, expected %d of %d kept\n",
                        round, n, (double)want.temperature, f.top_k, f.top_p, f.min_p, n_parts,
                        o.id, o.all, expected, n_kept);
            }
            /* the candidates suffice for what lies inside the first 256, unless top-p is of more */
            bool beyond_k = f.top_k > WIDTH && f.top_p < 1;
            CHECK(o.settled || n_kept >= WIDTH || beyond_k);
            CHECK(o.settled || n > WIDTH);
        }
    }
    printf("%ld of %ld settled by candidates, %ld rounds too close to call\n", n_settled, n_all,
           n_close);
    CHECK(n_settled > n_all / 2 && n_settled < n_all - n_all / 20 && n_close < 3);
}

/* With nothing filtered the choice is that of plain sampling. */
static void test_same_noise(void)
{
    static float logits[N_MAX];
    const struct candidate_filter wide = {.top_k = N_MAX, .top_p = 1};
    for (uint32_t round = 0; round < 200; round++) {
        struct logit_want want = {.target = -1, .temperature = 0.9f};
        struct logit_stats plain;
        make_logits(logits, N_MAX, (int)round % 6);
        sampler_key(want.key, 5, 6, 0, round);
        sampler_part_stats(&plain, logits, N_MAX, 0, &want);
        want.restricted = true;
        CHECK(choose(logits, N_MAX, 2, &wide, &want).id == plain.pick);
    }
}

static void test_flat_is_gathered(void)
{
    static float logits[N_MAX];
    struct candidate_filter f = {.top_p = 0.9};
    struct logit_want want = {.target = -1, .temperature = 1, .key = {1, 2}, .restricted = true};
    make_logits(logits, N_MAX, 0);
    struct outcome one = choose(logits, N_MAX, 1, &f, &want);
    struct outcome four = choose(logits, N_MAX, 4, &f, &want);
    CHECK(!one.settled && !four.settled && one.id == four.id);
    logits[1234] = 20; /* one token has it all */
    CHECK(choose(logits, N_MAX, 4, &f, &want).settled);
    CHECK(choose(logits, N_MAX, 4, &f, &want).id == 1234);
    f = (struct candidate_filter){.top_k = 256, .top_p = 0.99};
    logits[1234] = 0;
    CHECK(choose(logits, N_MAX, 4, &f, &want).settled); /* top-k alone bounds it */
    f.top_k = 257;
    CHECK(!choose(logits, N_MAX, 1, &f, &want).settled);
    f = (struct candidate_filter){.top_p = 1, .min_p = 0.999};
    CHECK(choose(logits, N_MAX, 4, &f, &want).settled);
}

/* How often each id comes out, against the renormalised softmax of what is kept. */
static void test_frequencies(void)
{
    enum { DRAWS = 30000, K = 8 };
    /* at T = 1: 0.432 0.262 0.159 0.0586 0.0356 0.0216 0.0216 0.0108 (rounded) */
    static const float logits[K] = {0.0f, 3.0f, 1.0f, 0.5f, 2.5f, 0.0f, 2.0f, -0.7f};
    static const struct {
        struct candidate_filter f;
        float temperature;
        int n_kept; /* worked out by hand from the sums */
        double chi2;
    } cases[] = {
        {{.top_k = 3, .top_p = 1}, 1, 3, 13.82},   /* chi-square, p = 0.001, 2 d.f. */
        {{.top_p = 0.9}, 1, 4, 16.27},             /* 0.432 0.694 0.853 0.911 */
        {{.top_p = 1, .min_p = 0.1}, 1, 4, 16.27}, /* e^-2 = 0.135 stays, e^-2.5 = 0.082 not */
        {{.top_k = 4, .top_p = 0.9}, 1, 3, 13.82}, /* of 0.911: 0.936 reached by 3 */
        {{.top_p = 0.9}, 2, 7, 22.46},             /* flatter: 0.8956 with 6, 0.957 with 7 */
        {{.top_k = 6, .top_p = 0.95, .min_p = 0.3}, 2, 4, 16.27}, /* e^-1 = 0.37, e^-1.25 = 0.29 */
    };
    static const int order[K] = {1, 4, 6, 2, 3, 0, 5, 7};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        int count[K] = {0};
        double sum = 0, chi2 = 0;
        for (int i = 0; i < cases[c].n_kept; i++) {
            sum += exp((double)logits[order[i]] / (double)cases[c].temperature);
        }
        for (uint32_t step = 0; step < DRAWS; step++) {
            struct logit_want want = {
                .target = -1, .temperature = cases[c].temperature, .restricted = true};
            sampler_key(want.key, 42, 7, 1, step);
            count[choose(logits, K, 1 + (int)step % 3, &cases[c].f, &want).id]++;
        }
        for (int i = 0; i < K; i++) {
            double p = exp((double)logits[order[i]] / (double)cases[c].temperature) / sum;
            double d = count[order[i]] - p * DRAWS;
            if (i >= cases[c].n_kept) {
                CHECK(count[order[i]] == 0);
            } else {
                chi2 += d * d / (p * DRAWS);
            }
        }
        if (!CHECK(chi2 < cases[c].chi2)) {
            fprintf(stderr, "    case %zu: chi-square %.3g\n", c, chi2);
        }
    }
}

/* Where exact sums meet p, rounding decides nothing: n equal logits, p = j / n keeps j ids. */
static void test_exact_sums(void)
{
    static float logits[100];
    for (int n = 2; n <= 100; n++) {
        for (int j = 1; j < n; j += 1 + n / 7) {
            struct candidate_filter f = {.top_p = (double)j / n};
            struct logit_want want = {.target = -1, .temperature = 0.3f, .restricted = true};
            for (uint64_t i = 0; i < 60; i++) {
                want.key[0] = i;
                int id = choose(logits, n, 1 + (int)i % 4, &f, &want).id;
                bool is_best = true; /* of the first j ids, and of no more */
                for (int k = 0; k < j; k++) {
                    is_best =
                        is_best && sampler_gumbel(want.key, k) <= sampler_gumbel(want.key, id);
                }
                CHECK(is_best && id < j);
            }
        }
    }
}

/* Numbers at the edges: never a wild id. */
static void test_edges(void)
{
    const float logits[] = {-INFINITY, 2, 2, -INFINITY};
    struct candidate_filter f = {.top_p = 0};
    struct logit_want want = {.target = -1, .temperature = 1, .restricted = true};
    CHECK(choose(logits, 4, 2, &f, &want).id == 1); /* at least one, the lower id of a tie */
    f = (struct candidate_filter){.top_p = 1, .min_p = 1};
    int n_second = 0;
    for (uint64_t i = 0; i < 100; i++) {
        want.key[0] = i;
        int id = choose(logits, 4, 4, &f, &want).id;
        CHECK(id == 1 || id == 2);
        n_second += id == 2;
    }
    CHECK(n_second > 25 && n_second < 75);
    f = (struct candidate_filter){.top_k = 4, .top_p = 1};
    for (uint64_t i = 0; i < 100; i++) { /* -inf is kept by top-k and never drawn */
        want.key[0] = i;
        int id = choose(logits, 4, 4, &f, &want).id;
        CHECK(id == 1 || id == 2);
    }
    want.temperature = 1e-45f; /* 1 / T is no number any more */
    CHECK(choose(logits, 4, 1, &f, &want).id == 1);
    CHECK(!candidate_filter_is_on(&(struct candidate_filter){.top_p = 1}));
    CHECK(candidate_filter_is_on(&(struct candidate_filter){.top_p = 0.5}));
    CHECK(candidate_filter_is_on(&(struct candidate_filter){.top_p = 1, .top_k = 1}));
    CHECK(candidate_filter_is_on(&(struct candidate_filter){.top_p = 1, .min_p = 0.1}));
    CHECK(candidate_filter_width(&(struct candidate_filter){.top_k = 5}) == 5);
    CHECK(candidate_filter_width(&(struct candidate_filter){.top_k = 500}) == CANDIDATES_MAX);
    CHECK(candidate_filter_width(&(struct candidate_filter){.top_k = 0}) == CANDIDATES_MAX);
}

int main(void)
{
    test_against_sort();
    test_same_noise();
    test_flat_is_gathered();
    test_frequencies();
    test_exact_sums();
    test_edges();
    return check_report();
}
