/* SPDX-License-Identifier: Apache-2.0 */
#include "core/recorded.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "core/h5.h"
#include "core/mem.h"
#include "core/prompts.h"
#include "core/runfile_internal.h"

#define N_OF(a) ((int)(sizeof(a) / sizeof(a)[0]))
#define COLUMN(row, f, kind)                  \
    {                                         \
#f, kind, offsetof(row, f), 0, "", "" \
    }

static const char *const fact_keys[] = {"program",
                                        "git_revision",
                                        "compiler",
                                        "compiler_flags",
                                        "mpi",
                                        "hdf5",
                                        "libconfig",
                                        "written_utc",
                                        "host",
                                        "world_size",
                                        "replicas",
                                        "tensor_ranks",
                                        "model_digest",
                                        "model_path",
                                        "backend",
                                        "arithmetic",
                                        "kv_format",
                                        "product",
                                        "prompts_digest",
                                        "prompts_path",
                                        "policy",
                                        NULL};

/* ---- levels and plans ---- */

static enum status read_levels(struct recorded *r, hid_t file)
{
    struct row {
        const char *text;
        int32_t id;
    };
    static const struct h5_column columns[] = {COLUMN(struct row, text, COL_TEXT),
                                               COLUMN(struct row, id, COL_I32)};
    struct h5_rows t;
    enum status st = ST_OK;
    TRY(h5_rows_read(&t, file, "levels", columns, N_OF(columns), sizeof(struct row),
                     LEVEL_TABLE_MAX));
    TRY_GOTO(st, MEM_NEW(&r->level, t.n), done);
    r->n_levels = (int32_t)t.n;
    for (int32_t i = 0; i < r->n_levels; i++) {
        const struct row *row = (const struct row *)t.rows + i;
        if (row->id != i || !row->text || strlen(row->text) >= sizeof r->level[i]) {
            FAIL_GOTO(st, ST_FORMAT, done,
                      "row %d of /levels: expected id %d and a text of 1 to %d bytes", i, i,
                      LEVEL_TEXT_BYTES - 1);
        }
        snprintf(r->level[i], sizeof r->level[i], "%s", row->text);
    }
done:
    h5_rows_free(&t);
    return st;
}

static enum status check_level(const struct recorded *r, int32_t level, const char *table,
                               int64_t row)
{
    if (level < 0 || level >= r->n_levels) {
        FAIL(ST_FORMAT, "row %lld of %s names level %d; the file has %d levels", (long long)row,
             table, level, r->n_levels);
    }
    return ST_OK;
}

/* Rows are in order of prompt and turn, and no turn is left out. */
static enum status check_order(const struct recorded_turn *u, int64_t i, const char *table)
{
    const struct recorded_turn *before = i > 0 ? u - 1 : NULL;
    bool first = u->turn == 0 && u->prompt >= 0 && (!before || u->prompt > before->prompt);
    bool next = before && u->prompt == before->prompt && u->turn == before->turn + 1;
    if ((!first && !next) || u->turn >= PROMPT_MAX_TURNS) {
        FAIL(ST_FORMAT,
             "row %lld of %s is about prompt %d, turn %d; expected ascending prompts, each with "
             "its turns from 0",
             (long long)i, table, u->prompt, u->turn);
    }
    return ST_OK;
}

