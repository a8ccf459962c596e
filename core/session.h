/* A replica's sequences: each slot's prompt goes through its turns (prefill in chunks, a plan from
 * the policy, decode steps until EOS or the limit), slots decode together (continuous batching),
 * and every step and pass is recorded. One session_advance is one pass.
 *
 * Collective over the replica: all of its ranks make the same calls in the same order. The policy
 * is asked through core/planner.h. No allocation after creation.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_SESSION_H
#define PMPD_CORE_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "core/decoder.h"
#include "core/planner.h"
#include "core/policy.h"
#include "core/prompts.h"
#include "core/trace.h"

struct session;

/* A token has come out of a slot (token 0 of a turn included). */
typedef void session_token_fn(void *ctx, int32_t slot, int32_t token);
/* A prompt is finished; the record is borrowed for the call. Errors end the pass. */
typedef enum status session_finished_fn(void *ctx, const struct finished_record *record);

struct session_options {
    int32_t n_slots; /* of the decoder */
    int32_t prefill_chunk;
    int32_t max_tok;        /* of a slot */
    int32_t max_turns;      /* most turns of any prompt */
    int32_t max_new_tokens; /* per turn; at most that many tokens, never one more */
    bool stop_at_eos;
    float temperature; /* 0: greedy */
    uint64_t seed;
    int32_t epoch, replica; /* recorded */
    bool by_level;          /* a decode pass takes slots at one level only (decode.cohort) */
    int32_t lag;            /* core/planner.h; 0: 1 */
    const struct planner_remote *remote; /* the same; NULL: the policy is asked here. Borrowed */
    bool kv_features; /* record core/kvcache.h features after the first turn's prefill */
    bool signals;     /* record SIGNAL_HIDDEN and SIGNAL_KV_NORMS; the decoder measures them */
    session_token_fn *on_token;       /* may be NULL */
    session_finished_fn *on_finished; /* may be NULL */
    void *ctx;                        /* of both */
};

/* Everything borrowed outlives the session. config: of the model (EOS ids, head_dim). */
MUST_CHECK enum status session_create(struct session **out, struct decoder *dec,
                                      struct collective *coll, struct policy *policy,
                                      const struct level_table *levels,
                                      const struct model_config *config,
                                      const struct session_options *options);
void session_destroy(struct session **s);

/* The largest packed finished record that options allow. Errors: ST_SHAPE (overflow). */
MUST_CHECK enum status session_max_record_bytes(size_t *out, const struct session_options *options,
                                                int32_t head_dim);

int32_t session_n_free(const struct session *s);
int32_t session_n_active(const struct session *s);
/* Puts an encoded prompt (borrowed until it is finished) into a free slot. dial: of its lease. */
MUST_CHECK enum status session_start(struct session *s, const struct prompt *prompt,
                                     int64_t ordinal, const uint64_t key[2], int32_t attempt,
                                     float dial);
/* One pass: a prefill chunk if a slot has prompt tokens left, else one step of every active slot
 * (by_level: of those at the level of the slot that has waited longest).
 * Does nothing when no slot is active. Errors: those of decoder and policy; ST_NUMERIC names
 * prompt, step and level. */
MUST_CHECK enum status session_advance(struct session *s);
/* Which prompts a crash or an error would be laid to now: the one that is worked on by itself (its
 * start, a prefill chunk, its plan, its end), else every active one. After an error they stay what
 * they were when it was found. Writes at most capacity ordinals, returns how many.
 * Async-signal-safe. */
int32_t session_suspects(const struct session *s, int64_t *ordinals, int32_t capacity);

#endif
