/* Greedy continuations of several prompts side by side, each with branches: copies of its sequence
 * that leave it at a step and go on at another level. The shared part is decoded once: a branch
 * starts by copying the KV cache (decoder_fork_slot). This is how labels for learned schedulers are
 * made: the main sequence is the high level's, branch i switches to the low level at step at[i].
 * A branch has the tokens that a run of its own under the plan "0:LEVEL at:BRANCH_LEVEL" has.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BRANCHES_H
#define PMPD_EXPERIMENTS_BRANCHES_H

#include <stdbool.h>
#include <stdint.h>

#include "experiments/engine.h"

enum { BRANCHES_MAX = 16 };

/* Logits (vocab) that predict token t of a sequence (0: the main one, 1 + i: branch i) of prompt p
 * of the group. */
typedef enum status branches_logits_fn(void *ctx, int32_t p, int32_t sequence, int32_t t,
                                       const float *logits);

struct branches_options {
    int32_t prefill, level; /* of the main sequence; level ids of the engine */
    int32_t n_branches, branch_level;
    int32_t at[BRANCHES_MAX]; /* (n_branches) ascending, >= 0 */
    int32_t max_new_tokens;
    bool stop_at_eos;
    bool all_heads;                /* features of every KV head instead of their mean */
    branches_logits_fn *on_logits; /* may be NULL */
    void *ctx;
};

struct branches_prompt {
    const int32_t *ids; /* (n_ids) borrowed */
    int32_t n_ids;
    const int32_t *forced; /* (n_forced) tokens fed instead of the own ones, of all sequences; NULL:
                              the own ones. Then nothing is recorded but logits are shown. */
    int32_t n_forced;
    /* filled in; memory by the caller */
    int32_t *tokens; /* (1 + n_branches, max_new_tokens) */
    int32_t *n_new;  /* (1 + n_branches) */
    float *signals;  /* (max_new_tokens, 3) logprob, entropy, margin of the main sequence's
                        tokens; may be NULL */
    float *features; /* (2, heads, n_ids, head_dim) after prefill; heads 1, or n_kv_heads
                         with all_heads; may be NULL */
};

struct branches;
/* For groups of up to n_side prompts: the engine's decoder has n_side * (1 + n_branches) slots. e
 * and options are borrowed. */
MUST_CHECK enum status branches_create(struct branches **out, struct engine *e, int32_t n_side,
                                       int32_t prefill_chunk,
                                       const struct branches_options *options);
void branches_destroy(struct branches **b);
/* Collective over the replica. Errors: those of the decoder, with the prompt's index in the group
 * where one is at fault. */
MUST_CHECK enum status branches_run(struct branches *b, struct branches_prompt *prompts, int32_t n);

#endif
