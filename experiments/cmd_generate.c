/* pmpd generate: one prompt, text that streams as it comes (or ids).
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/session.h"
#include "experiments/args.h"
#include "experiments/cmd.h"
#include "experiments/engine.h"
#include "sched/registry.h"

static const char usage[] =
    "usage: pmpd generate MODEL --prompt TEXT [-n N] [--bits B] [--temperature T]\n"
    "         [--top-k K] [--top-p P] [--min-p M] [--seed S] [--ids]\n"
    "Continues a text with a model (a Hugging Face folder, or one made by pmpd quantize).\n"
    "  --prompt TEXT    what to continue; \"\" is allowed where the tokenizer adds a BOS token\n"
    "  -n N             at most N new tokens (default 128); ends at EOS\n"
    "  --prefill B      level of the prompt (default: as --bits)\n"
    "  --plan P         levels by step instead of --bits, e.g. \"prefill:4 0:4 16:2\"\n"
    "  --temperature T  0 is greedy (default), above it samples\n"
    "  --top-k K        sample from the K most likely tokens (default 0: all)\n"
    "  --top-p P        from the fewest of them whose probabilities reach P (default 1: all)\n"
    "  --min-p M        from those with at least M times the highest probability (default 0)\n"
    "  --seed S         of the sampler (default 0)\n"
    "  --ids            print token ids instead of text\n" ARGS_COMMON_HELP "Examples:\n"
    "  pmpd generate ~/models/llama --prompt \"Once upon a time\" -n 64\n"
    "  pmpd generate nested --prompt \"Once\" --plan \"prefill:4 0:4 16:2\" --temperature 0.8 "
    "--seed 7\n";

/* What the session's callbacks fill. */
struct listener {
    bool stream, ids, first;
    struct token_stream text;
    json_t *json_ids; /* NULL without --json */
    int32_t n_new;
    float prefill_s, decode_s;
    int32_t n_steps;
};

static void on_token(void *ctx, int32_t slot, int32_t token)
{
    struct listener *l = ctx;
    (void)slot;
    l->n_new++;
    if (l->json_ids) {
        json_array_append_new(l->json_ids, json_integer(token));
    }
    if (!l->stream) {
        return;
    }
    if (l->ids) {
        printf("%s%d", l->first ? "" : " ", token);
    } else {
        char piece[TOKENIZER_PIECE_BYTES];
        size_t n = token_stream_next(&l->text, token, piece, sizeof piece);
        fwrite(piece, 1, n, stdout);
    }
    l->first = false;
    fflush(stdout);
}

static enum status on_finished(void *ctx, const struct finished_record *record)
{
    struct listener *l = ctx;
    l->prefill_s = record->turns[0].prefill_s;
    l->decode_s = record->turns[0].decode_s;
    l->n_steps = record->turns[0].n_steps;
    return ST_OK;
}

static enum status print_json(const struct listener *l, const struct tokenizer *tok,
                              const struct prompt *prompt, const struct settings *s)
{
    size_t n = json_array_size(l->json_ids);
    int32_t *ids = NULL;
    char *text = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&ids, n + 1));
    for (size_t i = 0; i < n; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(l->json_ids, i));
    }
    TRY_GOTO(st, tokenizer_decode(tok, ids, (int32_t)n, false, &text), done);
    json_t *prompt_ids = json_array();
    for (int32_t i = 0; i < prompt->n_ids[0]; i++) {
        json_array_append_new(prompt_ids, json_integer(prompt->ids[0][i]));
    }
    json_t *out =
        json_pack("{s:s, s:o, s:O, s:s, s:s, s:i, s:f, s:f}", "model", s->model.path, "prompt_ids",
                  prompt_ids, "ids", l->json_ids, "text", text, "level", s->policy.level, "n_steps",
                  l->n_steps, "prefill_s", (double)l->prefill_s, "decode_s", (double)l->decode_s);
    if (!out || json_dumpf(out, stdout, JSON_REAL_PRECISION(9)) != 0) {
        st = status_raise(ST_IO, __FILE__, __LINE__, __func__, "cannot print the result");
    }
    printf("\n");
    json_decref(out);
done:
    mem_free(text);
    mem_free(ids);
    return st;
}

