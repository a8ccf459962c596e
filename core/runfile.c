/* What lies in run.h5: one function per table, each a struct of a row, its columns with units and
 * meanings, and a loop over the records. Rows are ordered by prompt, turn, step, so that two runs
 * compare line by line.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/runfile.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/h5.h"
#include "core/mem.h"
#include "core/metrics.h"

#define N_OF(a) ((int)(sizeof(a) / sizeof(a)[0]))
#define TEXT(row, f, about)                              \
    {                                                    \
#f, COL_TEXT, offsetof(row, f), 0, "text", about \
    }
#define I32(row, f, unit, about)                      \
    {                                                 \
#f, COL_I32, offsetof(row, f), 0, unit, about \
    }
#define I64(row, f, unit, about)                      \
    {                                                 \
#f, COL_I64, offsetof(row, f), 0, unit, about \
    }
#define U64(row, f, unit, about)                      \
    {                                                 \
#f, COL_U64, offsetof(row, f), 0, unit, about \
    }
#define F32(row, f, unit, about)                      \
    {                                                 \
#f, COL_F32, offsetof(row, f), 0, unit, about \
    }
#define F64(row, f, unit, about)                      \
    {                                                 \
#f, COL_F64, offsetof(row, f), 0, unit, about \
    }

#define ABOUT_PROMPT "ordinal of the prompt in the prompt file, from 0"
#define ABOUT_TURN "turn of the prompt, from 0"

static enum status write_provenance(hid_t file, const struct run_contents *run)
{
    enum status st = ST_OK;
    hid_t group = H5I_INVALID_HID;
    TRY(h5_group(&group, file, "provenance",
                 "where this file comes from: one attribute per fact, and the settings"));
    for (int i = 0; i < run->n_facts; i++) {
        TRY_GOTO(st, h5_attribute(group, run->facts[i].key, run->facts[i].value), done);
    }
    if (H5Aexists(group, "prompts_digest") <= 0) {
        TRY_GOTO(st, h5_attribute(group, "prompts_digest", run->prompts->digest), done);
    }
    TRY_GOTO(st,
             h5_scalar_text(group, "config", run->config_text ? run->config_text : "",
                            "the full settings in force, as a file that pmpd run reads"),
             done);
done:
    H5Gclose(group);
    return st;
}

static enum status write_levels(hid_t file, const struct run_contents *run)
{
    struct row {
        int32_t id, max_bits;
        float avg_bits, head_avg_bits;
        const char *text;
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, id, "1", "what level columns refer to: the row"),
        TEXT(struct row, text, "the level as a configuration writes it"),
        F32(struct row, avg_bits, "bits", "mean over the weights of the layers' linear matrices"),
        F32(struct row, head_avg_bits, "bits", "mean over the weights of the output head"),
        I32(struct row, max_bits, "bits", "most bits of any linear matrix of the layers"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    TRY(h5_table_begin(&t, file, "levels", "precisions of the whole model that the run used",
                       columns, N_OF(columns), sizeof row, (uint64_t)run->levels->n));
    for (int i = 0; i < run->levels->n; i++) {
        const struct level *level = &run->levels->level[i];
        row = (struct row){i, level->max_bits, level->avg_bits, level->head_avg_bits, level->text};
        TRY_GOTO(st, h5_table_put(&t, &row), done);
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_prompts(hid_t file, const struct run_contents *run)
{
    struct row {
        const char *id, *task, *split;
        double started_unix_s, wall_s;
        int32_t prompt, turn, n_prompt_tok, n_new_tok, finish, prefill_level, token0;
        int32_t attempt, epoch, replica;
        float prefill_avg_bits, logprob0, entropy0, margin0, prefill_s, decode_s;
        char key[32];
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, prompt, "1", ABOUT_PROMPT),
        I32(struct row, turn, "1", ABOUT_TURN),
        TEXT(struct row, id, "the prompt's id in the prompt file"),
        TEXT(struct row, task, "the prompt's task, or empty"),
        TEXT(struct row, split, "the prompt's split, or empty"),
        I32(struct row, n_prompt_tok, "tokens", "tokens read at prefill of this turn"),
        I32(struct row, n_new_tok, "tokens", "tokens generated: token 0 and one per step"),
        I32(struct row, finish, "1", "why the turn ended: 0 end of sequence, 1 length"),
        I32(struct row, prefill_level, "1", "level that read the prompt: row of /levels"),
        F32(struct row, prefill_avg_bits, "bits", "average bits of that level"),
        I32(struct row, token0, "1", "id of the first token, which prefill yields"),
        F32(struct row, logprob0, "nats", "log-probability of token 0 at temperature 1"),
        F32(struct row, entropy0, "nats", "entropy of the distribution that gave token 0"),
        F32(struct row, margin0, "1", "largest minus second largest logit for token 0"),
        F32(struct row, prefill_s, "s", "time from the start of prefill to token 0"),
        F32(struct row, decode_s, "s", "time from token 0 to the last token"),
        I32(struct row, attempt, "1", "attempt that finished the prompt, from 1"),
        I32(struct row, epoch, "1", "start of the program that finished it, from 0"),
        I32(struct row, replica, "1", "replica that decoded it"),
        F64(struct row, started_unix_s, "s", "start of the prompt, seconds since 1970 (UTC)"),
        F64(struct row, wall_s, "s", "time of the whole prompt, all turns"),
        {"key", COL_CHARS, offsetof(struct row, key), sizeof row.key, "text",
         "resume key, 32 hexadecimal digits: equal keys, equal tokens"},
    };
    struct h5_table t;
    enum status st = ST_OK;
    uint64_t n = 0;
    for (int i = 0; i < run->n_finished; i++) {
        n += (uint64_t)run->finished[i].n_turns;
    }
    TRY(h5_table_begin(&t, file, "prompts", "finished prompts: one row per prompt and turn",
                       columns, N_OF(columns), sizeof row, n));
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        const struct prompt *p = &run->prompts->prompt[r->ordinal];
        char key[33];
        snprintf(key, sizeof key, "%016" PRIx64 "%016" PRIx64, r->key[0], r->key[1]);
        for (int j = 0; j < r->n_turns; j++) {
            const struct turn_record *u = &r->turns[j];
            row = (struct row){.id = p->id ? p->id : "",
                               .task = p->task ? p->task : "",
                               .split = p->split ? p->split : "",
                               .started_unix_s = r->started_unix_s,
                               .wall_s = r->wall_s,
                               .prompt = (int32_t)r->ordinal,
                               .turn = j,
                               .n_prompt_tok = u->n_prompt_tok,
                               .n_new_tok = u->n_new_tok,
                               .finish = u->finish,
                               .prefill_level = u->prefill_level,
                               .token0 = u->token0,
                               .attempt = r->attempt,
                               .epoch = r->epoch,
                               .replica = r->replica,
                               .prefill_avg_bits = run->levels->level[u->prefill_level].avg_bits,
                               .logprob0 = u->logprob0,
                               .entropy0 = u->entropy0,
                               .margin0 = u->margin0,
                               .prefill_s = u->prefill_s,
                               .decode_s = u->decode_s};
            memcpy(row.key, key, sizeof row.key);
            TRY_GOTO(st, h5_table_put(&t, &row), done);
        }
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_steps(hid_t file, const struct run_contents *run,
                               const struct pass_row *passes, size_t n_passes)
{
    struct row {
        int64_t pass;
        int32_t prompt, turn, step, level, token;
        float avg_bits, logprob, entropy, margin, max_prob, probe_kl;
        float hidden_mean, hidden_rms, k_norm, v_norm;
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, prompt, "1", ABOUT_PROMPT),
        I32(struct row, turn, "1", ABOUT_TURN),
        I32(struct row, step, "1", "step t reads generated token t and yields token t + 1"),
        I32(struct row, level, "1", "precision of the step: row of /levels"),
        F32(struct row, avg_bits, "bits", "average bits of that level"),
        I32(struct row, token, "1", "id of the token that the step yields"),
        F32(struct row, logprob, "nats", "log-probability of that token at temperature 1"),
        F32(struct row, entropy, "nats", "entropy of the distribution that gave it"),
        F32(struct row, margin, "1", "largest minus second largest logit"),
        F32(struct row, max_prob, "1", "probability of the most likely token at temperature 1"),
        F32(struct row, probe_kl, "nats",
            "KL divergence of the step's distribution from that of a probe at another level; nan: "
            "no probe"),
        F32(struct row, hidden_mean, "1",
            "mean of the final norm's input; nan: neither output.signals nor the policy asked"),
        F32(struct row, hidden_rms, "1", "root of its mean square; nan: as hidden_mean"),
        F32(struct row, k_norm, "1",
            "Euclidean norm of the new K row of the last layer, all heads; nan: as hidden_mean"),
        F32(struct row, v_norm, "1", "of its new V row; nan: as hidden_mean"),
        I64(struct row, pass, "1", "the pass that computed it: row of /passes; -1 unknown"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    uint64_t n = 0;
    for (int i = 0; i < run->n_finished; i++) {
        n += (uint64_t)run->finished[i].n_steps;
    }
    TRY(h5_table_begin(&t, file, "steps", "decode steps of finished prompts, the first included",
                       columns, N_OF(columns), sizeof row, n));
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        for (int j = 0; j < r->n_steps; j++) {
            const struct step_record *s = &r->steps[j];
            row = (struct row){.pass = passes_find(passes, n_passes, r->epoch, r->replica, s->pass),
                               .prompt = (int32_t)r->ordinal,
                               .turn = s->turn,
                               .step = s->step,
                               .level = s->level,
                               .token = s->token,
                               .avg_bits = run->levels->level[s->level].avg_bits,
                               .logprob = s->logprob,
                               .entropy = s->entropy,
                               .margin = s->margin,
                               .max_prob = s->max_prob,
                               .probe_kl = s->probe_kl,
                               .hidden_mean = s->hidden_mean,
                               .hidden_rms = s->hidden_rms,
                               .k_norm = s->k_norm,
                               .v_norm = s->v_norm};
            TRY_GOTO(st, h5_table_put(&t, &row), done);
        }
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_passes(hid_t file, const struct pass_row *passes, size_t n_passes)
{
    struct row {
        int64_t pass;
        uint64_t weight_bytes, kv_bytes;
        int32_t epoch, replica, kind, n_slots, n_tok, n_gathered, max_bits;
        float time_us, comm_us;
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, epoch, "1", "start of the program, from 0"),
        I32(struct row, replica, "1", "replica that ran it"),
        I64(struct row, pass, "1", "number of the pass within epoch and replica"),
        I32(struct row, kind, "1", "0 prefill, 1 decode"),
        I32(struct row, n_slots, "1", "sequences that shared the pass"),
        I32(struct row, n_tok, "tokens", "tokens that went through the layers together"),
        I32(struct row, n_gathered, "tokens",
            "tokens whose sampling filter reached beyond the ranks' candidates, so that all logits "
            "were gathered"),
        I32(struct row, max_bits, "bits", "planes read by the widest product"),
        U64(struct row, weight_bytes, "bytes", "weights read by all ranks of the replica together"),
        U64(struct row, kv_bytes, "bytes",
            "keys and values read by all ranks of the replica together; heads that several ranks "
            "hold count for each"),
        F32(struct row, time_us, "us", "time of the pass"),
        F32(struct row, comm_us, "us", "part of it spent in collectives"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    TRY(h5_table_begin(&t, file, "passes",
                       "runs through the layers; steps that shared one point to the same row",
                       columns, N_OF(columns), sizeof row, n_passes));
    for (size_t i = 0; i < n_passes; i++) {
        const struct pass_record *p = passes[i].pass;
        row = (struct row){p->pass,           p->weight_bytes, p->kv_bytes, passes[i].epoch,
                           passes[i].replica, p->kind,         p->n_slots,  p->n_tok,
                           p->n_gathered,     p->max_bits,     p->time_us,  p->comm_us};
        TRY_GOTO(st, h5_table_put(&t, &row), done);
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_plans(hid_t file, const struct run_contents *run)
{
    struct row {
        int64_t first_switch;
        int32_t prompt, turn, prefill_level, n_switches;
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, prompt, "1", ABOUT_PROMPT),
        I32(struct row, turn, "1", ABOUT_TURN),
        I32(struct row, prefill_level, "1", "level of prefill: row of /levels"),
        I64(struct row, first_switch, "1", "first of the plan's rows in /plan_switches"),
        I32(struct row, n_switches, "1", "how many rows there are"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    uint64_t n = 0;
    int64_t at = 0;
    for (int i = 0; i < run->n_finished; i++) {
        n += (uint64_t)run->finished[i].n_turns;
    }
    TRY(h5_table_begin(&t, file, "plans", "what was decided for every turn, as it came to pass",
                       columns, N_OF(columns), sizeof row, n));
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        for (int j = 0; j < r->n_turns; j++) {
            row = (struct row){at, (int32_t)r->ordinal, j, r->turns[j].prefill_level,
                               r->turns[j].n_switches};
            at += r->turns[j].n_switches;
            TRY_GOTO(st, h5_table_put(&t, &row), done);
        }
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_switches(hid_t file, const struct run_contents *run)
{
    struct switch_row {
        int32_t prompt, turn, step, level;
    };
    static const struct h5_column switch_columns[] = {
        I32(struct switch_row, prompt, "1", ABOUT_PROMPT),
        I32(struct switch_row, turn, "1", ABOUT_TURN),
        I32(struct switch_row, step, "1", "first step of the level"),
        I32(struct switch_row, level, "1", "level in force from then on: row of /levels"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    uint64_t n = 0;
    for (int i = 0; i < run->n_finished; i++) {
        n += (uint64_t)run->finished[i].n_switches;
    }
    TRY(h5_table_begin(&t, file, "plan_switches", "the plans' levels of decoding, turn after turn",
                       switch_columns, N_OF(switch_columns), sizeof(struct switch_row), n));
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        const struct plan_switch *at = r->switches;
        for (int j = 0; j < r->n_turns; j++) {
            for (int k = 0; k < r->turns[j].n_switches; k++, at++) {
                struct switch_row row = {(int32_t)r->ordinal, j, at->step, at->level};
                TRY_GOTO(st, h5_table_put(&t, &row), done);
            }
        }
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_decisions(hid_t file, const struct run_contents *run)
{
    struct row {
        int32_t prompt, turn, asked, step, level, probe;
        float dial, latency_us;
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, prompt, "1", ABOUT_PROMPT),
        I32(struct row, turn, "1", ABOUT_TURN),
        I32(struct row, asked, "1", "step after which the policy was asked; -1: prefill"),
        I32(struct row, step, "1", "first step of the level, or step of the probe"),
        I32(struct row, level, "1",
            "level in force from then on, unless a later decision changes it: row of /levels; -1: "
            "as before (a probe only)"),
        I32(struct row, probe, "1", "level at which the step's token also ran; -1: no probe"),
        F32(struct row, dial, "1", "the policy's dial: 0 cheapest, 1 best"),
        F32(struct row, latency_us, "us",
            "from the request until the replica had the answer; it looks between two passes"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    uint64_t n = 0;
    for (int i = 0; i < run->n_finished; i++) {
        n += (uint64_t)run->finished[i].n_decisions;
    }
    TRY(h5_table_begin(&t, file, "decisions",
                       "what policies decided and what took effect: one row per level or probe of "
                       "a plan or an amendment",
                       columns, N_OF(columns), sizeof row, n));
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        for (int j = 0; j < r->n_decisions; j++) {
            const struct decision_record *d = &r->decisions[j];
            row = (struct row){
                (int32_t)r->ordinal, d->turn, d->asked, d->step, d->level, d->probe, d->dial,
                d->latency_us};
            TRY_GOTO(st, h5_table_put(&t, &row), done);
        }
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_budget(hid_t file, const struct run_contents *run)
{
    static const struct h5_column columns[] = {
        I64(struct budget_row, lease, "1",
            "place of the prompt in the order in which dials are set"),
        I32(struct budget_row, prompt, "1", ABOUT_PROMPT),
        F32(struct budget_row, dial, "1", "the policy's dial for it: 0 cheapest, 1 best"),
        F64(struct budget_row, target, "bits or ms", "set point: mean cost of a decode step"),
        F64(struct budget_row, offset, "bits or ms", "cost of a step at dial 0 by the fit"),
        F64(struct budget_row, slope, "bits or ms", "how much more it costs at dial 1"),
        F64(struct budget_row, account, "bits or ms",
            "spent beyond the target until then, per step times leases, what is under way as "
            "expected"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    TRY(h5_table_begin(&t, file, "budget",
                       "the budget's controller, one row per lease; empty without a budget",
                       columns, N_OF(columns), sizeof(struct budget_row), (uint64_t)run->n_budget));
    for (int i = 0; i < run->n_budget; i++) {
        struct budget_row row = run->budget[i];
        TRY_GOTO(st, h5_table_put(&t, &row), done);
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

static enum status write_failed(hid_t file, const struct run_contents *run)
{
    struct row {
        const char *id, *reason;
        int32_t prompt, attempts;
    } row;
    static const struct h5_column columns[] = {
        I32(struct row, prompt, "1", ABOUT_PROMPT),
        TEXT(struct row, id, "the prompt's id in the prompt file"),
        I32(struct row, attempts, "1", "times it was started"),
        TEXT(struct row, reason, "message of the last attempt"),
    };
    struct h5_table t;
    enum status st = ST_OK;
    TRY(h5_table_begin(&t, file, "failed", "prompts that were given up", columns, N_OF(columns),
                       sizeof row, (uint64_t)run->n_failed));
    for (int i = 0; i < run->n_failed; i++) {
        const struct failed_prompt *f = &run->failed[i];
        const char *id = run->prompts->prompt[f->ordinal].id;
        row = (struct row){id ? id : "", f->reason, (int32_t)f->ordinal, f->attempts};
        TRY_GOTO(st, h5_table_put(&t, &row), done);
    }
    TRY_GOTO(st, h5_table_end(&t), done);
done:
    h5_table_close(&t);
    return st;
}

/* The record has K of all tokens, then V; the file has K and V of a token together, so that one
 * prompt is values[offset[i]:offset[i + 1]]. */
