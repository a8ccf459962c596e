/* Scoring windows of tokens: negative log-likelihood through prefill, or through the decode path
 * under a plan.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_SCORE_H
#define PMPD_EXPERIMENTS_SCORE_H

#include "core/plan.h"
#include "experiments/engine.h"
#include "experiments/windows.h"

enum { SCORE_DECODE_WINDOWS = 8 }; /* slots that score_by_decode needs */

/* Sums over the tokens scored so far; zero it first. */
struct score {
    double nll;             /* nats */
    int64_t n_tok, n_right; /* argmax equals the token */
    double bits;            /* of the level each was scored at */
};

/* Every window through slot 0 in prefill chunks at one level. Collective over the replica. Errors:
 * those of decoder_prefill. */
MUST_CHECK enum status score_by_prefill(struct engine *e, const struct settings *s,
                                        const struct windows *w, int32_t level, struct score *sum);
/* Positions before w->first are prefilled, then each token is fed by a decode step of its own at
 * the plan's level, SCORE_DECODE_WINDOWS windows side by side. Collective over the replica. */
MUST_CHECK enum status score_by_decode(struct engine *e, const struct settings *s,
                                       const struct windows *w, const struct plan *plan,
                                       struct score *sum);

#endif
