/* Shapes of well-known models, without their weights.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_SHAPE_H
#define PMPD_EXPERIMENTS_BENCH_SHAPE_H

#include "core/model.h"

#define SHAPE_NAMES "mobilellama-1.4b, vicuna-7b, phi-1.5, stablelm-3b, llama-3.1-8b, tiny"

/* The config of a named shape, or of FOLDER/config.json (its weights are not looked at).
 * Errors: ST_USER (no such shape and no folder); those of model_config_read. */
MUST_CHECK enum status shape_get(struct model_config *out, const char *name_or_folder);

/* Different (rows, columns) of a model's linears and head, the head's last. */
enum { SHAPE_MATRICES_MAX = 8 };
struct shape_matrix {
    int32_t n_rows, n_cols;
};
int shape_matrices(struct shape_matrix out[SHAPE_MATRICES_MAX], const struct model_config *c);

#endif
