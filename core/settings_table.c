/* The one table of settings, and what is printed from it: single values, help-config,
 * configs/default.cfg. A new setting is a field of struct settings and a row here; nothing else.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/settings.h"

#define FIELD(f) offsetof(struct settings, f), sizeof(((struct settings *)0)->f)
#define TWO_53 9007199254740992.0

static const char *const activation_words[] = {"last", "all", NULL};
static const char *const isa_words[] = {"auto", "avx512", "avx2", "scalar", NULL};
static const char *const kv_words[] = {"auto", "f16", "f32", NULL};
static const char *const cohort_words[] = {"all", "level", NULL};
static const char *const service_words[] = {"inline", "own", NULL};
static const char *const log_words[] = {"error", "warn", "info", "debug", NULL};

static const struct setting_row rows[] = {
    /* key, type, offset and bytes, min, max, words, default, unit, help */
    {"model.path", SET_TEXT, FIELD(model.path), 0, 0, NULL, "", "",
     "The model: a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or a nested "
     "folder that pmpd quantize wrote. Relative paths start at the working directory."},

    {"backend.name", SET_TEXT, FIELD(backend.name), 0, 0, NULL, "cpu", "",
     "What computes. cpu: OpenMP and SIMD. cpu_ref: slow scalar code that defines the right "
     "answer. cuda: one GPU per rank."},
    {"backend.threads", SET_I32, FIELD(backend.threads), 0, 4096, NULL, "0", "",
     "OpenMP threads of each rank. 0: as many as the rank may use. The tokens never depend on it."},
    {"backend.isa", SET_TEXT, FIELD(backend.isa), 0, 0, isa_words, "auto", "",
     "Instruction set of the cpu backend. auto: the widest of each node; ranks that differ are "
     "refused, and then a word here that all nodes have helps: avx512, avx2 or scalar."},

    {"parallel.tensor_ranks", SET_I32, FIELD(parallel.tensor_ranks), 1, 4096, NULL, "1", "ranks",
     "MPI ranks that share one copy of the model (tensor parallelism). The number of ranks divided "
     "by this is the number of replicas, which decode different prompts."},
    {"parallel.reproducible", SET_BOOL, FIELD(parallel.reproducible), 0, 0, NULL, "false", "",
     "Sum in a fixed order, so that results are the same bits for every number of tensor ranks. "
     "Costs some speed."},
    {"parallel.segments", SET_I32, FIELD(parallel.segments), 1, 64, NULL, "8", "",
     "Into how many parts reproducible sums are cut; at most as many tensor ranks fit. Runs that "
     "are to be compared bit for bit need the same number."},
    {"parallel.timeout_s", SET_F64, FIELD(parallel.timeout_s), 1, 86400, NULL, "300", "s",
     "A collective operation that takes longer ends the job with a message that names it; so does "
     "a "
     "replica that says nothing for half as long again (it does between two passes)."},

    {"decode.max_new_tokens", SET_I32, FIELD(decode.max_new_tokens), 1, 1048576, NULL, "128",
     "tokens", "The most tokens generated for each turn of a prompt."},
    {"decode.slots", SET_I32, FIELD(decode.slots), 1, 4096, NULL, "1", "sequences",
     "Sequences that a replica decodes together (continuous batching); each keeps its own "
     "precision."},
    {"decode.prefill_chunk", SET_I32, FIELD(decode.prefill_chunk), 1, 8192, NULL, "64", "tokens",
     "Prompt tokens that go through the layers at once during prefill."},
    {"decode.context", SET_I32, FIELD(decode.context), 0, 16777216, NULL, "0", "tokens",
     "Longest sequence, prompt and new tokens together; it sizes the KV cache. 0: what the model "
     "was trained for."},
    {"decode.temperature", SET_F64, FIELD(decode.temperature), 0, 100, NULL, "0", "",
     "Sampling temperature. 0: greedy, always the most likely token."},
    {"decode.top_k", SET_I32, FIELD(decode.top_k), 0, 16777216, NULL, "0", "tokens",
     "Sample from the so many most likely tokens only. 0: off. The filters apply in this order: "
     "temperature, top_k, top_p, min_p."},
    {"decode.top_p", SET_F64, FIELD(decode.top_p), 0, 1, NULL, "1", "",
     "Sample from the fewest most likely tokens whose probabilities reach this sum, at least one. "
     "1: off."},
    {"decode.min_p", SET_F64, FIELD(decode.min_p), 0, 1, NULL, "0", "",
     "Sample from tokens with at least this part of the most likely token's probability only. "
     "0: off."},
    {"decode.seed", SET_I64, FIELD(decode.seed), 0, TWO_53, NULL, "0", "",
     "Seed of the sampling. The same seed and configuration give the same tokens, whatever the "
     "number of replicas, threads or slots in use."},
    {"decode.stop_at_eos", SET_BOOL, FIELD(decode.stop_at_eos), 0, 0, NULL, "true", "",
     "End a turn when the model says that it is finished. false: always generate "
     "decode.max_new_tokens, for timing."},

    {"decode.cohort", SET_TEXT, FIELD(decode.cohort), 0, 0, cohort_words, "all", "",
     "Which sequences of a replica share a decode pass. all: every one; the pass reads the planes "
     "of the highest level among them. level: those at the level of the one that has waited "
     "longest, so that low levels read less. The tokens never depend on it."},

    {"kv.format", SET_TEXT, FIELD(kv.format), 0, 0, kv_words, "auto", "",
     "Number format of the KV cache. auto: f32 for an unquantised model on a CPU backend, else "
     "f16."},

    {"policy.name", SET_TEXT, FIELD(policy.name), 0, 0, NULL, "fixed", "",
     "What decides the precision of every step. pmpd help-config ends with the policies' names, "
     "what each does and which of these settings it reads."},
    {"policy.prefill", SET_TEXT, FIELD(policy.prefill), 0, 0, NULL, "max", "",
     "Level that reads the prompt (prefill). A level is a number of bits (\"4\"), the most that "
     "the "
     "model holds (\"max\"), or bits with exceptions by layer and matrix "
     "(\"3,0-1.down_proj=4\": 3 bits, but 4 for down_proj of layers 0 and 1)."},
    {"policy.level", SET_TEXT, FIELD(policy.level), 0, 0, NULL, "max", "",
     "Level of every decode step of the fixed policy; written as policy.prefill."},
    {"policy.switches", SET_TEXT, FIELD(policy.switches), 0, 0, NULL, "", "",
     "Switch points of the static and reversed policies as STEP:LEVEL, separated by blanks. "
     "\"0:4 85:3 170:2\" starts at 4 bits, goes to 3 at step 85 and to 2 at step 170."},
    {"policy.alternate", SET_TEXT, FIELD(policy.alternate), 0, 0, NULL, "", "",
     "Levels that the alternate policy takes in turn, one step each, separated by blanks: "
     "\"4 2\"."},
    {"policy.dial", SET_F64, FIELD(policy.dial), 0, 1, NULL, "0.5", "",
     "How much quality a policy with a choice should buy: 0 cheapest, 1 best, 0.5 as the other "
     "settings say."},
    {"policy.levels", SET_TEXT, FIELD(policy.levels), 0, 0, NULL, "", "",
     "Levels between which a policy chooses, from the best to the cheapest: \"4 3 2\"."},
    {"policy.classifier", SET_TEXT, FIELD(policy.classifier), 0, 0, NULL, "", "",
     "Classifiers of learned, learned-heads and step-learned (pmpd train makes them): one file per "
     "neighbouring pair of policy.levels, in their order, separated by colons."},
    {"policy.window", SET_I32, FIELD(policy.window), 1, 100000, NULL, "10", "steps",
     "confidence and activation: steps at a level before its threshold is known."},
    {"policy.deviations", SET_F64, FIELD(policy.deviations), -100, 100, NULL, "1", "",
     "confidence and activation: standard deviations between the mean of those steps and the "
     "threshold."},
    {"policy.activation", SET_TEXT, FIELD(policy.activation), 0, 0, activation_words, "all", "",
     "activation: look at the inputs of the last layer's matrices, or of all layers'."},
    {"policy.classes", SET_TEXT, FIELD(policy.classes), 0, 0, NULL, "0 1/3 2/3 1", "",
     "random: the switch points to draw from, as ascending parts of decode.max_new_tokens; 1: "
     "never."},
    {"policy.prior", SET_TEXT, FIELD(policy.prior), 0, 0, NULL, "", "",
     "random: a weight for each of policy.classes. Empty: all alike."},
    {"policy.oracle", SET_TEXT, FIELD(policy.oracle), 0, 0, NULL, "", "",
     "oracle: JSONL file with the plan of every prompt, {\"id\": \"...\", \"turn\": 0, "
     "\"plan\": \"prefill:4 0:4 85:2\"}."},
    {"policy.every", SET_I32, FIELD(policy.every), 1, 100000, NULL, "8", "steps",
     "step-learned: steps between two looks. error-feedback: steps between two probes."},
    {"policy.divergence", SET_F64, FIELD(policy.divergence), 0, 1000, NULL, "0.02", "nats",
     "error-feedback: a KL divergence from the best level above this takes one level up, below a "
     "quarter of it one level down."},
    {"policy.replay", SET_TEXT, FIELD(policy.replay), 0, 0, NULL, "", "",
     "Run file whose recorded plans the replay policy repeats; pmpd run --replay sets it."},

    {"service.rank", SET_TEXT, FIELD(service.rank), 0, 0, service_words, "inline", "",
     "Where leases, plans that need a model, and the budget are decided. inline: on rank 0, which "
     "also decodes and looks after them between two passes. own: on rank 0 alone, and the other "
     "ranks decode: start one rank more. The tokens never depend on it."},
    {"service.lag", SET_I32, FIELD(service.lag), 1, 1024, NULL, "1", "steps",
     "What is decided after a step takes effect so many steps later (prefill is step -1); until "
     "then the level in force stays, at first that of prefill. More lets a plan be made while the "
     "replica goes on decoding. It decides tokens."},

    {"budget.average_bits", SET_F64, FIELD(budget.average_bits), 0, 64, NULL, "0", "bits",
     "Hold the average bits of the decode steps of all prompts together at this value by moving "
     "the policy's dial from prompt to prompt; for a policy that listens to its dial. 0: off."},
    {"budget.ms_per_token", SET_F64, FIELD(budget.ms_per_token), 0, 1e9, NULL, "0", "ms",
     "The same for the time of a decode step with full slots, by a table of costs that is measured "
     "at the first start and kept in the run directory (costs.txt). 0: off."},
    {"budget.window", SET_I32, FIELD(budget.window), 1, 1048576, NULL, "16", "prompts",
     "The dial of a prompt follows from what the prompts up to so many places before it cost. It "
     "limits how many prompts are under way at once: take about twice the slots of all replicas. "
     "It decides tokens."},

    {"prompts.path", SET_TEXT, FIELD(prompts.path), 0, 0, NULL, "", "",
     "Prompt file, JSONL: one object per line with turns (a list of texts) and optionally id, "
     "task, split, reference, template."},
    {"prompts.split", SET_TEXT, FIELD(prompts.split), 0, 0, NULL, "", "",
     "Take only the prompts of this split. Empty: all."},
    {"prompts.limit", SET_I32, FIELD(prompts.limit), 0, 2147483647, NULL, "0", "prompts",
     "Take only the first so many prompts. 0: all."},

    {"output.dir", SET_TEXT, FIELD(output.dir), 0, 0, NULL, "results/run", "",
     "Run directory: journal, run.h5 and answers.jsonl. The same command again resumes what is "
     "missing."},
    {"output.kv_features", SET_BOOL, FIELD(output.kv_features), 0, 0, NULL, "false", "",
     "Also record the keys and values of the last layer after prefill, averaged over heads "
     "(/kv_features of run.h5)."},
    {"output.signals", SET_BOOL, FIELD(output.signals), 0, 0, NULL, "false", "",
     "Also record what each step's hidden state and new K and V rows look like: hidden_mean, "
     "hidden_rms, k_norm and v_norm of /steps."},

    {"run.name", SET_TEXT, FIELD(run.name), 0, 0, NULL, "", "",
     "Name of the run in run.h5 and answers.jsonl. Empty: made from model and policy."},
    {"run.deadline_s", SET_F64, FIELD(run.deadline_s), 0, 1e9, NULL, "0", "s",
     "Stop so long after the start, with what is finished kept; the program then ends with exit "
     "code 75 and the same command resumes. Set it below a job's time limit. 0: never."},
    {"run.max_deaths", SET_I32, FIELD(run.max_deaths), 0, 1000000, NULL, "5", "starts",
     "After so many starts in a row that died without a word (killed, a lost host) and finished no "
     "prompt, do not try again. 0: always try."},

    {"log.level", SET_TEXT, FIELD(log.level), 0, 0, log_words, "info", "",
     "How much is told on stderr: error, warn, info, debug (all ranks)."},
};

