/* Restricted sampling over a replica: the ranks' best candidates are gathered and the first rank
 * chooses; where the candidates do not settle it, all logits of that token are gathered. The choice
 * is broadcast, so that a rounding difference between machines never desynchronises the ranks.
 *
 * chooser_run is collective over the replica. No allocation after creation.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_CHOOSER_H
#define PMPD_CORE_CHOOSER_H

#include "core/backend.h"
#include "core/candidates.h"
#include "core/collective.h"
#include "core/status.h"
#include "core/weights.h"

struct chooser;

/* For at most max_tok tokens at once. be, coll and shard are borrowed and must outlive the chooser.
 * Not collective. Errors: ST_USER (more candidates than one message takes), ST_NOMEM. */
MUST_CHECK enum status chooser_create(struct chooser **out, struct backend *be,
                                      struct collective *coll, const struct model_shard *shard,
                                      int32_t vocab, const struct candidate_filter *filter,
                                      int32_t max_tok);
void chooser_destroy(struct chooser **chooser);

/* logits (n_tok, n_vocab_local) of this rank in backend memory; merged (n_tok) and wants (n_tok) of
 * the whole vocabulary. Sets pick and pick_logit of merged where the want is restricted.
 * *n_gathered: tokens whose logits were gathered. Errors: those of backend and collective. */
MUST_CHECK enum status chooser_run(struct chooser *chooser, const struct tensor *logits,
                                   struct logit_stats *merged, const struct logit_want *wants,
                                   int32_t *n_gathered);

#endif
