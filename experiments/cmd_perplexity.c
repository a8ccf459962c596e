/* pmpd perplexity: how well a model predicts a text, through prefill or through the decode path.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/plan.h"
#include "experiments/args.h"
#include "experiments/cmd.h"
#include "experiments/engine.h"
#include "experiments/score.h"

static const char usage[] =
    "usage: pmpd perplexity MODEL FILE [--bits B | --plan P] [--window W]\n"
    "exp of the mean negative log-likelihood (nats per token) of FILE under the model.\n"
    "FILE is plain text, cut into non-overlapping windows of W tokens: where the tokenizer adds a\n"
    "BOS token every window is BOS and W - 1 tokens of text, else W tokens of text; the first "
    "token\n"
    "of a window is never scored, the last window may be shorter. Or FILE is JSON,\n"
    "{\"ids\": [[...], ...], \"first_scored_position\": k}: every row is a window as it stands "
    "(with\n"
    "its BOS, if it has one), positions before k (default 1) are context and not scored.\n"
    "  --window W       tokens of a window of plain text (default: the context, at most 2048)\n"
    "  --plan P         score through the decode path: positions before k are prefilled, then one\n"
    "                   step per token at the plan's level, e.g. \"prefill:4 0:4 "
    "16:2\"\n" ARGS_COMMON_HELP "Examples:\n"
    "  pmpd perplexity nested wiki.txt --bits 3 --window 512\n"
    "  pmpd perplexity nested eval.json --plan \"prefill:4 0:4 64:2\" --json\n";

static void print_score(const struct score *sum, const struct windows *w, const struct settings *s,
                        const char *plan, bool as_json)
{
    double n = (double)sum->n_tok, mean = sum->nll / n;
    if (as_json) {
        json_t *out = json_pack("{s:s, s:s, s:f, s:f, s:I, s:i, s:f, s:f}", "model", s->model.path,
                                plan ? "plan" : "level", plan ? plan : s->policy.level,
                                "perplexity", exp(mean), "nll", mean, "tokens",
                                (json_int_t)sum->n_tok, "windows", (int)w->n, "average_bits",
                                sum->bits / n, "argmax_accuracy", (double)sum->n_right / n);
        json_dumpf(out, stdout, JSON_REAL_PRECISION(12));
        json_decref(out);
        printf("\n");
        return;
    }
    printf("perplexity       %.4f\n", exp(mean));
    printf("nats per token   %.6f\n", mean);
    printf("tokens scored    %lld in %d windows\n", (long long)sum->n_tok, w->n);
    printf("average bits     %.3f (%s %s)\n", sum->bits / n, plan ? "plan" : "level",
           plan ? plan : s->policy.level);
    printf("argmax accuracy  %.2f %%\n", 100 * (double)sum->n_right / n);
}

static enum status prepare(struct engine *e, struct settings *s, const char *path,
                           const char *window_text, const char *plan_text, struct windows *w,
                           struct plan *plan, int32_t *level)
{
    long long window = e->context < WINDOW_DEFAULT ? e->context : WINDOW_DEFAULT;
    if (window_text) {
        TRY(args_number(&window, "--window", window_text, 2, INT32_MAX));
    }
    TRY(windows_read(w, path, s->model.path, e->source.config.vocab, e->context, (int32_t)window));
    if (plan_text) {
        TRY(plan_create(plan, e->context));
        return plan_parse(plan, &e->levels, plan_text, "max");
    }
    return level_table_add(&e->levels, s->policy.level, level);
}

enum status cmd_perplexity(struct env *env, int argc, char **argv)
{
    const char *window = NULL, *plan_text = NULL;
    const struct arg_option own[] = {
        {"window", &window, NULL}, {"plan", &plan_text, NULL}, {NULL, NULL, NULL}};
    struct args a;
    struct engine e;
    struct windows w = {0};
    struct plan plan = {0};
    struct score sum = {0};
    int32_t level = 0;
    TRY(args_parse(&a, env, argc, argv, own, 2, usage));
    if (a.help) {
        fputs(env->rank == 0 ? usage : "", stdout);
        return ST_OK;
    }
    a.settings.decode.slots = plan_text ? SCORE_DECODE_WINDOWS : 1;
    enum status st = engine_open(&e, env, &a.settings);
    if (st == ST_OK) {
        st = env_agree(env,
                       prepare(&e, &a.settings, a.word[1], window, plan_text, &w, &plan, &level));
    }
    st = st ? st : engine_load(&e, &a.settings, false);
    if (st == ST_OK) {
        st = plan_text ? score_by_decode(&e, &a.settings, &w, &plan, &sum)
                       : score_by_prefill(&e, &a.settings, &w, level, &sum);
        st = engine_loop_end(env, st);
    }
    if (st == ST_OK && env->rank == 0) {
        print_score(&sum, &w, &a.settings, plan_text, a.json);
    }
    plan_free(&plan);
    windows_free(&w);
    engine_close(&e);
    return st;
}
