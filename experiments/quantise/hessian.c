/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/hessian.h"

#include <cblas.h>
#include <math.h>

#include "core/mem.h"

enum { TILE = 192 }; /* rows of H per task */

/* LAPACK's, of which OpenBLAS's headers say nothing. */
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info);
void dtrtri_(const char *uplo, const char *diag, const int *n, double *a, const int *lda,
             int *info);

void hessian_blas_begin(void)
{
    openblas_set_num_threads(1);
}

void blas_gemm(int32_t m, int32_t n, int32_t k, float alpha, const float *a, int32_t lda,
               const float *b, int32_t ldb, float beta, float *c, int32_t ldc)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c,
                ldc);
}

void blas_gemm_bt(int32_t m, int32_t n, int32_t k, float alpha, const float *a, int32_t lda,
                  const float *b, int32_t ldb, float beta, float *c, int32_t ldc)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, alpha, a, lda, b, ldb, beta, c,
                ldc);
}

enum status hessian_create(struct hessian *out, int32_t n)
{
    *out = (struct hessian){.n = n};
    size_t count;
    enum status st = mem_mul(&count, (size_t)n, (size_t)n);
    st = st ? st : MEM_NEW(&out->h, count);
    st = st ? st : MEM_NEW(&out->u, count);
    if (st != ST_OK) {
        hessian_free(out);
    }
    return st;
}

void hessian_free(struct hessian *h)
{
    mem_free(h->h);
    mem_free(h->u);
    *h = (struct hessian){0};
}

/* The upper triangle in bands of TILE rows, each from its first column on. */
void hessian_add(struct hessian *h, const float *x, int32_t n_tok, int n_threads)
{
    int32_t n = h->n, n_bands = (n + TILE - 1) / TILE;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
    for (int32_t band = 0; band < n_bands; band++) {
        int32_t i = band * TILE, rows = n - i < TILE ? n - i : TILE;
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, rows, n - i, n_tok, 1.0f, x + i, n,
                    x + i, n, 1.0f, h->h + (size_t)i * (size_t)n + i, n);
    }
    h->n_tok += n_tok;
}

/* Divides, mirrors and checks the diagonal, whose mean is kept. */
static enum status settle(struct hessian *h)
{
    size_t n = (size_t)h->n;
    if (h->n_tok == 0) {
        FAIL(ST_FORMAT, "no calibration tokens");
    }
    float scale = (float)(1.0 / (double)h->n_tok);
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        for (size_t j = i; j < n; j++) {
            float v = h->h[i * n + j] * scale;
            h->h[i * n + j] = v;
            h->h[j * n + i] = v;
        }
        sum += (double)h->h[i * n + i];
    }
    if (!isfinite(sum)) {
        FAIL(ST_FORMAT, "the activations of the calibration tokens are not finite");
    }
    h->mean_diag = sum / (double)n;
    return ST_OK;
}

/* With the order of the columns turned round, H = L L^T (L lower) reads H = R R^T with R upper, so
 * H^-1 = U^T U with U = R^-1, upper: one factorisation and the inverse of a triangle. */
enum status hessian_finish(struct hessian *h, double damp)
{
    TRY(settle(h));
    size_t n = (size_t)h->n;
    double *a = NULL, mean = h->mean_diag > 0 ? h->mean_diag : 1.0;
    TRY(MEM_NEW(&a, n * n));
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j <= i; j++) {
            a[i * n + j] = (double)h->h[(n - 1 - i) * n + (n - 1 - j)];
        }
        a[i * n + i] = (a[i * n + i] > 0 ? a[i * n + i] : mean) + damp * mean;
    }
    int info, size = h->n;
    dpotrf_("U", &size, a, &size, &info); /* row major lower is column major upper */
    if (info == 0) {
        dtrtri_("U", "N", &size, a, &size, &info);
    }
    for (size_t i = 0; info == 0 && i < n; i++) {
        for (size_t j = i; j < n; j++) {
            h->u[i * n + j] = (float)a[(n - 1 - i) * n + (n - 1 - j)];
        }
    }
    mem_free(a);
    if (info != 0) {
        FAIL(ST_USER,
             "the second moments of the calibration activations cannot be factored at column %d of "
             "%d with --damp %g; use more calibration text or a larger --damp",
             size - info, size, damp);
    }
    return ST_OK;
}
