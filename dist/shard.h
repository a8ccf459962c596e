/* The arithmetic of tensor-parallel shards and canonical segments. No MPI here: every world size
 * can be tried in one process.
 *
 * The input of o (n_heads * head_dim columns) and of down (ffn columns) is measured in units; a
 * unit is the smallest column run that may be cut off: lcm(group, head_dim) for o, the group for
 * down (dense: head_dim and 1). U units are cut into S segments, segment i = units [iU/S,
 * (i+1)U/S); rank r of n owns segments [rS/n, (r+1)S/n). With parallel.reproducible S =
 * min(parallel.segments, U) whatever n is; otherwise S = n, and each rank owns one. The vocabulary
 * is cut the same way in units of one row. The last group of down may be shorter than the others
 * (padding). So every number of ranks fits that is no larger than the smallest of the three S;
 * shares may be uneven. A rank with query heads [a, b) holds every KV head that they use, [a / q,
 * ceil(b / q)) with q query heads to a KV head: a KV head whose query heads are shared out is held
 * by each rank that has one of them.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_SHARD_H
#define PMPD_DIST_SHARD_H

#include <stdbool.h>

#include "core/weights.h"

struct shard_options {
    int32_t size; /* tensor ranks */
    bool reproducible;
    int32_t segments; /* parallel.segments, used when reproducible */
};

/* The shard of one rank. group_cols: the nested model's group, 1 for a dense model.
 * Errors: ST_USER: parallel.segments out of range; or the size does not fit, e.g. "5 tensor ranks
 * do not fit this model (4 units of attention input, ...): use 1 to 4; 1, 2 and 4 share the
 * attention evenly". */
MUST_CHECK enum status shard_model(struct model_shard *out, const struct model_config *config,
                                   int32_t group_cols, const struct shard_options *options,
                                   int32_t rank);

#endif