static enum status write_feature_rows(hid_t set, const struct finished_record *r, int64_t first)
{
    enum status st = ST_OK;
    float *rows = NULL;
    size_t dim = (size_t)r->feature_dim, n_tok = (size_t)r->n_feature_tok, row = 0, n = 0;
    TRY(mem_mul(&row, 2, dim));
    TRY(mem_mul(&n, n_tok, row));
    TRY(MEM_NEW(&rows, n));
    for (size_t i = 0; i < n_tok; i++) {
        for (size_t part = 0; part < 2; part++) {
            memcpy(rows + i * row + part * dim, r->features + (part * n_tok + i) * dim,
                   dim * sizeof *rows);
        }
    }
    TRY_GOTO(st, h5_array_write(set, H5T_NATIVE_FLOAT, (hsize_t)first, n_tok, rows), done);
done:
    mem_free(rows);
    return st;
}

static enum status write_features(hid_t file, const struct run_contents *run)
{
    hsize_t n = 0;
    hsize_t dims[3] = {0, 2, 0};
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        if (r->n_feature_tok > 0) {
            n++;
            dims[0] += (hsize_t)r->n_feature_tok;
            dims[2] = (hsize_t)r->feature_dim;
        }
    }
    if (n == 0) {
        return ST_OK;
    }
    enum status st = ST_OK;
    int64_t *offset = NULL;
    int32_t *prompt = NULL;
    hsize_t n_offset = n + 1;
    hid_t group = H5I_INVALID_HID, values = H5I_INVALID_HID, set = H5I_INVALID_HID;
    TRY(MEM_NEW(&offset, n_offset));
    TRY_GOTO(st, MEM_NEW(&prompt, n), done);
    TRY_GOTO(st,
             h5_group(&group, file, "kv_features",
                      "keys and values after prefill of the first turn; prompt[i] has the rows "
                      "offset[i] to offset[i + 1] of values"),
             done);
    TRY_GOTO(st,
             h5_array_create(&values, group, "values", H5T_IEEE_F32LE, 3, dims, "1",
                             "(token, K or V, dimension): last layer, mean over heads"),
             done);
    size_t at = 0;
    for (int i = 0; i < run->n_finished; i++) {
        const struct finished_record *r = &run->finished[i];
        if (r->n_feature_tok > 0) {
            TRY_GOTO(st, write_feature_rows(values, r, offset[at]), done);
            prompt[at] = (int32_t)r->ordinal;
            offset[at + 1] = offset[at] + r->n_feature_tok;
            at++;
        }
    }
    TRY_GOTO(st,
             h5_array_create(&set, group, "offset", H5T_STD_I64LE, 1, &n_offset, "1",
                             "first row of each prompt in values, and the end"),
             done);
    TRY_GOTO(st, h5_array_write(set, H5T_NATIVE_INT64, 0, n_offset, offset), done);
    H5Dclose(set);
    TRY_GOTO(st, h5_array_create(&set, group, "prompt", H5T_STD_I32LE, 1, &n, "1", ABOUT_PROMPT),
             done);
    TRY_GOTO(st, h5_array_write(set, H5T_NATIVE_INT32, 0, n, prompt), done);
