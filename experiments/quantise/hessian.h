/* Second moments of one linear input: H = X^T X / n over the calibration tokens, and from it what
 * error feedback needs. X are the inputs of the matrices that share them (q, k and v; gate and up).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_HESSIAN_H
#define PMPD_EXPERIMENTS_QUANTISE_HESSIAN_H

#include <stdint.h>

#include "core/status.h"

struct hessian {
    int32_t n;        /* columns of the matrices */
    int64_t n_tok;    /* tokens added */
    float *h;         /* (n, n) owned; after hessian_finish symmetric, divided by n_tok */
    float *u;         /* (n, n) owned; upper, U^T U = (H + damp I)^-1; after hessian_finish */
    double mean_diag; /* of H */
};

/* Errors: ST_SHAPE, ST_NOMEM. */
MUST_CHECK enum status hessian_create(struct hessian *out, int32_t n);
void hessian_free(struct hessian *h); /* zeroed ones too */
/* Adds n_tok rows of x (n_tok, n). Threads: n_threads of OpenMP; the sums do not depend on their
 * number. */
void hessian_add(struct hessian *h, const float *x, int32_t n_tok, int n_threads);
/* Divides, mirrors and factors. damp: this share of the mean of the diagonal is added to the
 * diagonal of what is inverted; columns that were always zero count as the mean.
 * Errors: ST_FORMAT (activations that are not finite, or no tokens), ST_USER (damp too small for
 * these activations), ST_NOMEM. */
MUST_CHECK enum status hessian_finish(struct hessian *h, double damp);

/* BLAS with one thread of its own: calls come from OpenMP threads, each with its share of the rows,
 * so that results do not depend on the number of threads. Before the first call of any other. */
void hessian_blas_begin(void);

/* c (m, n) = alpha a (m, k) b (k, n) + beta c, row major, rows lda, ldb, ldc apart. */
void blas_gemm(int32_t m, int32_t n, int32_t k, float alpha, const float *a, int32_t lda,
               const float *b, int32_t ldb, float beta, float *c, int32_t ldc);
/* The same with b given as (n, k): c = alpha a b^T + beta c. */
void blas_gemm_bt(int32_t m, int32_t n, int32_t k, float alpha, const float *a, int32_t lda,
                  const float *b, int32_t ldb, float beta, float *c, int32_t ldc);

#endif
