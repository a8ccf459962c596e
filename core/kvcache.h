/* The KV cache of one rank: per layer K and V of (n_slots, n_kv_heads_local, max_tok + n_spare,
 * head_dim) in one backend block, and how many rows of each slot are filled.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_KVCACHE_H
#define PMPD_CORE_KVCACHE_H

#include "core/backend.h"
#include "core/collective.h"
#include "core/weights.h"

struct kvcache {
    struct backend *be;      /* borrowed */
    struct kv_layer *layers; /* (n_layers) owned */
    int32_t *n_filled;       /* (n_slots) owned: tokens in the slot */
    void *block;             /* owned (backend) */
    int32_t n_layers, n_slots, n_kv_local, n_rows, head_dim, max_tok;
    enum dtype dtype; /* F16 or F32 */
    size_t bytes;
};

/* Errors: ST_SHAPE (overflow), ST_NOMEM with the size and the settings that make it smaller. */
MUST_CHECK enum status kvcache_create(struct kvcache *out, struct backend *be,
                                      const struct model_config *config,
                                      const struct model_shard *shard, int32_t n_slots,
                                      int32_t max_tok, int32_t n_spare, enum dtype dtype);
void kvcache_free(struct kvcache *kv);

/* Makes a slot hold n_tok tokens, for timings: rows that it has stay, further ones get numbers
 * between -1 and 1 that a seed and their place determine. Allocates. Errors: ST_SHAPE (n_tok over
 * max_tok), ST_NOMEM. */
MUST_CHECK enum status kvcache_fill(struct kvcache *kv, int32_t slot, int32_t n_tok, uint32_t seed);

/* Features of a slot for learned schedulers: K and V of the last layer, mean over all KV heads of
 * the model: out (2, n_tok, head_dim) host memory, K first; or all_heads: out (2, n_kv_heads,
 * n_tok, head_dim). Heads are gathered from the ranks and added in head order, replicated heads
 * once. scratch: (n_kv_heads + n_kv_local) * n_tok * head_dim
 * floats. Collective over the replica.
 * Source: the PMPD paper (arXiv 2410.13461), learned scheduler: last block's KV cache as input,
 * averaged over heads. */
MUST_CHECK enum status kvcache_features(const struct kvcache *kv, struct collective *coll,
                                        const struct model_shard *shard, int32_t n_kv_heads,
                                        int32_t slot, int32_t n_tok, bool all_heads, float *out,
                                        float *scratch);

/* Slot `to` gets what slot `from` holds, and as many tokens; what it held is gone. bounce: host
 * memory for one head of a slot, n_rows * head_dim elements (may be NULL where the backend's memory
 * is the host's). Not collective: each rank copies its own heads. Errors: those of the backend. */
MUST_CHECK enum status kvcache_fork(struct kvcache *kv, int32_t from, int32_t to, void *bounce);

#endif