static enum status read_switches(struct recorded *r, int64_t *n, hid_t file)
{
    struct row {
        int32_t prompt, turn, step, level;
    };
    static const struct h5_column columns[] = {
        COLUMN(struct row, prompt, COL_I32), COLUMN(struct row, turn, COL_I32),
        COLUMN(struct row, step, COL_I32), COLUMN(struct row, level, COL_I32)};
    struct h5_rows t;
    enum status st = ST_OK;
    const struct recorded_turn *u = r->turns;
    int64_t k = 0; /* of the switches of *u */
    TRY(h5_rows_read(&t, file, "plan_switches", columns, N_OF(columns), sizeof(struct row),
                     INT32_MAX));
    *n = (int64_t)t.n;
    TRY_GOTO(st, MEM_NEW(&r->switches, t.n), done);
    for (int64_t i = 0; i < *n; i++, k++) {
        const struct row *row = (const struct row *)t.rows + i;
        while (u < r->turns + r->n_turns && k >= u->n_switches) {
            u++;
            k = 0;
        }
        if (u == r->turns + r->n_turns || row->prompt != u->prompt || row->turn != u->turn) {
            FAIL_GOTO(st, ST_FORMAT, done,
                      "row %lld of /plan_switches is about prompt %d, turn %d; /plans has another "
                      "turn there",
                      (long long)i, row->prompt, row->turn);
        }
        if (k == 0 ? row->step != 0 : row->step <= r->switches[i - 1].step) {
            FAIL_GOTO(st, ST_FORMAT, done,
                      "row %lld of /plan_switches: prompt %d, turn %d has a switch at step %d; "
                      "expected step 0 first, then ascending steps",
                      (long long)i, row->prompt, row->turn, row->step);
        }
        TRY_GOTO(st, check_level(r, row->level, "/plan_switches", i), done);
        r->switches[i] = (struct plan_switch){row->step, row->level};
    }
done:
    h5_rows_free(&t);
    return st;
}

static enum status read_plans(struct recorded *r, hid_t file)
{
    struct row {
        int64_t first_switch;
        int32_t prompt, turn, prefill_level, n_switches;
    };
    static const struct h5_column columns[] = {
        COLUMN(struct row, first_switch, COL_I64), COLUMN(struct row, prompt, COL_I32),
        COLUMN(struct row, turn, COL_I32), COLUMN(struct row, prefill_level, COL_I32),
        COLUMN(struct row, n_switches, COL_I32)};
    struct h5_rows t;
    enum status st = ST_OK;
    int64_t at = 0, n_switches = 0;
    TRY(h5_rows_read(&t, file, "plans", columns, N_OF(columns), sizeof(struct row), INT32_MAX));
    TRY_GOTO(st, MEM_NEW(&r->turns, t.n), done);
    r->n_turns = (int64_t)t.n;
    for (int64_t i = 0; i < r->n_turns; i++) {
        const struct row *row = (const struct row *)t.rows + i;
        r->turns[i] = (struct recorded_turn){.prompt = row->prompt,
                                             .turn = row->turn,
                                             .prefill_level = row->prefill_level,
                                             .n_switches = row->n_switches};
        TRY_GOTO(st, check_order(&r->turns[i], i, "/plans"), done);
        TRY_GOTO(st, check_level(r, row->prefill_level, "/plans", i), done);
        if (row->n_switches < 0 || row->first_switch != at) {
            FAIL_GOTO(st, ST_FORMAT, done,
                      "row %lld of /plans has %d switches from row %lld; expected them from row "
                      "%lld",
                      (long long)i, row->n_switches, (long long)row->first_switch, (long long)at);
        }
        at += row->n_switches;
    }
    TRY_GOTO(st, read_switches(r, &n_switches, file), done);
    if (n_switches != at) {
        FAIL_GOTO(st, ST_FORMAT, done, "/plan_switches has %lld rows; /plans expects %lld",
                  (long long)n_switches, (long long)at);
    }
    at = 0;
    for (int64_t i = 0; i < r->n_turns; i++) {
        r->turns[i].switches = r->switches + at;
        at += r->turns[i].n_switches;
    }
done:
    h5_rows_free(&t);
    return st;
}

