/* The first timing table of the cuda backend: one-token products by shape and bits, with cold
 * caches (copies of the matrix in turn, more than the second-level cache holds) and warm ones (one
 * matrix again and again), beside cuBLAS in FP16 on the same shape and the device's own copy
 * bandwidth, measured in the same run. Nothing here is a test: it prints what it sees. gpu_timing
 * [--device N] Bytes are planes and levels of the precision (FP16: the weights); GB/s are 1e9
 * bytes. SPDX-License-Identifier: Apache-2.0
 */
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

extern "C" {
#include "core/backend.h"
#include "kernels/gpu.h"
#include "kernels/kernels.h"
#include "tests/ops/rig.h"
}

enum { GROUP = 64, REPEATS = 5, MAX_COPIES = 64 };
static const size_t COPY_BYTES = (size_t)1 << 30;

static void must(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "gpu_timing: %s: %s\n", what, status_message());
        exit(1);
    }
}

/* Microseconds of one call of f(i), i = 0.. : the median of REPEATS runs of n calls. */
template <typename F> static double time_us(cudaStream_t stream, int n, F f)
{
    std::vector<double> runs;
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int r = 0; r <= REPEATS; r++) {
        cudaEventRecord(begin, stream);
        for (int i = 0; i < n; i++) {
            f(i);
        }
        cudaEventRecord(end, stream);
        must(cudaEventSynchronize(end) == cudaSuccess, "timing");
        float ms = 0;
        cudaEventElapsedTime(&ms, begin, end);
        if (r > 0) { /* the first one warms up */
            runs.push_back(1e3 * (double)ms / n);
        }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(runs.begin(), runs.end());
    return runs[runs.size() / 2];
}

static double copy_gb_s(cudaStream_t stream)
{
    void *a = NULL, *b = NULL;
    must(cudaMalloc(&a, COPY_BYTES) == cudaSuccess && cudaMalloc(&b, COPY_BYTES) == cudaSuccess,
         "2 GiB for the copy");
    double us = time_us(stream, 10, [&](int) {
        cudaMemcpyAsync(b, a, COPY_BYTES, cudaMemcpyDeviceToDevice, stream);
    });
    cudaFree(a);
    cudaFree(b);
    return 2e-3 * (double)COPY_BYTES / us;
}

struct shape {
    int32_t n_rows, n_cols;
};

static void time_nested(struct backend *be, cudaStream_t stream, struct shape s, double copy,
                        size_t cache_bytes)
{
    struct rig_rng rng = {RIG_SEED};
    const enum level_kind kind[BITS_ALL] = {LEVEL_NONE, LEVEL_NONE, LEVEL_TIED, LEVEL_TIED,
                                            LEVEL_TIED};
    struct rig_matrix m;
    rig_matrix_make(&m, &rng, s.n_rows, s.n_cols, GROUP, 4, kind);
    struct matrix_range whole = rig_whole(&m.src);
    struct nested_matrix w[MAX_COPIES];
    memset(w, 0, sizeof w);
    size_t two_bits =
        nested_bytes_read(m.src.kind, s.n_rows, m.src.n_cols_padded, GROUP, 2, 1u << 2);
    int n = (int)std::min((size_t)MAX_COPIES, 3 * cache_bytes / two_bits + 2);
    for (int i = 0; i < n; i++) {
        must(backend_planes_load(be, &w[i], &m.src, &whole, 4) == ST_OK, "planes_load");
    }
    void *x = NULL, *y = NULL, *bits = NULL;
    must(backend_alloc(be, &x, (size_t)s.n_cols * 4) == ST_OK, "x");
    must(backend_alloc(be, &y, (size_t)s.n_rows * 4) == ST_OK, "y");
    must(backend_alloc(be, &bits, 1) == ST_OK, "bits");
    struct tensor tx = tensor_2d(x, DT_F32, 1, s.n_cols), ty = tensor_2d(y, DT_F32, 1, s.n_rows);
    struct tensor tb = tensor_1d(bits, DT_U8, 1);
    for (int b = 2; b <= 4; b++) {
        uint8_t host = (uint8_t)b;
        must(backend_upload(be, bits, &host, 1) == ST_OK, "bits");
        struct how how;
        memset(&how, 0, sizeof how);
        how.product = PRODUCT_ONE;
        how.n_segments = 1;
        how.bits_used = 1u << b;
        size_t bytes =
            nested_bytes_read(m.src.kind, s.n_rows, m.src.n_cols_padded, GROUP, b, 1u << b);
        double cold = time_us(stream, 4 * n, [&](int i) {
            must(backend_matmul_nested(be, &ty, &w[i % n], &tb, &tx, NULL, &how) == ST_OK,
                 "product");
        });
        double warm = time_us(stream, 100, [&](int) {
            must(backend_matmul_nested(be, &ty, &w[0], &tb, &tx, NULL, &how) == ST_OK, "product");
        });
        printf("%6d x %-6d  nested %d bits %9.1f %9.1f %9.0f %9.2f\n", s.n_rows, s.n_cols, b, cold,
               warm, 1e-3 * (double)bytes / cold, 1e-3 * (double)bytes / cold / copy);
    }
    for (int i = 0; i < n; i++) {
        backend_planes_drop(be, &w[i], 0);
    }
    backend_release(be, x);
    backend_release(be, y);
    backend_release(be, bits);
    rig_matrix_free(&m);
}

