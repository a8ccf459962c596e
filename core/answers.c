/* answers.jsonl: one object per finished prompt in the schema that evaluation scripts of the field
 * read (FastChat and its descendants), with the precision that each answer was decoded at.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/metrics.h"
#include "core/replace.h"
#include "core/runfile.h"

/* jansson takes UTF-8 only; a folder's name in model_id may be anything. */
static json_t *text_or_ascii(const char *text)
{
    json_t *json = json_string(text ? text : "");
    if (json) {
        return json;
    }
    char *copy = NULL;
    if (mem_strdup(&copy, text) != ST_OK) {
        return NULL;
    }
    for (char *p = copy; *p; p++) {
        *p = (unsigned char)*p < 0x80 ? *p : '?';
    }
    json = json_string(copy);
    mem_free(copy);
    return json;
}

static json_t *number_or_null(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

/* The text of token 0 and the tokens of the turn's steps. */
static enum status turn_text(json_t **out, const struct run_contents *run,
                             const struct turn_record *turn, const struct step_record *steps)
{
    enum status st = ST_OK;
    int32_t *ids = NULL;
    char *text = NULL;
    if (run->tokenizer) {
        TRY(MEM_NEW(&ids, (size_t)turn->n_steps + 1));
        ids[0] = turn->token0;
        for (int i = 0; i < turn->n_steps; i++) {
            ids[i + 1] = steps[i].token;
        }
        TRY_GOTO(st, tokenizer_decode(run->tokenizer, ids, turn->n_steps + 1, true, &text), done);
    }
    *out = text_or_ascii(text);
done:
    mem_free(text);
    mem_free(ids);
    return st;
}

/* {"4": 12, "3": 52}: steps of each level, in the order of their first use. */
static json_t *precision_log(const struct run_contents *run, const struct turn_record *turn,
                             const struct step_record *steps)
{
    json_t *log = json_object();
    for (int i = 0; log && i < turn->n_steps; i++) {
        const char *level = run->levels->level[steps[i].level].text;
        json_int_t n = json_integer_value(json_object_get(log, level));
        if (json_object_set_new(log, level, json_integer(n + 1)) != 0) {
            json_decref(log);
            log = NULL;
        }
    }
    return log;
}

/* json_*_new functions take their value even when they fail, and fail on NULL, so that one check of
 * all results at the end is enough. */
static enum status answer_line(json_t **out, const struct run_contents *run,
                               const struct finished_record *r)
{
    enum status st = ST_OK;
    json_t *answer = json_object(), *choice = json_object(), *choices = json_array();
    json_t *turns = json_array(), *new_tokens = json_array(), *wall_time = json_array();
    json_t *logs = json_array(), *prefill = json_array();
    const struct step_record *steps = r->steps;
    int bad = 0;
    for (int i = 0; i < r->n_turns; i++) {
        const struct turn_record *t = &r->turns[i];
        json_t *text = NULL;
        TRY_GOTO(st, turn_text(&text, run, t, steps), done);
        bad |= json_array_append_new(turns, text);
        bad |= json_array_append_new(new_tokens, json_integer(t->n_new_tok));
        bad |= json_array_append_new(wall_time,
                                     number_or_null((double)t->prefill_s + (double)t->decode_s));
        bad |= json_array_append_new(logs, precision_log(run, t, steps));
        bad |=
            json_array_append_new(prefill, json_string(run->levels->level[t->prefill_level].text));
        steps += t->n_steps;
    }
    bad |= json_object_set_new(answer, "question_id",
                               text_or_ascii(run->prompts->prompt[r->ordinal].id));
    bad |= json_object_set_new(answer, "model_id", text_or_ascii(run->model_id));
    bad |= json_object_set_new(choice, "index", json_integer(0));
    bad |= json_object_set(choice, "turns", turns);
    bad |= json_object_set(choice, "new_tokens", new_tokens);
    bad |= json_object_set(choice, "wall_time", wall_time);
    bad |= json_object_set(choice, "precision_log", logs);
    bad |= json_object_set(choice, "prefill_level", prefill);
    bad |= json_array_append(choices, choice);
    bad |= json_object_set(answer, "choices", choices);
    bad |= json_object_set_new(answer, "tstamp", number_or_null(r->started_unix_s + r->wall_s));
    if (bad) {
        FAIL_GOTO(st, ST_NOMEM, done, "out of memory for the answer of prompt %lld",
                  (long long)r->ordinal);
    }
    *out = json_incref(answer);
done:
    json_decref(prefill);
    json_decref(logs);
    json_decref(wall_time);
    json_decref(new_tokens);
    json_decref(turns);
    json_decref(choices);
    json_decref(choice);
    json_decref(answer);
    return st;
}

static enum status write_lines(FILE *out, const struct run_contents *run, const char *path)
{
    for (int i = 0; i < run->n_finished; i++) {
        json_t *answer = NULL;
        TRY(answer_line(&answer, run, &run->finished[i]));
        int failed = json_dumpf(answer, out, JSON_REAL_PRECISION(15)) != 0 || fputc('\n', out) < 0;
        json_decref(answer);
        if (failed) {
            FAIL(ST_IO, "%s: write failed: %s; %s", path, strerror(errno), replace_advice(errno));
        }
    }
    return ST_OK;
}

enum status answers_write(const char *path, const struct run_contents *run)
{
    enum status st = ST_OK;
    char *temporary = NULL;
    FILE *out = NULL;
    TRY(run_contents_check(run));
    TRY(replace_name(&temporary, path));
    out = fopen(temporary, "wb");
    if (!out) {
        FAIL_GOTO(st, ST_IO, done, "%s: cannot create %s: %s; %s", path, temporary, strerror(errno),
                  replace_advice(errno));
    }
    TRY_GOTO(st, write_lines(out, run, path), done);
    FILE *closing = out;
    out = NULL;
    if (fclose(closing) != 0) {
        FAIL_GOTO(st, ST_IO, done, "%s: write failed: %s; %s", path, strerror(errno),
                  replace_advice(errno));
    }
    TRY_GOTO(st, replace_commit(temporary, path), done);
done:
    if (out) {
        fclose(out);
    }
    if (st != ST_OK) {
        replace_abandon(temporary);
    }
    mem_free(temporary);
    return st;
}
