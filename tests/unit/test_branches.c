/* Branches of a sequence (a forked KV cache) against runs of their own under the same plan, and
 * logits of forced tokens. SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <sys/stat.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/session.h"
#include "experiments/branches.h"
#include "experiments/quantise/nested_write.h"
#include "sched/registry.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { N_PROMPTS = 3, T = 30, N_BRANCHES = 4, N_SEQ = 1 + N_BRANCHES, CHUNK = 4, MOST_TOK = 12 };
static const int32_t at[N_BRANCHES] = {0, 1, 10, 29};

static struct prompts prompts;

static void make_prompts(void)
{
    struct gen_rng rng = {7};
    prompts = (struct prompts){.n = N_PROMPTS};
    CHECK_OK(MEM_NEW(&prompts.prompt, N_PROMPTS));
    for (int i = 0; i < N_PROMPTS; i++) {
        struct prompt *q = &prompts.prompt[i];
        q->n_turns = 1;
        q->n_ids[0] = 9 + i;
        CHECK_OK(MEM_NEW(&q->ids[0], q->n_ids[0]));
        for (int t = 0; t < q->n_ids[0]; t++) {
            q->ids[0][t] = (int32_t)gen_below(&rng, 250);
        }
    }
}

static void set(struct settings *s, const char *model, int32_t n_slots)
{
    settings_default(s);
    snprintf(s->model.path, sizeof s->model.path, "%s", model);
    s->decode.slots = n_slots;
    s->decode.prefill_chunk = CHUNK;
    s->backend.threads = 1;
}

/* What the session says. */
struct alone {
    int32_t n, tokens[T + 1];
    float signals[T + 1][3];
    float features[2 * MOST_TOK * 64];
    int32_t n_features;
};

static enum status on_finished(void *ctx, const struct finished_record *r)
{
    struct alone *a = ctx;
    a->n = r->n_steps + 1;
    a->tokens[0] = r->turns[0].token0;
    for (int32_t t = 0; t < r->n_steps; t++) {
        a->tokens[t + 1] = r->steps[t].token;
        a->signals[t + 1][0] = r->steps[t].logprob;
        a->signals[t + 1][1] = r->steps[t].entropy;
        a->signals[t + 1][2] = r->steps[t].margin;
    }
    a->n_features = 2 * r->n_feature_tok * r->feature_dim;
    memcpy(a->features, r->features, (size_t)a->n_features * sizeof(float));
    return ST_OK;
}

/* Prompt i under the plan 4 bits, 2 from step `from` on. slots 2: the product of the branches. */
static void decode_alone(struct env *env, const char *model, int32_t i, int32_t from,
                         struct alone *a)
{
    struct settings s;
    struct engine e;
    struct policy policy = {0};
    struct session *session = NULL;
    const uint64_t key[2] = {0};
    set(&s, model, 2);
    snprintf(s.policy.name, sizeof s.policy.name, "static");
    snprintf(s.policy.prefill, sizeof s.policy.prefill, "4");
    snprintf(s.policy.switches, sizeof s.policy.switches, from ? "0:4 %d:2" : "0:2", from);
    CHECK_OK(engine_open(&e, env, &s));
    CHECK_OK(registry_open_policy(&policy, &s, &e.levels));
    CHECK_OK(engine_load(&e, &s, false));
    struct session_options o = {.n_slots = 2,
                                .prefill_chunk = CHUNK,
                                .max_tok = e.context,
                                .max_turns = 1,
                                .max_new_tokens = T,
                                .stop_at_eos = true,
                                .kv_features = true,
                                .on_finished = on_finished,
                                .ctx = a};
    CHECK_OK(session_create(&session, e.dec, &e.coll, &policy, &e.levels, &e.source.config, &o));
    CHECK_OK(session_start(session, &prompts.prompt[i], i, key, 1, 0.5f));
    while (session_n_active(session) > 0) {
        CHECK_OK(session_advance(session));
    }
    session_destroy(&session);
    policy_close(&policy);
    engine_close(&e);
}

/* The largest logit of every sequence and token. */
struct seen {
    int32_t vocab, best[N_PROMPTS][N_SEQ][T];
};

