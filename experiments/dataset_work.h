/* The work of `pmpd dataset`: prompts and their prefixes, what is done already, and the journals in
 * which the replicas keep it. Each replica appends to its own, OUT.parts/replica-N/journal.bin; at
 * the start every rank reads all of them, so that the number of replicas may change.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_DATASET_WORK_H
#define PMPD_EXPERIMENTS_DATASET_WORK_H

#include <stdbool.h>
#include <stdint.h>

#include "core/prompts.h"
#include "dist/journal.h"
#include "experiments/label.h"
#include "sched/dataset.h"

/* Records of our own in a journal. */
enum { WORK_REFERENCE = 64, WORK_ROW = 65 };

/* One prompt or prefix. */
struct work_item {
    const struct prompt *prompt; /* borrowed */
    int64_t ordinal;
    int32_t prefix;
    int32_t *ids; /* owned: (n_ids) */
    int32_t n_ids;
    uint64_t prompt_hash, key[2];
    bool is_done;       /* its row is in a journal */
    int32_t *reference; /* owned: (n_reference) tokens; NULL: not yet decoded */
    int32_t n_reference;
    struct top *top; /* owned: (n_reference) what the reference model thought; NULL: not kept */
};

struct work {
    struct work_item *items;    /* owned: (n) */
    struct work_item **by_key;  /* owned: (n) items in order of key */
    int32_t n, n_done, n_other; /* n_other: rows in the journals that are none of these */
};

struct work_options {
    int32_t n_prefixes, prefix_min; /* n_prefixes 0: the prompts as they are */
    int32_t most_tok;               /* of a prompt or prefix */
    uint64_t seed;
    const char *depends; /* borrowed: what all keys hash */
};

/* Items of all prompts in order. Errors: ST_USER: no prompt is long enough for a prefix. */
MUST_CHECK enum status work_create(struct work *out, const struct prompts *prompts,
                                   const struct tokenizer *tok, const struct work_options *o);
void work_free(struct work *w);

/* A finished reference, or row, as a record. */
MUST_CHECK enum status work_put_reference(struct journal *j, const struct work_item *item);
MUST_CHECK enum status work_put_row(struct journal *j, const struct dataset_row *row,
                                    const struct dataset_facts *facts);
/* Reads every journal under `parts`; with rows, the rows of items go there (each once), in order of
 * items. No folder is no error. */
MUST_CHECK enum status work_read(struct work *w, const char *parts,
                                 const struct dataset_facts *facts, struct dataset *rows);

#endif
