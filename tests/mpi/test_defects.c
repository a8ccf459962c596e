/* The defects of PMPD's public reference code that concern schedulers, one test each, named by what
 * goes wrong there: here it must go right. (Found by reading SamsungLabs/PMPD at commit 909cdf9.)
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include <ctype.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/session.h"
#include "experiments/engine.h"
#include "experiments/quantise/nested_write.h"
#include "sched/classifier.h"
#include "sched/registry.h"
#include "sched/step_window.h"
#include "tests/gen.h"

enum { N_NEW = 9, N_PROMPT = 5, N_STEPS = N_NEW - 1 };

static struct engine engine;
enum { MEAN, HEADS, STEPS }; /* classifiers */

static char folder[GEN_PATH_BYTES], classifiers[3][GEN_PATH_BYTES], plans[GEN_PATH_BYTES];

/* ---- what every policy needs ---- */

static void write_classifier(char *path, const char *name, int32_t n_heads)
{
    enum classifier_kind kind = n_heads > 0 ? CLASSIFIER_KV : CLASSIFIER_STEP;
    struct classifier c;
    struct gen_rng rng = {3};
    bool is_kv = kind == CLASSIFIER_KV;
    struct classifier_shape shape = {.kind = kind,
                                     .head_dim = is_kv ? engine.source.config.head_dim : 0,
                                     .n_kv_heads = n_heads,
                                     .n_groups = n_heads,
                                     .n_queries = is_kv,
                                     .n_in = is_kv ? n_heads * engine.source.config.head_dim
                                                   : STEP_WINDOW_N,
                                     .n_hidden = 4,
                                     .n_classes = is_kv ? 4 : 2};
    CHECK_OK(classifier_create(&c, &shape));
    for (size_t i = 0; i < c.n_params; i++) {
        c.params[i] = (float)gen_normal(&rng);
    }
    strcpy(c.facts.high, "4");
    strcpy(c.facts.low, "2");
    for (int i = 0; i < shape.n_classes; i++) {
        c.facts.class_at[i] = (double)i / (shape.n_classes - 1);
    }
    CHECK_OK(classifier_write(&c, gen_path(path, folder, name)));
    classifier_free(&c);
}

static void set_text(struct settings *s, const char *key, const char *value)
{
    char text[2 * GEN_PATH_BYTES];
    snprintf(text, sizeof text, "%s=%s", key, value);
    CHECK_OK(settings_set(s, text));
}

/* Settings with which a policy opens. */
static void settings_for(struct settings *s, const char *name)
{
    settings_default(s);
    set_text(s, "policy.name", name);
    set_text(s, "policy.levels", "4 2");
    set_text(s, "policy.switches", "0:4 3:2");
    set_text(s, "policy.alternate", "4 2");
    set_text(s, "policy.window", "2");
    set_text(s, "policy.every", "2");
    set_text(s, "policy.oracle", plans);
    set_text(s, "policy.classifier",
             classifiers[strcmp(name, "step-learned") == 0    ? STEPS
                         : strcmp(name, "learned-heads") == 0 ? HEADS
                                                              : MEAN]);
}

static bool is_replay(const struct policy_ops *ops)
{
    return strncmp(ops->name, "replay", 6) == 0; /* needs a recorded run: test_replay */
}

/* ---- one turn of one prompt ---- */

struct watch {
    struct step_record steps[N_NEW + 2];
    struct plan_switch switches[N_NEW + 2];
    int n_tokens, n_steps, n_switches;
    double wall_s, avg_bits;
    uint64_t first_alloc, last_alloc;
};

static void on_token(void *ctx, int32_t slot, int32_t token)
{
    struct watch *w = ctx;
    (void)slot;
    (void)token;
    if (w->n_tokens++ == 0) {
        w->first_alloc = mem_alloc_count();
    }
    w->last_alloc = mem_alloc_count();
}

static enum status on_finished(void *ctx, const struct finished_record *r)
{
    struct watch *w = ctx;
    w->wall_s = r->wall_s;
    w->n_steps = r->n_steps;
    w->n_switches = r->n_switches;
    CHECK(r->n_steps <= N_NEW + 2 && r->n_switches <= N_NEW + 2);
    memcpy(w->steps, r->steps, (size_t)r->n_steps * sizeof *r->steps);
    memcpy(w->switches, r->switches, (size_t)r->n_switches * sizeof *r->switches);
    for (int i = 0; i < r->n_steps; i++) {
        w->avg_bits += (double)engine.levels.level[r->steps[i].level].avg_bits / r->n_steps;
    }
    return ST_OK;
}