static void digest_plans(struct recorded *r)
{
    XXH3_state_t *state = XXH3_createState();
    INVARIANT(state != NULL);
    XXH3_128bits_reset(state);
    for (int32_t i = 0; i < r->n_levels; i++) {
        XXH3_128bits_update(state, r->level[i], strlen(r->level[i]) + 1);
    }
    for (int64_t i = 0; i < r->n_turns; i++) {
        const struct recorded_turn *u = &r->turns[i];
        const int32_t head[4] = {u->prompt, u->turn, u->prefill_level, u->n_switches};
        XXH3_128bits_update(state, head, sizeof head);
        XXH3_128bits_update(state, u->switches, (size_t)u->n_switches * sizeof *u->switches);
    }
    XXH128_hash_t h = XXH3_128bits_digest(state);
    XXH3_freeState(state);
    snprintf(r->digest, sizeof r->digest, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
}

static enum status read_failed(struct recorded *r, hid_t file)
{
    struct row {
        int32_t prompt;
    };
    static const struct h5_column columns[] = {COLUMN(struct row, prompt, COL_I32)};
    struct h5_rows t;
    enum status st = ST_OK;
    TRY(h5_rows_read(&t, file, "failed", columns, N_OF(columns), sizeof(struct row), INT32_MAX));
    TRY_GOTO(st, MEM_NEW(&r->failed, t.n), done);
    for (uint64_t i = 0; i < t.n; i++) {
        const struct row *row = (const struct row *)t.rows + i;
        if (row->prompt < 0 || recorded_find(r, row->prompt, 0)) {
            FAIL_GOTO(st, ST_FORMAT, done,
                      "row %llu of /failed names prompt %d; expected a prompt without a plan",
                      (unsigned long long)i, row->prompt);
        }
        r->failed[r->n_failed++] = row->prompt;
    }
done:
    h5_rows_free(&t);
    return st;
}

/* ---- tokens ---- */

struct prompt_row {
    const char *id;
    int32_t prompt, turn, n_prompt_tok, n_new_tok, prefill_level, token0;
    float logprob0, entropy0, margin0;
};

static enum status check_prompt_row(const struct prompt_row *row, const struct recorded_turn *u,
                                    int64_t i)
{
    if (row->prompt != u->prompt || row->turn != u->turn ||
        row->prefill_level != u->prefill_level) {
        FAIL(ST_FORMAT,
             "row %lld of /prompts is prompt %d, turn %d, prefill at level %d; /plans has prompt "
             "%d, turn %d, level %d there",
             (long long)i, row->prompt, row->turn, row->prefill_level, u->prompt, u->turn,
             u->prefill_level);
    }
    if (row->n_new_tok < 1 || row->n_prompt_tok < 1) {
        FAIL(ST_FORMAT, "row %lld of /prompts: prompt %d, turn %d has %d prompt and %d new tokens",
             (long long)i, row->prompt, row->turn, row->n_prompt_tok, row->n_new_tok);
    }
    return ST_OK;
}

struct step_row {
    int32_t prompt, turn, step, level, token;
    float logprob, entropy, margin;
};

/* What the plan says of a step; k walks along with the steps. */
static int32_t planned_level(const struct recorded_turn *u, int32_t *k, int32_t step)
{
    while (*k + 1 < u->n_switches && u->switches[*k + 1].step <= step) {
        (*k)++;
    }
    return *k < u->n_switches ? u->switches[*k].level : -1;
}

static enum status take_steps(struct recorded *r, const struct step_row *row)
{
    const struct step_row *first = row;
    struct recorded_token *at = r->tokens;
    for (const struct recorded_turn *u = r->turns; u < r->turns + r->n_turns; u++) {
        int32_t k = 0;
        at++; // token 0 came from prefill
        for (int32_t step = 0; step + 1 < u->n_tokens; step++, row++, at++) {
            if (row->prompt != u->prompt || row->turn != u->turn || row->step != step) {
                FAIL(ST_FORMAT,
                     "row %lld of /steps is prompt %d, turn %d, step %d; expected prompt %d, turn "
                     "%d, step %d",
                     (long long)(row - first), row->prompt, row->turn, row->step, u->prompt,
                     u->turn, step);
            }
            if (row->level != planned_level(u, &k, step)) {
                FAIL(ST_FORMAT,
                     "/steps and /plan_switches disagree: prompt %d, turn %d, step %d ran at level "
                     "%d, its plan says %d",
                     u->prompt, u->turn, step, row->level, planned_level(u, &k, step));
            }
            *at = (struct recorded_token){row->level, row->token, row->logprob, row->entropy,
                                          row->margin};
        }
        if (u->n_switches > 0 && u->switches[u->n_switches - 1].step > u->n_tokens - 2) {
            FAIL(ST_FORMAT,
                 "/plan_switches has a switch at step %d of prompt %d, turn %d, which took %d "
                 "steps",
                 u->switches[u->n_switches - 1].step, u->prompt, u->turn, u->n_tokens - 1);
        }
    }
    return ST_OK;
}

/* Rows of /prompts are the turns of /plans. */
static enum status take_prompts(struct recorded *r, const struct prompt_row *rows)
{
    size_t ids_bytes = 0;
    for (int64_t i = 0; i < r->n_turns; i++) {
        ids_bytes += (rows[i].id ? strlen(rows[i].id) : 0) + 1;
    }
    TRY(MEM_NEW(&r->ids, ids_bytes));
    char *id = r->ids;
    struct recorded_token *at = r->tokens;
    for (int64_t i = 0; i < r->n_turns; i++) {
        struct recorded_turn *u = &r->turns[i];
        u->id = strcpy(id, rows[i].id ? rows[i].id : "");
        id += strlen(id) + 1;
        u->n_prompt_tok = rows[i].n_prompt_tok;
        u->n_tokens = rows[i].n_new_tok;
        u->tokens = at;
        *at = (struct recorded_token){rows[i].prefill_level, rows[i].token0, rows[i].logprob0,
                                      rows[i].entropy0, rows[i].margin0};
        at += u->n_tokens;
    }
    return ST_OK;
}

static enum status read_tokens(struct recorded *r, hid_t file)
{
    static const struct h5_column prompt_columns[] = {
        COLUMN(struct prompt_row, id, COL_TEXT),
        COLUMN(struct prompt_row, prompt, COL_I32),
        COLUMN(struct prompt_row, turn, COL_I32),
        COLUMN(struct prompt_row, n_prompt_tok, COL_I32),
        COLUMN(struct prompt_row, n_new_tok, COL_I32),
        COLUMN(struct prompt_row, prefill_level, COL_I32),
        COLUMN(struct prompt_row, token0, COL_I32),
        COLUMN(struct prompt_row, logprob0, COL_F32),
        COLUMN(struct prompt_row, entropy0, COL_F32),
        COLUMN(struct prompt_row, margin0, COL_F32)};
    static const struct h5_column step_columns[] = {
        COLUMN(struct step_row, prompt, COL_I32),  COLUMN(struct step_row, turn, COL_I32),
        COLUMN(struct step_row, step, COL_I32),    COLUMN(struct step_row, level, COL_I32),
        COLUMN(struct step_row, token, COL_I32),   COLUMN(struct step_row, logprob, COL_F32),
        COLUMN(struct step_row, entropy, COL_F32), COLUMN(struct step_row, margin, COL_F32)};
    struct h5_rows prompts = {.type = H5I_INVALID_HID, .space = H5I_INVALID_HID};
    struct h5_rows steps = prompts;
    enum status st = ST_OK;
    int64_t n_tokens = 0;
    TRY_GOTO(st,
             h5_rows_read(&prompts, file, "prompts", prompt_columns, N_OF(prompt_columns),
                          sizeof(struct prompt_row), INT32_MAX),
             done);
    TRY_GOTO(st,
             h5_rows_read(&steps, file, "steps", step_columns, N_OF(step_columns),
                          sizeof(struct step_row), INT32_MAX),
             done);
    if ((int64_t)prompts.n != r->n_turns) {
        FAIL_GOTO(st, ST_FORMAT, done, "/prompts has %lld rows and /plans has %lld",
                  (long long)prompts.n, (long long)r->n_turns);
    }
    for (int64_t i = 0; i < r->n_turns; i++) {
        const struct prompt_row *row = (const struct prompt_row *)prompts.rows + i;
        TRY_GOTO(st, check_prompt_row(row, &r->turns[i], i), done);
        n_tokens += row->n_new_tok;
    }
    if ((int64_t)steps.n != n_tokens - r->n_turns) { // so that tokens are there for their memory
        FAIL_GOTO(st, ST_FORMAT, done, "/steps has %lld rows; /prompts expects %lld",
                  (long long)steps.n, (long long)(n_tokens - r->n_turns));
    }
    TRY_GOTO(st, MEM_NEW(&r->tokens, n_tokens), done);
    TRY_GOTO(st, take_prompts(r, prompts.rows), done);
    TRY_GOTO(st, take_steps(r, steps.rows), done);
done:
    h5_rows_free(&steps);
    h5_rows_free(&prompts);
    return st;
}

/* ---- provenance ---- */

static enum status read_provenance(struct recorded *r, hid_t file)
{
    enum status st = ST_OK;
    hid_t group = H5I_INVALID_HID, config = H5I_INVALID_HID;
    TRY_GOTO(st, MEM_NEW(&r->facts, N_OF(fact_keys)), done);
    TRY_H5(st, group = H5Gopen2(file, "provenance", H5P_DEFAULT), done, "/provenance");
    for (int i = 0; fact_keys[i]; i++) {
        char *text = NULL;
        TRY_GOTO(st, h5_read_attribute(&text, group, fact_keys[i]), done);
        if (!text) {
            TRY_GOTO(st, mem_strdup(&text, ""), done);
        }
        r->facts[i] = (struct recorded_fact){fact_keys[i], text};
    }
    TRY_H5(st, config = H5Dopen2(group, "config", H5P_DEFAULT), done, "/provenance/config");
    TRY_GOTO(st, h5_read_text(&r->config, config, false, "/provenance/config"), done);
    if (!r->config) {
        FAIL_GOTO(st, ST_FORMAT, done, "/provenance/config is no text; expected the settings");
    }
done:
    H5Dclose(config);
    H5Gclose(group);
    return st;
}

enum status recorded_read(struct recorded *out, const char *path, bool with_steps)
{
    enum status st = ST_OK;
    hid_t file = H5I_INVALID_HID;
    int64_t bytes = 0;
    *out = (struct recorded){0};
    TRY(runfile_open(&file, &bytes, path));
    TRY_GOTO(st, read_levels(out, file), done);
    TRY_GOTO(st, read_plans(out, file), done);
    TRY_GOTO(st, read_failed(out, file), done);
    digest_plans(out);
    if (with_steps) {
        TRY_GOTO(st, read_provenance(out, file), done);
        TRY_GOTO(st, read_tokens(out, file), done);
    }
done:
    H5Fclose(file);
    if (st != ST_OK) {
        status_prefix(st, "%s: ", path);
        recorded_free(out);
    }
    return st;
}

void recorded_free(struct recorded *r)
{
    for (struct recorded_fact *f = r->facts; f && f->key; f++) {
        mem_free(f->value);
    }
    mem_free(r->facts);
    mem_free(r->config);
    mem_free(r->ids);
    mem_free(r->tokens);
    mem_free(r->failed);
    mem_free(r->switches);
    mem_free(r->turns);
    mem_free(r->level);
    *r = (struct recorded){0};
}

/* ---- looking up ---- */

const struct recorded_turn *recorded_find(const struct recorded *r, int64_t prompt, int32_t turn)
{
    int64_t low = 0, high = r->n_turns;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        const struct recorded_turn *u = &r->turns[middle];
        if (u->prompt == prompt && u->turn == turn) {
            return u;
        }
        bool before = u->prompt < prompt || (u->prompt == prompt && u->turn < turn);
        low = before ? middle + 1 : low;
        high = before ? high : middle;
    }
    return NULL;
}

const char *recorded_fact(const struct recorded *r, const char *key)
{
    for (const struct recorded_fact *f = r->facts; f && f->key; f++) {
        if (strcmp(f->key, key) == 0) {
            return f->value;
        }
    }
    return "";
}
