/* The run file (HDF5) and answers.jsonl, written whole from finished records: to a temporary name,
 * closed, fsynced, renamed. h5py reads it in three lines. Every dataset carries a description and
 * a unit. Not collective: the lease owner writes.
 * Layout (DESIGN "Files"): /provenance (attributes; effective config as a string), /levels (text,
 * average bits, head bits), /prompts, /steps, /passes, /plans, /decisions, /budget, /kv_features,
 * /metrics: compound tables and flat + offset arrays. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_RUNFILE_H
#define PMPD_CORE_RUNFILE_H

#include <stdint.h>

#include "core/level.h"
#include "core/prompts.h"
#include "core/status.h"
#include "core/tokenizer.h"
#include "core/trace.h"

/* Root attributes "format" and "format_version": how a run file is told from other HDF5 files. */
#define RUNFILE_FORMAT "pmpd run"
#define RUNFILE_FORMAT_VERSION "1"

struct run_fact {
    const char *key, *value; /* borrowed */
};

struct failed_prompt {
    int64_t ordinal;
    int32_t attempts;
    char reason[256];
};

/* The budget's controller at one lease (sched/budget.h). */
struct budget_row {
    int64_t lease; /* place in the order of all prompts */
    int32_t prompt;
    float dial;
    double target, offset, slope, account;
};

struct run_contents {
    const struct prompts *prompts;
    const struct level_table *levels;
    const struct tokenizer *tokenizer; /* NULL: answers carry no text */
    const char *model_id;              /* for answers.jsonl */
    int32_t n_finished;
    const struct finished_record *finished; /* (n_finished) one per prompt, by ordinal */
    int32_t n_failed;
    const struct failed_prompt *failed;
    int32_t n_budget;
    const struct budget_row *budget; /* (n_budget) by lease */
    int32_t n_facts;
    const struct run_fact *facts; /* /provenance */
    const char *config_text;      /* full effective settings */
};

/* Errors: ST_FORMAT (records that do not fit prompts or levels), ST_HDF5 (with HDF5's own top and
 * innermost message), ST_IO. An existing file is replaced only by the finished new one. */
MUST_CHECK enum status runfile_write(const char *path, const struct run_contents *run);

/* answers.jsonl in the field's answer-file schema, one line per finished prompt: question_id,
 * model_id, choices: [{index, turns: [text], new_tokens: [n], wall_time: [s], precision_log:
 * [{"4": steps, ...}], prefill_level: [..]}], tstamp; atomically replaced. */
MUST_CHECK enum status answers_write(const char *path, const struct run_contents *run);

/* Scalars over all finished prompts: what /metrics holds and the closing table prints. A mean over
 * nothing is 0. */
struct run_metrics {
    int64_t n_prompts, n_finished, n_failed;
    int64_t n_prompt_tok, n_new_tok, n_steps, n_passes;
    double avg_decode_bits;  /* mean over all steps of the level's average bits, first included */
    double avg_prefill_bits; /* mean over prompt tokens */
    double decode_tok_s;    /* steps / decode pass time of a replica, summed over the replicas of an
                               epoch; epochs weighted by their steps: the aggregate rate */
    double bytes_per_token; /* (weight + KV bytes of decode passes) / steps */
    double mean_logprob;    /* nats per generated token */
    double decode_s, prefill_s; /* time of decode and prefill passes, summed over replicas */
};
void run_metrics_compute(struct run_metrics *out, const struct run_contents *run);

/* A run file's contents for `pmpd inspect`: provenance, counts, metrics; as text for people or as
 * one JSON object. The caller owns *text. Errors: ST_IO (cannot be opened), ST_FORMAT (not a run
 * file), ST_HDF5. */
MUST_CHECK enum status runfile_describe(char **text, const char *path, int as_json);

#endif
