/* Every setting of a run: one struct, filled from one table (key, type, default, range, help) that
 * also prints help-config and configs/default.cfg. Files are libconfig; --set key=value overrides.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_SETTINGS_H
#define PMPD_CORE_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "core/status.h"

enum { SETTINGS_PATH_BYTES = 4096, SETTINGS_WORD_BYTES = 64, SETTINGS_TEXT_BYTES = 1024 };

struct settings {
    struct {
        char path[SETTINGS_PATH_BYTES]; /* model.path: folder, plain or nested */
    } model;
    struct {
        char name[SETTINGS_WORD_BYTES]; /* backend.name: cpu, cpu_ref, cuda */
        int32_t threads;                /* backend.threads per rank; 0 = what the rank may use */
        char isa[SETTINGS_WORD_BYTES];  /* backend.isa: auto, avx512, avx2, scalar */
    } backend;
    struct {
        int32_t tensor_ranks; /* parallel.tensor_ranks: ranks that hold one replica together */
        bool reproducible;    /* parallel.reproducible: same bits for every number of them */
        int32_t segments;     /* parallel.segments */
        double timeout_s;     /* parallel.timeout_s: a collective that takes longer is an error */
    } parallel;
    struct {
        int32_t max_new_tokens; /* decode.max_new_tokens per turn */
        int32_t slots;          /* decode.slots: sequences decoded together by a replica */
        int32_t prefill_chunk;  /* decode.prefill_chunk tokens */
        int32_t context;        /* decode.context tokens; 0 = the model's */
        double temperature;     /* decode.temperature; 0 = greedy */
        double top_p;           /* decode.top_p; 1 = off */
        int32_t top_k;          /* decode.top_k; 0 = off */
        double min_p;           /* decode.min_p; 0 = off */
        int64_t seed;           /* decode.seed */
        bool stop_at_eos;       /* decode.stop_at_eos */
        char cohort[SETTINGS_WORD_BYTES]; /* decode.cohort: all, level */
    } decode;
    struct {
        char rank[SETTINGS_WORD_BYTES]; /* service.rank: inline, own */
        int32_t lag;                    /* service.lag: steps from a request to its effect */
    } service;
    struct {
        double average_bits; /* budget.average_bits of decode steps over all prompts; 0 = none */
        double ms_per_token; /* budget.ms_per_token; 0 = none */
        int32_t window;      /* budget.window: leases whose outcome a lease's dial does not know */
    } budget;
    struct {
        char format[SETTINGS_WORD_BYTES]; /* kv.format: auto, f16, f32 */
    } kv;
    struct {
        char name[SETTINGS_WORD_BYTES];       /* policy.name */
        char prefill[SETTINGS_TEXT_BYTES];    /* policy.prefill: a level */
        char level[SETTINGS_TEXT_BYTES];      /* policy.level: a level (fixed) */
        char switches[SETTINGS_TEXT_BYTES];   /* policy.switches: "0:4 85:3" (static, reversed) */
        char alternate[SETTINGS_TEXT_BYTES];  /* policy.alternate: "4 2" (alternate) */
        double dial;                          /* policy.dial in [0, 1] */
        char replay[SETTINGS_PATH_BYTES];     /* policy.replay: a run file (replay) */
        char levels[SETTINGS_TEXT_BYTES];     /* policy.levels: "4 3 2" */
        char classifier[SETTINGS_PATH_BYTES]; /* policy.classifier: files, one per pair */
        int32_t window;                       /* policy.window steps */
        double deviations;                    /* policy.deviations */
        char activation[SETTINGS_WORD_BYTES]; /* policy.activation: last, all */
        char classes[SETTINGS_TEXT_BYTES];    /* policy.classes: "0 1/3 2/3 1" (random) */
        char prior[SETTINGS_TEXT_BYTES];      /* policy.prior: "0.1 0.2 0.3 0.4" (random) */
        char oracle[SETTINGS_PATH_BYTES];     /* policy.oracle: plans (oracle) */
        int32_t every;                        /* policy.every steps */
        double divergence;                    /* policy.divergence, nats */
    } policy;
    struct {
        char path[SETTINGS_PATH_BYTES];  /* prompts.path: JSONL */
        char split[SETTINGS_WORD_BYTES]; /* prompts.split; "" = all */
        int32_t limit;                   /* prompts.limit; 0 = all */
    } prompts;
    struct {
        char dir[SETTINGS_PATH_BYTES]; /* output.dir: the run directory */
        bool kv_features;              /* output.kv_features */
        bool signals;                  /* output.signals */
    } output;
    struct {
        char name[SETTINGS_WORD_BYTES]; /* run.name */
        double deadline_s;              /* run.deadline_s; 0 = none */
        int32_t max_deaths;             /* run.max_deaths; 0 = any number */
    } run;
    struct {
        char level[SETTINGS_WORD_BYTES]; /* log.level: error, warn, info, debug */
    } log;
};

enum setting_type { SET_BOOL, SET_I32, SET_I64, SET_F64, SET_TEXT };

/* One row of the table. */
struct setting_row {
    const char *key; /* "decode.slots" */
    enum setting_type type;
    size_t offset, bytes;     /* in struct settings; bytes: capacity of a text */
    double min, max;          /* inclusive, numbers only */
    const char *const *words; /* allowed values of a text, NULL-terminated; NULL: any */
    const char *fallback;     /* the default, as text */
    const char *unit;         /* "tokens", "s", "" */
    const char *help;         /* one sentence or two */
};
/* The rows in order; NULL past the end. */
const struct setting_row *settings_row(int i);

/* All defaults. */
void settings_default(struct settings *s);
/* Reads the text of a libconfig file over *s; a key is decode: { slots = 4; } or decode.slots = 4;
 * On failure *s is unchanged. `name` is the file's name for messages. Unknown or repeated keys,
 * wrong types and values out of range are ST_USER with name:line, what was expected and the nearest
 * key. `where_text` relative paths are NOT resolved. @include is refused. */
MUST_CHECK enum status settings_parse(struct settings *s, const char *text, const char *name);
/* Reads a file into *text (mem_free). Errors: ST_IO; ST_USER: larger than 1 MiB, or no text. */
MUST_CHECK enum status settings_read_file(char **text, const char *path);
/* One "key=value" of the command line. A text value needs no quotes. Errors: ST_USER. */
MUST_CHECK enum status settings_set(struct settings *s, const char *assignment);
/* The value of a row as libconfig text ("\"abc\"", "0.5", "true") into text. */
void settings_value(const struct settings *s, const struct setting_row *row, char *text,
                    size_t text_bytes);
/* All settings as a libconfig file, grouped, that settings_parse reads back to the same struct;
 * with comments: help, unit, range and default of each key (this is configs/default.cfg). The
 * caller owns *text (mem_free). */
MUST_CHECK enum status settings_print(char **text, const struct settings *s, bool comments);

#endif