static void time_cublas(cublasHandle_t blas, cudaStream_t stream, struct shape s, double copy,
                        size_t cache_bytes)
{
    size_t bytes = (size_t)s.n_rows * (size_t)s.n_cols * 2;
    int n = (int)std::min((size_t)MAX_COPIES, 3 * cache_bytes / bytes + 2);
    char *w = NULL;
    void *x = NULL, *y = NULL;
    must(cudaMalloc((void **)&w, (size_t)n * bytes) == cudaSuccess, "weights");
    must(cudaMalloc(&x, (size_t)s.n_cols * 2) == cudaSuccess, "x");
    must(cudaMalloc(&y, (size_t)s.n_rows * 2) == cudaSuccess, "y");
    cudaMemset(w, 0, (size_t)n * bytes);
    cudaMemset(x, 0, (size_t)s.n_cols * 2);
    const float one = 1, zero = 0;
    auto product = [&](int i) {
        must(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, s.n_rows, 1, s.n_cols, &one,
                          w + (size_t)i * bytes, CUDA_R_16F, s.n_cols, x, CUDA_R_16F, s.n_cols,
                          &zero, y, CUDA_R_16F, s.n_rows, CUBLAS_COMPUTE_32F,
                          CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS,
             "cuBLAS");
    };
    double cold = time_us(stream, 4 * n, [&](int i) { product(i % n); });
    double warm = time_us(stream, 100, [&](int) { product(0); });
    printf("%6d x %-6d  cuBLAS FP16   %9.1f %9.1f %9.0f %9.2f\n", s.n_rows, s.n_cols, cold, warm,
           1e-3 * (double)bytes / cold, 1e-3 * (double)bytes / cold / copy);
    cudaFree(w);
    cudaFree(x);
    cudaFree(y);
}

int main(int argc, char **argv)
{
    struct backend be;
    struct backend_options options = {
        0, argc == 3 && strcmp(argv[1], "--device") == 0 ? atoi(argv[2]) : -1, nullptr};
    kernels_register_all();
    enum status st = backend_open(&be, "cuda", &options);
    if (st == ST_UNSUPPORTED) {
        printf("skipped: %s\n", status_message());
        return 77;
    }
    must(st == ST_OK, "open");
    /* the backend's first member is its GPU (kernels/cuda_backend.c) */
    const struct gpu *gpu = (const struct gpu *)be.impl;
    cudaStream_t stream = (cudaStream_t)gpu->stream;
    struct cudaDeviceProp prop;
    must(cudaGetDeviceProperties(&prop, gpu->device) == cudaSuccess, "properties");
    cublasHandle_t blas;
    must(cublasCreate(&blas) == CUBLAS_STATUS_SUCCESS, "cuBLAS");
    must(cublasSetStream(blas, stream) == CUBLAS_STATUS_SUCCESS, "cuBLAS");
    size_t cache = (size_t)prop.l2CacheSize;
    double copy = copy_gb_s(stream);
    printf("%s, %s, L2 %.0f MB, copy within the device %.0f GB/s (read + written)\n", gpu->name,
           gpu->arch, 1e-6 * (double)cache, copy);
    printf("groups of %d, tied levels; median of %d runs; cold: matrices in turn over %.0f MB\n",
           GROUP, (int)REPEATS, 3e-6 * (double)cache);
    printf("%15s  %-13s %9s %9s %9s %9s\n", "rows x columns", "weights", "cold us", "warm us",
           "cold GB/s", "of copy");
    const struct shape shapes[] = {{2048, 2048},  {5632, 2048},  {2048, 5632}, {4096, 4096},
                                   {11008, 4096}, {4096, 11008}, {32000, 4096}};
    for (const struct shape &s : shapes) {
        time_nested(&be, stream, s, copy, cache);
        time_cublas(blas, stream, s, copy, cache);
    }
    cublasDestroy(blas);
    backend_close(&be);
    return 0;
}
