/* pmpd bench prefill: reading a prompt of a random model, with the logits of its last token.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/bench/rig.h"
#include "experiments/bench/statistics.h"
#include "experiments/engine.h"

const struct column bench_prefill_columns[] = {
    {"bits", "bits", 0},     {"threads", "threads", 0},
    {"ranks", "ranks", 0},   {"tokens", "tokens", 0},
    {"chunk", "chunk", 0},   {"tok_s_min", "tok/s min", 2},
    {"tok_s", "median", 2},  {"tok_s_max", "max", 2},
    {"gmac_s", "GMAC/s", 2}, {"bandwidth_gb_s", "memory GB/s", 2},
    {NULL, NULL, 0},
};

/* Multiply-adds of the linears for n tokens and of the head for one; attention is not counted. */
static double count_macs(const struct model_config *c, int32_t n_tok)
{
    double macs = 0;
    for (int r = 0; r < M_N_ROLES; r++) {
        int32_t n_rows = 0, n_cols = 0;
        if (model_has_role(c, (enum matrix_role)r)) {
            model_matrix_shape(c, (enum matrix_role)r, &n_rows, &n_cols);
            macs += (double)n_rows * n_cols * c->n_layers * n_tok;
        }
    }
    return macs + (double)c->vocab * c->hidden;
}

/* A prompt in chunks, from an empty slot. */
static enum status read_prompt(struct rig *rig, const struct bench_options *o, int bits,
                               const int32_t *ids, int32_t n_tok, double *seconds)
{
    struct logit_want want = {.target = -1};
    struct token_result result;
    struct pass_record pass;
    decoder_clear_slot(rig->dec, 0);
    double start = clock_s();
    for (int32_t at = 0; at < n_tok; at += o->chunk) {
        int32_t n = n_tok - at < o->chunk ? n_tok - at : o->chunk;
        TRY(decoder_prefill(rig->dec, 0, ids + at, n, rig->level[bits], &want, at + n == n_tok,
                            &result, &pass));
    }
    *seconds = clock_s() - start;
    return ST_OK;
}

static enum status add_row(const struct rig *rig, const struct bench_options *o, int bits,
                           int32_t n_tok, struct samples *times, double gb_s, json_t *root)
{
    struct spread t = samples_spread(times);
    double n = n_tok;
    return report_add(
        root, "rows",
        json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:f, s:f, s:f, s:f, s:f}", "shape",
                  o->shape, "bits", bits, "threads", rig->n_threads, "ranks", rig->env->size,
                  "tokens", (int)n_tok, "chunk", (int)o->chunk, "isa",
                  rig->be.ops->arithmetic(&rig->be), "group", (int)o->group, "tok_s_min", n / t.max,
                  "tok_s", n / t.median, "tok_s_max", n / t.min, "gmac_s",
                  1e-9 * count_macs(&rig->config, n_tok) / t.median, "bandwidth_gb_s", gb_s));
}

/* Prompts of one length, the levels in turn. */
static enum status run_length(struct rig *rig, const struct bench_options *o, const int32_t *ids,
                              int32_t n_tok, json_t *root)
{
    struct samples times[BITS_ALL] = {0};
    struct progress progress;
    double seconds, before, after;
    int done = 0;
    enum status st = ST_OK;
    for (int i = 0; i < o->bits.n; i++) {
        TRY_GOTO(st, samples_create(&times[i], o->rounds), done);
    }
    progress_begin(&progress, "prefill", "prompts", (double)o->rounds * o->bits.n);
    TRY_GOTO(st, read_prompt(rig, o, o->bits.value[0], ids, n_tok, &seconds), done);
    TRY_GOTO(st, rig_probe(rig, &before), done);
    for (int32_t r = 0; r < o->rounds; r++) {
        for (int i = 0; i < o->bits.n; i++) {
            TRY_GOTO(st, read_prompt(rig, o, o->bits.value[i], ids, n_tok, &seconds), done);
            samples_add(&times[i], seconds);
            progress_update(&progress, ++done);
        }
    }
    progress_end(&progress);
    TRY_GOTO(st, rig_probe(rig, &after), done);
    for (int i = 0; i < o->bits.n; i++) {
        TRY_GOTO(st,
                 add_row(rig, o, o->bits.value[i], n_tok, &times[i], (before + after) / 2, root),
                 done);
    }
done:
    for (int i = 0; i < o->bits.n; i++) {
        samples_free(&times[i]);
    }
    return st;
}

static enum status run_threads(struct rig *rig, const struct bench_options *o, int32_t longest,
                               json_t *root)
{
    int32_t *ids = NULL;
    double seconds;
    enum status st = MEM_NEW(&ids, longest);
    TRY_GOTO(st, st, done);
    for (int32_t i = 0; i < longest; i++) {
        ids[i] = (int32_t)((int64_t)i * 7919 % rig->config.vocab);
    }
    TRY_GOTO(st, read_prompt(rig, o, o->bits.value[0], ids, o->tokens.value[0], &seconds), done);
    TRY_GOTO(st, rig_memory(rig, root), done);
    for (int i = 0; i < o->tokens.n; i++) {
        TRY_GOTO(st, run_length(rig, o, ids, o->tokens.value[i], root), done);
    }
done:
    mem_free(ids);
    return st;
}

enum status bench_prefill(struct env *env, const struct bench_options *o, json_t *root)
{
    int32_t longest = rig_most(&o->tokens);
    for (int i = 0; i < o->threads.n; i++) {
        struct rig rig;
        struct rig_needs needs = {.max_tok = longest,
                                  .slots = {.n = 1, .value = {1}},
                                  .chunk = o->chunk,
                                  .bits = rig_bits(&o->bits),
                                  .n_threads = o->threads.value[i]};
        enum status st = rig_open(&rig, env, o, &needs);
        if (st == ST_OK) {
            st = engine_loop_end(env, run_threads(&rig, o, longest, root));
        }
        rig_close(&rig);
        TRY(st);
    }
    return ST_OK;
}
