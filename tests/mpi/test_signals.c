/* What policies see: the meter against sums by definition, the same bits on one rank and on
 * several; probes against the same token run at that level for good, and their divergence against
 * its definition over all logits; steps are the same bits with probes or without. All ranks form
 * one replica. SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/log.h"
#include "core/mem.h"
#include "core/policy.h"
#include "dist/shard.h"
#include "experiments/engine.h"
#include "experiments/quantise/nested_write.h"
#include "tests/gen.h"

enum { N_TOK = 3, N_SLOTS = 3, N_PROMPT = 9, N_STEPS = 5 };

/* ---- the meter ---- */

static float *random_floats(struct gen_rng *rng, size_t n)
{
    float *out = calloc(n, sizeof *out);
    for (size_t i = 0; out && i < n; i++) {
        out[i] = (float)(gen_normal(rng) + 0.5);
    }
    return out;
}

/* Columns begin..end of x (N_TOK, width). */
static float *columns(const float *x, int32_t width, int32_t begin, int32_t end)
{
    int32_t n = end - begin;
    float *out = calloc((size_t)N_TOK * (size_t)n, sizeof *out);
    for (int32_t t = 0; out && t < N_TOK; t++) {
        memcpy(out + t * n, x + t * width + begin, (size_t)n * sizeof *out);
    }
    return out;
}

/* Everything that goes into a pass, whole. */
struct inputs {
    float *hidden, *attn, *mlp, *o, *down, *k, *v;
};

static void measure(struct meter *m, const struct model_config *c, const struct model_shard *s,
                    const struct inputs *in)
{
    int32_t hd = c->head_dim;
    float *o = columns(in->o, c->n_heads * hd, s->head_begin * hd, s->head_end * hd);
    float *down = columns(in->down, c->ffn, s->ffn_begin, s->ffn_end);
    float *k = columns(in->k, c->n_kv_heads * hd, s->kv_begin * hd, s->kv_end * hd);
    float *v = columns(in->v, c->n_kv_heads * hd, s->kv_begin * hd, s->kv_end * hd);
    meter_begin(m, 1, N_TOK - 1); /* the first position is not asked for */
    for (int32_t l = 0; l < c->n_layers; l++) {
        CHECK_OK(meter_take_input(m, l, METER_ATTN, in->attn));
        CHECK_OK(meter_take_input(m, l, METER_O, o));
        CHECK_OK(meter_take_input(m, l, METER_MLP, in->mlp));
        CHECK_OK(meter_take_input(m, l, METER_DOWN, down));
    }
    CHECK_OK(meter_take_kv(m, k, v));
    CHECK_OK(meter_take_hidden(m, in->hidden));
    CHECK_OK(meter_end(m));
    free(o);
    free(down);
    free(k);
    free(v);
}

static void by_definition(double out[3], const float *x, int32_t width, int32_t row)
{
    double sum = 0, squares = 0;
    for (int32_t i = 0; i < width; i++) {
        double v = (double)x[row * width + i];
        sum += v;
        squares += v * v;
    }
    out[0] = sum / width;
    out[1] = squares / width - out[0] * out[0];
    out[2] = sqrt(squares);
}

static void test_meter(struct engine *e, bool reproducible)
{
    struct model_config c = e->source.config;
    struct model_shard mine, whole;
    struct shard_options so = {.size = e->coll.size, .reproducible = reproducible, .segments = 4};
    struct collective alone;
    struct meter *m = NULL, *one = NULL;
    struct gen_rng rng = {7};
    collective_local(&alone);
    CHECK_OK(shard_model(&mine, &c, 16, &so, e->coll.rank));
    so.size = 1;
    CHECK_OK(shard_model(&whole, &c, 16, &so, 0));
    size_t width = (size_t)(c.n_heads * c.head_dim), kv = (size_t)(c.n_kv_heads * c.head_dim);
    struct inputs in = {.hidden = random_floats(&rng, N_TOK * (size_t)c.hidden),
                        .attn = random_floats(&rng, N_TOK * (size_t)c.hidden),
                        .mlp = random_floats(&rng, N_TOK * (size_t)c.hidden),
                        .o = random_floats(&rng, N_TOK * width),
                        .down = random_floats(&rng, N_TOK * (size_t)c.ffn),
                        .k = random_floats(&rng, N_TOK * kv),
                        .v = random_floats(&rng, N_TOK * kv)};
    CHECK_OK(meter_create(&m, &e->be, &e->coll, &mine, &c, SIGNALS_MEASURED, N_TOK));
    CHECK_OK(meter_create(&one, &e->be, &alone, &whole, &c, SIGNALS_MEASURED, N_TOK));
    measure(one, &c, &whole, &in);
    for (int pass = 0; pass < 2; pass++) { /* the second without finding owners */
        measure(m, &c, &mine, &in);
    }
    size_t n_activation = 2 * (size_t)c.n_layers * M_N_ROLES;
    for (int32_t i = 0; i < N_TOK - 1; i++) {
        const struct measured *got = meter_of(m, i), *same = meter_of(one, i);
        double want[3];
        by_definition(want, in.hidden, c.hidden, i + 1);
        CHECK_NEAR(got->hidden_mean, want[0], 1e-6);
        CHECK_NEAR(got->hidden_rms, sqrt(want[1] + want[0] * want[0]), 1e-6);
        by_definition(want, in.k, (int32_t)kv, i + 1);
        CHECK_NEAR(got->k_norm, want[2], 1e-5);
        by_definition(want, in.v, (int32_t)kv, i + 1);
        CHECK_NEAR(got->v_norm, want[2], 1e-5);
        const float *const inputs[M_N_ROLES] = {in.attn, in.attn, in.attn, in.o,
                                                in.mlp,  in.mlp,  in.down};
        for (int32_t l = 0; l < c.n_layers; l++) {
            for (int r = 0; r < M_N_ROLES; r++) {
                const float *at = got->activation + 2 * (l * M_N_ROLES + r);
                int32_t n = r == M_O ? (int32_t)width : r == M_DOWN ? c.ffn : c.hidden;
                by_definition(want, inputs[r], n, i + 1);
                CHECK_NEAR(at[0], want[0], 1e-6);
                CHECK_NEAR(at[1], want[1], 1e-5);
            }
        }
        if (reproducible) {
            CHECK(got->hidden_mean == same->hidden_mean && got->hidden_rms == same->hidden_rms);
            CHECK(got->k_norm == same->k_norm && got->v_norm == same->v_norm);
            CHECK(memcmp(got->activation, same->activation, n_activation * sizeof(float)) == 0);
        }
    }
    meter_destroy(&m);
    meter_destroy(&one);
    float *const owned[] = {in.hidden, in.attn, in.mlp, in.o, in.down, in.k, in.v};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        free(owned[i]);
    }
}

