/* pmpd tune high: the high precision of a schedule, chosen as the method says: the lowest uniform
 * precision whose perplexity is as good as lossless. pmpd tune plan: tune_plan.c.
 * Source: PMPD (arXiv 2410.13461): "high" is the lowest lossless precision by C4 perplexity, "low"
 * the one below.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/args.h"
#include "experiments/cmd.h"
#include "experiments/engine.h"
#include "experiments/score.h"
#include "experiments/tune_plan.h"

static const char usage[] =
    "usage: pmpd tune high MODEL --text FILE [--loss 1%] [--reference DENSE] [--window W]\n"
    "       pmpd tune plan FILE.cfg --out DIR ... (pmpd tune plan --help explains)\n"
    "high finds the lowest uniform precision of a nested model whose perplexity on FILE is at most "
    "--loss\n"
    "above the reference: the high precision of a schedule; the one below is its low precision.\n"
    "  --text FILE        plain text, or JSON rows of ids (see pmpd perplexity --help)\n"
    "  --loss L           how much perplexity may rise, such as 1% (default) or 0.01\n"
    "  --reference DENSE  the unquantised model (default: the most bits that MODEL holds)\n"
    "  --window W         tokens of a window of plain text (default: the context, at most "
    "2048)\n" ARGS_COMMON_HELP "Example:\n"
    "  pmpd tune high nested --text wiki.txt --loss 1% --reference ~/models/llama\n";

/* One precision's result. */
struct row {
    int bits; /* 0: the reference */
    double perplexity;
};

struct tuning {
    struct row row[BITS_ALL]; /* (n) ascending bits */
    int n;
    double reference, loss;
    int high, low; /* bits; 0: none */
};

static enum status parse_loss(double *out, const char *text)
{
    char *end = NULL;
    double v = strtod(text, &end);
    bool percent = end != text && strcmp(end, "%") == 0;
    if (end == text || (*end != '\0' && !percent) || !(v >= 0)) {
        FAIL(ST_USER, "--loss: expected a share such as 1%% or 0.01, found \"%s\"", text);
    }
    *out = percent ? v / 100 : v;
    return ST_OK;
}

/* Scores a model at some of its levels: every precision held, or "max" alone. Fills row in order of
 * ascending bits. */
static enum status score_model(struct env *env, struct settings *s, const char *path,
                               const char *text, int32_t window, bool every, struct row *row,
                               int *n)
{
    struct engine e;
    struct windows w = {0};
    int32_t level[BITS_ALL];
    *n = 0;
    snprintf(s->model.path, sizeof s->model.path, "%s", path);
    enum status st = engine_open(&e, env, s);
    if (st == ST_OK) {
        int32_t most = e.context < WINDOW_DEFAULT ? e.context : WINDOW_DEFAULT;
        st = windows_read(&w, text, path, e.source.config.vocab, e.context, window ? window : most);
        for (int b = 1; st == ST_OK && every && b <= BITS_MAX; b++) {
            if (e.source.held >> b & 1) {
                char name[8];
                snprintf(name, sizeof name, "%d", b);
                row[*n].bits = b;
                st = level_table_add(&e.levels, name, &level[(*n)++]);
            }
        }
        if (st == ST_OK && !every) {
            row[0].bits = 0;
            *n = 1;
            st = level_table_add(&e.levels, "max", &level[0]);
        }
        if (st == ST_OK && *n == 0) {
            st = status_raise(ST_USER, __FILE__, __LINE__, __func__,
                              "%s is not nested, so there is no precision to choose; quantise it "
                              "first (pmpd quantize)",
                              path);
        }
        st = env_agree(env, st);
    }
    st = st ? st : engine_load(&e, s, false);
    for (int i = 0; st == ST_OK && i < *n; i++) {
        struct score sum = {0};
        st = engine_loop_end(env, score_by_prefill(&e, s, &w, level[i], &sum));
        row[i].perplexity = exp(sum.nll / (double)sum.n_tok);
    }
    windows_free(&w);
    engine_close(&e);
    return st;
}

