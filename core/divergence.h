/* How far a probe's distribution lies from its step's: KL(p || q) = sum p (log p - log q) in nats,
 * p of the probe, q of the step, both at temperature 1, over the whole vocabulary. Every rank adds
 * up its own part of the vocabulary, segment by segment; one number per segment travels and they
 * are added in vocabulary order.
 *
 * divergence_run is collective over the replica. No allocation after creation.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_DIVERGENCE_H
#define PMPD_CORE_DIVERGENCE_H

#include <stdbool.h>

#include "core/backend.h"
#include "core/collective.h"
#include "core/sampler.h"
#include "core/status.h"
#include "core/weights.h"

struct divergence;

/* For at most max_probes probes at once. Everything is borrowed and must outlive it. Not
 * collective. Errors: ST_NOMEM. */
MUST_CHECK enum status divergence_create(struct divergence **out, struct backend *be,
                                         struct collective *coll, const struct model_shard *shard,
                                         int32_t max_probes);
void divergence_destroy(struct divergence **divergence);

/* logits (n, n_vocab_local) of this rank in backend memory, merged (n) statistics of the whole
 * vocabulary, is_probe (n): row i is the probe of row i - 1. Sets probe_kl of those results. */
MUST_CHECK enum status divergence_run(struct divergence *d, const struct tensor *logits,
                                      const struct logit_stats *merged, const bool *is_probe,
                                      struct token_result *results);

#endif