const struct setting_row *settings_row(int i)
{
    return i >= 0 && (size_t)i < sizeof rows / sizeof rows[0] ? &rows[i] : NULL;
}

/* Escapes as libconfig reads them; bytes from 0x80 on (UTF-8) go through as they are. */
static void print_quoted(FILE *out, const char *text)
{
    fputc('"', out);
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (*p == '"' || *p == '\\') {
            fprintf(out, "\\%c", *p);
        } else if (*p == '\n') {
            fputs("\\n", out);
        } else if (*p == '\t') {
            fputs("\\t", out);
        } else if (*p < 0x20 || *p == 0x7f) {
            fprintf(out, "\\x%02X", *p);
        } else {
            fputc(*p, out);
        }
    }
    fputc('"', out);
}

/* The shortest of two forms that reads back to the same number; always with a point or an exponent,
 * because a libconfig integer and a libconfig float are different types. */
static void print_float(FILE *out, double x)
{
    char text[40];
    snprintf(text, sizeof text, "%.15g", x);
    if (strtod(text, NULL) < x || strtod(text, NULL) > x) {
        snprintf(text, sizeof text, "%.17g", x);
    }
    if (!strpbrk(text, ".eE")) {
        strcat(text, ".0");
    } else if (!strchr(text, '.')) {
        char *e = strpbrk(text, "eE"); // 1e-05 -> 1.0e-05
        memmove(e + 2, e, strlen(e) + 1);
        memcpy(e, ".0", 2);
    }
    fputs(text, out);
}

