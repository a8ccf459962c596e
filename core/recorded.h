/* What a run file says that happened, in plain structs: the facts of its provenance, levels,
 * realised plans, tokens and steps. The file comes from outside: types, sizes, offsets and ids are
 * checked, and that its tables agree with each other, so that users index without looking.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_RECORDED_H
#define PMPD_CORE_RECORDED_H

#include <stdbool.h>
#include <stdint.h>

#include "core/checkpoint.h"
#include "core/level.h"
#include "core/plan.h"
#include "core/status.h"

/* What a step (or prefill, for token 0) yielded. */
struct recorded_token {
    int32_t level; /* it ran at: index of level */
    int32_t token;
    float logprob, entropy, margin;
};

/* A turn of a prompt. */
struct recorded_turn {
    int32_t prompt, turn; /* the prompt's ordinal in its file */
    int32_t prefill_level;
    int32_t n_switches;
    const struct plan_switch *switches; /* (n_switches): none when the turn has one token */
    /* read with the steps only: */
    const char *id; /* of the prompt */
    int32_t n_prompt_tok;
    int32_t n_tokens;                    /* at least 1 */
    const struct recorded_token *tokens; /* (n_tokens): from prefill, then one per step */
};

struct recorded_fact {
    const char *key;
    char *value; /* owned; "" where the file has none */
};

struct recorded {
    int32_t n_levels;
    char (*level)[LEVEL_TEXT_BYTES]; /* (n_levels) owned: as configurations write them */
    int64_t n_turns;
    struct recorded_turn *turns; /* (n_turns) owned, by prompt and turn; turns of a prompt from 0 */
    struct plan_switch *switches; /* owned, of all turns */
    char digest[DIGEST_TEXT];     /* of levels and plans */
    int64_t n_failed;
    int32_t *failed; /* (n_failed) owned: ordinals of prompts that were given up */
    /* read with the steps only: */
    struct recorded_token *tokens; /* owned, of all turns */
    char *ids;                     /* owned, of all turns */
    char *config;                  /* owned: the settings, as a configuration file */
    struct recorded_fact *facts;   /* owned: ends with a NULL key */
};

/* Levels and plans; with_steps: all the rest, too. Errors: ST_IO, ST_FORMAT, ST_HDF5, ST_NOMEM; all
 * name the path. On failure *out is empty; else it is given back with recorded_free. */
MUST_CHECK enum status recorded_read(struct recorded *out, const char *path, bool with_steps);
void recorded_free(struct recorded *r);

/* NULL: the file has no such turn. */
const struct recorded_turn *recorded_find(const struct recorded *r, int64_t prompt, int32_t turn);
/* "": the file, or this program, has no such fact. */
const char *recorded_fact(const struct recorded *r, const char *key);

#endif
