/* Measures a pass for the policies' signals: sums of the inputs of linear layers, of the residual
 * stream and of the new K and V rows, taken where they lie and merged over the ranks of the replica
 * in segment and head order, so that under parallel.reproducible every number of ranks gives the
 * same bits. Only a few floats per layer travel, once per pass.
 *
 * meter_end is collective over the replica, nothing else is. No allocation after creation.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_METER_H
#define PMPD_CORE_METER_H

#include <stdint.h>

#include "core/backend.h"
#include "core/collective.h"
#include "core/status.h"
#include "core/weights.h"

struct meter;

/* Of one position. See struct signals in core/policy.h; what was not asked for is 0 or NULL. */
struct measured {
    float hidden_mean, hidden_rms, k_norm, v_norm;
    const float *activation; /* (n_layers, M_N_ROLES, 2): mean, variance; owned by the meter */
};

/* What goes into linear layers: q, k and v share an input, gate and up share one. A parallel block
 * has no MLP input of its own. */
enum meter_input { METER_ATTN, METER_O, METER_MLP, METER_DOWN, METER_N_INPUTS };

/* needs: mask of core/policy.h; max_rows: most positions of a pass that are measured. be, coll,
 * shard and config are borrowed and must outlive the meter. Errors: ST_SHAPE, ST_NOMEM. */
MUST_CHECK enum status meter_create(struct meter **out, struct backend *be, struct collective *coll,
                                    const struct model_shard *shard,
                                    const struct model_config *config, uint32_t needs,
                                    int32_t max_rows);
void meter_destroy(struct meter **meter);

/* A pass begins whose positions first.. first + n - 1 are measured; n may be 0. */
void meter_begin(struct meter *m, int32_t first, int32_t n);
/* x (n_tok, width of this rank) F32 in backend memory. */
MUST_CHECK enum status meter_take_input(struct meter *m, int32_t layer, enum meter_input which,
                                        const float *x);
/* x (n_tok, hidden): the input of the final norm. */
MUST_CHECK enum status meter_take_hidden(struct meter *m, const float *x);
/* k, v (n_tok, n_kv_heads_local, head_dim) of the last layer, before the cache rounds them. */
MUST_CHECK enum status meter_take_kv(struct meter *m, const float *k, const float *v);
/* Waits for the backend and merges: the same results on every rank. */
MUST_CHECK enum status meter_end(struct meter *m);
/* Of measured position i < n, until the next meter_begin. */
const struct measured *meter_of(const struct meter *m, int32_t i);

#endif
