/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/cost_table.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/replace.h"

/* Enough for caches to be warm; the least of the repetitions is the one that nothing disturbed. */
enum { WARM = 2, REPETITIONS = 9, CONTEXT_TOK = 16 };
enum { LINE_BYTES = LEVEL_TEXT_BYTES + 32, MOST_BYTES = LEVEL_TABLE_MAX * LINE_BYTES };

/* The file's text, and its digest into the table. */
static void print_table(char text[MOST_BYTES], struct cost_table *t,
                        const struct level_table *levels)
{
    size_t n = 0;
    for (int32_t i = 0; i < t->n; i++) {
        n += (size_t)snprintf(text + n, LINE_BYTES, "%.9g %s\n", t->ms[i], levels->level[i].text);
    }
    XXH128_hash_t h = XXH3_128bits(text, n);
    snprintf(t->digest, sizeof t->digest, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
}

static enum status read_line(struct cost_table *t, char *line, int number, const char *path,
                             const struct level_table *levels)
{
    char *end = NULL;
    double ms = strtod(line, &end);
    if (end == line || *end != ' ' || !isfinite(ms) || ms <= 0) {
        FAIL(ST_FORMAT,
             "%s:%d: expected milliseconds and a level, found \"%.60s\"; remove the file, then the "
             "costs are measured again (and the run begins anew)",
             path, number, line);
    }
    for (int32_t i = 0; i < levels->n; i++) {
        if (strcmp(levels->level[i].text, end + 1) == 0) {
            t->ms[i] = ms;
        }
    }
    return ST_OK;
}

enum status cost_table_read(struct cost_table *out, bool *found, const char *dir,
                            const struct level_table *levels)
{
    char path[SETTINGS_PATH_BYTES + 32], text[MOST_BYTES], *whole = NULL, *rest = NULL;
    enum status st = ST_OK;
    int number = 0;
    *out = (struct cost_table){.n = levels->n};
    snprintf(path, sizeof path, "%s/costs.txt", dir);
    *found = access(path, F_OK) == 0;
    if (!*found) {
        return ST_OK;
    }
    TRY(settings_read_file(&whole, path));
    for (char *line = strtok_r(whole, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        TRY_GOTO(st, read_line(out, line, ++number, path, levels), done);
    }
    for (int32_t i = 0; i < levels->n; i++) {
        if (out->ms[i] <= 0) {
            FAIL_GOTO(st, ST_FORMAT, done,
                      "%s has no cost of level %s: was it measured for another policy? Take "
                      "another output.dir, or remove the file (the run then begins anew)",
                      path, levels->level[i].text);
        }
    }
    print_table(text, out, levels);
done:
    mem_free(whole);
    return st;
}

enum status cost_table_write(struct cost_table *t, const char *dir,
                             const struct level_table *levels)
{
    char path[SETTINGS_PATH_BYTES + 32], text[MOST_BYTES];
    snprintf(path, sizeof path, "%s/costs.txt", dir);
    print_table(text, t, levels);
    return replace_with(path, text, strlen(text));
}

/* Slots with a few tokens in each. */
static enum status fill_slots(struct engine *e, int32_t n_slots, int32_t n_tok)
{
    int32_t ids[CONTEXT_TOK] = {0};
    struct pass_record pass;
    for (int32_t slot = 0; slot < n_slots; slot++) {
        decoder_clear_slot(e->dec, slot);
        TRY(decoder_prefill(e->dec, slot, ids, n_tok, 0, NULL, 0, NULL, &pass));
    }
    return ST_OK;
}

static enum status measure(struct cost_table *t, struct engine *e, const struct settings *s,
                           struct decode_token *tokens, struct token_result *results)
{
    int32_t n = s->decode.slots, n_tok = s->decode.prefill_chunk;
    n_tok = n_tok < CONTEXT_TOK ? n_tok : CONTEXT_TOK;
    n_tok = n_tok < e->context ? n_tok : e->context - 1;
    for (int32_t level = 0; level < t->n; level++) {
        t->ms[level] = INFINITY;
        for (int i = 0; i < WARM + REPETITIONS; i++) {
            struct pass_record pass;
            TRY(fill_slots(e, n, n_tok));
            for (int32_t slot = 0; slot < n; slot++) {
                tokens[slot] =
                    (struct decode_token){.slot = slot, .level = level, .want = {.target = -1}};
            }
            TRY(decoder_step(e->dec, tokens, n, results, &pass));
            double ms = 1e-3 * (double)pass.time_us / n;
            t->ms[level] = i >= WARM && ms < t->ms[level] ? ms : t->ms[level];
        }
        t->ms[level] = t->ms[level] > 1e-6 ? t->ms[level] : 1e-6; // a clock that stood still
    }
    for (int32_t slot = 0; slot < n; slot++) {
        decoder_clear_slot(e->dec, slot);
    }
    return ST_OK;
}

enum status cost_table_measure(struct cost_table *out, struct engine *e,
                               const struct settings *settings)
{
    struct decode_token *tokens = NULL;
    struct token_result *results = NULL;
    enum status st = ST_OK;
    *out = (struct cost_table){.n = e->levels.n};
    if (e->env->replica >= 0) {
        TRY_GOTO(st, MEM_NEW(&tokens, settings->decode.slots), done);
        TRY_GOTO(st, MEM_NEW(&results, settings->decode.slots), done);
        TRY_GOTO(st, measure(out, e, settings, tokens, results), done);
    }
done:
    mem_free(tokens);
    mem_free(results);
    TRY(env_agree(e->env, st));
    TRY_MPI(MPI_Bcast(out->ms, LEVEL_TABLE_MAX, MPI_DOUBLE, e->env->n_service, e->env->world));
    return ST_OK;
}
