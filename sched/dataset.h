/* Training data of learned schedulers: for each prompt what the scheduler may look at, and the
 * earliest switch from the high to the low level that still writes as well as the high level alone.
 * One HDF5 file (dataset_write), or packed rows in a journal while it is made.
 * Source: the PMPD paper (arXiv 2410.13461): label = the smallest candidate switch whose text is as
 * good against the reference's as the high precision's, else "never"; scores are rounded to three
 * digits before they are compared.
 * Not collective. Everything is held in memory.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_SCHED_DATASET_H
#define PMPD_SCHED_DATASET_H

#include <stddef.h>
#include <stdint.h>

#include "core/checkpoint.h"
#include "core/level.h"
#include "core/status.h"
#include "sched/classifier.h"
#include "sched/train.h"

#define DATASET_FORMAT "pmpd dataset"
#define DATASET_FORMAT_VERSION "1"

enum { DATASET_MAX_CANDIDATES = CLASSIFIER_MAX_CLASSES - 1, DATASET_N_SIGNALS = 3 };

enum dataset_split { SPLIT_TRAIN, SPLIT_VALIDATION, SPLIT_TEST, SPLIT_N };
extern const char *const dataset_split_name[SPLIT_N];
/* Of 100 prompts about 70, 15 and 15, by the hash of the whole prompt alone: prefixes of one
 * prompt, and the same prompt in another job, are in one split. */
enum dataset_split dataset_split_of(uint64_t prompt_hash);
/* XXH3-64 of a prompt's text. */
uint64_t dataset_prompt_hash(const char *text);

/* What all rows have in common. Datasets are merged only when all of it is equal. */
struct dataset_facts {
    char model_digest[DIGEST_TEXT], reference_digest[DIGEST_TEXT];
    char high[LEVEL_TEXT_BYTES], low[LEVEL_TEXT_BYTES], reference[LEVEL_TEXT_BYTES]; /* levels */
    char criterion[32];     /* "rouge-l", "agreement", "kl" */
    double tolerance;       /* a score may be that much below the high level's */
    int32_t max_new_tokens; /* T */
    int32_t n_kv_heads;     /* of the features; 1: their mean */
    int32_t head_dim, n_candidates;
    double class_at[CLASSIFIER_MAX_CLASSES]; /* (n_candidates + 1) fractions of T; the last is 1 */
};

struct dataset_row {
    uint64_t key[2]; /* hash of all that the row depends on */
    uint64_t prompt_hash;
    int64_t ordinal; /* of the prompt in its file */
    int32_t prefix;  /* 0: the whole prompt; i: its i-th random prefix */
    int32_t label;   /* class: 0..n_candidates */
    int32_t n_tok;   /* prompt tokens */
    int32_t n_new;   /* tokens of the high level's text, the end token included */
    float high_score, scores[DATASET_MAX_CANDIDATES];
    char *id, *task, *prompt, *reference, *high; /* owned; texts */
    char *candidate[DATASET_MAX_CANDIDATES];     /* owned; (n_candidates) texts */
    float *features; /* owned; (2, n_kv_heads, n_tok, head_dim): core/kvcache.h */
    float *signals;  /* owned; (n_new, 3): logprob, entropy, margin of the high level's tokens */
};

struct dataset {
    struct dataset_facts facts;
    char *provenance; /* owned; text */
    int32_t n, capacity;
    struct dataset_row *rows; /* owned: (n) */
};

void dataset_row_free(struct dataset_row *row);
void dataset_free(struct dataset *d);
/* The row's owned memory goes over to d, whatever comes back. Errors: ST_NOMEM. */
MUST_CHECK enum status dataset_add(struct dataset *d, struct dataset_row *row);

/* Step at which candidate i switches. */
int32_t dataset_switch_step(const struct dataset_facts *facts, int32_t i);
/* Whether a score is as good as the high level's: both rounded to three digits, the tolerance
 * subtracted. */
bool dataset_accepts(const struct dataset_facts *facts, float score, float high_score);
/* The class: the first candidate that is accepted, else n_candidates. */
int32_t dataset_label(const struct dataset_facts *facts, const float *scores, float high_score);

/* A row as bytes; *out belongs to the caller (mem_free). */
MUST_CHECK enum status dataset_row_pack(const struct dataset_row *row,
                                        const struct dataset_facts *facts, void **out,
                                        size_t *bytes);
/* The other way, from untrusted bytes. Errors: ST_FORMAT, ST_NOMEM. */
MUST_CHECK enum status dataset_row_unpack(struct dataset_row *out,
                                          const struct dataset_facts *facts, const void *buf,
                                          size_t bytes);

/* HDF5, whole or not at all. Errors: ST_HDF5, ST_IO. */
MUST_CHECK enum status dataset_write(const struct dataset *d, const char *path);
/* Errors: ST_IO, ST_HDF5; ST_FORMAT (not a dataset, or one that contradicts itself), ST_NOMEM. */
MUST_CHECK enum status dataset_read(struct dataset *out, const char *path);
/* Rows of `from` that `into` does not have (by key) go over; from is emptied. *n_twice: those that
 * it had. Errors: ST_USER: other models, levels, criterion, T or candidates (says which differ). */
MUST_CHECK enum status dataset_merge(struct dataset *into, struct dataset *from,
                                     const char *from_path, int32_t *n_twice);

/* Samples of one split for one kind of classifier. KV: a sample per row. STEP: a sample per row and
 * candidate before the text's end: the window (sched/step_window.h) before that step; class 1 where
 * the candidate is accepted. */
struct dataset_samples {
    struct train_sample *sample; /* owned: (n) */
    int32_t n;
    float *vectors; /* owned; STEP's features; KV's lie in the dataset */
};
MUST_CHECK enum status dataset_samples(struct dataset_samples *out, const struct dataset *d,
                                       enum dataset_split split, enum classifier_kind kind);
void dataset_samples_free(struct dataset_samples *s);

#endif
