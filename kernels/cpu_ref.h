/* The oracle's own state and its products with weights; private to cpu_ref*.c.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_REF_H
#define PMPD_KERNELS_CPU_REF_H

#include "core/backend.h"
#include "kernels/host.h"

struct cpu_ref {
    struct host_scratch row; /* one decoded row of a matrix */
    double *scores;          /* (n_scores) owned: attention weights of one head of one token */
    size_t n_scores;
};

/* At least n doubles in *block, kept from call to call. */
MUST_CHECK enum status cpu_ref_reserve(double **block, size_t *capacity, size_t n);

/* Slots of struct backend_ops. A matrix is kept as it lies in the file, cut to the shard: planes
 * (n_resident, n_rows, n_cols_padded / 8) in one block, the F16 arrays of a precision one after the
 * other in another, so that core/bitplane.h decodes it. */
MUST_CHECK enum status cpu_ref_planes_load(struct backend *be, struct nested_matrix *w,
                                           const struct nested_source *src,
                                           const struct matrix_range *range, int n_planes);
void cpu_ref_planes_drop(struct backend *be, struct nested_matrix *w, int keep);
MUST_CHECK enum status cpu_ref_matmul_nested(struct backend *be, struct tensor *y,
                                             const struct nested_matrix *w,
                                             const struct tensor *bits, const struct tensor *x,
                                             const struct tensor *bias, const struct how *how);
MUST_CHECK enum status cpu_ref_matmul_dense(struct backend *be, struct tensor *y,
                                            const struct tensor *w, const struct tensor *x,
                                            const struct tensor *bias, const struct how *how);

#endif