done:
    H5Dclose(set);
    H5Dclose(values);
    H5Gclose(group);
    mem_free(prompt);
    mem_free(offset);
    return st;
}

static enum status write_metrics(hid_t file, const struct run_contents *run)
{
    struct run_metrics m;
    run_metrics_compute(&m, run);
    const struct {
        const char *name;
        int64_t value;
        const char *unit, *about;
    } counts[] = {
        {"n_prompts", m.n_prompts, "1", "prompts asked for"},
        {"n_finished", m.n_finished, "1", "prompts finished"},
        {"n_failed", m.n_failed, "1", "prompts given up"},
        {"n_prompt_tok", m.n_prompt_tok, "tokens", "tokens read at prefill"},
        {"n_new_tok", m.n_new_tok, "tokens", "tokens generated"},
        {"n_steps", m.n_steps, "1", "decode steps"},
        {"n_passes", m.n_passes, "1", "passes, prefill and decode"},
    };
    const struct {
        const char *name;
        double value;
        const char *unit, *about;
    } scalars[] = {
        {"avg_decode_bits", m.avg_decode_bits, "bits",
         "mean over all decode steps, the first included, of their level's average bits"},
        {"avg_prefill_bits", m.avg_prefill_bits, "bits",
         "mean over prompt tokens of their level's average bits"},
        {"decode_tok_s", m.decode_tok_s, "tokens/s",
         "steps per second of decode passes, summed over replicas that work side by side"},
        {"bytes_per_token", m.bytes_per_token, "bytes",
         "weights, keys and values read by decode passes, per step"},
        {"mean_logprob", m.mean_logprob, "nats", "mean log-probability of generated tokens"},
        {"decode_s", m.decode_s, "s", "time of decode passes, summed over replicas"},
        {"prefill_s", m.prefill_s, "s", "time of prefill passes, summed over replicas"},
    };
    enum status st = ST_OK;
    hid_t group = H5I_INVALID_HID;
    TRY(h5_group(&group, file, "metrics", "scalars over all finished prompts"));
    for (int i = 0; i < N_OF(counts); i++) {
        TRY_GOTO(
            st,
            h5_scalar_i64(group, counts[i].name, counts[i].value, counts[i].unit, counts[i].about),
            done);
    }
    for (int i = 0; i < N_OF(scalars); i++) {
        TRY_GOTO(st,
                 h5_scalar_f64(group, scalars[i].name, scalars[i].value, scalars[i].unit,
                               scalars[i].about),
                 done);
    }
done:
    H5Gclose(group);
    return st;
}