static void print_value(FILE *out, const struct settings *s, const struct setting_row *row)
{
    const char *field = (const char *)s + row->offset;
    switch (row->type) {
    case SET_BOOL:
        fputs(*(const bool *)field ? "true" : "false", out);
        break;
    case SET_I32:
        fprintf(out, "%" PRId32, *(const int32_t *)field);
        break;
    case SET_I64: {
        int64_t x = *(const int64_t *)field;
        fprintf(out, "%" PRId64 "%s", x, x > INT32_MAX || x < INT32_MIN ? "L" : "");
        break;
    }
    case SET_F64:
        print_float(out, *(const double *)field);
        break;
    case SET_TEXT:
        print_quoted(out, field);
        break;
    }
}

void settings_value(const struct settings *s, const struct setting_row *row, char *text,
                    size_t text_bytes)
{
    if (text_bytes == 0) {
        return;
    }
    text[0] = '\0';
    char *whole = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&whole, &bytes);
    if (!out) {
        return;
    }
    print_value(out, s, row);
    if (fclose(out) == 0) {
        snprintf(text, text_bytes, "%s", whole);
    }
    free(whole);
}

/* "    # words ..." broken at column 96. */
static void print_wrapped(FILE *out, const char *text)
{
    enum { WIDTH = 96 };
    static const char margin[] = "    #";
    int column = 0;
    for (const char *p = text; *p;) {
        int n = (int)strcspn(p, " ");
        if (column > 0 && column + 1 + n > WIDTH) {
            fputc('\n', out);
            column = 0;
        }
        if (column == 0) {
            fputs(margin, out);
            column = (int)sizeof margin - 1;
        }
        fprintf(out, " %.*s", n, p);
        column += 1 + n;
        p += n;
        p += strspn(p, " ");
    }
    fputc('\n', out);
}