/* ---- probes ---- */

static bool same_result(const struct token_result *a, const struct token_result *b)
{
    return a->token == b->token && a->logprob == b->logprob && a->entropy == b->entropy &&
           a->margin == b->margin && a->max_prob == b->max_prob;
}

static double kl_of(const float *p, const float *q, int32_t n)
{
    double sum_p = 0, sum_q = 0, kl = 0;
    for (int32_t i = 0; i < n; i++) {
        sum_p += exp((double)p[i]);
        sum_q += exp((double)q[i]);
    }
    for (int32_t i = 0; i < n; i++) {
        double lp = (double)p[i] - log(sum_p), lq = (double)q[i] - log(sum_q);
        kl += exp(lp) * (lp - lq);
    }
    return kl;
}

static void check_measured(struct engine *e, int32_t i, int32_t id, int32_t slot)
{
    const struct model_config *c = &e->source.config;
    const struct measured *m = decoder_measured(e->dec, i);
    int32_t n = decoder_n_filled(e->dec, slot), hd = c->head_dim;
    size_t one = (size_t)n * (size_t)hd, all = (size_t)c->n_kv_heads * one;
    float *features = calloc(2 * all, sizeof *features), *mean = calloc(2 * one, sizeof *mean);
    double squares[2] = {0}, norm = 0, sum = 0, sum_squares = 0;
    CHECK_OK(decoder_features(e->dec, slot, n, true, features));
    CHECK_OK(decoder_features(e->dec, slot, n, false, mean));
    for (int which = 0; which < 2; which++) {
        for (int32_t h = 0; h < c->n_kv_heads; h++) {
            const float *row = features + (size_t)which * all + (size_t)h * one + one - hd;
            for (int32_t j = 0; j < hd; j++) {
                squares[which] += (double)row[j] * (double)row[j];
            }
        }
        for (size_t j = 0; j < one; j++) {
            double heads = 0;
            for (int32_t h = 0; h < c->n_kv_heads; h++) {
                heads += (double)features[(size_t)which * all + (size_t)h * one + j];
            }
            CHECK_NEAR(mean[(size_t)which * one + j], heads / c->n_kv_heads, 1e-6);
        }
    }
    CHECK_NEAR(m->k_norm, sqrt(squares[0]), 1e-5 * sqrt(squares[0]));
    CHECK_NEAR(m->v_norm, sqrt(squares[1]), 1e-5 * sqrt(squares[1]));
    /* the first layer's input: the normed embedding */
    const uint16_t *x = (const uint16_t *)e->weights.embed.data + (size_t)id * (size_t)c->hidden;
    CHECK(e->weights.embed.dtype == DT_F16);
    const float *gain = e->weights.layers[0].attn_norm.gain.data;
    for (int32_t j = 0; j < c->hidden; j++) {
        norm += pow((double)f16_to_f32(x[j]), 2) / c->hidden;
    }
    for (int32_t j = 0; j < c->hidden; j++) {
        double v = (double)f16_to_f32(x[j]) / sqrt(norm + (double)c->norm_eps) * (double)gain[j];
        sum += v;
        sum_squares += v * v;
    }
    sum /= c->hidden;
    CHECK_NEAR(m->activation[2 * M_Q], sum, 1e-5);
    CHECK_NEAR(m->activation[2 * M_V + 1], sum_squares / c->hidden - sum * sum, 1e-5);
    for (int r = 0; r < c->n_layers * M_N_ROLES; r++) {
        CHECK(m->activation[2 * r + 1] > 0);
    }
    CHECK(m->hidden_rms > 0);
    free(features);
    free(mean);
}