static enum status write_all(hid_t file, const struct run_contents *run)
{
    enum status st = ST_OK;
    struct pass_row *passes = NULL;
    size_t n_passes = 0;
    TRY(passes_collect(&passes, &n_passes, run));
    TRY_GOTO(st, h5_attribute(file, "format", RUNFILE_FORMAT), done);
    TRY_GOTO(st, h5_attribute(file, "format_version", RUNFILE_FORMAT_VERSION), done);
    TRY_GOTO(st,
             h5_attribute(file, "description",
                          "one run of pmpd; the attributes of every dataset explain it"),
             done);
    TRY_GOTO(st, write_provenance(file, run), done);
    TRY_GOTO(st, write_levels(file, run), done);
    TRY_GOTO(st, write_prompts(file, run), done);
    TRY_GOTO(st, write_steps(file, run, passes, n_passes), done);
    TRY_GOTO(st, write_passes(file, passes, n_passes), done);
    TRY_GOTO(st, write_plans(file, run), done);
    TRY_GOTO(st, write_switches(file, run), done);
    TRY_GOTO(st, write_decisions(file, run), done);
    TRY_GOTO(st, write_budget(file, run), done);
    TRY_GOTO(st, write_failed(file, run), done);
    TRY_GOTO(st, write_features(file, run), done);
    TRY_GOTO(st, write_metrics(file, run), done);
done:
    mem_free(passes);
    return st;
}

enum status runfile_write(const char *path, const struct run_contents *run)
{
    enum status st = ST_OK;
    hid_t file = H5I_INVALID_HID;
    h5_quiet();
    TRY_GOTO(st, run_contents_check(run), done);
    TRY_GOTO(st, h5_create(&file, path), done);
    TRY_GOTO(st, write_all(file, run), done);
    TRY_GOTO(st, h5_save(file, path), done);
done:
    H5Fclose(file);
    if (st != ST_OK && st != ST_IO) { // those name the file already
        status_prefix(st, "writing the run file %s: ", path);
    }
    return st;
}