static void decode(struct watch *w, const struct settings *s)
{
    struct policy policy;
    struct session *session = NULL;
    struct prompt prompt = {.n_turns = 1};
    int32_t ids[N_PROMPT];
    const uint64_t key[2] = {1, 2};
    memset(w, 0, sizeof *w);
    prompt.id = (char[]){"p"};
    prompt.ids[0] = ids;
    prompt.n_ids[0] = N_PROMPT;
    for (int i = 0; i < N_PROMPT; i++) {
        ids[i] = 7 + 30 * i;
    }
    CHECK_OK(registry_open_policy(&policy, s, &engine.levels));
    if (!policy.ops) {
        return;
    }
    struct session_options o = {.n_slots = 1,
                                .prefill_chunk = 8,
                                .max_tok = engine.context,
                                .max_turns = 1,
                                .max_new_tokens = N_NEW,
                                .on_token = on_token,
                                .on_finished = on_finished,
                                .ctx = w};
    CHECK_OK(session_create(&session, engine.dec, &engine.coll, &policy, &engine.levels,
                            &engine.source.config, &o));
    CHECK_OK(session_start(session, &prompt, 0, key, 1, policy.dial));
    while (session_n_active(session) > 0) {
        CHECK_OK(session_advance(session));
    }
    session_destroy(&session);
    policy_close(&policy);
}

/* ---- the defects ---- */

/* 1: the example of the learned scheduler builds the naive one; documented options are unknown. */
static void test_1_a_name_builds_its_own_policy(void)
{
    struct settings s;
    struct policy p;
    for (int i = 0; registry_policy(i); i++) {
        const struct policy_ops *ops = registry_policy(i);
        if (!is_replay(ops)) {
            settings_for(&s, ops->name);
            CHECK_OK(registry_open_policy(&p, &s, &engine.levels));
            CHECK(p.ops == ops);
            policy_close(&p);
        }
        /* every setting that the help speaks of is one */
        for (const char *at = strstr(ops->help, "policy."); at; at = strstr(at + 1, "policy.")) {
            char key[64] = "";
            size_t n = strlen("policy.");
            while (isalpha((unsigned char)at[n]) || at[n] == '_') {
                n++;
            }
            bool known = false;
            snprintf(key, sizeof key, "%.*s", (int)n, at);
            for (int k = 0; settings_row(k); k++) {
                known = known || strcmp(settings_row(k)->key, key) == 0;
            }
            if (!CHECK(known)) {
                fprintf(stderr, "    the help of %s speaks of %s\n", ops->name, key);
            }
        }
    }
}

/* 2: a class compared with a text: the activation scheduler can never be built. */
static void test_2_every_policy_runs(void)
{
    struct settings s;
    struct watch w;
    for (int i = 0; registry_policy(i); i++) {
        if (!is_replay(registry_policy(i))) {
            settings_for(&s, registry_policy(i)->name);
            decode(&w, &s);
            CHECK(w.n_tokens == N_NEW && w.n_steps == N_STEPS && w.n_switches >= 1);
        }
    }
    settings_for(&s, "activation"); /* and does something: any input is calm enough */
    set_text(&s, "policy.deviations", "-100");
    decode(&w, &s);
    CHECK(w.n_switches == 2 && w.switches[1].step == 3); /* two steps of window, one that crosses */
}

/* 3: the random scheduler without a prior fails at the join of nothing. */
static void test_3_random_needs_no_prior(void)
{
    struct settings s;
    struct watch w;
    settings_for(&s, "random");
    CHECK(s.policy.prior[0] == '\0');
    decode(&w, &s);
    CHECK(w.n_steps == N_STEPS);
    set_text(&s, "policy.prior", "0 0 0 1");
    decode(&w, &s);
    CHECK(w.n_switches == 1);
}

/* 4: one token too many; the first step is always at the high precision, so that N = 0 and N = 1
 * are the same run; it is missing from the log, so that average bits come out too low. */