static void test_probes(struct engine *e, int32_t high, int32_t low)
{
    struct token_result result, results[2 * N_SLOTS];
    struct pass_record pass;
    int32_t ids[N_PROMPT], last = 0, vocab = e->source.config.vocab;
    struct logit_want want = {.target = -1};
    for (int32_t i = 0; i < N_PROMPT; i++) {
        ids[i] = 11 + 13 * i;
    }
    for (int32_t slot = 0; slot < N_SLOTS; slot++) {
        CHECK_OK(decoder_prefill(e->dec, slot, ids, N_PROMPT, high, &want, 1, &result, &pass));
    }
    last = result.token;
    for (int step = 0; step < N_STEPS; step++) {
        bool is_last = step == N_STEPS - 1;
        /* slot 0 is probed, at its own level in the first step; slot 1 is not; slot 2 takes the
         * probe's level for good in the last step */
        int32_t probe = step == 0 ? high : low;
        struct decode_token tokens[] = {
            {.slot = 0, .id = last, .level = high, .want = want},
            {.slot = 0, .id = last, .level = probe, .probe = true, .want = want},
            {.slot = 1, .id = last, .level = high, .want = want},
            {.slot = 2, .id = last, .level = is_last ? low : high, .want = want}};
        CHECK_OK(decoder_step(e->dec, tokens, 4, results, &pass));
        CHECK(pass.n_slots == 3 && pass.n_tok == 4);
        CHECK(same_result(&results[0], &results[2]));
        CHECK(results[0].probe_kl == 0 && results[2].probe_kl == 0 && results[3].probe_kl == 0);
        if (step == 0) {
            CHECK(same_result(&results[0], &results[1]) && results[1].probe_kl == 0);
        } else {
            CHECK(results[1].probe_kl > 0);
        }
        if (is_last) {
            CHECK(same_result(&results[1], &results[3]));
            CHECK(!same_result(&results[0], &results[3]));
        }
        for (int32_t slot = 0; slot < N_SLOTS; slot++) {
            CHECK(decoder_n_filled(e->dec, slot) == N_PROMPT + step + 1);
        }
        float *logits = calloc(4 * (size_t)vocab, sizeof *logits);
        CHECK_OK(decoder_logits(e->dec, logits));
        double kl = kl_of(logits + vocab, logits, vocab);
        CHECK_NEAR(results[1].probe_kl, kl, 1e-6 + 1e-5 * kl);
        free(logits);
        check_measured(e, 2, last, 1);
        last = results[0].token;
    }
}

int main(int argc, char **argv)
{
    struct env env = {0};
    struct settings s;
    struct engine e;
    char folder[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], nested[GEN_PATH_BYTES];
    int32_t high = 0, low = 0;
    CHECK_OK(env_start(&env, &argc, &argv));
    log_set_level(LOG_ERROR);
    if (env.rank == 0) {
        gen_folder(folder);
    }
    MPI_Bcast(folder, sizeof folder, MPI_CHAR, 0, env.world);
    gen_path(dense, folder, "dense");
    gen_path(nested, folder, "nested");
    if (env.rank == 0) {
        struct gen_model m = gen_model_default();
        struct nested_options o = {.n_threads = 1, .version = "test"};
        struct nested_report report;
        char command[GEN_PATH_BYTES + 16];
        m.ffn = 256;
        m.hidden = 128; /* 8 heads of 16, 2 KV heads: three ranks share out both */
        m.n_heads = 8;
        CHECK_OK(fit_spec_make(&o.spec, 1u << 2 | 1u << 4, LEVEL_TIED, false, 32, NULL));
        snprintf(command, sizeof command, "mkdir %s", dense);
        CHECK(system(command) == 0);
        CHECK_OK(gen_model_write(dense, &m));
        CHECK_OK(nested_write(&report, dense, nested, &o));
    }
    MPI_Barrier(env.world);
    settings_default(&s);
    snprintf(s.model.path, sizeof s.model.path, "%s", nested);
    snprintf(s.kv.format, sizeof s.kv.format, "f32");
    s.parallel.tensor_ranks = env.size;
    s.parallel.reproducible = true;
    s.parallel.segments = 4;
    s.decode.slots = N_SLOTS;
    s.decode.prefill_chunk = 16;
    s.backend.threads = 1;
    CHECK_OK(engine_open(&e, &env, &s));
    CHECK_OK(level_table_add(&e.levels, "4", &high));
    CHECK_OK(level_table_add(&e.levels, "2", &low));
    e.policy_signals = SIGNALS_MEASURED;
    CHECK_OK(engine_load(&e, &s, true));
    test_meter(&e, true);
    test_meter(&e, false);
    test_probes(&e, high, low);
    engine_close(&e);
    MPI_Barrier(env.world);
    if (env.rank == 0) {
        gen_remove(folder);
    }
    int failed = check_report();
    env_end(&env);
    return failed;
}