static void choose(struct tuning *t)
{
    for (int i = t->n; i-- > 0;) { /* downwards, as long as nothing is lost */
        if (t->row[i].perplexity > t->reference * (1 + t->loss)) {
            break;
        }
        t->high = t->row[i].bits;
        t->low = i > 0 ? t->row[i - 1].bits : 0;
    }
}

static void print_json(const struct tuning *t, const char *model, const char *reference)
{
    json_t *rows = json_array();
    for (int i = 0; i < t->n; i++) {
        json_array_append_new(rows, json_pack("{s:i, s:f, s:f}", "bits", t->row[i].bits,
                                              "perplexity", t->row[i].perplexity, "loss",
                                              t->row[i].perplexity / t->reference - 1));
    }
    json_t *out =
        json_pack("{s:s, s:s, s:f, s:f, s:o, s:o, s:o}", "model", model, "reference", reference,
                  "reference_perplexity", t->reference, "loss", t->loss, "precisions", rows, "high",
                  t->high ? json_integer(t->high) : json_null(), "low",
                  t->low ? json_integer(t->low) : json_null());
    json_dumpf(out, stdout, JSON_REAL_PRECISION(9));
    json_decref(out);
    printf("\n");
}

static void print_text(const struct tuning *t, const char *reference)
{
    printf("%-12s %12s %10s\n", "precision", "perplexity", "loss");
    printf("%-12s %12.4f %10s   %s\n", "reference", t->reference, "", reference);
    for (int i = t->n; i-- > 0;) {
        const struct row *r = &t->row[i];
        printf("%d bits       %12.4f %+9.2f%%   %s\n", r->bits, r->perplexity,
               100 * (r->perplexity / t->reference - 1),
               r->bits == t->high  ? "<- high"
               : r->bits == t->low ? "<- low"
                                   : "");
    }
    if (!t->high) {
        printf("no precision is within %.3g%% of the reference\n", 100 * t->loss);
    }
}

enum status cmd_tune(struct env *env, int argc, char **argv)
{
    const char *text = NULL, *loss = "1%", *reference = NULL, *window_text = NULL;
    const struct arg_option own[] = {{"text", &text, NULL},
                                     {"loss", &loss, NULL},
                                     {"reference", &reference, NULL},
                                     {"window", &window_text, NULL},
                                     {NULL, NULL, NULL}};
    struct args a;
    struct tuning t = {0};
    long long window = 0;
    int n = 0;
    if (argc > 1 && strcmp(argv[1], "plan") == 0) {
        return tune_plan(env, argc - 1, argv + 1);
    }
    TRY(args_parse(&a, env, argc, argv, own, 2, usage));
    if (a.help) {
        fputs(env->rank == 0 ? usage : "", stdout);
        return ST_OK;
    }
    if (strcmp(a.word[0], "high") != 0) {
        FAIL(ST_USER, "tune knows \"high\" and \"plan\", found \"%s\"; %s", a.word[0],
             "pmpd tune --help explains");
    }
    if (!text) {
        FAIL(ST_USER, "tune high needs --text FILE");
    }
    TRY(parse_loss(&t.loss, loss));
    if (window_text) {
        TRY(args_number(&window, "--window", window_text, 2, INT32_MAX));
    }
    struct row first = {0};
    if (reference) {
        TRY(score_model(env, &a.settings, reference, text, (int32_t)window, false, &first, &n));
    }
    TRY(score_model(env, &a.settings, a.word[1], text, (int32_t)window, true, t.row, &t.n));
    t.reference = reference ? first.perplexity : t.row[t.n - 1].perplexity;
    choose(&t);
    if (env->rank == 0) {
        (void)(a.json
                   ? print_json(&t, a.word[1], reference ? reference : "most bits")
                   : print_text(&t, reference ? reference : "the most bits that the model holds"));
    }
    return ST_OK;
}
