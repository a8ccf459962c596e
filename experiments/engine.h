/* Wiring: settings -> grid -> backend -> weights -> decoder, for one replica. Two phases, since the
 * levels that a run uses must be known before weights are loaded: engine_open, then whoever knows
 * adds levels, then engine_load. A scheduler service of its own (env->n_service) reads the model's
 * description like the others, but has no backend, weights and decoder.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_ENGINE_H
#define PMPD_EXPERIMENTS_ENGINE_H

#include "core/decoder.h"
#include "core/level.h"
#include "core/settings.h"
#include "core/weights.h"
#include "dist/env.h"

struct engine {
    struct env *env; /* borrowed */
    struct backend be;
    struct collective coll;
    struct model_source source;
    struct model_shard shard;
    struct level_table levels;
    struct weights weights; /* not on a service's rank ... */
    struct decoder *dec;    /* ... nor this */
    char backend[32];       /* name and arithmetic of the backend of the ranks that decode */
    char arithmetic[64];
    enum dtype kv_dtype;
    int32_t context;         /* tokens of a slot */
    bool policy_adds_tokens; /* for the provenance */
    uint32_t policy_signals; /* what passes measure for the policy; set it before engine_load */
};

/* Reads the model's description, cuts the world into replicas of settings->parallel.tensor_ranks
 * and opens the backend. Collective over the world; all ranks succeed or fail together. */
MUST_CHECK enum status engine_open(struct engine *e, struct env *env,
                                   const struct settings *settings);
/* Loads what the levels need and makes the decoder. Collective over the world. */
MUST_CHECK enum status engine_load(struct engine *e, const struct settings *settings,
                                   bool policy_adds_tokens);
void engine_close(struct engine *e);

/* After the token loop, where ranks can no longer agree: a failure is reported through the lifeline
 * (where there is one) and, with more than one rank, printed here and ends the job (never returns);
 * otherwise st comes back. */
MUST_CHECK enum status engine_loop_end(struct env *env, enum status st);

#endif
