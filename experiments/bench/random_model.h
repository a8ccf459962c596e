/* Weights that a backend holds of a model nobody trained: nested matrices with random planes and
 * plausible levels, made in memory in seconds. For timings: what they decode to is noise that stays
 * finite.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_RANDOM_MODEL_H
#define PMPD_EXPERIMENTS_BENCH_RANDOM_MODEL_H

#include "core/weights.h"

/* One random matrix as a file would hold it: every precision b of the mask `bits` with levels of
 * `kind` (TIED or FREE) in groups of `group` columns (a multiple of 32), n_planes the highest of
 * them. Weights have mean 0 and standard deviation 1 / sqrt(n_cols), so that a product keeps the
 * size of its input. */
struct random_matrix {
    struct nested_source source; /* points into block */
    void *block;                 /* owned */
};
MUST_CHECK enum status random_matrix_create(struct random_matrix *out, int32_t n_rows,
                                            int32_t n_cols, int32_t group, enum level_kind kind,
                                            uint32_t bits, uint64_t seed);
void random_matrix_free(struct random_matrix *m);

/* Makes config that of a nested model: group, planes, a nested head. */
void random_model_nest(struct model_config *config, int32_t group, uint32_t bits);
/* Loads this rank's shard of a random model: matrices of one shape share one random source, an F16
 * embedding, norms of gain 1. config was nested. weights_free gives it back. Progress is shown.
 * Not collective. Errors: ST_NOMEM, those of the backend. */
MUST_CHECK enum status random_model_load(struct weights *out, struct backend *be,
                                         const struct model_config *config,
                                         const struct model_shard *shard, enum level_kind kind,
                                         uint32_t bits);

/* Bytes of a model in memory, by arithmetic: */
struct model_bytes {
    size_t planes; /* of all linears and the head */
    size_t levels; /* of every precision held */
    size_t embed;  /* the F16 table */
};
/* Of what is loaded: this rank's. */
void random_model_bytes(struct model_bytes *out, const struct weights *w);
/* Of a whole model that is not loaded yet, and the most that its making takes beside it. */
void random_model_estimate(struct model_bytes *out, size_t *while_making,
                           const struct model_config *config, enum level_kind kind, uint32_t bits);

#endif