static void print_about(FILE *out, const struct setting_row *row, const struct settings *defaults)
{
    print_wrapped(out, row->help);
    fputs("    # [", out);
    switch (row->type) {
    case SET_BOOL:
        fputs("true or false", out);
        break;
    case SET_I32:
    case SET_I64:
        fprintf(out, "whole number from %.0f to %.0f", row->min, row->max);
        break;
    case SET_F64:
        fprintf(out, "number from %g to %g", row->min, row->max);
        break;
    case SET_TEXT:
        if (row->words) {
            for (int i = 0; row->words[i]; i++) {
                fprintf(out, "%s%s", i ? ", " : "one of ", row->words[i]);
            }
        } else {
            fprintf(out, "text of at most %zu bytes", row->bytes - 1);
        }
        break;
    }
    if (row->unit[0]) {
        fprintf(out, "; unit: %s", row->unit);
    }
    fputs("; default: ", out);
    print_value(out, defaults, row);
    fputs("]\n", out);
}

enum status settings_print(char **text, const struct settings *s, bool comments)
{
    struct settings defaults;
    settings_default(&defaults);
    char *whole = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&whole, &bytes);
    if (!out) {
        FAIL(ST_NOMEM, "out of memory: no room for the text of the settings");
    }
    if (comments) {
        fputs("# Settings of pmpd, each with its meaning. A file needs only the keys that it "
              "changes\n"
              "# and may write decode.slots = 4; instead of a group. On the command line:\n"
              "#     pmpd run FILE.cfg --set decode.slots=4\n"
              "# This text is what `pmpd help-config` prints.\n",
              out);
    }
    const char *group = "";
    size_t group_bytes = 0;
    for (int i = 0; settings_row(i); i++) {
        const struct setting_row *row = settings_row(i);
        const char *leaf = strchr(row->key, '.') + 1;
        size_t n = (size_t)(leaf - row->key);
        bool opens = n != group_bytes || strncmp(row->key, group, n) != 0;
        if (opens) {
            fprintf(out, "%s%s%.*s:\n{\n", i ? "};\n" : "", comments ? "\n" : "", (int)n - 1,
                    row->key);
            group = row->key;
            group_bytes = n;
        }
        if (comments) {
            fputs(opens ? "" : "\n", out);
            print_about(out, row, &defaults);
        }
        fprintf(out, "    %s = ", leaf);
        print_value(out, s, row);
        fputs(";\n", out);
    }
    fputs("};\n", out);
    enum status st = ST_OK;
    if (fclose(out) != 0) {
        FAIL_GOTO(st, ST_NOMEM, done, "out of memory: no room for the text of the settings");
    }
    TRY_GOTO(st, mem_strdup(text, whole), done);
done:
    free(whole);
    return st;
}
