/* The forward pass: slots (sequences decoded together, each token at its own level) and prefill
 * chunks, on one rank of a replica. The decoder is given tokens and levels; what they are is the
 * session's business. Mechanism only: no policy, no files, no allocation after creation.
 *
 * All calls but create and destroy are collective over the replica: its ranks call them in the same
 * order with the same arguments and get the same results.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_DECODER_H
#define PMPD_CORE_DECODER_H

#include "core/backend.h"
#include "core/candidates.h"
#include "core/collective.h"
#include "core/kvcache.h"
#include "core/level.h"
#include "core/meter.h"
#include "core/sampler.h"
#include "core/status.h"
#include "core/trace.h"
#include "core/weights.h"

struct decoder;

struct decoder_options {
    int32_t n_slots;       /* sequences that decode together */
    int32_t max_tok;       /* tokens of a slot, at most the model's context */
    int32_t prefill_chunk; /* tokens of one prefill pass */
    enum dtype kv_dtype;   /* F16 or F32 */
    bool adds_tokens;      /* the policy may add probe tokens: decode uses the SLOTS product */
    uint32_t signals;      /* mask of core/policy.h: what passes measure */
    struct candidate_filter filter; /* of tokens sampled at a temperature above 0 */
};

/* Everything is allocated here. Not collective. be, coll, weights and levels are borrowed and must
 * outlive the decoder; the level table no longer grows. Errors: ST_USER (max_tok over the model's
 * context), ST_NOMEM. */
MUST_CHECK enum status decoder_create(struct decoder **out, struct backend *be,
                                      struct collective *coll, struct weights *weights,
                                      const struct level_table *levels,
                                      const struct decoder_options *options);
void decoder_destroy(struct decoder **dec);

/* Tokens in a slot's KV cache; forgetting them makes the slot free for another sequence. */
int32_t decoder_n_filled(const struct decoder *dec, int32_t slot);
void decoder_clear_slot(struct decoder *dec, int32_t slot);
/* kvcache_fork: slot `to` goes on from where slot `from` is, which goes on, too. From then on both
 * give what a slot that had been fed the same tokens at the same levels would give, bit for bit.
 * Allocates its scratch on first use where the backend's memory is not the host's. */
MUST_CHECK enum status decoder_fork_slot(struct decoder *dec, int32_t from, int32_t to);
/* kvcache_fill: the slot then holds n_tok tokens, forgotten or made up as needed. For timings at a
 * context that nobody wants to prefill. Allocates. */
MUST_CHECK enum status decoder_fill_slot(struct decoder *dec, int32_t slot, int32_t n_tok);

/* One token of a decode pass. want.restricted is the decoder's business. */
struct decode_token {
    int32_t slot, id, level;
    bool probe; /* the token before it, of the same slot and id, once more at another level */
    struct logit_want want;
};

/* One pass over n tokens of different slots, and probes of some of them: K and V of a token are
 * appended, those of a probe go to the slot's spare row and are forgotten; a probe attends to the
 * rows before its position and to its own. Results (n) are what follows each. At most n_slots
 * tokens, and as many probes where the options add tokens. *pass gets everything but its number.
 * Errors: ST_SHAPE (a full slot, an id outside the vocabulary), ST_NUMERIC (logits that are not
 * numbers: the results of those tokens then have token -1), those of backend and collective. */
MUST_CHECK enum status decoder_step(struct decoder *dec, const struct decode_token *tokens,
                                    int32_t n, struct token_result *results,
                                    struct pass_record *pass);

/* One prefill pass: n <= prefill_chunk ids appended to a slot at one level. Results are computed
 * for the last n_results ids, each with its own want (n_results). n_results may be 0; at
 * most n_slots of them have a temperature above 0. */
MUST_CHECK enum status decoder_prefill(struct decoder *dec, int32_t slot, const int32_t *ids,
                                       int32_t n, int32_t level, const struct logit_want *wants,
                                       int32_t n_results, struct token_result *results,
                                       struct pass_record *pass);

/* What the last pass measured of its result i: with options.signals for as many results as slots
 * (and probes) there are. */
const struct measured *decoder_measured(const struct decoder *dec, int32_t i);

/* Logits of the last pass: out (n_results of it, vocab) host memory, on every rank. */
MUST_CHECK enum status decoder_logits(struct decoder *dec, float *out);

/* kvcache_features of a slot: out (2, n_tok, head_dim), or (2, n_kv_heads, n_tok, head_dim) of all
 * heads. Allocates its scratch on first use. */
MUST_CHECK enum status decoder_features(struct decoder *dec, int32_t slot, int32_t n_tok,
                                        bool all_heads, float *out);

#endif