static enum status generate(struct engine *e, struct policy *policy, const struct settings *s,
                            const struct tokenizer *tok, const struct prompt *prompt, bool ids,
                            bool as_json)
{
    struct session *session = NULL;
    struct listener l = {.stream = e->env->rank == 0 && !as_json, .ids = ids, .first = true};
    const uint64_t key[2] = {0, 0};
    enum status st = ST_OK;
    if (as_json) {
        l.json_ids = json_array();
    }
    token_stream_begin(&l.text, tok, false);
    struct session_options o = {.n_slots = 1,
                                .prefill_chunk = s->decode.prefill_chunk,
                                .max_tok = e->context,
                                .max_turns = 1,
                                .max_new_tokens = s->decode.max_new_tokens,
                                .stop_at_eos = true,
                                .temperature = (float)s->decode.temperature,
                                .seed = (uint64_t)s->decode.seed,
                                .on_token = on_token,
                                .on_finished = on_finished,
                                .ctx = &l};
    TRY_GOTO(st,
             session_create(&session, e->dec, &e->coll, policy, &e->levels, &e->source.config, &o),
             done);
    TRY_GOTO(st, session_start(session, prompt, 0, key, 1, policy->dial), done);
    while (session_n_active(session) > 0) {
        TRY_GOTO(st, session_advance(session), done);
    }
    if (e->env->rank == 0 && as_json) {
        TRY_GOTO(st, print_json(&l, tok, prompt, s), done);
    } else if (e->env->rank == 0) {
        char piece[TOKENIZER_PIECE_BYTES];
        size_t n = ids ? 0 : token_stream_end(&l.text, piece, sizeof piece);
        fwrite(piece, 1, n, stdout);
        printf("\n");
        fflush(stdout);
        log_info("%d tokens; prefill %d tokens in %.2f s; %d steps in %.2f s (%.1f tokens/s)",
                 l.n_new, prompt->n_ids[0], (double)l.prefill_s, l.n_steps, (double)l.decode_s,
                 l.decode_s > 0 ? l.n_steps / (double)l.decode_s : 0.0);
    }
done:
    session_destroy(&session);
    json_decref(l.json_ids);
    return st;
}

/* Reads what the options say into the settings; the prompt's ids. */
static enum status prepare(struct engine *e, struct settings *s, struct tokenizer **tok,
                           struct prompt *prompt, const char *text, struct policy *policy)
{
    TRY(tokenizer_open(tok, s->model.path, e->source.config.vocab));
    TRY(tokenizer_encode(*tok, text, strlen(text), true, &prompt->ids[0], &prompt->n_ids[0]));
    prompt->n_turns = 1;
    if (prompt->n_ids[0] == 0) {
        FAIL(ST_USER, "the prompt is empty and this tokenizer adds no BOS token: write some text");
    }
    int64_t room = (int64_t)e->context - prompt->n_ids[0];
    if (room < 1) {
        FAIL(ST_USER, "the prompt has %d tokens, the context of the model %d: shorten it",
             prompt->n_ids[0], e->context);
    }
    if (s->decode.max_new_tokens > room) {
        log_info("-n %d is cut to the %lld tokens that are left of the context of %d",
                 s->decode.max_new_tokens, (long long)room, e->context);
        s->decode.max_new_tokens = (int32_t)room;
    }
    return registry_open_policy(policy, s, &e->levels);
}

/* A setting and what an option says about it; NULL: nothing. */
struct assignment {
    const char *key, *value;
};

static enum status apply_options(struct settings *s, const struct assignment *sets, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char assignment[SETTINGS_TEXT_BYTES + 64];
        if (sets[i].value) {
            snprintf(assignment, sizeof assignment, "%s=%s", sets[i].key, sets[i].value);
            TRY(settings_set(s, assignment));
        }
    }
    return ST_OK;
}

enum status cmd_generate(struct env *env, int argc, char **argv)
{
    const char *prompt_text = NULL, *n = NULL, *prefill = NULL, *plan = NULL, *temperature = NULL;
    const char *top_k = NULL, *top_p = NULL, *min_p = NULL, *seed = NULL;
    bool ids = false;
    const struct arg_option own[] = {
        {"prompt", &prompt_text, NULL},
        {"n", &n, NULL},
        {"prefill", &prefill, NULL},
        {"plan", &plan, NULL},
        {"seed", &seed, NULL},
        {"temperature", &temperature, NULL},
        {"top-k", &top_k, NULL},
        {"top-p", &top_p, NULL},
        {"min-p", &min_p, NULL},
        {"ids", NULL, &ids},
        {NULL, NULL, NULL},
    };
    struct args a;
    TRY(args_parse(&a, env, argc, argv, own, 1, usage));
    if (a.help) {
        fputs(env->rank == 0 ? usage : "", stdout);
        return ST_OK;
    }
    if (!prompt_text) {
        FAIL(ST_USER, "generate needs --prompt TEXT");
    }
    const struct assignment sets[] = {
        {"decode.max_new_tokens", n},
        {"policy.prefill", prefill},
        {"decode.temperature", temperature},
        {"decode.top_k", top_k},
        {"decode.top_p", top_p},
        {"decode.min_p", min_p},
        {"decode.seed", seed},
        {"policy.switches", plan},
        {"policy.name", plan ? "static" : NULL},
    };
    TRY(apply_options(&a.settings, sets, sizeof sets / sizeof *sets));
    struct engine e;
    struct tokenizer *tok = NULL;
    struct prompt prompt = {0};
    struct policy policy = {0};
    enum status st = engine_open(&e, env, &a.settings);
    if (st == ST_OK) {
        st = env_agree(env, prepare(&e, &a.settings, &tok, &prompt, prompt_text, &policy));
    }
    if (st == ST_OK) {
        e.policy_signals = policy.ops->needs;
        st = engine_load(&e, &a.settings, policy.ops->adds_tokens);
    }
    if (st == ST_OK) {
        st = generate(&e, &policy, &a.settings, tok, &prompt, ids, a.json);
        st = engine_loop_end(env, st);
    }
    policy_close(&policy);
    tokenizer_close(&tok);
    mem_free(prompt.ids[0]);
    engine_close(&e);
    return st;
}