static void test_4_steps_are_counted_from_the_first(void)
{
    static const char *const switches[] = {"0:2", "0:4 1:2", "0:4 2:2", "0:4 8:2"};
    static const int n_high[] = {0, 1, 2, 8};
    struct settings s;
    struct watch w;
    for (int i = 0; i < 4; i++) {
        settings_for(&s, "static");
        set_text(&s, "policy.switches", switches[i]);
        decode(&w, &s);
        CHECK(w.n_tokens == N_NEW); /* and none more */
        CHECK(w.n_steps == N_STEPS);
        for (int t = 0; t < w.n_steps; t++) {
            int bits = engine.levels.level[w.steps[t].level].max_bits;
            CHECK(w.steps[t].step == t && bits == (t < n_high[i] ? 4 : 2));
        }
        CHECK_NEAR(w.avg_bits, (4.0 * n_high[i] + 2.0 * (N_STEPS - n_high[i])) / N_STEPS, 1e-12);
    }
}

/* 6: the learned scheduler prints while it decides and moves its network at every call; the time of
 * an answer is stored and never reported. */
static void test_6_deciding_is_silent_and_allocates_nothing(void)
{
    static const char *const names[] = {"learned",    "learned-heads", "step-learned",
                                        "confidence", "activation",    "error-feedback"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[GEN_PATH_BYTES];
        struct settings s;
        struct watch w;
        settings_for(&s, names[i]);
        decode(&w, &s); /* the first use of features allocates their scratch */
        fflush(stdout);
        fflush(stderr);
        int out = dup(1), err = dup(2), before = check_n_failed;
        FILE *file = fopen(gen_path(path, folder, "printed"), "w");
        CHECK(file != NULL);
        dup2(fileno(file), 1);
        dup2(fileno(file), 2);
        decode(&w, &s);
        fflush(stdout);
        fflush(stderr);
        dup2(out, 1);
        dup2(err, 2);
        close(out);
        close(err);
        fclose(file);
        size_t bytes = 1;
        free(gen_read_file(path, &bytes));
        CHECK(bytes == 0 && check_n_failed == before);
        CHECK(w.first_alloc == w.last_alloc);
        CHECK(w.wall_s > 0);
    }
}

int main(int argc, char **argv)
{
    struct env env = {0};
    struct settings s;
    struct nested_options o = {.n_threads = 1, .version = "test"};
    struct nested_report report;
    struct gen_model m = gen_model_default();
    char dense[GEN_PATH_BYTES], nested[GEN_PATH_BYTES], command[GEN_PATH_BYTES + 16];
    int32_t level = 0;
    CHECK_OK(env_start(&env, &argc, &argv));
    log_set_level(LOG_ERROR);
    gen_folder(folder);
    gen_path(dense, folder, "dense");
    gen_path(nested, folder, "nested");
    m.ffn = 256;
    snprintf(command, sizeof command, "mkdir %s", dense);
    CHECK(system(command) == 0);
    CHECK_OK(gen_model_write(dense, &m));
    CHECK_OK(fit_spec_make(&o.spec, 1u << 2 | 1u << 4, LEVEL_TIED, false, 32, NULL));
    CHECK_OK(nested_write(&report, dense, nested, &o));
    gen_put_text(folder, "plans.jsonl", "{\"id\": \"p\", \"plan\": \"0:4 2:2\"}\n");
    gen_path(plans, folder, "plans.jsonl");
    settings_default(&s);
    set_text(&s, "model.path", nested);
    s.decode.prefill_chunk = 8;
    s.backend.threads = 1;
    CHECK_OK(engine_open(&engine, &env, &s));
    CHECK_OK(level_table_add(&engine.levels, "4", &level));
    CHECK_OK(level_table_add(&engine.levels, "2", &level));
    engine.policy_signals = SIGNALS_MEASURED;
    CHECK_OK(engine_load(&engine, &s, true));
    write_classifier(classifiers[MEAN], "mean.h5", 1);
    write_classifier(classifiers[HEADS], "heads.h5", engine.source.config.n_kv_heads);
    write_classifier(classifiers[STEPS], "steps.h5", 0);
    test_1_a_name_builds_its_own_policy();
    test_2_every_policy_runs();
    test_3_random_needs_no_prior();
    test_4_steps_are_counted_from_the_first();
    test_6_deciding_is_silent_and_allocates_nothing();
    engine_close(&engine);
    gen_remove(folder);
    int failed = check_report();
    env_end(&env);
    return failed;
}