static enum status on_logits(void *ctx, int32_t p, int32_t sequence, int32_t t, const float *logits)
{
    struct seen *seen = ctx;
    int32_t best = 0;
    for (int32_t i = 1; i < seen->vocab; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    seen->best[p][sequence][t] = best;
    return ST_OK;
}

static void check_one(struct env *env, const char *model, int32_t i,
                      const struct branches_prompt *p, int *n_differ)
{
    for (int32_t b = 0; b < N_SEQ; b++) {
        struct alone a = {0};
        const int32_t *tokens = p->tokens + b * T;
        decode_alone(env, model, i, b ? at[b - 1] : T, &a);
        CHECK(p->n_new[b] == a.n && memcmp(tokens, a.tokens, (size_t)a.n * sizeof *tokens) == 0);
        *n_differ += b && (p->n_new[b] != p->n_new[0] ||
                           memcmp(tokens, p->tokens, (size_t)a.n * sizeof *tokens) != 0);
        if (b == 0) {
            CHECK(memcmp(p->signals + 3, a.signals[1], (size_t)(a.n - 1) * 3 * sizeof(float)) == 0);
            CHECK(a.n_features > 0 &&
                  memcmp(p->features, a.features, (size_t)a.n_features * sizeof(float)) == 0);
        }
    }
}

static void run(struct env *env, const char *model)
{
    static int32_t tokens[N_PROMPTS][N_SEQ * T], n_new[N_PROMPTS][N_SEQ], again[N_SEQ * T];
    static float signals[N_PROMPTS][3 * T], features[N_PROMPTS][2 * MOST_TOK * 64];
    static struct seen seen;
    struct settings s;
    struct engine e;
    struct branches *b = NULL;
    struct branches_prompt p[N_PROMPTS];
    struct branches_options o = {.n_branches = N_BRANCHES,
                                 .max_new_tokens = T,
                                 .stop_at_eos = true,
                                 .on_logits = on_logits,
                                 .ctx = &seen};
    int n_differ = 0;
    set(&s, model, 2 * N_SEQ);
    memcpy(o.at, at, sizeof at);
    CHECK_OK(engine_open(&e, env, &s));
    CHECK_OK(level_table_add(&e.levels, "4", &o.level));
    CHECK_OK(level_table_add(&e.levels, "2", &o.branch_level));
    o.prefill = o.level;
    CHECK_OK(engine_load(&e, &s, false));
    seen.vocab = e.source.config.vocab;
    CHECK_OK(branches_create(&b, &e, 2, CHUNK, &o));
    for (int32_t i = 0; i < N_PROMPTS; i++) {
        p[i] = (struct branches_prompt){.ids = prompts.prompt[i].ids[0],
                                        .n_ids = prompts.prompt[i].n_ids[0],
                                        .tokens = tokens[i],
                                        .n_new = n_new[i],
                                        .signals = signals[i],
                                        .features = features[i]};
    }
    CHECK_OK(branches_run(b, p, 2)); /* side by side */
    for (int32_t i = 0; i < 2; i++) {
        for (int32_t q = 0; q < N_SEQ; q++) { /* a branch shows logits from its first own token */
            for (int32_t t = q ? at[q - 1] + 1 : 0; t < n_new[i][q]; t++) {
                CHECK(seen.best[i][q][t] == tokens[i][q * T + t]);
            }
        }
    }
    CHECK_OK(branches_run(b, p + 2, 1)); /* slots used before */
    for (int32_t i = 0; i < N_PROMPTS; i++) {
        check_one(env, model, i, &p[i], &n_differ);
    }
    CHECK(n_differ > 3); /* 2 bits do matter here */
    /* forced tokens: what was decoded, fed again, is predicted again */
    p[2].forced = tokens[2];
    p[2].n_forced = n_new[2][0];
    p[2].tokens = again;
    p[2].signals = NULL;
    memset(&seen.best, 0, sizeof seen.best);
    CHECK_OK(branches_run(b, p + 2, 1));
    for (int32_t t = 0; t < p[2].n_forced; t++) {
        CHECK(seen.best[0][0][t] == tokens[2][t]);
    }
    branches_destroy(&b);
    engine_close(&e);
}

int main(int argc, char **argv)
{
    struct env env = {0};
    char folder[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], nested[GEN_PATH_BYTES];
    struct gen_model m = gen_model_default();
    struct nested_options o = {.n_threads = 1, .version = "test"};
    struct nested_report report;
    CHECK_OK(env_start(&env, &argc, &argv));
    log_set_level(LOG_ERROR);
    gen_folder(folder);
    gen_path(dense, folder, "dense");
    gen_path(nested, folder, "nested");
    m.eos = 33; /* some answers end early */
    CHECK_OK(fit_spec_make(&o.spec, 1u << 2 | 1u << 4, LEVEL_TIED, false, 32, NULL));
    CHECK(mkdir(dense, 0777) == 0);
    CHECK_OK(gen_model_write(dense, &m));
    CHECK_OK(nested_write(&report, dense, nested, &o));
    make_prompts();
    run(&env, nested);
    prompts_free(&prompts);
    gen_remove(folder);
    env_end(&env);
    return check_report();
}
