/* Every policy that goes down a list of levels: what it decides for signals made up by hand, held
 * against rules worked out here; that the dial moves all of them one way; what each refuses.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/mem.h"
#include "core/sampler.h"
#include "sched/classifier.h"
#include "sched/registry.h"
#include "sched/step_window.h"
#include "tests/gen.h"

enum { T = 24, N_LAYERS = 2, HEAD_DIM = 2, HELD = 1u << 2 | 1u << 3 | 1u << 4 };

static const struct model_config small = {.hidden = 4,
                                          .n_layers = N_LAYERS,
                                          .n_heads = 2,
                                          .n_kv_heads = 1,
                                          .head_dim = HEAD_DIM,
                                          .ffn = 8,
                                          .vocab = 16,
                                          .context = 64};

static char folder[GEN_PATH_BYTES];

/* ---- a turn with made-up signals ---- */

/* Signals of steps -1.. T - 2: index step + 1. */
struct story {
    float max_prob[T], logprob[T], kl[T];
    float activation[T][2 * N_LAYERS * M_N_ROLES];
    float features[2 * 3 * HEAD_DIM];
};

struct outcome {
    char levels[T];   /* "444332...": bits of steps 0.. T - 2 */
    char probes[T];   /* bits of the probe of each step, '.' for none */
    int32_t n_points; /* of the first plan */
    int32_t prefill_bits;
};

static void play(struct outcome *out, const char *const *assignments, float dial, int64_t ordinal,
                 const struct story *story)
{
    struct level_table t;
    struct settings s;
    struct policy policy;
    struct plan plan;
    void *state = NULL;
    memset(out, 0, sizeof *out);
    settings_default(&s);
    CHECK_OK(settings_set(&s, "policy.levels=4 3 2"));
    CHECK_OK(settings_set(&s, "policy.prefill=4"));
    for (int i = 0; assignments[i]; i++) {
        CHECK_OK(settings_set(&s, assignments[i]));
    }
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_OK(plan_create(&plan, T));
    CHECK_OK(registry_open_policy(&policy, &s, &t));
    if (!policy.ops) {
        return;
    }
    CHECK_OK(mem_alloc_array(&state, 1, policy.ops->state_bytes + 1));
    memset(state, 0x5a, policy.ops->state_bytes); /* begin clears it */
    struct prompt_facts facts = {.ordinal = ordinal,
                                 .id = "one",
                                 .task = "",
                                 .n_prompt_tok = 3,
                                 .max_new_tokens = T,
                                 .dial = dial};
    CHECK_OK(policy_begin(&policy, &facts, state, t.n, &plan.prefill));
    out->prefill_bits = t.level[plan.prefill].max_bits;
    int32_t probe = -1;
    for (int32_t step = -1; step < T - 1; step++) {
        struct signals signals = {.step = step,
                                  .level = step < 0 ? plan.prefill : plan_level(&plan, step),
                                  .logprob = story->logprob[step + 1],
                                  .max_prob = story->max_prob[step + 1],
                                  .activation = story->activation[step + 1],
                                  .n_layers = N_LAYERS,
                                  .features = step < 0 ? story->features : NULL,
                                  .n_feature_heads = 1,
                                  .n_feature_tok = 3,
                                  .feature_dim = HEAD_DIM,
                                  .probe_level = probe,
                                  .probe_kl = probe < 0 ? 0 : story->kl[step + 1]};
        if (step < 0) {
            CHECK_OK(policy_plan(&policy, &facts, &signals, state, t.n, &plan));
            out->n_points = plan.n;
            continue;
        }
        out->levels[step] = (char)('0' + t.level[signals.level].max_bits);
        out->probes[step] = probe < 0 ? '.' : (char)('0' + t.level[probe].max_bits);
        probe = -1;
        if (policy.ops->needs & SIGNAL_LOGITS) {
            struct amendment a;
            CHECK_OK(policy_observe(&policy, &facts, &signals, state, t.n, &a));
            probe = a.probe;
            if (a.level >= 0) {
                CHECK_OK(plan_amend(&plan, step + 1, a.level));
            }
        }
    }
    mem_free(state);
    policy_close(&policy);
    plan_free(&plan);
    level_table_release(&t);
}

static void check_levels(int line, const char *const *assignments, float dial,
                         const struct story *story, const char *want)
{
    struct outcome o;
    play(&o, assignments, dial, 0, story);
    if (!CHECK(strcmp(o.levels, want) == 0)) {
        fprintf(stderr, "    case of line %d: %s at dial %g\n    found    %s\n    expected %s\n",
                line, assignments[0], (double)dial, o.levels, want);
    }
    CHECK(o.prefill_bits == 4);
}
#define CHECK_LEVELS(assignments, dial, story, want) \
    check_levels(__LINE__, (assignments), (dial), (story), (want))

/* ---- one by one ---- */

static void test_confidence(void)
{
    const char *const four[] = {"policy.name=confidence", "policy.window=4", NULL};
    const char *const off[] = {"policy.name=confidence", "policy.window=4", "policy.deviations=2",
                               NULL};
    struct story s = {0};
    /* steps 0..3: mean 0.5, deviation 0.1, threshold 0.6: reached at step 6, not by 0.59 at 5;
     * steps 7..10 at 3 bits: mean 0.3, deviation 0, threshold 0.3: reached at once */
    static const float p[] = {0.9f,  0.4f, 0.6f, 0.4f, 0.6f, 0.5f, 0.59f,
                              0.61f, 0.3f, 0.3f, 0.3f, 0.3f, 0.3f, 0.3f};
    memcpy(s.max_prob, p, sizeof p);
    CHECK_LEVELS(four, 0.5f, &s, "44444443333322222222222");
    CHECK_LEVELS(off, 0.5f, &s, "44444444444444444444444");
    CHECK_LEVELS(four, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(four, 0, &s, "22222222222222222222222");
    /* dial 0.4 takes 0.405 deviations away: 0.5595, passed at step 5; at 3 bits
     * 0.61 is among the first four, and nothing passes their threshold of 0.46 */
    CHECK_LEVELS(four, 0.4f, &s, "44444433333333333333333");
}

static void test_activation(void)
{
    const char *const all[] = {"policy.name=activation", "policy.window=2", "policy.deviations=0.5",
                               NULL};
    const char *const last[] = {"policy.name=activation", "policy.window=2",
                                "policy.deviations=0.5", "policy.activation=last", NULL};
    struct story s = {0};
    /* mean square 4 at step 0, then 6, from step 5 on 2; the first layer has 1.05 at step 3 */
    for (int step = 0; step < T - 1; step++) {
        for (int i = 0; i < N_LAYERS * M_N_ROLES; i++) {
            float *mean_variance = s.activation[step + 1] + 2 * i;
            if (i % M_N_ROLES != M_GATE) { /* the family has none */
                mean_variance[0] = 1;
                mean_variance[1] = step == 0 ? 3 : step < 5 ? 5 : 1;
            }
            if (i % M_N_ROLES != M_GATE && i < M_N_ROLES && step == 3) {
                mean_variance[1] = 0.05f;
            }
        }
    }
    /* steps 0 and 1: mean ln 24 / 2 = 1.589, deviation 0.203: 1.488 or less is calm, which step 3
     * is with (0.049 + 1.792) / 2; steps 4 and 5 then give 1.242 and 0.549: step 6 is calm with
     * 0.693 */
    CHECK_LEVELS(all, 0.5f, &s, "44443332222222222222222");
    /* step 5 is calm; steps 6 and 7 have no deviation: step 8 is */
    CHECK_LEVELS(last, 0.5f, &s, "44444433322222222222222");
    CHECK_LEVELS(all, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(all, 0, &s, "22222222222222222222222");
}

static void test_random(void)
{
    const char *const plain[] = {"policy.name=random", "policy.levels=4 2", NULL};
    const char *const prior[] = {"policy.name=random", "policy.levels=4 2", "policy.prior=0 3 1 0",
                                 NULL};
    const char *const three[] = {"policy.name=random", NULL};
    const char *const seeded[] = {"policy.name=random", "policy.levels=4 2", "decode.seed=2", NULL};
    static const struct story s = {0};
    int seen[4] = {0}, by_prior[4] = {0}, differ = 0;
    enum { N = 400 };
    for (int i = 0; i < N; i++) {
        struct outcome o, again;
        play(&o, plain, 0.5f, i, &s);
        size_t at = strcspn(o.levels, "2"); /* classes 0, 8, 16 and never */
        CHECK(at == 0 || at == 8 || at == 16 || at == T - 1);
        seen[at == T - 1 ? 3 : at / 8]++;
        play(&again, plain, 0.5f, i, &s);
        CHECK(strcmp(o.levels, again.levels) == 0);
        play(&again, seeded, 0.5f, i, &s);
        differ += strcmp(o.levels, again.levels) != 0;
        play(&o, prior, 0.5f, i, &s);
        at = strcspn(o.levels, "2");
        by_prior[at == T - 1 ? 3 : at / 8]++;
        play(&o, three, 0.5f, i, &s);
        CHECK(strspn(o.levels, "4") + strspn(o.levels + strspn(o.levels, "4"), "3") +
                  strspn(o.levels + strcspn(o.levels, "2"), "2") ==
              T - 1);
    }
    /* four standard deviations of a binomial: 4 sqrt(400 / 4 * 3 / 4) = 35 */
    for (int c = 0; c < 4; c++) {
        CHECK_NEAR(seen[c], N / 4, 35);
    }
    CHECK(by_prior[0] == 0 && by_prior[3] == 0);
    CHECK_NEAR(by_prior[1], 3 * N / 4, 35);
    CHECK(differ > N / 2);
    CHECK_LEVELS(plain, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(plain, 0, &s, "22222222222222222222222");
}

/* A classifier whose logits are its last bias alone: probabilities are given. */
static const char *write_classifier(const char *name, enum classifier_kind kind, const char *high,
                                    const char *low, const double *at, const double *probability,
                                    int32_t n_classes)
{
    static char paths[8][GEN_PATH_BYTES];
    static int n_paths;
    char *path = paths[n_paths++ % 8];
    struct classifier c;
    const bool is_kv = kind == CLASSIFIER_KV;
    struct classifier_shape shape = {.kind = kind,
                                     .head_dim = is_kv ? HEAD_DIM : 0,
                                     .n_kv_heads = is_kv,
                                     .n_groups = is_kv,
                                     .n_queries = is_kv,
                                     .n_in = is_kv ? HEAD_DIM : STEP_WINDOW_N,
                                     .n_hidden = 3,
                                     .n_classes = n_classes};
    CHECK_OK(classifier_create(&c, &shape));
    struct classifier_view v = classifier_view(&shape, c.params);
    for (int32_t i = 0; i < n_classes; i++) {
        v.b2[i] = (float)log(probability[i]);
        c.facts.class_at[i] = at[i];
    }
    if (kind == CLASSIFIER_STEP) { /* "drop" wins once the step is far from the mean signal */
        v.w1[9] = 8;               /* of step / max_new_tokens */
        v.b1[0] = -8;
        v.w2[3] = 100;
        v.b2[1] -= 1;
    }
    snprintf(c.facts.high, sizeof c.facts.high, "%s", high);
    snprintf(c.facts.low, sizeof c.facts.low, "%s", low);
    CHECK_OK(classifier_write(&c, gen_path(path, folder, name)));
    classifier_free(&c);
    return path;
}

static void test_learned(void)
{
    static const double at[] = {0, 1.0 / 3, 2.0 / 3, 1}, third[] = {0.1, 0.5, 0.3, 0.1},
                        two_thirds[] = {0.1, 0.2, 0.4, 0.3};
    char one[2 * GEN_PATH_BYTES], both[3 * GEN_PATH_BYTES];
    const char *a = write_classifier("43", CLASSIFIER_KV, "4", "3", at, third, 4);
    const char *b = write_classifier("32", CLASSIFIER_KV, "3", "2", at, two_thirds, 4);
    snprintf(both, sizeof both, "policy.classifier=%s:%s", a, b);
    const char *const pairs[] = {"policy.name=learned", both, NULL};
    static const struct story s = {.features = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}};
    CHECK_LEVELS(pairs, 0.5f, &s, "44444444333333332222222");
    CHECK_LEVELS(pairs, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(pairs, 0, &s, "22222222222222222222222");
    /* dial 0.8: weights 4^(0, 1/3, 2/3, 1): .1 .79 .76 .4 and .1 .32 1.0 1.2: classes 1 and 3 */
    CHECK_LEVELS(pairs, 0.8f, &s, "44444444333333333333333");
    struct level_table t;
    struct settings set;
    struct policy p;
    settings_default(&set);
    CHECK_OK(settings_set(&set, "policy.name=learned"));
    CHECK_OK(settings_set(&set, "policy.levels=4 3 2"));
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_STATUS(registry_open_policy(&p, &set, &t), ST_USER,
                 "policy.classifier names 0 files, policy.levels has 2 neighbouring pairs");
    snprintf(one, sizeof one, "policy.classifier=%s:%s", b, a);
    CHECK_OK(settings_set(&set, one));
    CHECK_STATUS(registry_open_policy(&p, &set, &t), ST_USER, "the high level");
    CHECK_OK(settings_set(&set, both));
    CHECK_OK(settings_set(&set, "policy.name=step-learned"));
    CHECK_STATUS(registry_open_policy(&p, &set, &t), ST_USER, "policy \"step-learned\"");
    level_table_release(&t);
}

static void test_step_learned(void)
{
    static const double at[] = {0, 1}, even[] = {0.5, 0.5};
    struct classifier c;
    struct story s = {0};
    char setting[2 * GEN_PATH_BYTES];
    const char *path = write_classifier("step", CLASSIFIER_STEP, "4", "2", at, even, 2);
    snprintf(setting, sizeof setting, "policy.classifier=%s", path);
    const char *const pair[] = {"policy.name=step-learned", "policy.levels=4 2", "policy.every=5",
                                setting, NULL};
    for (int t = 0; t < T; t++) {
        s.logprob[t] = -1 - 0.1f * (float)(t % 3);
    }
    /* the rule by itself: the vector before steps 0, 5, 10, ... from all signals up to there */
    char want[T] = "";
    float x[STEP_WINDOW_N], probability[2], scratch[256];
    struct step_window w;
    bool dropped = false;
    CHECK_OK(classifier_read(&c, path));
    CHECK(classifier_scratch(&c.shape, 1) <= sizeof scratch / sizeof *scratch);
    step_window_clear(&w);
    for (int32_t step = 0; step < T - 1; step++) {
        step_window_add(&w, s.logprob[step], 0, 0);
        if (step % 5 == 0 && !dropped) {
            step_window_vector(&w, step, T, x);
            CHECK_OK(classifier_evaluate(&c, x, 1, scratch, probability));
            dropped = probability[1] > probability[0];
        }
        want[step] = dropped ? '2' : '4';
    }
    classifier_free(&c);
    CHECK(strchr(want, '4') && strchr(want, '2')); /* it does drop, later than at once */
    CHECK_LEVELS(pair, 0.5f, &s, want);
    CHECK_LEVELS(pair, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(pair, 0, &s, "22222222222222222222222");
}

static void test_error_feedback(void)
{
    const char *const four[] = {"policy.name=error-feedback", "policy.every=4",
                                "policy.divergence=0.4", NULL};
    struct story s = {0};
    struct outcome o;
    /* probes at steps 3, 7, 11, 15, 19: calm, calm, at the bound of calm, between, above */
    s.kl[4] = 0.05f;
    s.kl[8] = 0.01f;
    s.kl[12] = 0.5f;
    s.kl[16] = 0.2f;
    s.kl[20] = 0.41f;
    CHECK_LEVELS(four, 0.5f, &s, "44443333222233333333444");
    play(&o, four, 0.5f, 0, &s);
    CHECK(strcmp(o.probes, "...3...4...4...4...4...") == 0);
    CHECK_LEVELS(four, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(four, 0, &s, "22222222222222222222222");
    play(&o, four, 1, 0, &s); /* nothing is asked where nothing is decided */
    CHECK(strcmp(o.probes, ".......................") == 0);
}

static void test_oracle(void)
{
    char path[GEN_PATH_BYTES], setting[2 * GEN_PATH_BYTES];
    static const struct story s = {0};
    struct level_table t;
    struct settings set;
    struct policy p;
    gen_put_text(folder, "best.jsonl",
                 "{\"id\": \"two\", \"plan\": \"0:3\"}\n\n"
                 "{\"id\": \"one\", \"turn\": 0, \"plan\": \"0:4 5:2 100:3\"}\n"
                 "{\"id\": \"one\", \"turn\": 1, \"plan\": \"0:2\"}\n");
    snprintf(setting, sizeof setting, "policy.oracle=%s", gen_path(path, folder, "best.jsonl"));
    const char *const best[] = {"policy.name=oracle", setting, NULL};
    CHECK_LEVELS(best, 0.5f, &s, "44444222222222222222222");
    settings_default(&set);
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_OK(settings_set(&set, "policy.name=oracle"));
    CHECK_STATUS(registry_open_policy(&p, &set, &t), ST_USER, "policy.oracle is empty");
    CHECK_OK(settings_set(&set, setting));
    CHECK_OK(registry_open_policy(&p, &set, &t));
    struct prompt_facts facts = {.id = "three", .max_new_tokens = T};
    int32_t level = 0;
    CHECK_STATUS(policy_begin(&p, &facts, NULL, t.n, &level), ST_USER,
                 "has no plan for prompt \"three\", turn 0; it holds 3 plans");
    CHECK(strlen(policy_digest(&p)) == 32);
    policy_close(&p);
    static const struct {
        const char *text, *says;
        enum status st;
    } bad[] = {
        {"{\"id\": \"a\", \"plan\": \"0:9\"}", "bad.jsonl:1: level \"9\"", ST_USER},
        {"{\"id\": \"a\", \"plan\": \"\"}", "bad.jsonl:1: the plan \"\" has no step", ST_USER},
        {"{\"id\": \"a\"}", "bad.jsonl:1", ST_FORMAT},
        {"\n[1]", "bad.jsonl:2", ST_FORMAT},
        {"{\"id\": \"a\", \"plan\": \"0:4\"}\n{\"id\": \"a\", \"plan\": \"0:3\"}",
         "two plans for prompt \"a\", turn 0", ST_FORMAT}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        gen_put_text(folder, "bad.jsonl", bad[i].text);
        snprintf(setting, sizeof setting, "policy.oracle=%s", gen_path(path, folder, "bad.jsonl"));
        CHECK_OK(settings_set(&set, setting));
        CHECK_STATUS(registry_open_policy(&p, &set, &t), bad[i].st, bad[i].says);
    }
    level_table_release(&t);
}

/* ---- the dial ---- */

static void test_dial_of_plans(void)
{
    static const struct story s = {0};
    const char *const fixed_points[] = {"policy.name=static", "policy.switches=0:4 6:3 9:2", NULL};
    const char *const reversed[] = {"policy.name=reversed", "policy.switches=0:4 6:2", NULL};
    const char *const alternate[] = {"policy.name=alternate", "policy.alternate=4 2", NULL};
    CHECK_LEVELS(fixed_points, 0.5f, &s, "44444433322222222222222");
    CHECK_LEVELS(fixed_points, 2.0f / 3, &s, "44444444444433333322222"); /* twice the steps */
    CHECK_LEVELS(fixed_points, 1, &s, "44444444444444444444444");
    CHECK_LEVELS(fixed_points, 0, &s, "22222222222222222222222");
    CHECK_LEVELS(reversed, 0.5f, &s, "22222244444444444444444");
    CHECK_LEVELS(reversed, 2.0f / 3, &s, "22244444444444444444444");
    CHECK_LEVELS(alternate, 0.5f, &s, "42424242424242424242424");
    CHECK_LEVELS(alternate, 0.625f, &s, "44424242444242424442424"); /* a quarter of the rounds */
    CHECK_LEVELS(alternate, 0, &s, "22222222222222222222222");
    CHECK_LEVELS(alternate, 1, &s, "44444444444444444444444");
}

/* With two levels and equal signals a larger dial never gives fewer bits at any step. */
static void test_dial_is_monotone(const char *kv, const char *step)
{
    const char *const names[] = {"fixed",        "static",        "reversed",   "alternate",
                                 "random",       "confidence",    "activation", "learned",
                                 "step-learned", "error-feedback"};
    struct gen_rng rng = {5};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        char name[64], classifier[2 * GEN_PATH_BYTES];
        snprintf(name, sizeof name, "policy.name=%s", names[k]);
        snprintf(classifier, sizeof classifier, "policy.classifier=%s",
                 strcmp(names[k], "learned") == 0 ? kv : step);
        const char *const set[] = {name,
                                   "policy.levels=4 2",
                                   "policy.level=2",
                                   "policy.switches=0:4 7:2",
                                   "policy.alternate=4 2",
                                   "policy.window=3",
                                   "policy.every=3",
                                   classifier,
                                   NULL};
        int moved = 0;
        for (int trial = 0; trial < 10; trial++) {
            struct story s;
            struct outcome before = {0};
            for (int t = 0; t < T; t++) {
                s.max_prob[t] = (float)gen_uniform(&rng);
                s.logprob[t] = -(float)gen_uniform(&rng);
                s.kl[t] = 0.1f * (float)pow(gen_uniform(&rng), 3);
                for (int i = 0; i < 2 * N_LAYERS * M_N_ROLES; i++) {
                    s.activation[t][i] = 0.1f + (float)gen_uniform(&rng);
                }
            }
            for (size_t i = 0; i < sizeof s.features / sizeof *s.features; i++) {
                s.features[i] = (float)gen_normal(&rng);
            }
            for (int d = 0; d <= 20; d++) {
                struct outcome o;
                play(&o, set, (float)d / 20, trial, &s);
                for (int t = 0; d > 0 && t < T - 1; t++) {
                    if (!CHECK(o.levels[t] >= before.levels[t])) {
                        fprintf(stderr, "    %s at dial %g\n", names[k], d / 20.0);
                    }
                }
                moved += d > 0 && strcmp(o.levels, before.levels) != 0;
                before = o;
            }
        }
        CHECK((moved > 0) == (k > 0)); /* all but fixed do move */
    }
}

/* Many requests together are answered as one by one: different prompts, dials and levels. */
static void test_company(const char *name, const char *file)
{
    enum { N = 70, STATE = 512, N_LEVELS = 2 };
    static unsigned char together[N][STATE] __attribute__((aligned(16))),
        alone[STATE] __attribute__((aligned(16)));
    static float features[N][2 * 3 * HEAD_DIM];
    struct policy_request requests[N];
    struct prompt_facts facts[N];
    struct signals signals[N];
    struct plan plans[N], plan;
    struct level_table t;
    struct settings s;
    struct policy p;
    struct gen_rng rng = {11};
    char setting[2 * GEN_PATH_BYTES];
    int n_low = 0;
    settings_default(&s);
    snprintf(setting, sizeof setting, "policy.classifier=%s", file);
    CHECK_OK(settings_set(&s, setting));
    snprintf(setting, sizeof setting, "policy.name=%s", name);
    CHECK_OK(settings_set(&s, setting));
    CHECK_OK(settings_set(&s, "policy.levels=4 2"));
    CHECK_OK(settings_set(&s, "policy.every=1"));
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_OK(registry_open_policy(&p, &s, &t));
    CHECK(p.ops->answer != NULL && p.ops->state_bytes <= STATE);
    CHECK_OK(plan_create(&plan, T));
    memset(together, 0, sizeof together);
    for (int i = 0; i < N; i++) {
        CHECK_OK(plan_create(&plans[i], T));
        for (size_t k = 0; k < sizeof features[i] / sizeof *features[i]; k++) {
            features[i][k] = (float)gen_normal(&rng);
        }
        facts[i] = (struct prompt_facts){
            .id = "", .task = "", .max_new_tokens = T, .dial = (float)gen_uniform(&rng)};
        signals[i] = (struct signals){.step = strcmp(name, "learned") == 0 || i % 2 ? -1 : i % T,
                                      .level = 1,
                                      .logprob = -(float)gen_uniform(&rng),
                                      .features = features[i],
                                      .n_feature_heads = 1,
                                      .n_feature_tok = 3,
                                      .feature_dim = HEAD_DIM};
        CHECK_OK(level_table_add(&t, "4", &signals[i].level));
        requests[i] =
            (struct policy_request){&facts[i], &signals[i], together[i], &plans[i], {-1, -1}};
    }
    CHECK_OK(policy_answer(&p, requests, N, t.n));
    for (int i = 0; i < N; i++) {
        struct amendment a = {-1, -1};
        memset(alone, 0, sizeof alone);
        plan_clear(&plan);
        if (signals[i].step < 0) {
            CHECK_OK(policy_plan(&p, &facts[i], &signals[i], alone, t.n, &plan));
        } else {
            CHECK_OK(policy_observe(&p, &facts[i], &signals[i], alone, t.n, &a));
        }
        CHECK(plan.n == plans[i].n && a.level == requests[i].amendment.level);
        CHECK(memcmp(plan.at, plans[i].at, (size_t)plan.n * sizeof *plan.at) == 0);
        CHECK(memcmp(alone, together[i], sizeof alone) == 0);
        n_low += a.level >= 0 || plan.n > 1;
        plan_free(&plans[i]);
    }
    CHECK(n_low > 0 && n_low < N);
    plan_free(&plan);
    policy_close(&p);
    level_table_release(&t);
}

static void test_lists(void)
{
    struct level_table t;
    struct settings s;
    struct policy p;
    settings_default(&s);
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_OK(settings_set(&s, "policy.name=random"));
    CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER, "policy.levels = \"\"; expected two");
    CHECK_OK(settings_set(&s, "policy.levels=4 4"));
    CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER, "from the best level to the cheapest");
    CHECK_OK(settings_set(&s, "policy.levels=2 4"));
    CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER, "\"4\" with 4 bits comes after \"2\"");
    CHECK_OK(settings_set(&s, "policy.levels=4 9"));
    CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER, "level \"9\"");
    CHECK_OK(settings_set(&s, "policy.levels=4 2"));
    static const char *const bad[][2] = {
        {"policy.classes=", "policy.classes is empty"},
        {"policy.classes=0 x", "\"x\" is no part"},
        {"policy.classes=0 1/0", "\"1/0\" is no part"},
        {"policy.classes=0 3/2", "\"3/2\" is no part"},
        {"policy.classes=0 -1", "\"-1\" is no part"},
        {"policy.classes=0 nan", "\"nan\" is no part"},
        {"policy.classes=0 2/3 1/2", "policy.classes ascend; \"1/2\""}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_OK(settings_set(&s, bad[i][0]));
        CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER, bad[i][1]);
    }
    CHECK_OK(settings_set(&s, "policy.classes=0 1"));
    static const char *const priors[][2] = {{"policy.prior=1", "expected 2 weights"},
                                            {"policy.prior=1 2 3", "expected 2 weights"},
                                            {"policy.prior=0 0", "not all 0"},
                                            {"policy.prior=1 -1", "\"-1\" is no weight"},
                                            {"policy.prior=1 inf", "\"inf\" is no weight"},
                                            {"policy.prior=1 b", "\"b\" is no weight"}};
    for (size_t i = 0; i < sizeof priors / sizeof *priors; i++) {
        CHECK_OK(settings_set(&s, priors[i][0]));
        CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER, priors[i][1]);
    }
    level_table_release(&t);
}

int main(void)
{
    static const double at[] = {0, 1.0 / 3, 2.0 / 3, 1}, p[] = {0.3, 0.3, 0.3, 0.1},
                        stay[] = {0, 1}, even[] = {0.5, 0.5};
    gen_folder(folder);
    test_confidence();
    test_activation();
    test_random();
    test_learned();
    test_step_learned();
    test_error_feedback();
    test_oracle();
    test_dial_of_plans();
    const char *kv = write_classifier("kv", CLASSIFIER_KV, "4", "2", at, p, 4);
    const char *step = write_classifier("s", CLASSIFIER_STEP, "4", "2", stay, even, 2);
    test_dial_is_monotone(kv, step);
    test_company("learned", kv);
    test_company("step-learned", step);
    test_lists();
    gen_remove(folder);
    return check_report();
}
